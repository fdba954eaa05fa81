"""Tests of `fit_sweep`, which fits a recipe to the user's own sweep."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rankaware_optim import (
    CalibrationError,
    MuA,
    RankAwareError,
    Recipe,
    RecipeError,
    Reference,
)
from rankaware_optim.laws import PRIOR_LAW, Law, Power, get_law
from rankaware_optim.sweeps import _fit, fit_sweep

extrapolates = pytest.mark.filterwarnings(
    "ignore::rankaware_optim.errors.RankAwareWarning"
)

PRIOR = get_law(PRIOR_LAW)
AT_16, WIDTH = -9.0, 1024.0  # log2 of the true best rate at rank 16, alpha 16
REFERENCE = Reference(16, 16.0, fan_in=WIDTH)


def alpha_of(rank: int, custom: str) -> float:
    """Return the alpha of a rank: the rank itself if `custom` is "rank", otherwise 16."""
    return float(rank if custom == "rank" else 16)


def best_of(law: Law, rank: int, custom: str = "rank") -> float:
    """Return log2 of the true best learning rate at a rank. Rank 0 is full finetuning."""
    there = Reference(method="full", fan_in=WIDTH)
    if rank:
        there = Reference(rank, alpha_of(rank, custom), fan_in=WIDTH)
    return AT_16 + math.log2(law.multiplier(there.as_factor(), REFERENCE))


def drawn(
    law: Law | None = None,
    *,
    ranks=(4, 16, 64),
    custom: str = "rank",
    offsets=(-3.2, -2.1, -1.2, -0.3, 0.6, 1.7),
    noise: float = 0.003,
    seeds: int = 2,
    cliff: float | None = None,
    draw: int = 0,
    fan_in: float | str = WIDTH,
) -> list[dict]:
    """Return a sweep whose losses are lowest at a law's learning rates, and whose runs diverge `cliff` octaves above them."""
    rng = np.random.default_rng(draw)
    rows = []
    for rank, u, seed in itertools.product(ranks, offsets, range(seeds)):
        loss = 1.0 + 0.06 * (math.exp(1.2 * u) - 1.2 * u - 1.0) + rng.normal(0, noise)
        lost = cliff is not None and u >= cliff
        row = {
            "rank": rank or "full",
            "lr": 2.0 ** (best_of(law or PRIOR, rank, custom) + u),
            "loss": "diverged" if lost else loss,
            "seed": seed,
            "alpha": alpha_of(rank, custom) if rank else "",
            "fan_in": fan_in,
            "steps": 100,
        }
        rows.append(row)
    return rows


def log2_at(recipe: Recipe, rank: int, **target) -> float:
    """Return log2 of the recipe's best learning rate at a rank, without the margin."""
    rate = recipe.at(**target) if not rank else recipe.at(rank, **target)
    return math.log2(rate.lr) + recipe.margin


# --- what a fit finds -----------------------------------------------------------------------------------------------

TRUE_LAWS = [
    (PRIOR, 0.0),
    (MuA(tokens=None), 0.0),
    (MuA(tokens=64.0), 0.0),
    (Power(exponent=0.15, law=PRIOR), 0.15),
    (Power(exponent=-0.15, law=PRIOR), -0.15),
]


@extrapolates
@pytest.mark.parametrize("custom", ["rank", "kept"])
@pytest.mark.parametrize(("law", "drift"), TRUE_LAWS, ids=lambda v: repr(v)[:44])
def test_a_sweep_drawn_from_a_law_gives_its_rates_back(law, drift, custom):
    """At every rank in the sweep and one in between, the recipe is within a quarter of an octave of the true best rate."""
    recipe = fit_sweep(drawn(law, custom=custom))
    for rank in (4, 8, 16, 64):
        at = log2_at(recipe, rank, alpha=alpha_of(rank, custom))
        assert at == pytest.approx(best_of(law, rank, custom), abs=0.25)
    if isinstance(law, Power):
        assert recipe.law.exponent == pytest.approx(drift, abs=0.06)


def test_full_rows_settle_full_finetuning():
    """Rows whose rank is "full" are runs of full finetuning, so its learning rate is no longer an extrapolation."""
    law = Power(full_factor=0.7)
    recipe = fit_sweep(drawn(law, ranks=(4, 64, 0)))
    assert recipe.full_seen
    assert log2_at(recipe, 0, method="full") == pytest.approx(best_of(law, 0), abs=0.25)
    assert not recipe.at(method="full").extrapolated


