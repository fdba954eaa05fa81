"""Inspection of models: which LoRA matrices are found, by which convention, and which models raise
an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from rankaware_optim import InspectionError, inspect_model
from rankaware_optim._types import Factor
from rankaware_optim.inspection import Survey, canonical_name

from ..helpers.models import (
    STYLES,
    TuneLoRA,
    Weight,
    adapted,
    mlp,
    same,
    snapshot,
)

FANS = {"linear": (12, 20), "conv": (27, 8), "embedding": (30, 8)}
CONVENTION = {
    "plain": "lora_A/lora_B",
    "tune": "lora_a/lora_b",
    "kohya": "lora_down/lora_up",
    "container": "peft",
}
MATERIALS = {
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "meta": {"device": "meta"},
}


@pytest.mark.parametrize("material", MATERIALS)
@pytest.mark.parametrize("kind", FANS)
@pytest.mark.parametrize("style", STYLES)
def test_every_convention_and_layer_kind_is_read(style, kind, material):
    """A and B are found with the layer's fans, rank, scaling and kind, in any dtype and on the meta device."""
    layer = adapted(style, kind, **MATERIALS[material])
    survey = inspect_model(nn.ModuleDict({"up": layer}))
    convention = CONVENTION[style]
    if (style, kind) == ("container", "embedding"):
        convention = "peft-embedding"
    assert [f.role for f in survey.factors] == ["A", "B"]
    for factor in survey.factors:
        assert (factor.fan_in, factor.fan_out) == FANS[kind]
        assert (factor.rank, factor.scaling) == (4, 2.0)
        assert (factor.kind, factor.layer) == (kind, "up")
        assert factor.init == ("unknown" if material == "meta" else "A")
        assert factor.convention == convention
    assert survey.other == ()


RANK_5 = nn.Parameter(torch.zeros(20, 5))
SCALED = r"^The LoRA layer block\.up has the scaling .* Set alpha to a positive number"
REFUSED = [
    *(
        (
            style,
            {name: 16},
            r"^The LoRA layer block\.up declares rank 16, .*\(4, 12\).*\(20, 4\)",
        )
        for style, name in (("plain", "r"), ("tune", "rank"), ("kohya", "lora_dim"))
    ),
    ("plain", {"r": 0}, "declares rank 0, but"),
    ("plain", {"r": None, "lora_B": RANK_5}, r"declares no rank, .*\(20, 5\)"),
    *(("plain", {"scaling": s}, SCALED) for s in (0, -1.0, math.inf, math.nan)),
    ("tune", {"alpha": 0}, SCALED),
    ("kohya", {"scale": -1.0}, SCALED),
    ("plain", {"merged_adapters": ["default"]}, "merged into the base weight"),
]


@pytest.mark.parametrize(("style", "values", "message"), REFUSED)
def test_what_a_layer_cannot_declare_is_refused(style, values, message):
    """A rank that contradicts the shapes, an impossible scaling and a merged adapter raise an error
    that names the layer.
    """
    layer = adapted(style)
    for name, value in values.items():
        setattr(layer, name, value)
    model = nn.ModuleDict({"block": nn.ModuleDict({"up": layer})})
    with pytest.raises(InspectionError, match=message):
        inspect_model(model)


SQUARE = [  # the shapes of A and B, the declared rank, the rank that is read
    ((64, 4), (4, 64), None, None),
    ((3, 64, 4), (3, 4, 64), None, None),
    ((64, 4), (4, 64), 64, 64),
    ((4, 64), (64, 4), None, 4),
    ((64, 64), (64, 64), None, 64),
]


@pytest.mark.parametrize(("a", "b", "declared", "rank"), SQUARE)
def test_a_square_pair_may_be_stored_either_way(a, b, declared, rank):
    """A of shape (64, 4) and B of shape (4, 64) may have rank 64 or 4, so an undeclared rank raises
    an error.
    """
    layer = nn.Module()
    layer.linear_in, layer.linear_out = Weight(torch.ones(a)), Weight(torch.zeros(b))
    layer.dim = declared
    if rank is not None:
        assert {f.rank for f in inspect_model(layer).factors} == {rank}
        return
    message = (
        rf"no rank.*{re.escape(str(a))}.* could be 64 or 4\. Set the attribute `r`"
    )
    with pytest.raises(InspectionError, match=message):
        inspect_model(layer)


