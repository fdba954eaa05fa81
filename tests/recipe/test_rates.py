"""Tests of `Recipe.at`: its learning rates, their extrapolation, and the tag that identifies a recipe."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rankaware_optim as ra
from rankaware_optim import (
    Constant,
    MuA,
    Power,
    RankAwareError,
    RankAwareOptimizer,
    RankAwareWarning,
    Recipe,
    RecipeError,
    Reference,
)

from ..helpers.models import mlp
from ..helpers.recipes import RECIPE as CALIBRATED

WIDTH = 16  # the width of models.mlp
AT_16 = Reference(rank=16, alpha=32, fan_in=WIDTH, batch=16.0)
extrapolates = pytest.mark.filterwarnings(
    "ignore::rankaware_optim.errors.RankAwareWarning"
)


RECIPE = replace(
    CALIBRATED,
    reference=AT_16,
    law=Power(exponent=0.1, full_factor=1.5),
    margin=0.25,
    ceiling=3e-2,
    full_fan_in=float(WIDTH),
    settings={"weight_decay": 0.01, "betas": (0.9, 0.999), "foreach": True},
    steps=100,
    warmup=0.05,
    other_rates={"head.weight": "base", "head.bias": "base"},
    versions={"torch": "2.6"},
)


def recipe(**changes) -> Recipe:
    """Return the recipe of a calibration at ranks 4 and 64, with some fields changed."""
    return replace(RECIPE, **changes)


# --- rates ----------------------------------------------------------------------------------------------------------


def test_the_reference_gets_the_base_rate():
    """At the reference configuration, `at` gives exactly the recipe's own learning rate and ceiling."""
    assert RECIPE.at() == RECIPE.at(rank=16) == RECIPE.at(rank=16, alpha=32)
    assert (RECIPE.at().lr, RECIPE.at().ceiling) == (RECIPE.lr, RECIPE.ceiling)
    assert RECIPE.lr == RECIPE.fitted_lr * 2**-0.25


@pytest.mark.parametrize(
    "beside", [{"rank": 8}, {"alpha": 8}, {"init": "A"}, {"rslora": True}], ids=str
)
def test_full_finetuning_has_no_rank(beside):
    """Passing a rank, alpha, init or rslora together with method="full" raises an error."""
    with pytest.raises(RecipeError, match="Full finetuning has no rank"):
        RECIPE.at(method="full", **beside)


OF_NAN = {"tensors": {"value": np.array([1.0, math.nan])}}
LAW = RECIPE.law
DECISIVE = [
    {"fitted_lr": 1e-3},
    {"margin": 0.0},
    *(
        {"reference": replace(AT_16, **change)}
        for change in (
            {"rank": 8},
            {"alpha": 16},
            {"init": "B"},
            {"fan_in": 32},
            {"batch": 8},
        )
    ),
    {"reference": Reference(method="full", fan_in=WIDTH)},
    {"law": replace(LAW, exponent=0.2)},
    {"law": replace(LAW, law=MuA(tokens=4))},
    {"law": replace(LAW, law=Constant())},
    {"scaling_rule": "alpha"},
]
BESIDE = [
    {"name": "other"},
    {"versions": {}},
    {"tensors": {}},
    OF_NAN,
    {"steps": 7},
    {"notes": ("a",)},
    {"ceiling": None},
    {"covariance": np.eye(3)},
]


def hashed(made: Recipe) -> str:
    return made.tag.partition(" ")[0]


def test_the_hash_is_of_what_decides_the_rates():
    """The tag's hash depends on the learning rate, reference, law and scaling rule, but not on the name or the trials."""
    others = {hashed(recipe(**change)) for change in DECISIVE}
    assert len(others - {hashed(RECIPE)}) == len(DECISIVE)
    assert {hashed(recipe(**change)) for change in BESIDE} == {hashed(RECIPE)}
    assert re.fullmatch(r"[0-9a-f]{12} two words\n", recipe(name="two words\n").tag)


@pytest.mark.parametrize(("inside", "outside"), [(4, 2), (4, 1), (64, 128), (64, 4096)])
def test_outside_the_band_is_wider_and_flagged(inside, outside):
    """At a rank outside the range tried, `at` warns, adds a note, widens the interval and marks the rate as extrapolated."""
    made = recipe(law=Power(), covariance=np.diag([0.04, 0.0, 0.0]))
    near = made.at(rank=inside)
    with pytest.warns(RankAwareWarning, match=f"rank {outside} is outside"):
        far = made.at(rank=outside)
    assert far.extrapolated
    assert any(
        "outside the range of the ranks tried (4, 64)" in note for note in far.notes
    )
    assert far.high / far.low > near.high / near.low