def test_the_ceiling_is_the_smallest_rate_that_diverged():
    """Diverged runs set the ceiling, and the recipe's learning rate stays below half of the ceiling at every rank."""
    recipe = fit_sweep(drawn(cliff=1.5))
    ceiling = math.log2(recipe.at(16).ceiling)
    assert ceiling == pytest.approx(best_of(PRIOR, 16) + 1.7, abs=0.01)
    assert all(recipe.at(rank).lr < recipe.at(rank).ceiling / 2 for rank in (4, 16, 64))
    assert fit_sweep(drawn()).ceiling is None


def test_a_rank_that_always_diverged_is_noted():
    """If every run of a rank diverged, a note says that its learning rate was not measured."""
    lost = [{**row, "loss": math.inf} for row in drawn(ranks=(64,))]
    notes = fit_sweep([*drawn(ranks=(4, 16)), *lost]).notes
    assert any("rank 64: every run diverged" in note for note in notes)


@pytest.mark.parametrize("ranks", [(4, 64), (16,)])
@pytest.mark.parametrize(
    ("offsets", "end"),
    [((-4.0, -3.0, -2.0, -1.0), "highest"), ((0.7, 1.5, 2.3), "lowest")],
)
def test_a_best_rate_at_an_end_of_the_grid_is_a_bound(offsets, end, ranks):
    """If the best rate of every rank is at an end of the grid, the interval widens to contain the true one, with a note."""
    inside = fit_sweep(drawn(ranks=ranks))
    recipe = fit_sweep(drawn(ranks=ranks, offsets=offsets))
    rate, own = recipe.at(), inside.at()
    rank = recipe.reference.rank
    assert rate.low < 2.0 ** best_of(PRIOR, rank) < rate.high
    assert math.log2(rate.high / rate.low) > 2 * math.log2(own.high / own.low)
    way = {"lowest": "lower", "highest": "higher"}[end]
    words = (f"is the {end} one that was tried", way)
    said = [note for note in rate.notes if all(word in note for word in words)]
    assert len(said) == len(ranks)
    assert not any("tried" in note for note in inside.notes)


def test_each_rank_at_an_end_of_the_grid_adds_its_share_of_uncertainty(monkeypatch):
    """The standard deviation that is added is an octave times the fraction of the ranks at an end of the grid."""
    half = [
        *drawn(ranks=(4,), offsets=(-4.0, -3.0, -2.0, -1.0)),
        *drawn(ranks=(64,)),
    ]
    added = fit_sweep(half).covariance[0, 0]
    monkeypatch.setattr(_fit, "_END_SD", 0.0)
    assert added - fit_sweep(half).covariance[0, 0] == pytest.approx(0.5**2)


def test_a_sweep_of_as_many_runs_as_are_allowed_is_fitted(monkeypatch):
    """A sweep with exactly the largest number of runs is fitted, and one more run is an error."""
    rows = drawn(ranks=(16,))
    monkeypatch.setattr(_fit, "MOST_TRIALS", len(rows))
    assert fit_sweep(rows).ranks == (16,)
    with pytest.raises(CalibrationError, match=f"at most {len(rows)} runs"):
        fit_sweep([*rows, {**rows[0], "seed": 99}])


def test_the_mean_over_seeds_decides_whether_the_best_rate_is_at_an_end():
    """The mean loss over seeds, not a single lucky seed, decides whether the best learning rate is at an end of the grid."""
    rows = drawn(ranks=(16,), noise=0.0, offsets=(-2, -1, 0, 1, 2))
    lucky = [{**row, "loss": row["loss"] - 0.3} for row in rows[-1:]]
    assert fit_sweep([*rows[:-1], *lucky]).notes == fit_sweep(rows).notes == ()
    falling = drawn(ranks=(16,), noise=0.0, offsets=(-4, -3, -2, -1), seeds=3)
    middle = [{**row, "loss": row["loss"] - 0.2} for row in falling[3:4]]
    notes = fit_sweep([*falling[:3], *middle, *falling[4:]]).notes
    assert any("the highest one that was tried" in note for note in notes)


def test_full_finetuning_has_the_width_of_its_own_rows():
    """The recipe takes the fan-in of full finetuning from the rows of full finetuning, unless full_fan_in= is passed."""
    lora, full = drawn(ranks=(4, 64)), drawn(ranks=(0,), fan_in=4 * WIDTH)
    recipe = fit_sweep([*lora, *full])
    assert recipe.full_fan_in == 4 * WIDTH
    assert recipe.reference.fan_in == WIDTH
    assert fit_sweep([*lora, *full], full_fan_in=2.0 * WIDTH).full_fan_in == 2 * WIDTH


# --- what the data do not determine ---------------------------------------------------------------------------------


