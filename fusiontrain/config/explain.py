"""Pydantic's findings in words: what was given, what was expected, and what the nearest right key is."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fusiontrain.config.schema import Config
from fusiontrain.config.validate import Problem

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_TYPE_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def explain(detail: Mapping[str, Any]) -> Problem:
    """One entry of `ValidationError.errors()` of a `Config` as a problem."""
    location = tuple(detail["loc"])
    while len(location) > 1 and detail["type"] not in ("extra_forbidden", "missing") and _field_at(location) is None:
        location = location[:-1]  # behind the key pydantic names which alternative of its type it tried
    key = ".".join(str(part) for part in location)
    kind = detail["type"]
    if kind == "extra_forbidden":
        return Problem(key, f"unknown key; {_suggest_key(location)}")
    field = _field_at(location)
    expected = describe(field) if field else "another value"
    if kind == "missing":
        note = f" ({field.description})" if field and field.description else ""
        return Problem(key, f"is missing; expected {expected}{note}")
    near = ""
    if kind == "literal_error" and field and isinstance(detail["input"], str):
        near = _did_you_mean(detail["input"], [str(choice) for choice in _choices(field.annotation)])
    finite = " that is finite" if kind == "finite_number" else ""
    return Problem(key, f"given {given(detail['input'])}, expected {expected}{finite}{near}")


def describe(field: FieldInfo) -> str:
    """What a field takes, in words: 'a whole number >= 1 or null'."""
    bounds = [
        f"{sign} {getattr(constraint, name):g}"
        for constraint in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(constraint, name, None) is not None
    ]
    names = [_type_name(item) for item in _alternatives(field.annotation)]
    if bounds:
        names[0] += f" {' and '.join(bounds)}"
    if any(getattr(constraint, "min_length", None) for constraint in field.metadata):
        names[0] += " with at least one entry"
    return " or ".join(names)


def given(value: Any) -> str:
    """A value as its reader would name it: 'the text 'abc'', 'the list [1, 2]'."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value}"
    names: dict[type, str] = {str: "the text", list: "the list", dict: "a section with the keys"}
    shown = ", ".join(value) if isinstance(value, dict) else repr(value)
    return f"{names.get(type(value), 'the value')} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema below `prefix`, sections included; entries of lists are not."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in filter(None, map(_section, _alternatives(field.annotation))):
            yield from all_keys(section, f"{prefix}{name}.")


def _suggest_key(location: tuple[Any, ...]) -> str:
    *parents, wrong = location
    place = ".".join(str(part) for part in parents)
    prefix = f"{place}." if place else ""
    section = _model_at(tuple(parents))
    here = list(section.model_fields) if section else []
    near = difflib.get_close_matches(str(wrong), here, n=1)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    elsewhere = [key for key in all_keys() if key.rsplit(".", 1)[-1] == wrong]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"expected one of {', '.join(here)}"


def _did_you_mean(text: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(text, choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _alternatives(annotation: Any) -> list[Any]:
    """`int | None` -> [int, NoneType]; anything else alone."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _choices(annotation: Any) -> list[Any]:
    return [choice for item in _flatten(annotation) if get_origin(item) is Literal for choice in get_args(item)]


def _flatten(annotation: Any) -> Iterator[Any]:
    for item in _alternatives(annotation):
        yield item
        if get_origin(item) is tuple:
            yield from _flatten(get_args(item)[0])


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"a list, each entry {_type_name(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "a section with the keys " + ", ".join(annotation.model_fields)
    return _TYPE_NAMES.get(annotation, str(annotation))


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _model_at(location: tuple[Any, ...]) -> type[BaseModel] | None:
    """The section that `location` points to; list positions lead to the section of the list's entries."""
    if not location:
        return Config
    field = _field_at(location)
    candidates = [] if field is None else list(_flatten(field.annotation))
    return next((model for model in map(_section, candidates) if model), None)


def _field_at(location: tuple[Any, ...]) -> FieldInfo | None:
    """The field that `location` points to; for a position in a list, the field of one entry."""
    *parents, last = location
    if isinstance(last, int):
        field = _field_at(tuple(parents))
        entries = get_args(field.annotation) if field else ()
        return FieldInfo(annotation=entries[last] if Ellipsis not in entries and last < len(entries) else entries[0]) if entries else None
    section = _model_at(tuple(parents))
    return section.model_fields.get(str(last)) if section else None
