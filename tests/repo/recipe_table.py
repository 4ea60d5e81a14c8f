"""Writes the README's table of recipes: what each was seen to do by its tests, from the report that pytest leaves with --junitxml.

    python tests/repo/recipe_table.py runs/recipes.xml README.md        # `make recipes` runs the tests first
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from fusiontrain.testing.recipes import CAPABILITIES, RECIPES

BEGIN, END = "<!-- recipes: `make recipes` writes this -->", "<!-- recipes: end -->"
YES = "yes"

Results = Mapping[tuple[str, str], str | None]
"""(recipe, capability) -> why not, or None where its test passed."""


def read_report(path: Path) -> Results:
    """The results in a report. Raises ValueError where a recipe lacks the test of a capability, or has one twice."""
    found: dict[tuple[str, str], str | None] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        match = re.fullmatch(r"test_(\w+)\[(.+)\]", case.get("name", ""))
        if match is None or match[1] not in CAPABILITIES:
            continue
        pair = match[2], match[1]
        if pair in found:
            raise ValueError(f"{path}: two tests of {pair}")
        found[pair] = _why_not(case)
    wanted = {(recipe, capability) for recipe in RECIPES for capability in CAPABILITIES}
    if found.keys() != wanted:
        raise ValueError(f"{path}: no test of {sorted(wanted - found.keys())}, and no such recipe or capability as {sorted(found.keys() - wanted)}")
    return found


def _why_not(case: ElementTree.Element) -> str | None:
    """Of a test that was expected to fail, its reason."""
    for kind in ("error", "failure", "skipped"):
        for child in case.iter(kind):
            message = " ".join(child.get("message", "").split())
            return message if kind == "skipped" else f"its test fails ({message})"
    return None


def table(results: Results) -> str:
    """Markdown: a row per recipe, a column per capability, and the reasons of what is not so below."""
    reasons: list[str] = []
    lines = [f"| recipe | {' | '.join(CAPABILITIES.values())} |", "|---" * (len(CAPABILITIES) + 1) + "|"]
    for recipe in RECIPES:
        cells = []
        for capability in CAPABILITIES:
            reason = results[recipe, capability]
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append(YES if reason is None else f"no ({reasons.index(reason) + 1})")
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n({number}) {reason}" for number, reason in enumerate(reasons, 1))])


def between(text: str) -> str:
    """What stands between the two markers of a text. Raises ValueError unless each is there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected {BEGIN} and {END} once each")
    return text.partition(BEGIN)[2].partition(END)[0].strip()


def put(text: str, new: str) -> str:
    """A text with `new` between its markers."""
    between(text)
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    report, readme = map(Path, sys.argv[1:])
    readme.write_text(put(readme.read_text(encoding="utf-8"), table(read_report(report))), encoding="utf-8")
