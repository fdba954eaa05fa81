"""A recipe in an optimizer: what is said where the run is another than its own, and the rates beside the adapters."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankaware_optim import (
    Falling,
    OptimizerError,
    Power,
    RankAwareOptimizer,
    RankAwareWarning,
    Recipe,
    RecipeError,
    Reference,
)
from rankaware_optim._optimizers import get_optimizer_class
from rankaware_optim.optimizer import effective_lr

from ..helpers.models import mlp, train

WIDTH = 16  # that of models.mlp
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
RECIPE = Recipe(
    name="digits",
    fitted_lr=8e-3,
    reference=Reference(rank=4, alpha=4, fan_in=WIDTH, batch=16),
    law=Power(exponent=0.1),
    covariance=np.diag([0.04, 0.01, 0.09]),
    lean=0.25,
    scaling_rule="fixed",
    full_fan_in=float(WIDTH),
    ranks=(4, 64),
    optimizer="torch.optim.adamw.AdamW",
    settings={"weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "foreach": True},
    steps=100,
    warmup=0.05,
    other_rates={"head.weight": "base", "head.bias": "base"},
)
OWN = {"weight_decay": 0.1, "betas": (0.9, 0.95)}  # what it was made with


def built(
    recipe: Recipe = RECIPE, optimizer=AdamW, model: nn.Module | None = None, **options
) -> RankAwareOptimizer:
    return RankAwareOptimizer(
        model or mlp((16, 16)), optimizer, recipe=recipe, **options
    )


def rates(opt, role: str = "other") -> dict[str, float]:
    """The rates of the groups of a role, by parameter."""
    return {
        n: effective_lr(g)
        for g in opt.param_groups
        if g["lora_role"] == role
        for n in g["param_names"]
    }


def values(opt, role: str = "other") -> list[float]:
    """The different rates of a role, to nine digits."""
    return sorted({float(f"{lr:.9g}") for lr in rates(opt, role).values()})


# --- the run is another than the recipe's ---------------------------------------------------------------------------

TAKE = r"give **recipe.settings"
FARTHER = "are less certain for others"
OTHER = [
    ({}, {"betas": (0.9, 0.95)}, "weight_decay=0.1, not 0.01", TAKE),
    ({}, {"weight_decay": 0.1}, "betas=[0.9, 0.95], not [0.9, 0.999]", TAKE),
    ({}, {**OWN, "eps": 1e-6}, "eps=1e-08, not 1e-06", TAKE),
    (
        {},
        {"weight_decay": 0.02},
        "weight_decay=0.1, not 0.02; betas=[0.9, 0.95], not [0.9, 0.999]",
        TAKE,
    ),
    ({}, {**OWN, "batch": 64}, "batch=16, not 64", FARTHER),
    ({}, {**OWN, "steps": 500}, "steps=100, not 500", FARTHER),
    (
        {},
        {"weight_decay": 0.1, "batch": 8, "steps": 50},
        "not [0.9, 0.999]; batch=16, not 8; steps=100, not 50",
        TAKE,
    ),
    (
        {},
        {"optimizer": SGD},
        "optimizer='AdamW', not 'SGD'; family='sign-like', not 'gradient-like'",
        "with SGD",
    ),
    (
        {},
        {"optimizer": "nadam"},
        "optimizer='AdamW', not 'NAdam'. ",
        "calibrate with NAdam",
    ),
    (
        {"optimizer": "torch.optim.sgd.SGD"},
        {},
        "optimizer='SGD', not 'AdamW'; family='gradient-like', not",
        "AdamW",
    ),
    (
        {"optimizer": "theirs.Own"},
        {},
        "optimizer='Own', not 'AdamW'; family='unknown', not 'sign-like'",
        "AdamW",
    ),
]


@pytest.mark.parametrize(("changes", "options", "words", "cure"), OTHER)
def test_what_is_another_than_the_recipes_is_said_once(changes, options, words, cure):
    """Optimizer, family, settings in force, batch, steps and warm-up that differ make one warning and a note."""
    with pytest.warns(RankAwareWarning) as caught:
        opt = built(replace(RECIPE, **changes), **options)
    (said,) = (str(warning.message) for warning in caught)
    assert said.startswith("Recipe 'digits' was made with ")
    assert words in said
    assert cure in said
    assert said in opt.report().notes


@pytest.mark.filterwarnings("ignore:Recipe 'digits' was made with")
def test_a_recipes_rates_keep_no_distance():
    """Even by the default law, a recipe's moved rate is the law's: it has a margin of its own."""
    opt = built(replace(RECIPE, law=Power(law=Falling())))
    moved = Falling().multiplier(
        replace(RECIPE.reference, rank=16, alpha=16).as_factor(), RECIPE.reference
    )
    assert {
        g["rank_multiplier"] for g in opt.param_groups if g["lora_role"] != "other"
    } == {moved}
    assert "keeps a distance" not in str(opt.report())


@pytest.mark.parametrize(
    ("optimizer", "shown"), [(AdamW, True), (SGD, False), (torch.optim.NAdam, False)]
)
@pytest.mark.filterwarnings("ignore:Recipe 'digits' was made with")
def test_the_band_is_of_the_recipes_own_optimizer(optimizer, shown):
    """Beside another optimizer's rates the recipe's band is not printed."""
    assert (
        "the best rate lies between" in str(built(optimizer=optimizer).report())
    ) == shown


class Eight(AdamW):
    """A class of one's own around AdamW."""


