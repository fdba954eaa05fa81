"""Recipes passed to an optimizer: warnings if the run differs from the recipe's trials, and
learning rates of parameters outside LoRA.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from rankaware_optim import (
    RankAwareOptimizer,
    RankAwareWarning,
    Recipe,
    RecipeError,
    Reference,
)
from rankaware_optim._optimizers import get_optimizer_class

from ..helpers.models import mlp
from ..helpers.optimizers import called, rates_of
from ..helpers.recipes import RECIPE as CALIBRATED

WIDTH = 16  # the width of models.mlp
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
RECIPE = replace(
    CALIBRATED,
    fitted_lr=8e-3,
    reference=Reference(rank=4, alpha=4, fan_in=WIDTH, batch=16),
    margin=0.25,
    full_fan_in=float(WIDTH),
    optimizer="torch.optim.adamw.AdamW",
    settings={"weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "foreach": True},
    steps=100,
    warmup=0.05,
    other_rates={"head.weight": "base", "head.bias": "base"},
)
# the settings with which the recipe was made
OWN = {"weight_decay": 0.1, "betas": (0.9, 0.95)}


def built(
    recipe: Recipe = RECIPE, optimizer=AdamW, model: nn.Module | None = None, **options
) -> RankAwareOptimizer:
    return RankAwareOptimizer(
        model or mlp((16, 16)), optimizer, recipe=recipe, **options
    )


def values(opt, role: str = "other") -> list[float]:
    """Return the different learning rates of a role, to nine digits."""
    groups = [group for group in opt.rates.groups if group.role == role]
    return sorted({float(f"{group.lr:.9g}") for group in groups})


def heads(opt) -> dict[str, float]:
    """Return the learning rates of the head's parameters by name."""
    return {name: lr for name, lr in rates_of(opt).items() if "head" in name}


# --- the run differs from the recipe --------------------------------------------------------------------------------

TAKE = "pass **recipe.settings"
FARTHER = "learning rates are less certain"
DECAY, BETAS = "weight_decay=0.1, not", "betas=[0.9, 0.95], not [0.9, 0.999]"
NO_SGD = "optimizer='AdamW', not 'SGD'. "
OTHER = [
    ({}, {"betas": (0.9, 0.95)}, f"{DECAY} 0.01", TAKE),
    ({}, {"weight_decay": 0.02}, f"{DECAY} 0.02; {BETAS}", TAKE),
    ({}, {**OWN, "batch": 64}, "batch=16, not 64", FARTHER),
    ({}, {**OWN, "steps": 500}, "steps=100, not 500", FARTHER),
    (
        *({}, {"weight_decay": 0.1, "batch": 8, "steps": 50}),
        *(f"{BETAS}; batch=16, not 8; steps=100, not 50", TAKE),
    ),
    ({}, {"optimizer": SGD}, NO_SGD, "calibration with SGD"),
    (
        *({"optimizer": "torch.optim.sgd.SGD"}, {}),
        *("optimizer='SGD', not 'AdamW'. ", "AdamW"),
    ),
]


@pytest.mark.parametrize(("changes", "options", "words", "cure"), OTHER)
def test_what_is_another_than_the_recipes_is_said_once(changes, options, words, cure):
    """If the optimizer, its settings, the batch size or the number of steps differ from the
    recipe's, one warning and one note list all differences.
    """
    with pytest.warns(RankAwareWarning) as caught:
        opt = built(replace(RECIPE, **changes), **options)
    (said,) = (str(warning.message) for warning in caught)
    assert said.startswith("Recipe 'digits' was made with ")
    assert words in said
    assert cure in said
    assert said in opt.report().notes


@pytest.mark.parametrize(
    ("optimizer", "shown"), [(AdamW, True), (SGD, False), (torch.optim.NAdam, False)]
)
@pytest.mark.filterwarnings("ignore:Recipe 'digits' was made with")
def test_the_band_is_of_the_recipes_own_optimizer(optimizer, shown):
    """The recipe's interval is printed only for the optimizer that the recipe was made with."""
    report = str(built(optimizer=optimizer).report())
    assert ("the best learning rate lies between" in report) == shown


class Eight(AdamW):
    """A user's own class that inherits from AdamW."""