def test_a_loss_that_hardly_moves_is_said():
    """Losses of pure noise give a wide interval and a note that the best learning rate is uncertain."""
    rng = np.random.default_rng(0)
    cells = itertools.product((4, 64), range(8, 14))
    rows = [
        {"rank": r, "alpha": r, "lr": 2.0**-x, "loss": 1 + rng.normal(0, 1e-3)}
        for r, x in cells
    ]
    recipe = fit_sweep(rows)
    assert any("the best learning rate is uncertain" in note for note in recipe.notes)
    assert recipe.at(16).high / recipe.at(16).low > 8


@extrapolates
def test_without_fan_in_only_what_depends_on_it_is_refused(tmp_path):
    """A sweep without fan_in gives the same rates at other ranks, but full finetuning and another init need fan_in=."""
    known = fit_sweep(drawn(fan_in=4096.0))
    recipe = Recipe.load(fit_sweep(drawn(fan_in="")).save(tmp_path / "r.toml"))
    assert recipe.reference.fan_in is None
    assert recipe.at(8).lr == pytest.approx(known.at(8).lr, rel=1e-9)
    for target in ({"method": "full"}, {"rank": 16, "init": "B"}):
        with pytest.raises(
            RecipeError, match=r"without the width of the model.*fan_in="
        ):
            recipe.at(**target)
        wide = recipe.at(**target, fan_in=4096.0)
        assert wide.lr == pytest.approx(known.at(**target).lr, rel=1e-9)


# --- what changes nothing -------------------------------------------------------------------------------------------


def test_repeated_rows_and_names_of_seeds_do_not_matter():
    """Repeated rows count once, and the numbers of the seeds do not matter."""
    renamed = [{**row, "seed": 100 + 7 * row["seed"]} for row in drawn()]
    recipe, other = fit_sweep(drawn()), fit_sweep([*renamed, *renamed])
    assert other.fitted_lr == recipe.fitted_lr
    assert np.array_equal(other.covariance, recipe.covariance)


def test_the_order_of_rows_decides_nothing():
    """If ranks were swept at several alphas, another rank needs an explicit alpha, whatever the order of the rows."""
    cells = itertools.product((4, 64), (8, 64))
    blocks = [
        [{**row, "alpha": alpha} for row in drawn(ranks=(rank,))]
        for rank, alpha in cells
    ]
    for order in itertools.permutations(blocks):
        recipe = fit_sweep([row for block in order for row in block])
        assert recipe.scaling_rule == "unknown"
        assert recipe.reference.alpha == 8.0
        with pytest.raises(RecipeError, match="alpha"):
            recipe.at(16)


# --- sweeps that cannot be fitted ---------------------------------------------------------------------------------


def one(**changes) -> list[dict]:
    return [{**row, **changes} for row in drawn()]


def of_both(**values) -> list[dict]:
    """Return the rows once with one value and once with another."""
    ((name, (first, second)),) = values.items()
    return [*one(**{name: first}), *one(**{name: second})]


BAD_SWEEPS = [
    (one(loss="diverged"), "All 36 runs.*diverged.*learning rates below"),
    (one(lr=1e-4), "the same learning rate 0.0001.*at least two"),
    (of_both(model=("a", "b")), "2 values of model: 'a', 'b'.*where={'model': 'b'}"),
    (of_both(batch=(8, 32)), "2 values of batch: 8.0, 32.0"),
    (of_both(init=("", "B")), "2 values of init: 'A', 'B'"),
    (of_both(steps=(8, 9)), "2 values of steps"),
    (of_both(fan_in=(8, 9)), "2 values of fan_in: 8.0, 9.0"),
    (drawn(ranks=(4, 0), fan_in=""), "LoRA and of full finetuning.*fan_in"),
    ([{**one()[0], "seed": i} for i in range(2001)], "2,001 runs.*2,000"),
]


@pytest.mark.parametrize(
    ("rows", "message"), BAD_SWEEPS, ids=[row[1][:30] for row in BAD_SWEEPS]
)
def test_a_sweep_that_says_nothing_is_refused(rows, message):
    """A sweep that cannot be fitted raises an error that says why and what to do."""
    with pytest.raises(RankAwareError, match=message):
        fit_sweep(rows)


@pytest.mark.parametrize("width", [-5.0, 0.0, math.nan, "wide"])
def test_a_width_that_cannot_be_is_refused(width):
    """Passing an impossible full_fan_in= raises an error that names this argument."""
    with pytest.raises(CalibrationError, match="full_fan_in is"):
        fit_sweep(drawn(), full_fan_in=width)
