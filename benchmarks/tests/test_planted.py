"""The bugs that benchmarks/planted.py plants still have a place in the package."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1]


def test_every_bug_has_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that a planted bug replaces occurs exactly once in its file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    bugs = importlib.import_module("planted").BUGS
    assert bugs
    assert all(bug.text for bug in bugs)
