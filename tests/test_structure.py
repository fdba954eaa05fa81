"""Tests of how many names the subpackages import from each other."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import rankaware_optim

ROOT = Path(rankaware_optim.__file__).parent
MOST = 30


def names_across_borders() -> dict[str, set[str]]:
    """Return the names that are imported from each subpackage by modules outside of it."""
    crossing = defaultdict(set)
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            above = here[: len(here) - node.level + 1]
            package = (*above, *(node.module or "").split("."))[0]
            if package and (ROOT / package).is_dir() and here[:1] != (package,):
                crossing[package] |= {alias.name for alias in node.names}
    return crossing


CROSSING = names_across_borders()


@pytest.mark.parametrize("package", sorted(CROSSING))
def test_few_names_cross_a_border(package: str) -> None:
    """Modules outside a subpackage import at most 30 names from it."""
    names = sorted(CROSSING[package])
    assert len(names) <= MOST, (
        f"Other packages take {len(names)} names from {package}/, more than {MOST}: "
        f"{', '.join(names)}. Give {package}/ one name that does what several of these "
        f"are taken for, or move the caller into {package}/."
    )


def test_borders_are_seen() -> None:
    """The count includes `Law`, which the optimizer imports from the laws."""
    assert "Law" in CROSSING["laws"]
