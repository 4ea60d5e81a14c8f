"""The choice of an implementation: by name, and never silently another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def choose(operator: str, implementations: Mapping[str, Callable[..., Any]], impl: str, auto: str) -> Callable[..., Any]:
    """The implementation called `impl`; "auto" stands for `auto`. Raises ValueError for any other name."""
    name = auto if impl == "auto" else impl
    if name not in implementations:
        raise ValueError(f"{operator}: impl={impl!r}: choose one of {', '.join(['auto', *implementations])}")
    return implementations[name]
