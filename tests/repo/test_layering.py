"""Who may import whom, and other rules of the house that no unit test would see."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "fusiontrain").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
TRACKED = [ROOT / name for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()]
MAX_FILE_LINES, MAX_KERNEL_FILE_LINES = 500, 700
MAX_FUNCTION_LINES, MAX_KERNEL_FUNCTION_LINES = 80, 150
TORCH_IN_DATA = {"collate.py", "loader.py", "pin.py"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_layers_and_cycles():
    """The contracts in pyproject.toml."""
    # The console script's folder is not on every path; the package has no __main__.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_small(path):
    kernel = "kernels" in path.parts
    assert len(path.read_text().splitlines()) <= (MAX_KERNEL_FILE_LINES if kernel else MAX_FILE_LINES)
    limit = MAX_KERNEL_FUNCTION_LINES if kernel else MAX_FUNCTION_LINES
    assert not [f"{node.name}: {node.end_lineno - node.lineno + 1}" for node in functions(path) if node.end_lineno - node.lineno >= limit]


def imported_modules(path: Path) -> set[str]:
    """Modules that importing this file imports; those under `if TYPE_CHECKING` and inside functions are left out."""
    found: set[str] = set()

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                visit(node.body)

    visit(ast.parse(path.read_text()).body)
    return found


def test_torch_in_the_data_package_only_where_batches_are_made():
    users = {p.name for p in (ROOT / "fusiontrain/data").rglob("*.py") if any(m.split(".")[0] == "torch" for m in imported_modules(p))}
    assert users <= TORCH_IN_DATA
    assert "collate.py" in users


@pytest.mark.parametrize("package", ["models", "objectives", "data", "generate", "config"])
def test_no_package_below_the_engine_knows_about_ranks(package):
    text = "\n".join(path.read_text() for path in (ROOT / "fusiontrain" / package).rglob("*.py"))
    assert "torch.distributed" not in text


def test_only_the_command_line_prints():
    calls = [
        f"{name_of(path)}:{node.lineno}"
        for path in SOURCES
        if "cli" not in path.parts and "benchmarks" not in path.parts
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_functions_are_annotated(path):
    missing = [
        f"{node.name}:{node.lineno}"
        for node in functions(path)
        if not node.name.startswith("_")
        and "triton.jit" not in [ast.unparse(decorator) for decorator in node.decorator_list]  # Triton knows what a pointer points to
        and (node.returns is None or any(a.annotation is None for a in node.args.args + node.args.kwonlyargs if a.arg not in ("self", "cls")))
    ]
    assert missing == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_functions_and_classes_say_what_they_do(path):
    """Module level only. A body of one or two lines may speak for itself, and so do the sections of the schema: their fields are described."""
    missing = [
        f"{node.name}:{node.lineno}"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and path.name != "schema.py"
        if node.end_lineno - node.body[0].lineno >= 2 and not ast.get_docstring(node)
    ]
    assert missing == []


def test_folders_that_must_not_be_packages():
    for folder in ("kernels", "launch", "configs", "tests", "docker"):
        assert (ROOT / folder).is_dir()
        assert not (ROOT / folder / "__init__.py").exists()


def test_the_kernels_folder_does_not_shadow_the_package_of_that_name():
    code = "import importlib.util; spec = importlib.util.find_spec('kernels'); print(spec is None or spec.origin is None)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "True", result.stderr
    assert importlib.util.find_spec("fusiontrain_kernels") is not None


def test_help_is_quick_because_it_imports_no_torch():
    code = (
        "import sys, fusiontrain.cli.main as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr


def test_no_path_of_a_machine_in_the_repository():
    places = [
        f"{name_of(path)}:{number}"
        for path in TRACKED
        if path.is_file() and path.suffix in {".py", ".md", ".yaml", ".toml", ".sh", ".sbatch", ".txt", ""}
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if re.search(r"(?<![\w.])/(work|home|root|Users)/\w", line)
    ]
    assert places == []


def test_a_failing_file_would_be_noticed(tmp_path):
    """The checks above can fail: a file that breaks them is found."""
    bad = tmp_path / "bad.py"
    bad.write_text("import torch\n\ndef public(x):\n    print(x)\n" + "    x = 1\n" * 90)
    (node,) = functions(bad)
    assert node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    assert imported_modules(bad) == {"torch"}
    assert node.returns is None