ALIKE = [
    (RECIPE, {**OWN}),
    (RECIPE, {**OWN, "foreach": False, "eps": 1e-8, "amsgrad": True}),
    (RECIPE, {**OWN, "batch": 16.0, "steps": 100}),
    (RECIPE, {"weight_decay": torch.tensor(0.1), "betas": [0.9, 0.95]}),
    (RECIPE, {**OWN, "optimizer": Eight}),
    (replace(RECIPE, optimizer="bitsandbytes.optim.adamw.AdamW8bit"), OWN),
    (replace(RECIPE, settings={}), {"weight_decay": 0.3}),
    (
        replace(RECIPE, settings={"weight_decay": 0.01, "unheard": 3, "foreach": True}),
        {"foreach": False},
    ),
    (
        replace(RECIPE, reference=replace(RECIPE.reference, batch=None), warmup=None),
        {**OWN, "batch": 64},
    ),
    (replace(RECIPE, settings={"betas": (0.9, 0.999)}), {}),
]


@pytest.mark.parametrize(("recipe", "options"), ALIKE)
def test_what_agrees_or_is_not_known_is_not_said(recipe, options):
    """Nothing is said where values agree, where one side does not say, or of how the same is computed."""
    opt = built(recipe, **options)  # a warning is an error here
    assert not any("was made with" in note for note in opt.report().notes)


def grouped(model: nn.Module, pairs: dict, rest: dict) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "lora" in name], **pairs},
        {"params": [p for name, p in named if "lora" not in name], **rest},
    ]


def test_settings_in_force_are_those_of_the_adapters_groups():
    """A group's own setting counts for its adapters, and what other parameters have does not."""
    model = mlp((16, 16))
    groups = grouped(model, {"weight_decay": 0.1}, {"weight_decay": 0.0})
    RankAwareOptimizer(
        groups, AdamW, model=model, recipe=RECIPE, betas=(0.9, 0.95), weight_decay=0.5
    )
    groups = grouped(model, {"weight_decay": 0.2}, {"weight_decay": 0.1})
    with pytest.warns(RankAwareWarning, match=r"weight_decay=0\.1, not 0\.2\. "):
        RankAwareOptimizer(groups, AdamW, model=model, recipe=RECIPE, **OWN)


def test_a_built_optimizer_is_compared_by_what_it_holds():
    """An optimizer that is built already is compared by its groups."""
    model = mlp((16, 16))
    RankAwareOptimizer(AdamW(model.parameters(), **OWN), model=model, recipe=RECIPE)
    with pytest.warns(RankAwareWarning, match=r"weight_decay=0\.1, not 0\.01; betas"):
        RankAwareOptimizer(
            AdamW((model := mlp((16, 16))).parameters()), model=model, recipe=RECIPE
        )


# --- steps and batch ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Recipe 'digits'")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "run",
    [{"steps": 800}, {"batch": 64}, {"steps": 800, "batch": 64}, {"steps": 100}],
    ids=str,
)
def test_rates_are_moved_to_the_runs_steps_and_batch(run, method):
    """Every rate is the recipe's at these steps and batch, and so is the band in the report."""
    recipe = replace(RECIPE, full_seen=True, ranks=(4, 16))
    model = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH)) if method == "full" else mlp((16, 16))
    )
    opt = built(recipe, model=model, method=method, **OWN, **run)
    rate = (
        recipe.at(method="full", **run)
        if method == "full"
        else recipe.at(rank=16, **run)
    )
    assert values(opt, "full" if method == "full" else "A") == pytest.approx(
        [rate.lr], rel=1e-8
    )
    assert (
        f"between {rate.low:.3g} and {rate.high:.3g} with 90 %, for {run.get('steps', 100)} steps"
        in str(opt.report())
    )
    if method == "lora":
        assert values(opt) == pytest.approx([recipe.at(**run).lr], rel=1e-8)


