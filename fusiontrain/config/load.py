"""From a YAML file and dotted overrides to a checked `Config`, and back.

OmegaConf reads and merges (`${oc.env:HOME}` and references to other keys work), pydantic checks the values strictly (a text is never
taken for a number), `validate.py` checks what needs more than one section. All problems of one kind are reported at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from fusiontrain.config.explain import explain
from fusiontrain.config.schema import Config
from fusiontrain.config.validate import Problem, cross_section_problems
from fusiontrain.utils.errors import UserError

COMMAND_LINE = "command line"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path`, with `overrides` such as `train.steps=50` or `data.sources.0.weight=2` applied.

    Nothing but the file itself is looked up on the disk; `validate.file_problems` does the rest.

    Raises UserError with one line per problem.
    """
    tree = _read(Path(path))
    written = OmegaConf.to_container(tree)
    keys = [_apply(tree, override) for override in overrides]
    blame = [*keys, *(section for key in keys for section in _sections_around(key) if not _holds(written, section))]
    try:
        values = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise UserError(f"{_origin(path, key, blame)}: {key}: {_first_line(error)}") from error
    config, problems = _check(values)
    if config is not None:
        problems = cross_section_problems(config)
    if problems or config is None:
        raise UserError("\n".join(f"{_origin(path, problem.key, blame)}: {problem}" for problem in problems))
    return config


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape(config.model_dump(mode="json"))))


def _read(path: Path) -> DictConfig:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the YAML file of a configuration")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the YAML file of a configuration")
    try:
        tree = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise UserError(f"{line}: not valid YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from error
    except OSError as error:  # OmegaConf's answer to a file that holds one number or word, and the system's to one it may not read
        reason = error.strerror or "holds a single value; expected sections such as 'model:' and 'train:'"
        raise UserError(f"{path}: {reason}") from error
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: holds a list; expected sections such as 'model:' and 'train:'")
    if not tree:
        raise UserError(f"{path}: is empty; expected sections such as 'model:' and 'train:'")
    return tree


def _apply(tree: DictConfig, override: str) -> str:
    """Writes one `key=value` into the tree and returns its key. The schema finds out later whether such a key exists."""
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise UserError(f"{COMMAND_LINE}: {override!r} is not an override; write it as section.key=value, such as train.steps=50")
    try:
        OmegaConf.update(tree, key, OmegaConf.from_dotlist([f"value={value}"])._get_node("value"), merge=False, force_add=True)
    except IndexError as error:
        raise UserError(f"{COMMAND_LINE}: {override!r} cannot be applied: the list has no such entry; give the whole list instead") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{COMMAND_LINE}: {override!r} cannot be applied: {_first_line(error)}") from error
    return key


def _check(values: Any) -> tuple[Config | None, list[Problem]]:
    # Strict JSON mode takes a list for a tuple and 3 for 3.0, but no text for a number, no true for 1 and no 2.5 for 2.
    try:
        return Config.model_validate_json(json.dumps(values), strict=True), []
    except ValidationError as error:
        details = error.errors(include_url=False)
        wrong_inside = {detail["loc"][:depth] for detail in details for depth in range(len(detail["loc"]))}
        # Pydantic does not count wrong entries of a list, and then also calls the list too short.
        problems = [explain(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in wrong_inside]
    return None, list({problem.key: problem for problem in problems[::-1]}.values())[::-1]  # each alternative of a type had its say; the first is kept


def _origin(path: str | Path, key: str, override_keys: list[str]) -> str:
    """Who is to blame for the value at `key`: an override of it, or of a section around it; else the file."""
    related = any(f"{key}.".startswith(f"{other}.") for other in override_keys)
    return COMMAND_LINE if related else str(path)


def _sections_around(key: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`."""
    parts = key.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _holds(tree: Any, key: str) -> bool:
    """Whether nested dicts and lists have something at a dotted key."""
    for part in key.split("."):
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and part.isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return False
    return True


def _escape(value: Any) -> Any:
    """Texts that hold `${` made literal for OmegaConf, which would take them for references."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match.group(1) * 2 + "\\${", value)
    return value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
