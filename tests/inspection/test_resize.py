"""Adapters at another rank in place: every style and layout, what they declare, what they draw, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rankaware_optim import InspectionError, initialize, inspect_model
from rankaware_optim.inspection import Adapters, walk

from ..helpers.models import BASES, STYLES, adapted, mlp
from .test_initialize import LAYOUTS, inputs, owner


def remade(model: nn.Module, rank: int, seed: int = 0, **options) -> Adapters:
    """The model's adapters, made at `rank`."""
    adapters = Adapters(walk(model), (rank,), **options)
    adapters.remake(rank, seed)
    return adapters


RULES = {
    "fixed": lambda found, new: 1.0,
    "alpha": lambda f, n: f / n,
    "rslora": lambda f, n: math.sqrt(f / n),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rank", [1, 4, 7, 64])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("style", STYLES)
def test_every_style_and_kind_at_another_rank(style, kind, rank, rule):
    """The layer declares the new rank and the multiplier of the rule, gives its base's output, and can train."""
    layer, x = adapted(style, kind, rank=4, scaling=2.0), inputs(kind)
    output = layer(x)
    remade(layer, rank, rule=rule)
    factors = inspect_model(layer).factors
    assert {f.rank for f in factors} == {rank}
    assert [f.scaling for f in factors] == pytest.approx(
        [2.0 * RULES[rule](4, rank)] * 2, rel=1e-6
    )
    assert torch.equal(layer(x), output)
    layer(x).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tucker"])
def test_every_layout_at_another_rank(layout, init):
    """Whatever the layout, rank and fans are those asked for, and the variance is what `initialize` gives there."""
    make, _, _ = LAYOUTS[layout]
    model = nn.ModuleDict({"up": make()})
    found = inspect_model(model, init=init).factors
    remade(model, 32, init=init, variance="mua" if init == "A" else None)
    new = inspect_model(model).factors
    assert [(f.rank, f.fan_in, f.fan_out, f.kind, f.init) for f in new] == [
        (32, f.fan_in, f.fan_out, f.kind, init) for f in found
    ]
    drawn = {f.role: model.get_parameter(f.name) for f in new}[init].detach()
    again = drawn.clone()
    initialize(model, init, force=True)
    assert torch.equal(drawn, {f.role: model.get_parameter(f.name) for f in new}[init])
    assert torch.equal(drawn, again)


def test_back_at_its_own_rank():
    """At the rank found, the shapes and declarations are those found."""
    model = mlp((4, 4), scalings=3.0)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    remade(model, 4, rule="alpha")
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert {f.scaling for f in inspect_model(model).factors} == {3.0}


def test_the_seed_and_the_name_decide_the_draw():
    """One seed gives one draw, another another; a factor's rows at a small rank are the first ones at a large rank."""
    small, same, other, large = (mlp(seed=seed) for seed in (0, 1, 2, 3))
    for model, rank, seed in (
        (small, 2, 5),
        (same, 2, 5),
        (other, 2, 6),
        (large, 8, 5),
    ):
        remade(model, rank, seed)
    assert torch.equal(small.layer0.lora_A, same.layer0.lora_A)
    assert not torch.equal(small.layer0.lora_A, other.layer0.lora_A)
    assert torch.equal(small.layer0.lora_A, large.layer0.lora_A[:2])


@pytest.mark.parametrize(
    ("init", "kind", "expected"),
    [("A", "linear", "A"), ("B", "linear", "B"), ("A", "embedding", "A")],
)
def test_the_found_init_is_the_new_one(init, kind, expected):
    """Without init= a pair starts as it was found to start."""
    layer = adapted(kind=kind, init=init)
    remade(layer, 8)
    assert {f.init for f in inspect_model(layer).factors} == {expected}


def test_the_default_draw_is_the_libraries():
    """Init[A] is drawn uniform with variance 1/(3·fan_in), an embedding at Init[B] with variance 1."""
    wide = owner((4, 300), (8, 4))
    nn.init.normal_(wide.lora_A)
    remade(wide, 32)
    assert wide.lora_A.abs().max() <= 1 / math.sqrt(300)
    assert wide.lora_A.detach().var() == pytest.approx(1 / 900, rel=0.1)
    table = adapted(kind="embedding", init="B")
    remade(table, 256)
    assert table.lora_B.detach().var() == pytest.approx(1, rel=0.2)
    remade(nn.ModuleDict({"x": table}), 256, variance="mua")
    assert table.lora_B.detach().var() == pytest.approx(1 / 256, rel=0.2)


def test_proportions_are_kept():
    """Layers with twice the common rank keep twice the rank, and each its own multiplier."""
    model = mlp((4, 4, 8), scalings=(1.0, 1.0, 0.5))
    adapters = remade(model, 16)
    assert adapters.rank == 4
    assert [(f.rank, f.scaling) for f in inspect_model(model).factors[::2]] == [
        (16, 1.0),
        (16, 1.0),
        (32, 0.5),
    ]


def test_tied_factors_stay_tied():
    """A factor that two pairs share is one new factor for both."""
    model = mlp()
    model.layer1.lora_A = model.layer0.lora_A
    remade(model, 8)
    assert model.layer1.lora_A is model.layer0.lora_A
    assert model.layer0.lora_A.shape == (8, 16)


def test_what_the_factors_modules_say():
    """A factor that is a module declares its new sizes, and its bias is as long as its output."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lora_a, self.lora_b = nn.Linear(12, 4), nn.Linear(4, 20, bias=False)
            self.rank = 4
            nn.init.zeros_(self.lora_b.weight)

    layer = Biased()
    remade(layer, 6)
    assert (layer.lora_a.in_features, layer.lora_a.out_features) == (12, 6)
    assert (layer.lora_b.in_features, layer.lora_b.out_features) == (6, 20)
    assert not layer.lora_a.bias.any()
    assert layer.lora_b(layer.lora_a(torch.ones(2, 12))).shape == (2, 20)


def test_frozen_factors_stay_frozen_and_attributes_are_carried():
    """requires_grad, dtype and a parameter's own attributes are the found factor's."""
    layer = adapted().to(torch.bfloat16)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.mark = "mine"
    remade(layer, 8)
    assert (layer.lora_A.requires_grad, layer.lora_B.requires_grad) == (False, True)
    assert (layer.lora_B.mark, layer.lora_A.dtype) == ("mine", torch.bfloat16)


def odd_groups():
    return owner((16, 32, 3, 3), (256, 4, 1, 1), groups=4)


def both_drawn():
    return adapted(init="other")


def merged():
    layer = adapted()
    layer.merged = True
    return layer


def hada():
    layer = adapted()
    layer.hada_w1_a = nn.Parameter(torch.ones(4, 4))
    return layer


def viewed():
    model = nn.ModuleDict({"x": adapted(), "y": adapted()})
    model["y"].lora_A.data = model["x"].lora_A.data
    return model


def tucker():
    return LAYOUTS["tucker"][0]()


def read_only():
    class Fixed(type(adapted())):
        r = property(lambda self: 4)

    layer = adapted()
    del layer.r
    layer.__class__ = Fixed
    return layer


def undeclared():
    layer = adapted()
    del layer.scaling
    return layer


def on_meta():
    return adapted(device="meta")


REFUSED = [
    (odd_groups, 6, {"init": "B"}, "cannot be made at rank 6"),
    (
        lambda: mlp((4, 4, 6)),
        3,
        {},
        "layer2 has rank 6 where most have 4, so in a trial at rank 3 it would have 4.5",
    ),
    (both_drawn, 8, {}, "cannot be read, so new factors cannot be drawn"),
    (merged, 8, {}, "merged into its base weight"),
    (hada, 8, {}, r"hada_w1_a belongs to an adapter \(LoHa\)"),
    (viewed, 8, {}, "shares its memory"),
    (tucker, 8, {"init": "A"}, r"Tucker core"),
    (undeclared, 8, {"rule": "alpha"}, "declares no scaling"),
    (on_meta, 8, {"init": "A"}, "meta device"),
    (lambda: nn.Linear(3, 3), 8, {}, "No trainable LoRA pair"),
]


@pytest.mark.parametrize(("make", "rank", "options", "message"), REFUSED)
def test_what_cannot_be_made_is_refused_before_anything_changes(
    make, rank, options, message
):
    """A sentence says which pair cannot be made at which rank, and why."""
    model = make()
    before = [(id(p), p.shape) for p in model.parameters()]
    with pytest.raises(InspectionError, match=message):
        Adapters(walk(model), (rank,), **options)
    assert [(id(p), p.shape) for p in model.parameters()] == before


def test_a_rank_that_cannot_be_declared_is_refused():
    """A read-only rank is found out when it does not follow."""
    layer = read_only()
    with pytest.raises(InspectionError, match="'r' does not accept the value 8"):
        remade(layer, 8)
