"""Tests of `Recipe.judge`: how far a learning rate is from the best one, and the share of improvement that it loses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rankaware_optim import RankAwareError, Recipe, RecipeError
from rankaware_optim.fitting import curves_of
from rankaware_optim.recipe import Judgement
from rankaware_optim.recipe._trials import observations_of
from rankaware_optim.sweeps import fit_sweep

SHIPPED = Path(__file__).parents[2] / "recipes"
pytestmark = pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")
BEST, START = -9.0, 4.0  # log2 of the best learning rate, and the loss before training


def loss_at(x: float) -> float:
    """Return the loss at `x`, log2 of the learning rate: 1 at the best one, and close to 4 far away from it."""
    return START - 3.0 / (1.0 + 0.15 * (x - BEST) ** 2)


def sweep(start: float | None = START, **changes) -> list[dict]:
    """Return runs at rank 16 whose learning rates are a factor of 2 apart."""
    return [
        {
            "rank": 16,
            "alpha": 16,
            "lr": 2.0**x,
            "loss": loss_at(x),
            "start": start,
            **changes,
        }
        for x in np.arange(BEST - 3, BEST + 3)
    ]


RECIPE = fit_sweep(sweep())


@pytest.mark.parametrize("octaves", [-3, -2, -1, 0, 1, 2])
def test_the_share_that_is_lost_is_read_off_the_curve(octaves):
    """Among the learning rates tried, the estimated share of improvement that is lost is within 0.1 of the true share."""
    judged = RECIPE.judge(2.0 ** (BEST + octaves))
    truth = (loss_at(BEST + octaves) - 1.0) / (START - 1.0)
    assert judged.lost == pytest.approx(truth, abs=0.1)
    assert judged.factor == pytest.approx(2.0 ** (BEST + octaves) / RECIPE.lr)
    low, high = RECIPE.at().low, RECIPE.at().high
    assert judged.inside == (low <= judged.lr <= high)


@pytest.mark.parametrize("octaves", [-9, 4])
def test_beyond_the_curve_there_is_a_factor_and_no_share(octaves):
    """Far below the learning rates tried, and above the highest of them, `judge` gives the factor but no lost share."""
    judged = RECIPE.judge(2.0 ** (BEST + octaves))
    assert judged.lost is None
    assert "%" not in judged.verdict("It")
    assert f"too {'low' if octaves < 0 else 'high'}" in str(judged)


OTHER_SCORES = [
    replace(RECIPE, score="reward"),
    replace(RECIPE, score="own"),
    fit_sweep(sweep(start=None)),
    replace(RECIPE, tensors={}),
]


@pytest.mark.parametrize("recipe", OTHER_SCORES, ids=["reward", "own", "sweep", "none"])
def test_without_losses_before_and_after_there_is_no_share(recipe):
    """With rewards, custom scores, a sweep without initial losses, or no trials, `judge` gives no lost share."""
    judged = recipe.judge(2.0 ** (BEST - 2))
    assert judged.lost is None
    assert 3 < 1 / judged.factor < 5


def test_another_configuration_is_judged_by_its_own_best():
    """At another rank, the factor and the lost share are relative to the best learning rate for that rank."""
    there = RECIPE.at(64, alpha=16)
    judged = RECIPE.judge(there.lr / 4, 64, alpha=16)
    assert judged.factor == pytest.approx(0.25)
    assert judged.lost == pytest.approx(RECIPE.judge(RECIPE.lr / 4).lost)
    wide = replace(
        RECIPE, full_fan_in=64.0, reference=replace(RECIPE.reference, fan_in=64.0)
    )
    # the sweep has no run of full finetuning
    assert wide.judge(1e-4, method="full").lost is None


def test_a_recipe_that_follows_no_curve_gives_no_share():
    """If the recipe's learning rate is far from the best one of its trials, `judge` gives no lost share."""
    suggested = replace(RECIPE, fitted_lr=RECIPE.fitted_lr * 8)
    assert suggested.judge(2.0**BEST).lost is None


def test_above_the_ceiling_a_run_may_diverge():
    """At or above the ceiling, the judgement says that a run may diverge, as one did at the ceiling."""
    lost = {**sweep()[0], "lr": 2.0 ** (BEST + 4), "loss": "diverged"}
    recipe = fit_sweep([*sweep(), lost])
    assert f"diverge, as one did at {recipe.ceiling:.3g}" in str(recipe.judge(1.0))
    assert "diverge" in str(recipe.judge(recipe.ceiling))
    assert "diverge" not in str(recipe.judge(recipe.ceiling * 0.99))


def test_a_sentence_says_factor_share_and_interval():
    """The text of a judgement has the factor in two digits, the lost share, and the best learning rate with its interval."""
    rate = RECIPE.at()
    text = str(Judgement(rate.lr / 48.4, rate, lost=0.61))
    for words in ("48 times too low", "61 %", f"{rate.lr:.3g}", rate.band):
        assert words in text
    assert "as good as" in str(RECIPE.judge(RECIPE.lr))
    assert "1 %" in str(Judgement(rate.lr / 48.4, rate, lost=0.0099))
    assert "less than" not in str(Judgement(rate.lr / 48.4, rate, lost=0.011))
    inside = str(RECIPE.judge(RECIPE.at().high * 0.999))
    assert "in its 90 % interval" in inside


def test_full_finetuning_alone_is_judged_as_such():
    """A recipe that has only runs of full finetuning judges learning rates for full finetuning."""
    rows = sweep(rank="full", alpha="", fan_in=64)
    recipe = fit_sweep(rows)
    assert recipe.judge(recipe.lr / 4).factor == pytest.approx(0.25)


@pytest.mark.parametrize("lr", [0, -1e-4, math.nan, math.inf, "2e-4", None, True])
def test_what_is_no_learning_rate_is_refused(lr):
    """Judging a learning rate that is not a positive finite number raises an error."""
    with pytest.raises(RecipeError, match="learning rate to judge must be"):
        RECIPE.judge(lr)


def test_a_run_that_was_left_out_is_estimated():
    """In 90 % of cases, the loss at the lowest learning rate is estimated from the other runs to within 15 % of the gain."""
    errors = []
    for path in sorted(SHIPPED.glob("*[ab].toml")):
        recipe = Recipe.load(path)
        if recipe.score != "loss":
            continue
        seen = observations_of(recipe)
        for rank in {o.rank for o in seen}:
            own = sorted((o for o in seen if o.rank == rank), key=lambda o: o.x)
            finite = [o for o in own if math.isfinite(o.value)]
            if len(finite) < 4:
                continue
            lowest, best = finite[0], min(o.value for o in finite)
            curve = curves_of([o for o in seen if o is not lowest])[rank]
            lost = curve.lost_at(lowest.x)
            if lost is not None:
                errors.append(abs(lost - (lowest.value - best) / curve.gain))
    assert len(errors) > 10
    assert np.mean(errors) < 0.08
    assert np.quantile(errors, 0.9) < 0.15


def test_judging_leaves_random_states_alone():
    """Judging twice gives the same result and leaves NumPy's global random state unchanged."""
    before = np.random.get_state()[1].copy()
    first, second = (RECIPE.judge(1e-3).lost for _ in range(2))
    assert first == second
    assert np.array_equal(before, np.random.get_state()[1])


def test_errors_are_ours():
    """Judging at an impossible rank raises an error of this package."""
    with pytest.raises(RankAwareError):
        RECIPE.judge(1e-3, rank=0, alpha=1)
