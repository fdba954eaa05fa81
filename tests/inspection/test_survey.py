"""Inspection: what is found in a model, under which convention, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from rankaware_optim import InspectionError, inspect_model
from rankaware_optim._types import Factor, Survey
from rankaware_optim.inspection import canonical_name
from rankaware_optim.inspection._conventions import CONVENTIONS

from ..helpers.models import (
    STYLES,
    PlainLoRA,
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
    """A pair gives an A and a B factor with the layer's fans, rank, scaling and kind, at any dtype and on meta."""
    survey = inspect_model(
        nn.ModuleDict({"up": adapted(style, kind, **MATERIALS[material])})
    )
    convention = (
        "peft-embedding"
        if (style, kind) == ("container", "embedding")
        else CONVENTION[style]
    )
    assert [f.role for f in survey.factors] == ["A", "B"]
    for factor in survey.factors:
        assert (factor.fan_in, factor.fan_out) == FANS[kind]
        assert (factor.rank, factor.scaling, factor.kind, factor.layer) == (
            4,
            2.0,
            kind,
            "up",
        )
        assert factor.init == ("unknown" if material == "meta" else "A")
        assert factor.convention == convention
    assert survey.other == ()


@pytest.mark.parametrize(
    ("style", "attribute"), [("plain", "r"), ("tune", "rank"), ("kohya", "lora_dim")]
)
def test_declared_rank_against_shape_is_refused(style, attribute):
    """A declared rank that its factors' shapes contradict is an error that names layer and both numbers."""
    layer = adapted(style)
    setattr(layer, attribute, 16)
    with pytest.raises(
        InspectionError, match=r"block\.up declares rank 16 .*\(4, 12\).*\(20, 4\)"
    ):
        inspect_model(nn.ModuleDict({"block": nn.ModuleDict({"up": layer})}))


def test_factors_of_different_ranks_are_refused():
    """A and B that disagree with each other are an error even where no rank is declared."""
    layer = adapted()
    layer.r, layer.lora_B = None, nn.Parameter(torch.zeros(20, 5))
    with pytest.raises(
        InspectionError,
        match=r"declares no rank but lora_A has shape \(4, 12\) and lora_B \(20, 5\)",
    ):
        inspect_model(layer)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("style", "attribute"),
    [("plain", "scaling"), ("tune", "alpha"), ("kohya", "scale")],
)
def test_impossible_scaling_is_refused(style, attribute, value):
    """A scaling or alpha of zero, below zero, infinite or NaN is an error that names the layer."""
    layer = adapted(style)
    setattr(layer, attribute, value)
    with pytest.raises(
        InspectionError, match=r"^up has the scaling .* Give a positive finite alpha"
    ):
        inspect_model(nn.ModuleDict({"up": layer}))


def test_alpha_is_read_from_a_buffer():
    """Where only alpha is declared, as a one-element buffer, scaling is alpha / rank."""
    layer = adapted("kohya", scaling=0.5)
    del layer.scale
    assert {f.scaling for f in inspect_model(layer).factors} == {0.5}


def test_undeclared_rank_and_scaling():
    """An undeclared rank is the shape's, an undeclared scaling is 1 with a note."""
    layer = adapted()
    del layer.r, layer.scaling
    survey = inspect_model(nn.ModuleDict({"up": layer}))
    assert {(f.rank, f.scaling) for f in survey.factors} == {(4, 1.0)}
    assert survey.notes == ("up declares no scaling: 1 is assumed.",)


def test_no_pair_is_refused():
    """A model without pairs is an error that says how many parameters and which conventions were tried."""
    with pytest.raises(InspectionError) as caught:
        inspect_model(nn.Linear(3, 3))
    assert "among 2 parameters" in str(caught.value)
    assert all(c.name in str(caught.value) for c in CONVENTIONS)
    assert "method='full'" in caught.value.cure


@pytest.mark.parametrize(
    "train", [lambda model: None, lambda model: model.head.requires_grad_(True)]
)
def test_frozen_pairs_are_refused(train):
    """Pairs that are all frozen, as PEFT loads them, are an error that says how to load them for training."""
    model = mlp((4, 4)).requires_grad_(False)
    train(model)
    with pytest.raises(
        InspectionError, match=r"^4 LoRA factors found, all frozen"
    ) as caught:
        inspect_model(model)
    assert caught.value.cure.startswith("Load with is_trainable=True")