@pytest.mark.parametrize("target", [{"rank": 64}, {"rank": 4, "alpha": 16}])
def test_the_ceiling_moves_with_the_best_rate(target):
    """The ratio of the ceiling to the learning rate is the same at every configuration."""
    made = recipe(covariance=np.zeros((3, 3)))
    own, there = made.at(), made.at(**target)
    assert there.lr != own.lr
    assert there.ceiling / there.lr == pytest.approx(own.ceiling / own.lr, rel=1e-9)


@extrapolates
def test_a_recipe_without_full_runs_says_what_they_would_settle():
    """If full finetuning was not tried, its first note recommends full_trials=3, and it has no ceiling."""
    rate = RECIPE.at(method="full")
    assert rate.ceiling is None
    assert "full_trials=3" in rate.notes[0]
    tried = recipe(full_seen=True).at(method="full")
    assert tried.ceiling is not None
    assert not tried.extrapolated


RULES = {
    "fixed": {4: 2.0, 64: 2.0},
    "rslora": {4: 4.0, 64: 1.0},
    "alpha": {4: 8.0, 64: 0.5},
}


@pytest.mark.parametrize("rule", RULES)
def test_alpha_left_out_follows_the_rule(rule):
    """If no alpha is passed, `at` uses the alpha that follows from the scaling rule of the trials."""
    made = recipe(scaling_rule=rule)
    for rank, scaling in RULES[rule].items():
        given = made.at(rank=rank, alpha=scaling * rank)
        assert made.at(rank=rank).lr == pytest.approx(given.lr, rel=1e-12)
    assert made.at(rank=64, alpha=16, rslora=True) == made.at(rank=64, alpha=128)


def test_an_unknown_rule_asks_for_alpha():
    """If the trials' alphas follow no known rule, `at` needs an alpha for every rank except the reference's."""
    made = recipe(scaling_rule="unknown")
    with pytest.raises(RecipeError, match=r"rank 8.*alpha.*at\(rank=8, alpha="):
        made.at(rank=8)
    with pytest.raises(RecipeError, match=r"rslora=True.*without alpha"):
        made.at(rank=8, rslora=True)
    assert made.at(rank=16) == made.at()
    assert made.at(rank=8, alpha=16).lr == RECIPE.at(rank=8).lr


@extrapolates
@pytest.mark.parametrize("rslora", [False, True])
def test_after_a_search_at_one_rank_the_error_names_two_calls_that_work(rslora):
    """The error for another rank shows two calls that work: one with alpha proportional to the rank, one with alpha fixed."""
    reference = replace(AT_16, rslora=rslora)
    made = recipe(scaling_rule="unknown", ranks=(16,), reference=reference)
    with pytest.raises(RecipeError, match="only rank 16 was tried") as caught:
        made.at(rank=64)
    calls = re.findall(r"at\([^)]*\)", caught.value.cure)
    rates = [eval(f"made.{call}", {"made": made}) for call in calls]
    asked = [made.at(64, alpha=alpha, rslora=rslora) for alpha in (128.0, 32.0)]
    assert rates == asked


IMPOSSIBLE = [
    *({"rank": rank} for rank in (0, -4, 1.5, "16", math.nan, True)),
    {"rank": 0, "alpha": 1.0},
    *({"rank": 8, "alpha": alpha} for alpha in (0, -1.0, math.nan)),
    {"rank": 8, "init": "C"},
    *({"rank": 8, "fan_in": width} for width in (0, -1.0, math.inf)),
    *({"method": "full", "fan_in": width} for width in (0, -1.0)),
    {"method": "Full"},
    {"method": None},
]


@pytest.mark.parametrize("target", IMPOSSIBLE, ids=str)
def test_impossible_targets_are_refused(target):
    """An impossible rank, alpha, init, width or method raises an error of this package."""
    with pytest.raises(RankAwareError):
        recipe(full_seen=True).at(**target)


FULL = Reference(method="full", fan_in=WIDTH)


def test_a_recipe_of_full_finetuning_alone_asks_for_rank_and_alpha():
    """A recipe of full finetuning alone gives a LoRA learning rate only if both rank and alpha are passed."""
    made = recipe(reference=FULL, ranks=(), full_seen=True, scaling_rule="unknown")
    assert made.at(method="full").lr == made.lr
    with pytest.raises(RecipeError, match=r"at\(method='full'\)"):
        made.at()
    with pytest.raises(RecipeError, match=r"at\(rank=8, alpha="):
        made.at(rank=8)
    with pytest.warns(RankAwareWarning, match="outside"):
        assert made.at(rank=8, alpha=8).extrapolated


widths = {"fan_in": st.sampled_from([1e-9, 1e12])}
lora = st.fixed_dictionaries(
    {},
    optional={
        **widths,
        "rank": st.sampled_from([1, 64, 2**31 - 1]),
        "alpha": st.sampled_from([1e-12, 1.0, 1e12]),
        "steps": st.sampled_from([1, 10**15]),
        "batch": st.sampled_from([1e-9, 1e15]),
    },
)
full = st.fixed_dictionaries({"method": st.just("full")}, optional=widths)