def test_undeclared_rank_and_scaling():
    """An undeclared rank is read from the shapes, and for an undeclared scaling 1 is assumed, with
    a note.
    """
    layer = adapted()
    del layer.r, layer.scaling
    survey = inspect_model(nn.ModuleDict({"up": layer}))
    assert {(f.rank, f.scaling) for f in survey.factors} == {(4, 1.0)}
    (note,) = survey.notes
    assert "1 is assumed" in note


@pytest.mark.parametrize(
    "value", [torch.ones(3), torch.ones((), device="meta"), "2", True], ids=str
)
def test_a_declared_value_that_is_no_number_does_not_count(value):
    """A declared scaling counts only if it is a number or a tensor of one element."""
    layer = adapted()
    layer.scaling = value
    survey = inspect_model(layer)
    assert {f.scaling for f in survey.factors} == {1.0}
    assert "1 is assumed" in survey.notes[0]
    layer.scaling = torch.tensor([2.0])
    assert {f.scaling for f in inspect_model(layer).factors} == {2.0}


@pytest.mark.parametrize("hidden", ["a", "b", "ab"])
@pytest.mark.parametrize("kind", FANS)
@pytest.mark.parametrize("style", STYLES)
def test_empty_shards_are_read_by_their_modules(style, kind, hidden):
    """If a process has an empty shard, as under ZeRO-3, rank and fans are those that the modules declare."""
    layer = adapted(style, kind)
    whole = inspect_model(layer, init="A")
    for name, half in zip("ab", layer.pair(), strict=True):
        if name in hidden:
            half.data = torch.empty(0)
    assert inspect_model(layer, init="A") == whole


@pytest.mark.parametrize(("rank", "words"), [(None, "declares no rank"), (0, "rank 0")])
def test_an_empty_shard_without_a_rank_is_refused(rank, words):
    """An empty shard raises an error if its module declares no rank or an impossible one."""
    layer = adapted()
    layer.r = rank
    layer.lora_A.data = torch.empty(0)
    with pytest.raises(InspectionError, match=words):
        inspect_model(layer, init="A")


def test_a_shards_fans_may_be_those_of_its_own_module():
    """If the base layer is not in the adapter's module, as with kohya's, the fans of empty shards
    come from the modules of A and B.
    """
    layer = nn.Module()
    layer.lora_down, layer.lora_up = nn.Linear(12, 4), nn.Linear(4, 20)
    layer.lora_dim = 4
    for part in (layer.lora_down, layer.lora_up):
        part.weight.data = torch.empty(0)
    factors = inspect_model(layer, init="A").factors
    assert {(f.rank, f.fan_in, f.fan_out) for f in factors} == {(4, 12, 20)}


@pytest.mark.parametrize("head_trains", [False, True])
def test_frozen_pairs_are_refused(head_trains):
    """If all pairs are frozen, as PEFT loads them, the error says how to load them for training."""
    model = mlp((4, 4)).requires_grad_(False)
    model.head.requires_grad_(head_trains)
    with pytest.raises(
        InspectionError, match=r"4 LoRA matrices, but all of them are frozen"
    ) as caught:
        inspect_model(model)
    assert "is_trainable=True" in caught.value.cure


@pytest.mark.parametrize(("frozen", "left"), [("lora_A", ["B"]), ("lora_B", ["A"])])
def test_frozen_factors_are_skipped(frozen, left):
    """Only matrices that require a gradient are in the survey, but a frozen matrix still helps to
    read its pair.
    """
    model = nn.ModuleDict({"up": adapted(), "down": adapted()})
    model["down"].requires_grad_(False)
    getattr(model["up"], frozen).requires_grad_(False)
    survey = inspect_model(model)
    assert [(f.role, f.layer, f.init) for f in survey.factors] == [(left[0], "up", "A")]


def test_tied_factors_count_once():
    """A matrix that two layers share is in the survey once, by its first name."""
    model = nn.ModuleDict({"up": adapted(), "down": adapted()})
    model["down"].lora_A = model["up"].lora_A
    names = [f.name for f in inspect_model(model).factors]
    assert names == ["up.lora_A", "up.lora_B", "down.lora_B"]


