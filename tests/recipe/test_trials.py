"""Tests that the trials of a recipe are read back as the observations that its fit used."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rankaware_optim.fitting import Observation
from rankaware_optim.recipe._trials import (
    end_of_tried,
    knows_improvement,
    loss_curves,
    observations_of,
)
from rankaware_optim.sweeps import fit_sweep
from rankaware_optim.sweeps._read import read_sweep

from ..helpers.recipes import RECIPE


def rows(**changes) -> list[dict]:
    """Return a sweep of LoRA and full finetuning in which the runs at the highest learning rate diverged."""
    made = []
    for rank in (8, "full"):
        for x, loss in ((-11, 2.0), (-10, 1.2), (-9, 1.0), (-8, 1.4), (-5, "inf")):
            row = {"rank": rank, "alpha": 8, "lr": 2.0**x, "loss": loss, "fan_in": 64}
            made.append({**row, "seed": 3, **changes})
    return made


@pytest.mark.parametrize("start", ["", 2.5])
def test_the_runs_of_a_sweep_come_back_at_their_own_rates(start):
    """The runs of a sweep are read back from its recipe unchanged, with and without a loss before training."""
    sweep = read_sweep(rows(start=start))
    own = [run.observed_at(math.log2(run.lr)) for run in (*sweep.lora, *sweep.full)]
    assert observations_of(fit_sweep(rows(start=start))) == own


CURVES = np.full((6, 20), math.nan)
for row, (end, steps) in enumerate([(1.0, 20), (1.4, 20), (3.6, 10), (3.0, 5)]):
    CURVES[row, :steps] = np.linspace(4.0, end, steps)
CURVES[4, :20] = np.linspace(4.0, 9.0, 20)
OF_CURVES = replace(
    RECIPE,
    ranks=(4,),
    tensors={
        "rank": np.array([4, 4, 4, 4, 4, 4]),
        "seed": np.array([0, 0, 0, 0, 0, 0]),
        "lr": np.full(6, 1e-3),
        "own_lr": np.array([1e-3, 2e-3, 4e-3, 8e-3, 2e-2, math.nan]),
        "value": np.array([1.05, 1.5, math.nan, math.nan, math.inf, math.inf]),
        "diverged": np.arange(6) == 4,
        "pruned": np.array([False, False, True, True, False, False]),
        "steps": np.array([20, 20, 10, 5, 20, 0]),
        "curve": CURVES.astype(np.float32),
    },
)


def test_trials_come_back_with_what_their_curves_show():
    """An observation has the start, end and noise of its trial's loss curve, and says whether the trial returned the score."""
    whole, second, lost = observations_of(OF_CURVES)[:3]
    assert whole.rank == 4
    assert whole.x == pytest.approx(math.log2(1e-3))
    assert whole.value == 1.05
    assert (whole.start, whole.first) == (4.0, 4.0)
    assert whole.tail == pytest.approx(CURVES[0, -5:].mean(), rel=1e-6)
    assert whole.noise == pytest.approx(0.0, abs=1e-5)
    assert whole.returned  # the mean of the last five values is 1.32
    assert second.value == 1.5
    assert lost.value == math.inf
    by_training = {**OF_CURVES.tensors, "value": CURVES[:, -5:].mean(axis=1)}
    first = observations_of(replace(OF_CURVES, tensors=by_training))[0]
    assert not first.returned


def test_a_run_that_was_stopped_early_has_the_score_that_it_would_have_had():
    """A trial that was stopped after 30 % of its steps or later is scored by its distance from the best trial at that time."""
    found = observations_of(OF_CURVES)
    assert [o.x for o in found] == pytest.approx(
        [math.log2(lr) for lr in (1e-3, 2e-3, 2e-2, 4e-3)]
    )
    gap = CURVES[2, 5:10].mean() - CURVES[0, 5:10].mean()
    assert found[-1].value == pytest.approx(1.05 + gap)


def test_a_run_is_compared_with_the_best_of_its_own_seed():
    """If no trial of the same seed finished, a trial that was stopped early gets no score."""
    seeds = np.array([0, 0, 1, 1, 0, 0])
    other = replace(OF_CURVES, tensors={**OF_CURVES.tensors, "seed": seeds})
    assert len(observations_of(other)) == 3


def test_the_end_of_the_rates_tried_is_of_one_rank():
    """`end_of_tried` says for a single rank whether its best learning rate is at an end of the learning rates tried."""
    assert end_of_tried(OF_CURVES, 4) == "lowest"
    assert end_of_tried(OF_CURVES, None) == ""
    assert end_of_tried(fit_sweep(rows()), 8) == ""


def test_a_recipe_without_trials_has_no_curves():
    """A recipe without trials has no observations, no loss curves and no known improvement."""
    bare = replace(RECIPE, tensors={})
    assert observations_of(bare) == []
    assert loss_curves(bare) == {}
    assert not knows_improvement(bare)


def test_every_rank_tried_has_a_curve():
    """`loss_curves` gives a curve for every rank tried, and one for full finetuning under the key None."""
    curves = loss_curves(fit_sweep(rows(start=2.5)))
    assert {*curves} == {8, None}
    assert curves[8].tried == (-11.0, -5.0)


def test_an_observation_has_what_a_fit_needs():
    """For a run of a sweep without an initial loss, the observation uses the final loss as start, so it shows no improvement."""
    (first, *_) = observations_of(fit_sweep(rows()))
    assert first == Observation(8, 3, -11.0, 2.0, 2.0, 2.0, returned=True)