REFUSED = [
    ({"steps": 0}, RecipeError, "steps is 0"),
    ({"steps": 2.5}, RecipeError, r"steps is 2\.5"),
    (
        {"recipe": replace(RECIPE, steps=None), "steps": 9},
        RecipeError,
        "does not give its own steps",
    ),
    (
        {"recipe": None, "lr": 1e-3, "steps": 9},
        OptimizerError,
        "steps= was given without recipe=",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_an_impossible_run_is_refused(options, error, message):
    """Steps and shares that cannot be, and what only a recipe gives a meaning, are errors."""
    with pytest.raises(error, match=message):
        built(**options)


# --- its settings ---------------------------------------------------------------------------------------------------


def test_a_recipes_settings_are_its_optimizers(tmp_path):
    """**recipe.settings, read from its file, is what the optimizer takes, nothing is said, and training goes on."""
    recipe = Recipe.load(RECIPE.save(tmp_path / "r.toml"))
    model = mlp((16, 16))
    opt = built(recipe, model=model, **recipe.settings)
    for group in opt.param_groups:
        assert (group["weight_decay"], tuple(group["betas"])) == (0.1, (0.9, 0.95))
    train(model, opt, steps=1)


SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipes_settings_are_its_optimizers(path):
    """Every setting is one that its optimizer's constructor takes, with a value that it accepts."""
    recipe = Recipe.load(path)
    native = get_optimizer_class(recipe.optimizer)
    native([nn.Parameter(torch.zeros(2, 2))], lr=recipe.lr, **recipe.settings)


# --- other parameters -----------------------------------------------------------------------------------------------

PLAIN = replace(RECIPE, settings={}, ranks=(4, 16))
UNSEEN = replace(PLAIN, other_rates={})
FULL = replace(UNSEEN, full_seen=True)
FULL_LR = FULL.at(method="full").lr
OTHERS = [
    (PLAIN, {}, PLAIN.lr, "no LoRA factor: the base rate, as in the recipe's trials"),
    (
        replace(PLAIN, full_seen=True),
        {},
        PLAIN.lr,
        "no LoRA factor: the base rate, as in the recipe's trials",
    ),
    (
        replace(PLAIN, other_rates={"head.weight": 3e-3, "head.bias": 3e-3}),
        {},
        3e-3,
        "no LoRA factor: its rate in the recipe's trials",
    ),
    (FULL, {}, FULL_LR, "no LoRA factor: full finetuning's rate by the recipe"),
    (UNSEEN, {"other_lr": 1e-3}, 1e-3, "given by other_lr="),
    (UNSEEN, {"rates": {"head.*": 2e-3}}, 2e-3, "given by rates="),
    (FULL, {"other_lr": 1e-3}, 1e-3, "given by other_lr="),
    (PLAIN, {"rates": {"head.*": 2e-3}}, 2e-3, "given by rates="),
]


@pytest.mark.parametrize(("recipe", "options", "lr", "why"), OTHERS)
def test_a_head_has_the_rate_that_is_known_for_it(recipe, options, lr, why):
    """A head has what is given, else its rate in the trials, else full finetuning's; the report says which."""
    opt = built(recipe, **options)
    assert rates(opt) == {
        name: pytest.approx(lr, rel=1e-9) for name in ("head.weight", "head.bias")
    }
    report = opt.report()
    assert {row.reason for row in report.rows if row.role == "other"} == {why}
    assert report.audit == ()


@pytest.mark.parametrize(
    "optimizer",
    [AdamW, lambda model: AdamW(model.parameters())],
    ids=["class", "built"],
)
def test_a_head_that_nothing_is_known_of_asks_for_its_rate(optimizer):
    """Where neither the head nor full finetuning was seen, an error asks for other_lr, before anything is changed."""
    model = mlp((16, 16))
    native = optimizer(model) if optimizer is not AdamW else None
    given = (model, AdamW) if native is None else (native,)
    with pytest.raises(
        RecipeError, match=r"trained neither head\.weight nor the full model.*other_lr="
    ):
        RankAwareOptimizer(*given, model=model, recipe=UNSEEN)
    assert native is None or type(native) is AdamW


def test_only_what_trains_asks_for_a_rate():
    """Adapters alone, and frozen parameters that are listed beside them, ask for nothing."""
    built(UNSEEN, model=mlp((16, 16), head=False))
    model = mlp((16, 16))
    model.head.requires_grad_(False)
    RankAwareOptimizer(list(model.parameters()), AdamW, model=model, recipe=UNSEEN)


def test_seen_and_unseen_parameters_part():
    """Of two modules beside the adapters each has its own rate and reason."""
    model = mlp((16, 16))
    model.norms = nn.ModuleList([nn.LayerNorm(3) for _ in range(12)])
    model.new = nn.Linear(3, 2)
    recipe = replace(
        FULL,
        other_rates={
            "norms.*.weight": "base",
            "norms.*.bias": "base",
            "head.weight": 1e-4,
        },
    )
    opt = built(recipe, model=model)
    found = rates(opt)
    assert found["norms.11.weight"] == found["norms.0.bias"] == recipe.lr
    assert found["head.weight"] == pytest.approx(1e-4)
    assert found["head.bias"] == found["new.weight"] == pytest.approx(FULL_LR)


@pytest.mark.parametrize("added", [False, True], ids=["built", "added"])
def test_a_group_with_a_rate_of_its_own_keeps_it(added):
    """The rate that the user's group names is the head's, whatever the recipe knows, and nothing is asked for."""
    model = mlp((16, 16))
    pairs, head = grouped(model, {}, {"lr": 5e-4})
    opt = RankAwareOptimizer(
        [pairs] if added else [pairs, head], AdamW, model=model, recipe=UNSEEN
    )
    if added:
        opt.add_param_group(head)
    assert rates(opt) == {"head.weight": 5e-4, "head.bias": 5e-4}


def test_a_head_added_later_is_treated_alike():
    """A group added after the optimizer was copied into a file and back has the rates that the recipe gives."""
    model = mlp((16, 16))
    pairs, head = grouped(model, {}, {})
    opt = RankAwareOptimizer([pairs], AdamW, model=model, recipe=FULL)
    opt.add_param_group(head)
    assert rates(opt) == {
        name: pytest.approx(FULL_LR) for name in ("head.weight", "head.bias")
    }
    unknown = RankAwareOptimizer([pairs], AdamW, model=model, recipe=UNSEEN)
    with pytest.raises(RecipeError, match="other_lr="):
        unknown.add_param_group(head)
    assert len(unknown.param_groups) == 2
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert str(again.report()) == str(opt.report())


def test_a_built_optimizers_rates_are_the_recipes():
    """Wrapping a built optimizer with a recipe sets the head's rate too, not only the adapters'."""
    model = mlp((16, 16))
    opt = RankAwareOptimizer(
        AdamW(model.parameters(), lr=1.0), model=model, recipe=FULL
    )
    assert values(opt) == pytest.approx([FULL_LR])
    assert {g["lr"] for g in opt.param_groups} == {FULL.lr}


def test_schedules_move_a_heads_rate_too():
    """The recipe's rate for a head is a ratio to the base rate, which schedules set."""
    opt = built(FULL)
    for group in opt.param_groups:
        group["lr"] *= 0.5
    assert values(opt) == pytest.approx([FULL_LR / 2])


def test_in_full_finetuning_everything_is_full():
    """What a recipe saw beside adapters says nothing of full finetuning, whose biases move with the weights."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    recipe = replace(FULL, other_rates={"*.bias": 1.0})
    opt = built(recipe, model=model, method="full")
    assert [effective_lr(g) for g in opt.param_groups] == pytest.approx([FULL_LR] * 2)


def test_a_recipe_of_full_finetuning_gives_a_head_its_rate():
    """Where full finetuning is the reference, a head beside adapters has its rate, and the pairs the law's."""
    recipe = replace(
        FULL,
        reference=Reference(method="full", fan_in=WIDTH),
        ranks=(),
        scaling_rule="unknown",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankAwareWarning)
        opt = built(recipe)
    assert values(opt) == pytest.approx([recipe.lr])


def test_a_recipe_survives_with_what_it_knows(tmp_path):
    """Other rates and the code's source survive the files, and printing says them."""
    made = replace(
        PLAIN,
        other_rates={"head.weight": "base", "a.*.b": 3e-4},
        source={"train": "t", "commit": "c"},
    )
    found = Recipe.load(made.save(tmp_path / "r.toml"))
    assert (found.other_rates, found.source) == (made.other_rates, made.source)
    said = re.sub(r"\s+", " ", str(found))
    assert (
        "other rates head.weight the base rate; a.*.b 0.0003; any other must be given"
        in said
    )
    assert "code t, commit c" in said


def test_groups_name_their_recipe():
    """Every group has the hash and the name of the recipe that its rate is of."""
    tags = {group["rankaware_recipe"] for group in built(**OWN).param_groups}
    assert tags == {RECIPE.tag}


def test_each_head_has_its_own_rate_and_reason():
    """Where the trials had two rates, each parameter is a row of its own."""
    rates = {"head.weight": 1e-4, "head.bias": 2e-4}
    opt = built(replace(RECIPE, other_rates=rates), **OWN)
    rows = [row for row in opt.report().rows if row.role == "other"]
    assert {row.names[0]: row.lr for row in rows} == pytest.approx(rates)
    assert all(row.reason.endswith("its rate in the recipe's trials") for row in rows)