ALIKE = [
    (RECIPE, {**OWN, "foreach": False, "eps": 1e-8, "amsgrad": True}),
    (RECIPE, {**OWN, "batch": 16.0, "steps": 100}),
    (RECIPE, {"weight_decay": torch.tensor(0.1), "betas": [0.9, 0.95]}),
    (RECIPE, {**OWN, "optimizer": Eight}),
    (RECIPE, {**OWN, "optimizer": called("FusedAdam")}),
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
    """There is no warning if the run agrees with the recipe, if one of the two does not state a
    value, or if only the implementation differs.
    """
    opt = built(recipe, **options)  # a warning is an error here
    assert not any("was made with" in note for note in opt.report().notes)


def grouped(model: nn.Module, pairs: dict, rest: dict) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "lora" in name], **pairs},
        {"params": [p for name, p in named if "lora" not in name], **rest},
    ]


@pytest.mark.parametrize("given", ["groups", "instance"])
def test_settings_in_force_are_those_of_the_adapters_groups(given):
    """The recipe's settings are compared with the settings of the groups that contain LoRA
    matrices, not with those of other groups.
    """

    def wrap(pairs, rest, **defaults):
        model = mlp((16, 16))
        groups = grouped(model, {"weight_decay": pairs}, {"weight_decay": rest})
        built = (AdamW(groups, **defaults),), {}
        args, options = built if given == "instance" else ((groups, AdamW), defaults)
        return RankAwareOptimizer(*args, model=model, recipe=RECIPE, **options)

    wrap(0.1, 0.0, betas=(0.9, 0.95), weight_decay=0.5)
    with pytest.warns(RankAwareWarning, match=r"weight_decay=0\.1, not 0\.2\. "):
        wrap(0.2, 0.1, **OWN)


# --- steps and batch ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Recipe 'digits'")
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "run",
    [{"steps": 800}, {"batch": 64}, {"steps": 800, "batch": 64}, {"steps": 100}],
    ids=str,
)
def test_rates_are_moved_to_the_runs_steps_and_batch(run, method):
    """For another number of steps or another batch size, the learning rates and the interval in the
    report are those that `recipe.at` returns.
    """
    # with a steepness the margin, and so the learning rate, depends on the steps
    recipe = replace(RECIPE, full_seen=True, ranks=(4, 16), steepness=0.3)
    model, role, asked = mlp((16, 16)), "A", {"rank": 16}
    if method == "full":
        model, role, asked = nn.Linear(WIDTH, WIDTH), "full", {"method": "full"}
    opt = built(recipe, model=model, method=method, **OWN, **run)
    rate = recipe.at(**asked, **run)
    assert values(opt, role) == pytest.approx([rate.lr], rel=1e-8)
    band = f"between {rate.low:.3g} and {rate.high:.3g} with a probability of 90 %"
    said = " ".join(str(opt.report()).split())
    assert f"{band} at {rate.configuration}." in said
    if method == "lora":  # the head's learning rate is converted as the adapters' is
        moved = rate.lr / recipe.at(**asked).lr
        assert values(opt) == pytest.approx([recipe.lr * moved], rel=1e-8)


@pytest.mark.filterwarnings("ignore:Recipe 'digits'")
@pytest.mark.parametrize("tuned", ["A", "B"])
@pytest.mark.parametrize("init", ["A", "B", "full"])
def test_rates_are_moved_to_the_models_init(tuned, init):
    """A model whose init differs from the recipe's gets the learning rate that `recipe.at` returns
    for the model's init, and so does full finetuning.
    """
    reference = replace(RECIPE.reference, init=tuned)
    recipe = replace(RECIPE, reference=reference, ranks=(4, 16), full_seen=True)
    if init == "full":
        model, role, options = nn.Linear(WIDTH, WIDTH), "full", {"method": "full"}
        rate = recipe.at(method="full", fan_in=WIDTH)
    else:
        model, role, options = mlp((16, 16), init=init), "A", {}
        rate = recipe.at(rank=16, init=init, fan_in=WIDTH)
    opt = built(recipe, model=model, **options, **OWN)
    assert values(opt, role) == pytest.approx([rate.lr], rel=1e-8)


# --- settings of shipped recipes ------------------------------------------------------------------------------------


SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipes_settings_are_its_optimizers(path):
    """The optimizer of every shipped recipe accepts the recipe's settings."""
    recipe = Recipe.load(path)
    native = get_optimizer_class(recipe.optimizer)
    native([nn.Parameter(torch.zeros(2, 2))], lr=recipe.lr, **recipe.settings)


# --- parameters outside LoRA ----------------------------------------------------------------------------------------

