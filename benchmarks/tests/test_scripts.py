"""The benchmark of public scripts: patches find their lines, and a rate that is off is seen."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

click = pytest.importorskip("click")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the benchmarks are not at hand"
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("ecosystem.scripts")
    sys.modules.pop("ecosystem.scripts", None)


TEXT = "import torch\n\nopt = AdamW(params)\ntrain(opt)\n"


def test_a_patch_puts_its_lines(scripts: Any) -> None:
    """Lines are put before and after those that are found, and are counted."""
    changes = (
        scripts.before("import torch\n", scripts.IMPORT),
        scripts.after("opt = AdamW(params)\n", "opt = wrapped(opt)\n"),
    )
    found = scripts.patched(TEXT, changes)
    assert found == (
        "import rankaware_optim as ra\nimport torch\n\nopt = AdamW(params)\nopt = wrapped(opt)\ntrain(opt)\n"
    )
    assert scripts.lines_added(TEXT, found) == 2


@pytest.mark.parametrize(("line", "times"), [("opt = SGD(params)\n", 0), ("opt", 2)])
def test_a_script_that_has_changed_is_refused(
    scripts: Any, line: str, times: int
) -> None:
    """A line that is missing, or not the only one, stops the benchmark."""
    with pytest.raises(click.ClickException, match=f"has {times} times"):
        scripts.patched(TEXT, [scripts.after(line, "x\n")])


def test_every_script_adds_one_to_three_lines(scripts: Any) -> None:
    """On a text with just the lines to find, each script's changes apply, and add at most three lines."""
    for script in scripts.SCRIPTS:
        adapted = scripts.patched(
            "".join(change.find for change in script.adapters), script.adapters
        )
        finds = [change.find for change in script.ours if change.find not in adapted]
        plain = adapted + "".join(finds)
        ours = scripts.patched(plain, scripts.tuned_at("r=8", script.ours))
        assert 1 <= scripts.lines_added(plain, ours) <= 3
        assert "r=8" in ours


def done(scripts: Any, *calls: tuple[int, float, int]) -> Any:
    """A run of these steps, rates and numbers of tensors."""
    rows = [
        {"step": step, "lr": lr, "weight_decay": 0.1, "tensors": tensors}
        for step, lr, tensors in calls
    ]
    return scripts.Done(Path(), rows, "")


@pytest.mark.parametrize(
    ("calls", "error"),
    [
        (((0, 0.0, 4), (1, 0.5, 1), (1, 0.5, 3)), 0.0),
        (((0, 0.0, 4), (1, 0.5, 1), (1, 0.4, 3)), 0.2),
        (((0, 0.0, 4), (1, 0.5, 3)), math.inf),
        (((0, 0.1, 4), (1, 0.5, 4)), math.inf),
        (((1, 0.5, 4),), math.inf),
    ],
    ids=["the law's", "one is off", "a tensor less", "not zero", "a step less"],
)
def test_a_rate_that_is_off_is_seen(
    scripts: Any, calls: tuple[tuple[int, float, int], ...], error: float
) -> None:
    """At half the plain run's rate, one group or two, at every step of it."""
    plain = done(scripts, (0, 0.0, 4), (1, 1.0, 4))
    assert scripts.worst(plain, done(scripts, *calls), 0.5) == pytest.approx(error)
