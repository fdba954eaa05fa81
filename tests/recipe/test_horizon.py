"""Rates at another number of steps or batch: how far it moves, how the band widens, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankaware_optim import Power, RankAwareWarning, Recipe, RecipeError, Reference
from rankaware_optim.fitting import carry_of
from rankaware_optim.recipe import SLOPE_SD, Horizon
from rankaware_optim.recipe._horizon import BATCH_SD

from ..helpers.calibrations import calibrate, made_up

pytestmark = pytest.mark.filterwarnings(
    "ignore::rankaware_optim.errors.RankAwareWarning"
)

STEPS, BATCH = 100, 16.0
AT_16 = Reference(rank=16, alpha=16, fan_in=64.0)


def recipe(**changes) -> Recipe:
    """A recipe of 100 steps at batch 16, sure of all but the horizon."""
    values = {
        "name": "digits",
        "fitted_lr": 2e-3,
        "reference": AT_16,
        "law": Power(),
        "covariance": np.diag([0.04, 0.0, 0.0]),
        "ceiling": 3e-2,
        "scaling_rule": "fixed",
        "ranks": (4, 64),
        "full_seen": True,
        "full_fan_in": 64.0,
        "steps": STEPS,
        "batch": BATCH,
        "horizon": Horizon(0.25, 0.1),
    }
    return Recipe(**{**values, **changes})


def sd_of(rate) -> float:
    return math.log2(rate.high / rate.low) / 2 / 1.645


# --- extrapolating --------------------------------------------------------------------------------------------------


def test_steps_move_the_rate_by_the_slope():
    """Sixteen times the steps at a slope of a quarter double the rate, its band's middle and its ceiling."""
    own, far = recipe().at(), recipe().at(steps=16 * STEPS)
    assert (far.lr, far.ceiling) == pytest.approx((2 * own.lr, 2 * own.ceiling))
    assert sd_of(far) == pytest.approx(math.hypot(0.2, 4 * 0.1))


def test_a_batch_moves_the_rate_by_the_laws_rule():
    """Four times the batch double an Adam recipe's rate, with 0.15 octaves of doubt for each octave."""
    own, far = recipe().at(), recipe().at(batch=4 * BATCH)
    assert far.lr == pytest.approx(2 * own.lr)
    assert far.notes[0].startswith("batch 64 instead of 16: ")
    assert sd_of(far) == pytest.approx(math.hypot(0.2, 2 * BATCH_SD))


@pytest.mark.parametrize(
    "where", [{"steps": 5000}, {"batch": 256}, {"steps": 20, "batch": 1}], ids=str
)
def test_another_horizon_is_said_to_be_an_extrapolation(where):
    """It is flagged, its notes say so for each of the two, and it warns."""
    with pytest.warns(RankAwareWarning, match="instead of"):
        rate = recipe().at(**where)
    assert rate.extrapolated
    assert sum("an extrapolation" in note for note in rate.notes) == len(where)


def test_the_own_horizon_changes_nothing():
    """The recipe's own steps and batch, said or left out, give one rate."""
    assert recipe().at(steps=STEPS, batch=BATCH) == recipe().at()


@pytest.mark.parametrize("init", ["A", "B"])
def test_full_finetuning_moves_with_steps_as_the_prior_says(init):
    """The rate of full finetuning moves by LoRA's slope and by what full finetuning's prior is more."""
    made = recipe(reference=replace(AT_16, init=init))
    own, far = made.at(method="full"), made.at(method="full", steps=4 * STEPS)
    more = carry_of(made.reference, 0.0).full
    slope = made.horizon.slope + more.mean
    sd = math.hypot(made.horizon.slope_sd, more.sd)
    assert math.log2(far.lr / own.lr) == pytest.approx(2 * slope)
    assert sd_of(far) == pytest.approx(math.hypot(sd_of(own), 2 * sd))


def test_a_longer_target_is_the_same_in_a_search_and_in_a_recipe():
    """A fit that is carried to more steps and a recipe asked for them move full finetuning alike."""
    made = recipe(horizon=Horizon(carry_of(AT_16, 0.0).lora.mean))
    carry = carry_of(AT_16, 2.0)
    octaves = carry.of(carry.lora)[0] + carry.of(carry.full)[0]
    own, far = made.at(method="full"), made.at(method="full", steps=4 * STEPS)
    assert math.log2(far.lr / own.lr) == pytest.approx(octaves)