@pytest.mark.parametrize("lone", ["lora_A", "lora_B"])
def test_half_a_pair_is_other(lone):
    """A module that owns only one of the two factors owns no pair."""
    model = nn.ModuleDict({"up": adapted(), "lone": nn.Module()})
    model["lone"].register_parameter(lone, nn.Parameter(torch.ones(4, 4)))
    assert inspect_model(model).other == (f"lone.{lone}",)


@pytest.mark.parametrize(("frozen", "left"), [("lora_A", ["B"]), ("lora_B", ["A"])])
def test_frozen_factors_are_skipped(frozen, left):
    """Only what requires a gradient is a factor; the other half of its pair still informs it."""
    model = nn.ModuleDict({"up": adapted(), "down": adapted()})
    model["down"].requires_grad_(False)
    getattr(model["up"], frozen).requires_grad_(False)
    survey = inspect_model(model)
    assert [(f.role, f.layer, f.init) for f in survey.factors] == [(left[0], "up", "A")]


def test_tied_factors_count_once():
    """A factor that two layers share is one factor, by its first name; both layers' own halves remain."""
    model = nn.ModuleDict({"up": adapted(), "down": adapted()})
    model["down"].lora_A = model["up"].lora_A
    names = [f.name for f in inspect_model(model).factors]
    assert names == ["up.lora_A", "up.lora_B", "down.lora_B"]


def test_a_layer_used_twice_counts_once():
    """A module registered under two names is surveyed under the first."""
    layer = adapted()
    survey = inspect_model(nn.ModuleDict({"up": layer, "again": layer}))
    assert [f.name for f in survey.factors] == ["up.lora_A", "up.lora_B"]


@pytest.mark.parametrize("init", ["A", "B", "other"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", FANS)
def test_init_is_read_from_the_zeros(style, kind, init):
    """Without a declaration the init is the zero pattern: B zero, A zero, neither."""
    assert {f.init for f in inspect_model(adapted(style, kind, init=init)).factors} == {
        init
    }


def test_two_zero_factors_have_an_unknown_init():
    """A pair that is all zero says nothing about its init."""
    layer = adapted(init="B")
    nn.init.zeros_(layer.lora_B)
    assert {f.init for f in inspect_model(layer).factors} == {"unknown"}


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5000])
def test_the_sample_covers_long_factors(size):
    """A factor that is drawn everywhere is never taken for zero, whatever its size."""
    layer = PlainLoRA(nn.Linear(size, 3), 1)
    assert {f.init for f in inspect_model(layer).factors} == {"A"}


@pytest.mark.parametrize("named", ["A", "B", "other"])
@pytest.mark.parametrize("found", ["A", "B", "other"])
def test_the_user_may_name_the_init(found, named):
    """`init=` overrides whatever the factors say."""
    assert {f.init for f in inspect_model(adapted(init=found), init=named).factors} == {
        named
    }


@pytest.mark.parametrize("attribute", ["q_lora_rank", "kv_lora_rank", "lora_rank"])
def test_low_rank_attention_is_no_adapter(attribute):
    """A module with an integer such as q_lora_rank is not taken for an adapter (multi-head latent attention)."""
    block = nn.Module()
    setattr(block, attribute, 8)
    block.q_a_proj, block.q_b_proj = (
        nn.Linear(16, 8, bias=False),
        nn.Linear(8, 16, bias=False),
    )
    survey = inspect_model(nn.ModuleDict({"up": adapted(), "mla": block}))
    assert {f.layer for f in survey.factors} == {"up"}
    assert survey.other == ("mla.q_a_proj.weight", "mla.q_b_proj.weight")


@pytest.mark.parametrize("style", STYLES)
def test_the_model_is_left_as_found(style):
    """Inspection changes no bit of parameters, gradients, mode or random state."""
    model = mlp((4, 8), style=style).eval()
    model.get_submodule("head").weight.grad = torch.ones(3, 16)
    before, random, flags = (
        snapshot(model),
        torch.get_rng_state(),
        [p.requires_grad for p in model.parameters()],
    )
    inspect_model(model)
    assert same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not model.training
    assert torch.equal(model.get_submodule("head").weight.grad, torch.ones(3, 16))


