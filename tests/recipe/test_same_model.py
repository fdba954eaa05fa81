"""Tests of when a model counts as a different one from the recipe's, and of the warning or error that follows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim import RankAwareOptimizer, RankAwareWarning, RecipeError
from rankaware_optim.recipe._same_model import ANOTHER_TASK_SD

from ..helpers.models import PlainLoRA
from ..helpers.optimizers import rates_of
from ..helpers.recipes import RECIPE as CALIBRATED

AdamW = torch.optim.AdamW
WIDTH = 64
QV = {"model.layers.*.q_proj": 64.0, "model.layers.*.v_proj": 64.0}
RECIPE = replace(CALIBRATED, layers=QV, full_seen=True)
FULL_ALONE = replace(
    RECIPE,
    reference=ra.Reference(method="full", fan_in=WIDTH),
    ranks=(),
    layers={**QV, "model.layers.*.k_proj": 64.0},
    full_fan_in=1e3,
)


class Block(nn.Module):
    """A block of a language model with adapters on some projections, or without adapters if the rank is None."""

    def __init__(self, adapted: str, rank: int | None, width: int) -> None:
        super().__init__()
        for name in "qkv":
            layer: nn.Module = nn.Linear(width, width, bias=False)
            if rank is not None:
                wanted = name in adapted
                layer = PlainLoRA(layer, rank, 2.0) if wanted else frozen(layer)
            self.add_module(f"{name}_proj", layer)


class Nested(nn.Module):
    """A module that contains another module under a given name."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


def model(
    adapted: str = "qv",
    rank: int | None = 8,
    width: int = WIDTH,
    names: str = "model.layers",
) -> nn.Module:
    """Return a model that contains two blocks below a path of module names."""
    made: nn.Module = nn.ModuleList(Block(adapted, rank, width) for _ in range(2))
    for name in reversed(names.split(".")):
        made = Nested(name, made)
    return made


def rate_of(opt: RankAwareOptimizer) -> float:
    (lr,) = set(rates_of(opt).values())
    return lr


# --- the recipe's own model -----------------------------------------------------------------------------------------

PEFT, LIGHTNING = "base_model.model.model.layers", "net.base_model.model.model.layers"
AT_HOME = [
    (RECIPE, model(), {}),
    (RECIPE, model(rank=64), {}),
    (RECIPE, model(names=PEFT), {}),
    (RECIPE, model(names=LIGHTNING), {}),
    (RECIPE, model(names="layers"), {}),
    (RECIPE, model(width=2 * WIDTH), {}),
    (RECIPE, model(rank=None), {"method": "full"}),
    (replace(RECIPE, layers={}), model("k", names="other.blocks"), {}),
    (FULL_ALONE, model(), {}),
]


@pytest.mark.filterwarnings("ignore:.* extrapolates .* the model.s fan-in is 128")
@pytest.mark.filterwarnings("ignore:.* extrapolates .* rank 8 is outside")
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
@pytest.mark.parametrize(("recipe", "trained", "options"), AT_HOME)
def test_the_same_model_is_no_stranger(recipe, trained, options, prefix):
    """With another rank, full finetuning, twice the width or a wrapper's prefix, a model still counts as the recipe's own."""
    layers = {f"{prefix}{name}": width for name, width in recipe.layers.items()}
    recipe = replace(recipe, layers=layers)
    opt = RankAwareOptimizer(trained, AdamW, recipe=recipe, **options)
    assert not any("another task" in note for note in opt.report().notes)


# --- a different model ----------------------------------------------------------------------------------------------

STRANGERS = [
    (model(names="encoder.blocks"), {}, r"encoder\.blocks\.\*\.q_proj"),
    (model(rank=None, names="blocks"), {"method": "full"}, "blocks"),
    (model("qkv"), {}, r"model\.layers\.\*\.k_proj"),
    (model("q"), {}, r"model\.layers\.\*\.v_proj"),
]


@pytest.mark.parametrize("init", "AB")
@pytest.mark.parametrize(("trained", "options", "words"), STRANGERS)
def test_a_stranger_is_told_first(trained, options, words, init):
    """On a model with other layers, a warning and the report's first note recommend `calibrate`, and the interval is wider."""
    recipe = replace(RECIPE, reference=replace(RECIPE.reference, init=init))
    home, options = replace(recipe, layers={}), {"init": init, **options}
    sure = RankAwareOptimizer(trained, AdamW, recipe=home, **options).report()
    words = rf"only one of the two models has {words}.*ra.calibrate on this model"
    with pytest.warns(RankAwareWarning, match=words) as caught:
        opt = RankAwareOptimizer(trained, AdamW, recipe=recipe, **options)
    (said,) = (str(warning.message) for warning in caught)
    report = opt.report()
    assert report.notes[0] == said
    own, wider = band_in(sure.notes), band_in(report.notes)
    variance = (wider**2 - own**2) / 1.645**2
    assert math.sqrt(variance) == pytest.approx(ANOTHER_TASK_SD[init], rel=0.01)