@pytest.mark.parametrize("init", ["A", "B", "other", "unknown"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", FANS)
def test_init_is_read_from_the_zeros_or_named(style, kind, init):
    """The init follows from which matrix is zero, unless `init=` says otherwise."""
    layer = adapted(style, kind, init=init if init in "AB" else "other")
    if init == "unknown":
        for factor in layer.pair():
            nn.init.zeros_(factor)
    assert {f.init for f in inspect_model(layer).factors} == {init}
    for named in ("A", "B", "other"):
        assert {f.init for f in inspect_model(layer, init=named).factors} == {named}


@pytest.mark.parametrize("style", STYLES)
def test_the_model_is_left_as_found(style):
    """Inspection changes no parameter, gradient, mode or random state."""
    model = mlp((4, 8), style=style).eval()
    model.head.weight.grad = gradient = torch.ones(3, 16)
    before, random = snapshot(model), torch.get_rng_state()
    flags = [p.requires_grad for p in model.parameters()]
    inspect_model(model)
    assert same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not model.training
    assert model.head.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(3, 16))


# --- full finetuning ------------------------------------------------------------------------------------------------


def conv1d() -> nn.Module:
    """Return a stand-in for the Conv1D of transformers, whose weight has shape (in, out)."""
    layer = type("Conv1D", (nn.Module,), {})()
    layer.nf, layer.weight = 24, nn.Parameter(torch.ones(8, 24))
    return layer


def stack() -> nn.Module:
    """Return a module with a parameter of three dimensions: a stack of matrices (…, out, in)."""
    layer = nn.Module()
    layer.experts = nn.Parameter(torch.ones(4, 24, 8))
    return layer


# layers, with those weights that full finetuning counts: name, kind, fan-in and fan-out
FULL = {
    "emb": (nn.Embedding(50, 8), []),
    "conv": (nn.Conv2d(4, 6, 3), [("weight", "conv", 36, 6)]),
    "transposed": (nn.ConvTranspose2d(6, 4, 3), [("weight", "conv", 54, 4)]),
    "depthwise": (nn.Conv2d(6, 6, 5, groups=6), [("weight", "conv", 25, 6)]),
    "norm": (nn.BatchNorm2d(6), []),
    "attn": (
        nn.MultiheadAttention(8, 2),
        [("in_proj_weight", "linear", 8, 24), ("out_proj.weight", "linear", 8, 8)],
    ),
    "out": (nn.Linear(24, 5), [("weight", "linear", 24, 5)]),
    "conv1d": (conv1d(), [("weight", "linear", 8, 24)]),
    "stack": (stack(), [("experts", "linear", 8, 24)]),
}


def test_full_finetuning_takes_every_weight():
    """In full finetuning every weight of two or more dimensions has the role full, but embeddings,
    biases and norms are other parameters.
    """
    model = nn.ModuleDict({name: layer for name, (layer, _) in FULL.items()})
    survey = inspect_model(model, method="full")
    expected = [
        (f"{layer}.{name}", *row)
        for layer, (_, rows) in FULL.items()
        for name, *row in rows
    ]
    found = [(f.name, f.kind, f.fan_in, f.fan_out) for f in survey.factors]
    assert found == expected
    assert {(f.role, f.rank, f.scaling) for f in survey.factors} == {
        ("full", None, 1.0)
    }
    names = {name for name, _ in model.named_parameters()}
    assert set(survey.other) == names - {row[0] for row in expected}


NO_FULL = [
    (nn.Linear(3, 3).requires_grad_(False), "full", "none of the model's 2 parameters"),
    (adapted(), "full", "a trainable LoRA pair"),
    (adapted(), "qlora", "'lora' or 'full', but 'qlora' was passed"),
]


@pytest.mark.parametrize(("model", "method", "message"), NO_FULL)
def test_what_cannot_be_finetuned_in_full_is_refused(model, method, message):
    """A frozen model and a model with trainable adapters raise an error for full finetuning, and so
    does an unknown method.
    """
    with pytest.raises(InspectionError, match=message):
        inspect_model(model, method=method)


# --- names ----------------------------------------------------------------------------------------------------------

NAMES = [
    ("layer.weight", "layer.weight"),
    ("module.layer.weight", "layer.weight"),
    ("module._orig_mod.layer.weight", "layer.weight"),
    ("_orig_mod.module.layer.weight", "layer.weight"),
    ("_fsdp_wrapped_module.layer._fsdp_wrapped_module.weight", "layer.weight"),
    ("layer._checkpoint_wrapped_module.weight", "layer.weight"),
    ("encoder.module.weight", "encoder.module.weight"),
]


@pytest.mark.parametrize(("name", "plain"), NAMES)
def test_canonical_name(name, plain):
    """The prefixes of wrappers are removed anywhere in a name, but "module." only at the start."""
    assert canonical_name(name) == plain


def test_names_stay_apart():
    """If two parameters would get the same canonical name, all keep their own names."""
    inner = nn.ModuleDict({"up": adapted(rank=4)})
    survey = inspect_model(nn.ModuleDict({"module": inner, "up": adapted(rank=8)}))
    ranks = {f.name: f.rank for f in survey.factors if f.role == "A"}
    assert ranks == {"module.up.lora_A": 4, "up.lora_A": 8}
    assert {f.layer for f in survey.factors} == {"module.up", "up"}


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_wrapped_models_give_the_same_survey(wrap):
    """A wrapped model has the survey of the plain model."""
    assert inspect_model(wrap(mlp())) == inspect_model(mlp())


# --- the survey's numbers -------------------------------------------------------------------------------------------


def pairs(*rows: tuple[str, float, float], **options) -> list[Factor]:
    """Return the factors A and B of layers with these names and fans."""
    given = {"rank": 4, "init": "A", "kind": "linear", **options}
    return [
        Factor(f"{layer}.{role}", role, fan_in=n, fan_out=out, layer=layer, **given)
        for layer, n, out in rows
        for role in "AB"
    ]


def test_width_is_weighted_by_weight_size():
    """The width is the mean fan-in weighted by the size of the weights, counts each layer once, and
    leaves out embeddings.
    """
    adapted = pairs(("a", 10, 10), ("b", 40, 20))
    survey = Survey((*adapted, *pairs(("emb", 9999, 9999), kind="embedding")))
    assert survey.width == pytest.approx((10 * 100 + 40 * 800) / 900)
    assert survey.full_width("A") == 40
    assert survey.full_width("B") == survey.width


def test_dominant_is_the_most_common_by_pairs():
    """The most common configuration is counted by pairs, and embeddings and pairs without a law
    count only if there are no others.
    """
    one = pairs(("a", 8, 8))
    two = pairs(("b", 8, 8), ("c", 8, 8), rank=16, init="B")
    dominant = Survey((*one, *two)).dominant()
    assert (dominant.rank, dominant.scaling, dominant.init) == (16, 1.0, "B")
    embeddings = pairs(("e", 8, 8), ("f", 8, 8), kind="embedding", rank=2)
    assert Survey((*one, *embeddings)).dominant().rank == 4
    assert Survey(tuple(embeddings)).dominant().rank == 2
    lawless = pairs(("k", 8, 8), ("l", 8, 8), kind="kasa", rank=3)
    assert Survey((*one, *lawless)).dominant().rank == 4
    assert Survey(tuple(lawless)).dominant().rank == 3


def test_several_models_are_inspected_as_one():
    """A list of models has one survey, in which names begin with the model's number, but other
    lists raise an error.
    """
    models = [TuneLoRA(nn.Linear(12, 20), rank) for rank in (4, 8)]
    both = inspect_model(models).factors
    assert [f.name.partition(".")[0] for f in both] == ["0", "0", "1", "1"]
    assert [f.rank for f in both] == [4, 4, 8, 8]
    for wrong in (16, [], [models[0], 16], {"unet": models[0]}):
        with pytest.raises(InspectionError, match="A model was expected"):
            inspect_model(wrong)


def test_a_survey_cannot_be_changed():
    """The fields of a survey cannot be set, and equal surveys have the same hash."""
    survey = Survey(tuple(pairs(("a", 8, 8))))
    with pytest.raises(FrozenInstanceError):
        survey.factors = ()
    assert hash(survey) == hash(Survey(tuple(pairs(("a", 8, 8)))))


def test_an_empty_survey_has_no_dominant_reference():
    """Asking a survey without LoRA pairs for the most common configuration raises an error."""
    with pytest.raises(InspectionError, match="no LoRA pair"):
        Survey().dominant()
