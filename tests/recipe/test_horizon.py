"""Rates at another number of steps or batch: what curves show of it, how the band widens, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tomli
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankaware_optim import Power, RankAwareWarning, Recipe, RecipeError, Reference, calibrate
from rankaware_optim.calibration.fit import Prior
from rankaware_optim.calibration.fit._horizon_fit import horizon_of
from rankaware_optim.optimizer import effective_lr
from rankaware_optim.recipe import SLOPE_SD, Horizon
from rankaware_optim.recipe._horizon import BATCH_SD

from ..helpers.models import mlp

pytestmark = pytest.mark.filterwarnings("ignore::rankaware_optim.errors.RankAwareWarning")

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
    assert sd_of(far) == pytest.approx(math.hypot(0.2, 2 * BATCH_SD))


@pytest.mark.parametrize("where", [{"steps": 5000}, {"batch": 256}, {"steps": 20, "batch": 1}], ids=str)
def test_another_horizon_is_said_to_be_an_extrapolation(where):
    """It is flagged, its notes say so for each of the two, and it warns."""
    with pytest.warns(RankAwareWarning, match="instead of"):
        rate = recipe().at(**where)
    assert rate.extrapolated
    assert sum("an extrapolation" in note for note in rate.notes) == len(where)


def test_the_own_horizon_changes_nothing():
    """The recipe's own steps and batch, said or left out, give one rate."""
    assert recipe().at(steps=STEPS, batch=BATCH) == recipe().at()


def test_full_finetuning_takes_no_slope_that_lora_showed():
    """LoRA's slope is not full finetuning's: there the rate stays and its band widens by the prior's."""
    own, far = recipe().at(method="full"), recipe().at(method="full", steps=4 * STEPS)
    assert far.lr == own.lr
    assert sd_of(far) == pytest.approx(math.hypot(sd_of(own), 2 * SLOPE_SD))


@given(steps=st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)), rank=st.sampled_from([4, 16, 1024]))
def test_the_farther_the_steps_the_wider_the_band(steps, rank):
    """Of two horizons on either side the farther one, in octaves, has the wider band."""
    near, far = sorted(steps, key=lambda s: abs(math.log2(s / STEPS)))
    assert sd_of(recipe().at(rank, steps=near)) <= sd_of(recipe().at(rank, steps=far)) + 1e-9
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


# --- reading curves -------------------------------------------------------------------------------------------------


def trials(slope: float, steps: int = 64, offsets=(-3, -2, -1, -0.5, 0.5, 1, 2)) -> dict[str, np.ndarray]:
    """Runs at ranks 4 and 64 whose best rate so far moves by `slope` octaves for every octave of steps."""
    found: dict[str, list] = {"rank": [], "seed": [], "lr": [], "diverged": [], "curve": []}
    for rank in (4, 64):
        for seed, x in enumerate(offsets):
            ages = [math.log2(step / steps) for step in range(1, steps + 1)]
            curve = [0.3 + 0.06 * (x - slope * age) ** 2 - 0.2 * age for age in ages]
            row = (rank, seed % 2, 2.0 ** (x - 9), False, [2.3, *curve[1:]])
            for values, value in zip(found.values(), row, strict=True):
                values.append(value)
    return {key: np.array(value) for key, value in found.items()}


@pytest.mark.parametrize("slope", [-0.5, 0.0, 0.5])
def test_a_slope_in_the_curves_is_found_and_shrunk(slope):
    """The slope has the sign of the truth, is nearer to 0 than it, and its 90 % band holds the truth."""
    found = horizon_of(trials(slope), Prior())
    assert abs(found.slope - slope / 2) <= abs(slope) / 2 + 0.03
    assert abs(found.slope - slope) < 1.645 * found.slope_sd
    assert found.slope * slope > 0 or abs(found.slope) < 0.03
    assert found.slope_sd < SLOPE_SD


def test_runs_that_were_stopped_are_read_as_far_as_they_went():
    """A pruned run counts where it still ran and a diverged one as lost; neither makes the slope a NaN."""
    seen = trials(0.0)
    seen["curve"][0, 40:] = math.nan
    seen["curve"][6, 10:] = math.nan
    seen["diverged"][6] = True
    found = horizon_of(seen, Prior())
    assert abs(found.slope) < 0.1
    assert found.slope_sd < SLOPE_SD


SILENT = [
    {},
    {key: value for key, value in trials(0.5).items() if key != "curve"},
    trials(0.5, steps=9),
    {**trials(0.5), "curve": np.full((14, 64), math.nan)},
]


@pytest.mark.parametrize("seen", SILENT, ids=["nothing", "no curves", "nine steps", "no values"])
def test_without_curves_the_prior_stands(seen):
    """Sweeps without curves, very short runs and empty curves say nothing of the horizon."""
    assert horizon_of(seen, Prior()) == Horizon(0.0, SLOPE_SD)


def test_a_calibration_records_its_horizon(tmp_path):
    """What the curves showed stands in the recipe and in its file."""

    def train(trial):
        opt = trial.optimizer(mlp((trial.rank, trial.rank), seed=trial.seed))
        off = math.log2(effective_lr(opt.param_groups[0])) + 9
        for step in range(trial.steps):
            yield 1 + 0.05 * off**2 - step / trial.steps

    made = calibrate(train, torch.optim.AdamW, ranks=(4, 16), steps=40, trials=10)
    assert made.horizon != Horizon()
    assert 0 < made.horizon.slope_sd < SLOPE_SD
    assert Recipe.load(made.save(tmp_path / "r.toml")).horizon == made.horizon


# --- the file -------------------------------------------------------------------------------------------------------


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slope=st.floats(-5, 5), sd=st.floats(0, 5), steps=st.none() | st.integers(1, 10**9))
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


BAD = [(key, value) for key in ("slope", "slope_sd") for value in ("nan", "-inf", '"text"', "true", "[]")]


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
