"""The bugs that benchmarks/attacks/planted.py plants still have a place in the package."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the benchmarks are not at hand"
)


def test_every_bug_has_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that a planted bug replaces occurs exactly once in its file."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    planted = importlib.import_module("attacks.planted")
    misplaced = []
    for bug in planted.BUGS:
        times = (
            (planted.PACKAGE / bug.file).read_text(encoding="utf-8").count(bug.before)
        )
        if times != 1:
            misplaced.append(f"{bug.file} has {times} times: {bug.before}")
    assert not misplaced, "\n".join(misplaced)
