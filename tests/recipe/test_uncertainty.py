"""Tests of a learning rate's uncertainty: the fit's standard deviation, and additions for untried configurations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rankaware_optim import (
    Constant,
    Power,
    RankAwareError,
    Recipe,
    RecipeError,
    Reference,
)
from rankaware_optim.fitting import Fit, Prior, steps_variance
from rankaware_optim.recipe import ANY_WIDTH, recipe_of
from rankaware_optim.recipe._rates import BATCH_SD, margin, spread

from ..helpers.recipes import RECIPE as CALIBRATED

pytestmark = pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")
COVARIANCE = np.array([[0.05, 0.01, -0.02], [0.01, 0.02, 0.004], [-0.02, 0.004, 0.3]])
AT_16 = Reference(16, 16.0, fan_in=256.0)
RECIPE = Recipe(
    name="r",
    fitted_lr=2e-3,
    reference=AT_16,
    law=Power(exponent=0.4, pivot=8.0),
    covariance=COVARIANCE,
    scaling_rule="fixed",
    full_fan_in=512.0,
    ranks=(4, 64),
    scatter=0.2,
)
FULL = Reference(method="full", fan_in=512.0)
B = replace(RECIPE, reference=replace(AT_16, init="B"))
TO_FULL = replace(RECIPE, law=replace(RECIPE.law, to_full=True))
CASES = [
    # recipe, target, the fit's design vector, the standard deviations that are added
    (RECIPE, AT_16, (1, 1, 0), [0.2]),
    (RECIPE, replace(AT_16, rank=4), (1, -1, 0), [0.2]),
    (RECIPE, replace(AT_16, rank=64), (1, 3, 0), [0.2]),
    (RECIPE, replace(AT_16, rank=256), (1, 5, 0), [0.2, 0.1 * 2]),
    (RECIPE, replace(AT_16, rank=1), (1, -3, 0), [0.2, 0.1 * 2]),
    (RECIPE, replace(AT_16, fan_in=2048.0), (1, 1, 0), [0.2, 0.25 * 3]),
    (RECIPE, replace(AT_16, fan_in=257.0), (1, 1, 0), [0.2]),
    (RECIPE, replace(AT_16, fan_in=262.0), (1, 1, 0), [0.2, 0.25 * math.log2(262 / 256)]),
    (RECIPE, replace(AT_16, init="B"), (1, 1, 0), [0.2, 1.0]),
    (B, AT_16, (1, 1, 0), [0.2, 1.0]),
    (B, replace(B.reference, rank=256), (1, 5, 0), [0.2, 0.1 * 2]),
    (B, replace(B.reference, rank=1), (1, -3, 0), [0.2, 0.2 * 2]),
    (replace(RECIPE, ranks=()), AT_16, (1, 1, 0), [0.2, 0.1]),
    (RECIPE, FULL, (1, 0, 1), [0.4 / 2 * 6]),
    (TO_FULL, FULL, (1, 6, 1), []),
    (replace(RECIPE, full_seen=True), FULL, (1, 0, 1), []),
    (
        replace(RECIPE, full_seen=True),
        replace(FULL, fan_in=1024.0),
        (1, 0, 1),
        [0.25],
    ),
]  # fmt: skip


def test_the_scatter_is_the_smallest_uncertainty():
    """However certain the fit is, the uncertainty of full finetuning is not below the scatter of single ranks."""
    certain = replace(RECIPE, full_seen=True, covariance=np.zeros((3, 3)))
    assert spread(certain, FULL)[0] == pytest.approx(0.2)


@pytest.mark.parametrize(("recipe", "target", "row", "added"), CASES)
def test_the_spread_is_the_fits_and_what_was_not_tried(recipe, target, row, added):
    """An untried rank adds 0.1 octaves of uncertainty per octave, an untried width 0.25 per octave, and another init 1.

    Below the ranks tried, init B adds 0.2 octaves per octave of rank.
    """
    variance = np.array(row) @ COVARIANCE @ row + sum(sd**2 for sd in added)
    sd, notes = spread(recipe, target)
    assert sd == pytest.approx(math.sqrt(variance))
    untried = len(added) - (target.method == "lora")
    assert len(notes) == (1 if recipe is TO_FULL else untried)


@pytest.mark.parametrize(("sd", "octaves"), [(0.0, 0.0), (0.2, 0.06), (1.0, 0.25)])
def test_the_margin_is_of_an_exponential_cliff_and_bounded(sd, octaves):
    """The margin is half the steepness times the variance, and at most a quarter of an octave."""
    assert margin(replace(RECIPE, steepness=3.0), sd) == pytest.approx(octaves)


def test_a_recipe_of_unknown_width_answers_as_one_of_4096():
    """A recipe without a width converts between ranks as if the width were 4096, but another init needs fan_in=."""
    lost = replace(RECIPE, reference=replace(AT_16, fan_in=None))
    wide = replace(RECIPE, reference=replace(AT_16, fan_in=4096.0))
    assert ANY_WIDTH == 4096.0
    assert lost.at(64).lr == wide.at(64).lr
    with pytest.raises(RecipeError, match=r"width of the model.*fan_in="):
        lost.at(64, init="B")


def test_a_recipe_is_made_of_a_fit():
    """`recipe_of` takes the learning rate and the ceiling from the fit at the reference's rank, and computes the margin."""
    mean = np.array([-9.0, 0.5, 0.25])
    fit = Fit(Prior(pivot=16.0, scatter=0.3), mean, COVARIANCE, 2.0, -6.0, {})
    made = recipe_of(
        fit, Constant(), Reference(64, 64.0, fan_in=256.0), name="r", ranks=(64,)
    )
    assert made.fitted_lr == 2.0**-8  # two octaves of rank at half an octave each
    assert made.ceiling == 2.0**-5
    assert made.law == Power(0.5, 2**0.25, pivot=16.0, law=Constant())
    assert (made.steepness, made.scatter) == (2.0, 0.3)
    variance = np.array([1, 2, 0]) @ COVARIANCE @ [1, 2, 0] + 0.3**2
    assert made.margin == pytest.approx(min(variance, 0.25))
    assert (
        recipe_of(replace(fit, ceiling=None), Constant(), AT_16, name="r").ceiling
        is None
    )