def band_in(notes) -> float:
    """Return half the width, in octaves, of the interval that the notes of a report contain."""
    (words,) = (note for note in notes if "best learning rate lies between" in note)
    low, high = words.split("between ")[1].split(" with ")[0].split(" and ")
    return math.log2(float(high) / float(low)) / 2


# --- another model's width ------------------------------------------------------------------------------------------

NARROW, WIDE = WIDTH / 2, 2.0 * WIDTH
WIDTHS = [
    (RECIPE, {"rank": 8}),
    (replace(RECIPE, layers={}), {"method": "full"}),
    (FULL_ALONE, {"method": "full"}),
    (replace(RECIPE, layers={}), {"rank": 8, "alpha": 4.0}),
]


@pytest.mark.filterwarnings("ignore::rankaware_optim.errors.RankAwareWarning")
@pytest.mark.parametrize(("recipe", "asked"), WIDTHS)
@pytest.mark.parametrize("fan_in", [NARROW, WIDE])
def test_another_models_width_is_refused(recipe, asked, fan_in):
    """Up to twice or half the width, a recipe gives a learning rate. Beyond that, an error recommends `suggest_lr`."""
    farther = fan_in * (1.01 if fan_in > WIDTH else 0.99)
    assert recipe.at(**asked, fan_in=fan_in).lr > 0
    with pytest.raises(
        RecipeError, match=r"fan-in .* .*at most a factor of 2.*suggest_lr"
    ):
        recipe.at(**asked, fan_in=farther)


@pytest.mark.parametrize("layers", [{}, QV, {"blocks.*": 64.0}])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("is_built", [False, True])
def test_a_model_of_another_width_is_refused(layers, method, is_built):
    """For a model three times as wide, wrapping raises an error, whatever the layers' names, and changes no optimizer."""
    trained = model(rank=8 if method == "lora" else None, width=3 * WIDTH)
    native = AdamW(trained.parameters())
    given = (native,) if is_built else (trained, AdamW)
    recipe = replace(RECIPE, layers=layers)
    with pytest.raises(RecipeError, match="this model has fan-in 192"):
        RankAwareOptimizer(*given, model=trained, recipe=recipe, method=method)
    assert type(native) is AdamW


@pytest.mark.filterwarnings("ignore:.* extrapolates .* the model.s fan-in")
def test_what_lora_adapts_may_be_narrower_than_the_model():
    """A recipe whose adapted layers are narrow also applies to full finetuning of a model that has much wider layers."""
    trained = model(rank=None)
    for block in trained.model.layers:
        block.down_proj = nn.Linear(8 * WIDTH, 4 * WIDTH, bias=False)
    opt = RankAwareOptimizer(trained, AdamW, recipe=RECIPE, method="full")
    rate = RECIPE.at(method="full", fan_in=8.0 * WIDTH)
    assert not any("another" in note for note in opt.report().notes)
    assert rate_of(opt) == pytest.approx(rate.lr)


OF_LORA = replace(RECIPE.reference, fan_in=120)
OF_FULL = ra.Reference(method="full", fan_in=360)


@pytest.mark.filterwarnings("ignore:.* extrapolates .* the model.s fan-in")
@pytest.mark.parametrize("reference", [OF_LORA, OF_FULL])
def test_without_names_the_width_is_of_the_recipes_own_kind(reference):
    """Without layer names, a LoRA recipe is compared with the model's mean fan-in, and a full recipe with the largest."""
    trained = model(rank=None)
    for block in trained.model.layers:
        block.down_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)
    recipe = replace(RECIPE, reference=reference, layers={})
    assert RankAwareOptimizer(trained, AdamW, recipe=recipe, method="full")


@pytest.mark.filterwarnings("ignore:.* extrapolates .* the model.s fan-in")
def test_other_layers_of_the_same_model_are_no_other_model():
    """If the common layers have the same width, an additional wide layer gives a warning and not an error."""
    trained = model()
    for block in trained.model.layers:
        block.down_proj = PlainLoRA(nn.Linear(8 * WIDTH, 4 * WIDTH, bias=False), 8, 2.0)
    with pytest.warns(
        RankAwareWarning, match="only one of the two models has model.*down_proj"
    ):
        RankAwareOptimizer(trained, AdamW, recipe=RECIPE)
