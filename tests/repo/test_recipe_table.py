"""The README's table of recipes has the rows and columns of the tests that it comes from, and says no where they did."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from fusiontrain.testing.recipes import CAPABILITIES, RECIPES

ROOT = Path(__file__).parents[2]
PASSED = '<testcase name="test_{}[{}]"/>'


def load_script():
    spec = importlib.util.spec_from_file_location("recipe_table", Path(__file__).with_name("recipe_table.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


SCRIPT = load_script()


def test_every_recipe_has_a_test_of_every_capability():
    names = [node.name for node in ast.parse((ROOT / "tests/integration/test_recipes.py").read_text()).body if isinstance(node, ast.FunctionDef)]
    assert [name.removeprefix("test_") for name in names if name.startswith("test_")] == list(CAPABILITIES)


def test_the_readme_has_their_results():
    shown, *notes = SCRIPT.between((ROOT / "README.md").read_text(encoding="utf-8")).split("\n\n")
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert heading[1:] == list(CAPABILITIES.values()) and [row[0] for row in rows] == list(RECIPES)
    numbers = {re.fullmatch(r"\((\d+)\) \S.*", note)[1] for note in notes}
    cells = [cell for row in rows for cell in row[1:]]
    assert len(cells) == len(RECIPES) * len(CAPABILITIES)
    assert {re.fullmatch(r"no \((\d+)\)", cell)[1] for cell in cells if cell != SCRIPT.YES} == numbers


def report_of(tmp_path, changes=None):
    cases = {(recipe, capability): PASSED.format(capability, recipe) for recipe in RECIPES for capability in CAPABILITIES} | (changes or {})
    path = tmp_path / "report.xml"
    path.write_text(f"<testsuites><testsuite>{''.join(cases.values())}<testcase name='test_other'/></testsuite></testsuites>")
    return path


def test_what_is_not_so_is_shown_with_its_reason(tmp_path):
    first, *_, last = RECIPES
    told = '<testcase name="test_samples[{}]"><skipped type="pytest.xfail" message="it has\nno mouth"/></testcase>'
    broken = f'<testcase name="test_exports[{last}]"><failure message="assert 1 == 2">a long text</failure></testcase>'
    changes = {(first, "samples"): told.format(first), (last, "samples"): told.format(last), (last, "exports"): broken}
    rows, *notes = SCRIPT.table(SCRIPT.read_report(report_of(tmp_path, changes))).split("\n\n")
    assert notes == ["(1) it has no mouth", "(2) its test fails (assert 1 == 2)"]
    lines = {line.split(" | ")[0].strip("| "): line for line in rows.splitlines()[2:]}
    assert lines[first] == f"| {first} | yes | yes | no (1) | yes | yes |" and lines[last] == f"| {last} | yes | yes | no (1) | no (2) | yes |"
    assert all(line.count("yes") == len(CAPABILITIES) for name, line in lines.items() if name not in (first, last))


def test_a_report_that_lacks_a_test_makes_no_table(tmp_path):
    with pytest.raises(ValueError, match=r"no test of .*'Transfusion', 'resumes'"):
        SCRIPT.read_report(report_of(tmp_path, {("Transfusion", "resumes"): ""}))


def test_only_what_is_between_the_markers_changes():
    text = f"before\n{SCRIPT.BEGIN}\nold\n{SCRIPT.END}\nafter"
    assert SCRIPT.between(SCRIPT.put(text, "| new |")) == "| new |"
    assert SCRIPT.put(text, "old") == text
    with pytest.raises(ValueError, match="once each"):
        SCRIPT.put("no markers", "new")