# --- another number of steps, another batch ---------------------------------------------

STEPS, BATCH = 100, 16.0
OF_16 = Reference(rank=16, alpha=16, fan_in=64.0, batch=BATCH)


# a recipe of 100 steps at batch 16 with a small uncertainty of its own
SURE = replace(
    CALIBRATED,
    reference=OF_16,
    law=Power(),
    covariance=np.diag([0.04, 0.0, 0.0]),
    ceiling=3e-2,
    full_seen=True,
    steps=STEPS,
)


def sd_of(rate) -> float:
    return math.log2(rate.high / rate.low) / 2 / 1.645


def test_a_batch_moves_the_rate_by_the_laws_rule():
    """With Adam, four times the batch size doubles the learning rate and adds 0.15 octaves of uncertainty per octave."""
    own, far = SURE.at(), SURE.at(batch=4 * BATCH)
    assert far.lr == pytest.approx(2 * own.lr)
    assert far.notes[0].startswith("the recipe is for batch 16, but")
    assert sd_of(far) == pytest.approx(math.hypot(0.2, 2 * BATCH_SD))


@pytest.mark.parametrize("times", [16, 1 / 16])
def test_beyond_four_times_the_batch_the_rate_stays_and_the_band_grows(times):
    """Beyond 4 times the batch size, the learning rate changes no further, the interval still widens, and a note says so."""
    tried = SURE.at(batch=BATCH * (4 if times > 1 else 1 / 4))
    far = SURE.at(batch=BATCH * times)
    assert far.lr == pytest.approx(tried.lr)
    assert sd_of(far) == pytest.approx(math.hypot(0.2, 4 * BATCH_SD))
    assert "the largest change that the rule covers" in far.notes[0]
    assert "the largest change that the rule covers" not in tried.notes[0]
    kept = replace(SURE, law=Power(law=Constant()))
    assert (
        "the largest change that the rule covers"
        not in kept.at(batch=BATCH * times).notes[0]
    )


REFUSED = [
    *({"steps": value} for value in (-5, 0, 2.5, "many", math.nan, math.inf, True)),
    *({"batch": value} for value in (-1, 0, "x", math.nan, math.inf, True)),
]


@pytest.mark.parametrize("where", REFUSED, ids=str)
def test_impossible_horizons_are_refused(where):
    """An impossible number of steps or an impossible batch size raises an error that names the argument."""
    with pytest.raises(RankAwareError, match=next(iter(where))):
        SURE.at(**where)


@pytest.mark.parametrize("what", ["steps", "batch"])
def test_a_recipe_that_does_not_know_its_own_horizon_refuses_another(what):
    """If a recipe does not know its own steps or batch size, passing this argument to `at` raises an error."""
    lost = {
        "steps": {"steps": None},
        "batch": {"reference": replace(OF_16, batch=None)},
    }
    made = replace(SURE, **lost[what])
    with pytest.raises(
        RecipeError, match=f"does not contain the {what} of its trials.*Remove {what}="
    ):
        made.at(**{what: 64})
    assert made.at().lr == SURE.lr


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("octaves", [2, -2])
def test_steps_widen_the_band(octaves, method):
    """Another number of steps changes neither the learning rate nor the ceiling, but widens the interval."""
    steps = int(STEPS * 2**octaves)
    own, far = (SURE.at(method=method, **where) for where in ({}, {"steps": steps}))
    # two octaves: 2·σ²·λ²·(2/λ + exp(−2/λ) − 1) at σ = .4 and λ = 1.5
    added = 0.16 * 4.5 * (4 / 3 + math.exp(-4 / 3) - 1)
    assert steps_variance(octaves) == pytest.approx(added)
    assert (far.lr, far.ceiling) == pytest.approx((own.lr, own.ceiling))
    assert sd_of(far) == pytest.approx(math.sqrt(sd_of(own) ** 2 + added))