def test_the_rest_is_other_by_name():
    """Everything trainable that is no factor is listed as other, in the model's order."""
    survey = inspect_model(mlp())
    assert survey.other == ("head.weight", "head.bias")
    assert survey.looked_at == len(list(mlp().parameters()))


# --- full finetuning ------------------------------------------------------------------------------------------------


def network() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "emb": nn.Embedding(50, 8),
            "conv": nn.Conv2d(4, 6, 3),
            "depthwise": nn.Conv2d(6, 6, 5, groups=6),
            "norm": nn.BatchNorm2d(6),
            "attn": nn.MultiheadAttention(8, 2),
            "out": nn.Linear(24, 5),
        }
    )


FULL = [
    ("conv.weight", "conv", 36, 6),
    ("depthwise.weight", "conv", 25, 6),
    ("attn.in_proj_weight", "linear", 8, 24),
    ("attn.out_proj.weight", "linear", 8, 8),
    ("out.weight", "linear", 24, 5),
]


def test_full_finetuning_takes_every_weight():
    """With method="full" every trainable weight of two or more dimensions is a factor of role full."""
    survey = inspect_model(network(), method="full")
    assert [(f.name, f.kind, f.fan_in, f.fan_out) for f in survey.factors] == FULL
    assert {(f.role, f.rank, f.scaling) for f in survey.factors} == {
        ("full", None, 1.0)
    }


def test_full_finetuning_leaves_vectors_and_embeddings_as_other():
    """Embeddings, biases and norms are other under full finetuning."""
    others = inspect_model(network(), method="full").other
    assert set(others) == {n for n, _ in network().named_parameters()} - {
        row[0] for row in FULL
    }
    assert "emb.weight" in others


def test_full_finetuning_of_a_frozen_model_is_refused():
    """Nothing trainable is an error that says how many parameters were looked at."""
    model = network().requires_grad_(False)
    with pytest.raises(
        InspectionError, match=f"None of {len(list(model.parameters()))} parameters"
    ):
        inspect_model(model, method="full")


def test_transformers_conv1d_is_transposed():
    """A Conv1D stores (in, out), so its fan-in is the first size."""
    layer = type("Conv1D", (nn.Module,), {})()
    layer.nf, layer.weight = 24, nn.Parameter(torch.ones(8, 24))
    assert [
        (f.fan_in, f.fan_out) for f in inspect_model(layer, method="full").factors
    ] == [(8, 24)]


def test_stacked_experts_have_the_last_size_as_fan_in():
    """A bare parameter of three dimensions is a stack of matrices (…, out, in)."""
    layer = nn.Module()
    layer.experts = nn.Parameter(torch.ones(4, 24, 8))
    assert [
        (f.fan_in, f.fan_out) for f in inspect_model(layer, method="full").factors
    ] == [(8, 24)]


def test_unknown_method_is_refused():
    """A method other than lora and full is an error."""
    with pytest.raises(InspectionError, match="'lora' or 'full', not 'qlora'"):
        inspect_model(adapted(), method="qlora")


# --- names ----------------------------------------------------------------------------------------------------------

NAMES = [
    ("layer.weight", "layer.weight"),
    ("module.layer.weight", "layer.weight"),
    ("_orig_mod.layer.weight", "layer.weight"),
    ("module._orig_mod.layer.weight", "layer.weight"),
    ("_orig_mod.module.layer.weight", "layer.weight"),
    ("_fsdp_wrapped_module.layer._fsdp_wrapped_module.weight", "layer.weight"),
    ("layer._checkpoint_wrapped_module.weight", "layer.weight"),
    ("encoder.module.weight", "encoder.module.weight"),
]


@pytest.mark.parametrize(("name", "plain"), NAMES)
def test_canonical_name(name, plain):
    """Wrappers' prefixes are dropped wherever they come, "module." at the front only."""
    assert canonical_name(name) == plain