@given(
    steps=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)),
    rank=st.sampled_from([4, 16, 1024]),
)
def test_the_farther_the_steps_the_wider_the_band(steps, rank):
    """Of two horizons on either side the farther one, in octaves, has the wider band."""
    near, far = sorted(steps, key=lambda s: abs(math.log2(s / STEPS)))
    assert (
        sd_of(recipe().at(rank, steps=near))
        <= sd_of(recipe().at(rank, steps=far)) + 1e-9
    )
    assert sd_of(recipe().at(rank)) <= sd_of(recipe().at(rank, steps=near)) + 1e-9


@given(batch=st.tuples(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9)))
def test_the_farther_the_batch_the_wider_the_band(batch):
    """The same for batches."""
    near, far = sorted(batch, key=lambda b: abs(math.log2(b / BATCH)))
    assert sd_of(recipe().at(batch=near)) <= sd_of(recipe().at(batch=far)) + 1e-9


REFUSED = [
    *({"steps": value} for value in (-5, 0, 2.5, "many", math.nan, math.inf, True)),
    *({"batch": value} for value in (-1, 0, "x", math.nan, math.inf, True)),
]


@pytest.mark.parametrize("where", REFUSED, ids=str)
def test_impossible_horizons_are_refused(where):
    """Steps are positive whole numbers and a batch is a positive number."""
    with pytest.raises(RecipeError, match=next(iter(where))):
        recipe().at(**where)


@pytest.mark.parametrize("what", ["steps", "batch"])
def test_a_recipe_that_does_not_know_its_own_horizon_refuses_another(what):
    """From unknown steps or an unknown batch nothing is extrapolated; the sentence says which is missing."""
    with pytest.raises(RecipeError, match=f"does not give its own {what}"):
        recipe(**{what: None}).at(**{what: 64})
    assert recipe(**{what: None}).at().lr == recipe().lr


@pytest.mark.parametrize(
    ("ranks", "init", "slope"),
    [((4, 16), "A", 0.0), ((4, 16), "B", 0.15), ((None,), "A", 0.3)],
    ids=str,
)
def test_a_calibrated_recipe_moves_by_the_slope_of_other_tasks(ranks, init, slope):
    """One length tells nothing of another: from Init[A] the rate stays, at Init[B] and in full finetuning it rises."""
    made = calibrate(made_up(init=init), ranks=ranks, trials=8)
    method = {"method": "full"} if ranks == (None,) else {}
    own, far = (made.at(**method, **where) for where in ({}, {"steps": 4 * made.steps}))
    assert math.log2(far.low * far.high / (own.low * own.high)) / 2 == pytest.approx(
        2 * slope
    )
    assert sd_of(far) == pytest.approx(math.hypot(sd_of(own), 2 * 0.25))


# --- the file -------------------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slope=st.floats(-5, 5), sd=st.floats(0, 5), steps=st.none() | st.integers(1, 10**9)
)
def test_a_horizon_survives_the_file(slope, sd, steps, tmp_path):
    """Slope and deviation come back bit for bit."""
    made = recipe(horizon=Horizon(slope, sd), steps=steps)
    loaded = Recipe.load(made.save(tmp_path / "r.toml"))
    assert (loaded.horizon, loaded.steps) == (made.horizon, made.steps)


def with_line(path, key: str, value: str | None) -> None:
    """Replace a line of [horizon], or take it out."""
    lines = path.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{key} ="))
    lines[at : at + 1] = [] if value is None else [f"{key} = {value}"]
    path.write_text("\n".join(lines) + "\n")


BAD = [
    (key, value)
    for key in ("slope", "slope_sd")
    for value in ("nan", "-inf", '"text"', "true", "[]")
]


@pytest.mark.parametrize(("key", "value"), [*BAD, ("slope_sd", "-0.1")])
def test_a_horizon_that_cannot_be_is_refused(key, value, tmp_path):
    """Text, NaN, infinity and a negative deviation are errors that name their place."""
    path = recipe().save(tmp_path / "r.toml")
    with_line(path, key, value)
    with pytest.raises(RecipeError, match=rf"@ horizon\.{key}$|@ horizon\.{key} "):
        Recipe.load(path)


def test_a_recipe_from_before_horizons_has_the_prior(tmp_path):
    """A file without slopes loads, and its schema is the same."""
    path = recipe().save(tmp_path / "r.toml")
    for key in ("slope", "slope_sd"):
        with_line(path, key, None)
    assert "slope" not in tomli.loads(path.read_text())["horizon"]
    assert Recipe.load(path).horizon == Horizon(0.0, SLOPE_SD)
