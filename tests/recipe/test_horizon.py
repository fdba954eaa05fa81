"""Rates at another number of steps or batch: how far it moves, how the band widens, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankaware_optim import Constant, Power, RankAwareError, RecipeError, Reference
from rankaware_optim.fitting import steps_variance
from rankaware_optim.recipe._rates import BATCH_SD

from ..helpers.recipes import RECIPE

pytestmark = pytest.mark.filterwarnings(
    "ignore::rankaware_optim.errors.RankAwareWarning"
)

STEPS, BATCH = 100, 16.0
AT_16 = Reference(rank=16, alpha=16, fan_in=64.0, batch=BATCH)


# of 100 steps at batch 16, sure of all but the horizon
SURE = replace(
    RECIPE,
    reference=AT_16,
    law=Power(),
    covariance=np.diag([0.04, 0.0, 0.0]),
    ceiling=3e-2,
    full_seen=True,
    steps=STEPS,
)


def sd_of(rate) -> float:
    return math.log2(rate.high / rate.low) / 2 / 1.645


# --- extrapolating --------------------------------------------------------------------------------------------------


def test_a_batch_moves_the_rate_by_the_laws_rule():
    """Four times the batch double an Adam recipe's rate, with 0.15 octaves of doubt for each octave."""
    own, far = SURE.at(), SURE.at(batch=4 * BATCH)
    assert far.lr == pytest.approx(2 * own.lr)
    assert far.notes[0].startswith("batch 64 instead of 16: ")
    assert sd_of(far) == pytest.approx(math.hypot(0.2, 2 * BATCH_SD))


@pytest.mark.parametrize("times", [16, 1 / 16])
def test_beyond_four_times_the_batch_the_rate_stays_and_the_band_grows(times):
    """The rule was tried within a factor of 4: the rate moves as far, the doubt grows on, and the note says so."""
    tried = SURE.at(batch=BATCH * (4 if times > 1 else 1 / 4))
    far = SURE.at(batch=BATCH * times)
    assert far.lr == pytest.approx(tried.lr)
    assert sd_of(far) == pytest.approx(math.hypot(0.2, 4 * BATCH_SD))
    assert "where the move stops" in far.notes[0]
    assert "where the move stops" not in tried.notes[0]
    kept = replace(SURE, law=Power(law=Constant()))
    assert "where the move stops" not in kept.at(batch=BATCH * times).notes[0]


@given(
    what=st.sampled_from(["steps", "batch"]),
    times=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    rank=st.sampled_from([4, 16, 1024]),
)
def test_the_farther_the_horizon_the_wider_the_band(what, times, rank):
    """Of two horizons on either side the farther one, in octaves, has the wider band."""
    own = {"steps": STEPS, "batch": BATCH}[what]
    near, far = sorted(times, key=lambda s: abs(math.log2(s / own)))
    widths = [
        sd_of(SURE.at(rank, **where)) for where in ({}, {what: near}, {what: far})
    ]
    assert widths == pytest.approx(sorted(widths), abs=1e-9)


REFUSED = [
    *({"steps": value} for value in (-5, 0, 2.5, "many", math.nan, math.inf, True)),
    *({"batch": value} for value in (-1, 0, "x", math.nan, math.inf, True)),
]


@pytest.mark.parametrize("where", REFUSED, ids=str)
def test_impossible_horizons_are_refused(where):
    """Steps are positive whole numbers and a batch is a positive number."""
    with pytest.raises(RankAwareError, match=next(iter(where))):
        SURE.at(**where)


@pytest.mark.parametrize("what", ["steps", "batch"])
def test_a_recipe_that_does_not_know_its_own_horizon_refuses_another(what):
    """From unknown steps or an unknown batch nothing is extrapolated; the sentence says which is missing."""
    lost = {
        "steps": {"steps": None},
        "batch": {"reference": replace(AT_16, batch=None)},
    }
    made = replace(SURE, **lost[what])
    with pytest.raises(RecipeError, match=f"does not give its own {what}"):
        made.at(**{what: 64})
    assert made.at().lr == SURE.lr


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("octaves", [2, -2])
def test_steps_widen_the_band(octaves, method):
    """At other steps the rate and its ceiling stay, and the band is as wide as the prior of the fit says."""
    steps = int(STEPS * 2**octaves)
    own, far = (SURE.at(method=method, **where) for where in ({}, {"steps": steps}))
    # two octaves: 2·σ²·λ²·(2/λ + exp(−2/λ) − 1) at σ = .4 and λ = 1.5
    added = 0.16 * 4.5 * (4 / 3 + math.exp(-4 / 3) - 1)
    assert steps_variance(octaves) == pytest.approx(added)
    assert (far.lr, far.ceiling) == pytest.approx((own.lr, own.ceiling))
    assert sd_of(far) == pytest.approx(math.sqrt(sd_of(own) ** 2 + added))
