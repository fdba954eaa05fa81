"""Half a run: which runs and ranks count, and where the first trial lies."""

from __future__ import annotations

import math

import pytest
from calibration import half_run
from calibration.half_run import EIGHTH, FROM, Outcome, cells, of_length, regrets_of
from study.configurations import START
from study.grids import FULL, Job


@pytest.mark.parametrize(
    ("tuned", "rank", "near"),
    [(64, 64, True), (64, 4, True), (64, 1, False), (16, 256, True), (64, FULL, False)],
)
def test_the_goal_counts_ranks_within_a_factor_of_16(
    tuned: int, rank: int, near: bool
) -> None:
    """The rank tuned counts, and LoRA's ranks up to 16 times or a sixteenth of it."""
    of = Outcome(EIGHTH, "language", "full", tuned, 400, FROM, 4, 0, rank, 0.0)
    assert of.is_near == near


def test_a_length_has_its_own_runs_and_the_losses_before_training() -> None:
    """Runs of other lengths are left out, and a kept run has its configuration's name."""
    start, short, long = (
        Job("language", scheme, 16, -8.0, 0)
        for scheme in (START, "full | 50 steps", "full | 400 steps")
    )
    kept = of_length({start: 9.0, short: 2.0, long: 1.0}, 50)
    assert kept == {start: 9.0, short._replace(scheme="full"): 2.0}


def test_the_first_trial_has_the_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search from a guess begins at it, and one without a guess at the package's own rate."""
    tried: list[float] = []
    plain = half_run.run

    def seen(on, study, setting, x):
        tried.append(x)
        return plain(on, study, setting, x)

    monkeypatch.setattr(half_run, "run", seen)
    of = cells()[0]
    for guess in (of.best - 1.5, None):
        tried.clear()
        assert [runs for runs, _ in regrets_of(of, guess, (0, 1))] == [*half_run.RUNS]
        assert math.isclose(tried[0], of.best - 1.5) == (guess is not None)