PLAIN = replace(RECIPE, settings={}, ranks=(4, 16))
UNSEEN = replace(PLAIN, other_rates={})
FULL = replace(UNSEEN, full_seen=True)
FULL_LR = FULL.at(method="full").lr
BASE = "not a LoRA matrix: base learning rate, as in the recipe's trials"
TRIED = "not a LoRA matrix: its learning rate in the recipe's trials"
IN_FULL = "not a LoRA matrix: the recipe's learning rate for full finetuning"
SEEN = replace(PLAIN, other_rates={"head.weight": 3e-3, "head.bias": 3e-3})
OTHERS = [
    (PLAIN, {}, PLAIN.lr, BASE),
    (replace(PLAIN, full_seen=True), {}, PLAIN.lr, BASE),
    (SEEN, {}, 3e-3, TRIED),
    (FULL, {}, FULL_LR, IN_FULL),
    (UNSEEN, {"other_lr": 1e-3}, 1e-3, "set by other_lr="),
    (FULL, {"other_lr": 1e-3}, 1e-3, "set by other_lr="),
    (PLAIN, {"rates": {"head.*": 2e-3}}, 2e-3, "set by rates="),
]


@pytest.mark.parametrize(("recipe", "options", "lr", "why"), OTHERS)
def test_a_head_has_the_rate_that_is_known_for_it(recipe, options, lr, why):
    """A head gets its explicit learning rate, else its learning rate in the recipe's trials, else
    the one for full finetuning, and the report says which.
    """
    opt = built(recipe, **options)
    assert heads(opt) == pytest.approx({"head.weight": lr, "head.bias": lr}, rel=1e-9)
    report = opt.report()
    assert {row.why for row in report.rows if row.role == "other"} == {why}
    assert report.audit == ()


@pytest.mark.parametrize("is_built", [False, True])
def test_a_head_that_nothing_is_known_of_asks_for_its_rate(is_built):
    """If the recipe's trials trained neither the head nor the full model, an error asks for
    other_lr=, and the optimizer stays unchanged.
    """
    model = mlp((16, 16))
    native = AdamW(model.parameters())
    given = (native,) if is_built else (model, AdamW)
    with pytest.raises(
        RecipeError, match=r"no learning rate for the parameter head\.weight.*other_lr="
    ):
        RankAwareOptimizer(*given, model=model, recipe=UNSEEN)
    assert type(native) is AdamW


def test_only_what_trains_asks_for_a_rate():
    """If frozen parameters are listed beside the adapters, no learning rate has to be set for them."""
    built(UNSEEN, model=mlp((16, 16), head=False))
    model = mlp((16, 16))
    model.head.requires_grad_(False)
    RankAwareOptimizer(list(model.parameters()), AdamW, model=model, recipe=UNSEEN)


@pytest.mark.parametrize("added", [False, True], ids=["built", "added"])
def test_a_group_with_a_rate_of_its_own_keeps_it(added):
    """A learning rate in the user's own group takes precedence over the recipe, and no other_lr= is needed."""
    model = mlp((16, 16))
    pairs, head = grouped(model, {}, {"lr": 5e-4})
    opt = RankAwareOptimizer(
        [pairs] if added else [pairs, head], AdamW, model=model, recipe=UNSEEN
    )
    if added:
        opt.add_param_group(head)
    assert heads(opt) == {"head.weight": 5e-4, "head.bias": 5e-4}


def test_a_head_added_later_is_treated_alike():
    """A head that is added later gets the recipe's learning rate and follows the schedule, also in a copy of the
    optimizer.
    """
    model = mlp((16, 16))
    pairs, head = grouped(model, {}, {})
    opt = RankAwareOptimizer([dict(pairs)], AdamW, model=model, recipe=FULL)
    opt.add_param_group(dict(head))
    assert values(opt) == pytest.approx([FULL_LR])
    unknown = RankAwareOptimizer([pairs], AdamW, model=model, recipe=UNSEEN)
    with pytest.raises(RecipeError, match="other_lr="):
        unknown.add_param_group(head)
    assert len(unknown.param_groups) == 1
    for again in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert str(again.report()) == str(opt.report())
    for group in opt.param_groups:
        group["lr"] *= 0.5
    assert values(opt) == pytest.approx([FULL_LR / 2])


def test_a_built_optimizers_rates_are_the_recipes():
    """Wrapping an existing optimizer with a recipe replaces the learning rates of the adapters and of the head."""
    model = mlp((16, 16))
    opt = RankAwareOptimizer(
        AdamW(model.parameters(), lr=1.0), model=model, recipe=FULL
    )
    assert values(opt) == pytest.approx([FULL_LR])
    assert [g["lr"] for g in opt.param_groups] == pytest.approx(
        [FULL.lr] * len(opt.param_groups)
    )


def test_a_recipe_of_full_finetuning_gives_a_head_its_rate():
    """With a recipe for full finetuning a head gets the recipe's learning rate, and LoRA pairs the converted one."""
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