def test_names_stay_apart():
    """Where dropping a prefix would give two parameters one name, all keep the names that the model gives them."""
    model = nn.ModuleDict(
        {"module": nn.ModuleDict({"up": adapted(rank=4)}), "up": adapted(rank=8)}
    )
    survey = inspect_model(model)
    assert [(f.name, f.rank) for f in survey.factors if f.role == "A"] == [
        ("module.up.lora_A", 4),
        ("up.lora_A", 8),
    ]
    assert {f.layer for f in survey.factors} == {"module.up", "up"}


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_wrapped_models_give_the_same_survey(wrap):
    """A wrapped model is surveyed under the names of the plain one."""
    assert inspect_model(wrap(mlp())) == inspect_model(mlp())


# --- the survey's numbers -------------------------------------------------------------------------------------------


def factor(
    layer: str,
    n: int,
    out: int,
    *,
    rank: int = 4,
    init: str = "A",
    kind: str = "linear",
) -> list[Factor]:
    return [
        Factor(f"{layer}.{role}", role, rank, n, out, init=init, kind=kind, layer=layer)
        for role in "AB"
    ]


def test_width_is_weighted_by_weight_size():
    """The width is the mean fan-in weighted by the adapted weights' size, each layer once, embeddings left out."""
    survey = Survey(
        (
            *factor("a", 10, 10),
            *factor("b", 40, 20),
            *factor("emb", 9999, 9999, kind="embedding"),
        )
    )
    assert survey.width == pytest.approx((10 * 100 + 40 * 800) / 900)
    assert survey.full_width("A") == 40
    assert survey.full_width("B") == survey.width


def test_dominant_is_the_most_common_by_pairs():
    """The dominant reference is the most common (rank, scaling, init), embeddings asked last."""
    survey = Survey(
        (
            *factor("a", 8, 8),
            *factor("b", 8, 8, rank=16, init="B"),
            *factor("c", 8, 8, rank=16, init="B"),
        )
    )
    assert (
        survey.dominant().rank,
        survey.dominant().scaling,
        survey.dominant().init,
    ) == (16, 1.0, "B")
    embeddings = (
        factor("e", 8, 8, kind="embedding", rank=2),
        factor("f", 8, 8, kind="embedding", rank=2),
    )
    assert (
        Survey((*factor("a", 8, 8), *embeddings[0], *embeddings[1])).dominant().rank
        == 4
    )
    assert Survey(tuple(embeddings[0])).dominant().rank == 2


def test_an_empty_survey_has_no_dominant_reference():
    """A survey without pairs cannot say what is most common."""
    with pytest.raises(InspectionError, match="no LoRA pair"):
        Survey().dominant()


def test_several_styles_in_one_model():
    """Pairs of different conventions are found side by side, each once."""
    model = nn.ModuleDict({style: adapted(style) for style in STYLES})
    survey = inspect_model(model)
    assert [f.layer for f in survey.factors] == [
        style for style in STYLES for _ in "AB"
    ]


def test_biases_of_factors_are_other():
    """A factor stored as a module may have a bias; it is other."""
    layer = TuneLoRA(nn.Linear(12, 20), 4)
    layer.lora_b = Weight(torch.zeros(20, 4))
    layer.lora_b.bias = nn.Parameter(torch.zeros(20))
    assert inspect_model(layer).other == ("lora_b.bias",)


def test_errors_have_cause_and_cure():
    """An error's text is its cause and then its cure."""
    with pytest.raises(InspectionError) as caught:
        inspect_model(nn.Linear(2, 2))
    assert re.fullmatch(
        f"{re.escape(caught.value.cause)} {re.escape(caught.value.cure)}",
        str(caught.value),
    )


def test_full_finetuning_refuses_trainable_pairs() -> None:
    """A model with adapters to train is not taken for full finetuning."""
    with pytest.raises(InspectionError, match="has a trainable LoRA pair"):
        inspect_model(mlp(), method="full")


def test_transposed_convolutions_have_their_own_fan_in() -> None:
    """A ConvTranspose stores (in, out, k, k): its fan-in is in × k²."""
    (factor,) = inspect_model(nn.ConvTranspose2d(6, 4, 3), method="full").factors
    assert (factor.fan_in, factor.fan_out) == (54.0, 4.0)