@extrapolates
@settings(deadline=None, max_examples=200)
@given(
    exponent=st.sampled_from([-10, 10.0]) | st.floats(-10, 10),
    lr=st.sampled_from([1e-30, 1e6]),
    variance=st.floats(0, 1e4),
    fan_in=st.sampled_from([None, 1e-9, 1.0, 1e12]),
    target=lora | full,
)
def test_a_rate_is_positive_and_finite_or_an_error(
    exponent, lr, variance, fan_in, target
):
    """At the ends of all allowed ranges, `at` gives positive finite numbers or raises an error of this package."""
    made = recipe(
        fitted_lr=lr,
        margin=0.0,
        ceiling=lr,
        law=Power(exponent=exponent, pivot=1e-9, law=MuA(tokens=None)),
        covariance=np.eye(3) * variance,
        reference=replace(AT_16, fan_in=fan_in),
    )
    try:
        rate = made.at(**target)
    except RankAwareError:
        return
    assert 0 < rate.low <= rate.lr <= rate.high < math.inf
    assert 0 < (rate.ceiling or rate.lr) < math.inf


# --- with the optimizer ---------------------------------------------------------------------------------------------


def whole(width: int = WIDTH) -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Linear(width, 3))


AT_B = replace(AT_16, init="B")
WIDE = {"fan_in": 2.0 * WIDTH}
MODELS = [
    # the recipe's reference, a model whose layers are all alike, and the model's configuration
    (AT_16, lambda: mlp((4, 4), scalings=2.0), {"rank": 4}),
    (AT_16, lambda: mlp((8, 8), scalings=0.5), {"rank": 8, "alpha": 4.0}),
    (AT_16, lambda: mlp((64, 64), scalings=1.0), {"rank": 64, "alpha": 64.0}),
    (AT_16, lambda: mlp((16,), scalings=2.0, width=2 * WIDTH), WIDE),
    (AT_B, lambda: mlp((8, 8), scalings=0.5, init="B"), {"rank": 8, "alpha": 4.0}),
    (AT_16, whole, {"method": "full"}),
    (AT_16, lambda: whole(2 * WIDTH), {"method": "full", **WIDE}),
    (AT_B, whole, {"method": "full"}),
    (FULL, whole, {"method": "full"}),
]
LAWS = [
    *(Power(0.1, 1.5), Power(-0.4, 1.5, to_full=True), Power(law=Constant())),
    Power(-0.4, law=MuA(tokens=None)),
]


@extrapolates
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("reference", "model", "asked"), MODELS)
@pytest.mark.parametrize("steepness", [0.0, 3.0])
def test_the_optimizer_uses_the_rate_that_is_quoted(
    steepness, reference, model, asked, law
):
    """A model trains at the learning rate that `Recipe.at` gives for its configuration, and the report shows the interval."""
    own = {"law": law, "reference": reference, "steepness": steepness}
    made = recipe(full_seen=True, margin=0.0, **own)
    method = asked.get("method", "lora")
    opt = RankAwareOptimizer(model(), "adamw", recipe=made, method=method)
    rate, role = made.at(**asked), "full" if method == "full" else "A"
    used = [part.lr for part in opt.rates.groups if part.role == role]
    assert used == pytest.approx([rate.lr] * len(used), rel=1e-9)
    assert (used[0] < 0.99 * math.sqrt(rate.low * rate.high)) == bool(steepness)
    assert f"between {rate.low:.3g} and {rate.high:.3g}" in str(opt.report())


@pytest.mark.parametrize(("fan_in", "is_wide"), [(4096.0, True), (512.0, False)])
def test_a_wide_models_recipe_has_the_measured_ratio_to_full_finetuning(
    fan_in, is_wide
):
    """A recipe of LoRA runs alone converts to full finetuning as `convert_lr` does, and mentions bfloat16 for a wide model."""
    rows = [
        {
            "rank": rank,
            "alpha": 32,
            "fan_in": fan_in,
            "lr": 2.0**x,
            "loss": (x + 12) ** 2,
        }
        for rank in (4, 16)
        for x in range(-15, -8)
    ]
    recipe = ra.sweeps.fit_sweep(rows, full_fan_in=3 * fan_in)
    lora = recipe.at(16, alpha=32)
    with pytest.warns(ra.RankAwareWarning, match="full finetuning was not tried"):
        full = recipe.at(method="full")
    at = ra.Reference(16, 32, fan_in=fan_in)
    middle = math.sqrt(lora.low * lora.high)
    wanted = ra.convert_lr(middle, at, f"full,fan_in={3 * fan_in:g}").lr
    assert math.sqrt(full.low * full.high) == pytest.approx(wanted, rel=0.05)
    assert ("bfloat16" in str(full)) == is_wide
    assert "factor of 2.7" in str(full)
