"""`initialize`: which values it draws, what it leaves unchanged to the last bit, and which pairs
raise an error.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from rankaware_optim import InspectionError, inspect_model
from rankaware_optim.inspection import initialize

from ..helpers.models import STYLES, adapted, mlp, same, snapshot, train

# --- the drawn values -----------------------------------------------------------------------------------------------


def owner(
    a: tuple[int, ...],
    b: tuple[int, ...],
    names: tuple[str, str] = ("lora_A", "lora_B"),
    **others,
) -> nn.Module:
    """Return a module with A and B of these shapes, all zero, and with these attributes."""
    module = nn.Module()
    for name, shape in zip(names, (a, b), strict=True):
        setattr(module, name, nn.Parameter(torch.zeros(shape)))
    for name, value in others.items():
        setattr(module, name, value)
    return module


def of_embedding() -> nn.Module:
    return owner(
        (16, 500), (128, 16), base_layer=nn.Embedding(500, 128).requires_grad_(False)
    )


CONV = nn.Conv2d(32, 64, 3).requires_grad_(False)
OF_CONV = (16, 32, 3, 3)
LAYOUTS = {
    # the owner, the variance of A if B is zero, and the variance of B if A is zero
    "rows": (partial(owner, (16, 128), (256, 16)), 1 / 128, 1 / 16),
    "embedding": (of_embedding, 1.0, 1 / 16),
    "conv": (partial(owner, OF_CONV, (256, 16, 1, 1)), 1 / 288, 1 / 16),
    "grouped": (partial(owner, OF_CONV, (256, 4, 1, 1), groups=4), 1 / 288, 1 / 4),
    "kernel": (partial(owner, (48, 96), (192, 48), conv=CONV, r=16), 1 / 288, 1 / 48),
}


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_variance_of_every_layout(layout, init):
    """A is drawn from a normal distribution with variance 1/fan_in, and B with variance one over
    the number of inner features that B sums.
    """
    make, of_a, of_b = LAYOUTS[layout]
    model = nn.ModuleDict({"up": make()})
    factors = initialize(model, init).factors
    roles = {f.role: model.get_parameter(f.name).detach() for f in factors}
    unit = roles.pop(init) / math.sqrt(of_a if init == "A" else of_b)
    (zero,) = roles.values()
    count = unit.numel()
    assert abs(unit.mean()) < 5 / math.sqrt(count)
    assert unit.square().mean() == pytest.approx(1, abs=5 * math.sqrt(2 / count))
    far = (unit.abs() > 1.96).float().mean()
    assert far == pytest.approx(0.05, abs=5 * math.sqrt(0.05 / count))
    assert not zero.any()


def drawn(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in snapshot(model).items() if "lora" in name}


def test_the_seed_decides_the_draw():
    """The same seed gives the same values, whatever the random state and the wrappers of the model,
    and another seed gives other values.
    """
    models = [mlp(seed=seed) for seed in (0, 1, 2)]
    wrapped = nn.ModuleDict({"module": mlp()})  # a prefix such as DDP adds
    initialize(wrapped, "B", seed=3)
    for model, seed in zip(models, (3, 3, 4), strict=True):
        initialize(model, "B", seed=seed)
    assert same(drawn(models[0]), drawn(models[1]))
    assert same(drawn(models[0]), drawn(wrapped["module"]))
    assert not torch.equal(models[0].layer0.lora_B, models[2].layer0.lora_B)
    assert not torch.equal(models[0].layer0.lora_B, models[0].layer1.lora_B)


def test_torch_s_defaults_do_not_reach_the_draw():
    """torch's default device and default dtype do not change the drawn values."""
    first, second = mlp(), mlp()
    initialize(first, "B")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            initialize(second, "B")
    finally:
        torch.set_default_dtype(before)
    assert same(drawn(first), drawn(second))


# --- what stays unchanged -------------------------------------------------------------------------------------------


def test_nothing_else_changes():
    """Initialising leaves the random state, gradients, modes, requires_grad, the head and frozen
    pairs unchanged.
    """
    model = mlp((4, 4, 4), scalings=3.0).eval()
    model.act0.train()
    model.layer1.requires_grad_(False)
    model(torch.ones(2, 16)).sum().backward()
    before, random = snapshot(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    found = [(p.requires_grad, copy.deepcopy(p.grad)) for p in model.parameters()]
    survey = initialize(model, "B")
    assert {factor.scaling for factor in survey.factors} == {3.0}
    after = snapshot(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {f"layer{i}.lora_{half}" for i in (0, 2) for half in "AB"}
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert model.layer1.scaling == 3.0
    for param, (wanted, gradient) in zip(model.parameters(), found, strict=True):
        assert param.requires_grad == wanted
        assert param.grad is gradient or torch.equal(param.grad, gradient)


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("style", STYLES)
def test_the_init_is_known_after_training(style, init):
    """After some steps neither A nor B is zero, and inspection still knows how they started."""
    model = mlp(style=style, init="A" if init == "B" else "B")
    initialize(model, init)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for found in (model, copy.deepcopy(model)):
        assert {f.init for f in inspect_model(found).factors} == {init}
    fresh = mlp(style=style)
    initialize(fresh, init)
    fresh.load_state_dict(model.state_dict())
    assert {f.init for f in inspect_model(fresh).factors} == {init}


def test_tied_factors_are_drawn_once():
    """A matrix that several pairs share is drawn once, by its first name, and the init is noted for all of them."""
    model = mlp()
    model.layer1.lora_B = model.layer0.lora_B
    alone = mlp((4,))
    survey = initialize(model, "B")
    initialize(alone, "B")
    assert torch.equal(model.layer1.lora_B, alone.layer0.lora_B)
    assert {f.init for f in survey.factors} == {"B"}


# --- pairs that raise an error --------------------------------------------------------------------------------------


def trained(model: nn.Module, name: str = "lora_B") -> None:
    getattr(model["up"], name).data.view(-1)[-2] = 1e-3


def adalora(model: nn.Module) -> None:
    model["up"] = up = nn.Module()
    up.r, up.scaling = {"x": 4}, {"x": 2.0}
    for name, shape in (("lora_A", (4, 12)), ("lora_B", (20, 4)), ("lora_E", (4, 1))):
        setattr(up, name, nn.ParameterDict({"x": nn.Parameter(torch.zeros(shape))}))


def without(half: str):
    return lambda model: getattr(model["up"], half).requires_grad_(False)


def holding(**values):
    """Return a function that sets these attributes on the layer."""

    def spoil(model: nn.Module) -> None:
        for name, value in values.items():
            setattr(model["up"], name, value)

    return spoil


FLAT, PARTITION = (nn.Parameter(torch.zeros(size)) for size in (24, 0))
SPREAD = nn.Parameter(torch.zeros(4, 12))
SPREAD.full_tensor = None  # as a DTensor has it
REFUSED = [
    (trained, {"init": "A"}),
    (trained, {"init": "B"}),
    (adalora, {}),
    (without("lora_A"), {"init": "B"}),
    (without("lora_B"), {"init": "A"}),
    (lambda model: model.requires_grad_(False), {}),
    (holding(r=5), {}),
    (holding(lora_A=FLAT), {}),
    (holding(lora_B=PARTITION), {}),
    (holding(lora_A=SPREAD), {}),
    (holding(scaling=-1.0), {}),
    (holding(), {"init": "C"}),
]


@pytest.mark.parametrize(("spoil", "options"), REFUSED)
def test_what_is_refused_before_anything_changes(spoil, options):
    """An impossible initialisation raises an InspectionError, and changes neither the matrices nor
    the recorded init.
    """
    model = nn.ModuleDict({"first": adapted(init="A"), "up": adapted(init="A")})
    spoil(model)
    before = snapshot(model)
    with pytest.raises(InspectionError):
        initialize(model, **{"init": "B", **options})
    assert same(snapshot(model), before)
    assert not any("_rankaware_init" in vars(module) for module in model.modules())


def test_a_bias_behind_a_zero_factor_adds_something():
    """A pair whose A is zero but has a nonzero bias raises an error, because the bias reaches the
    output through B.
    """
    model = nn.Module()
    model.lora_a, model.lora_b = nn.Linear(8, 4), nn.Linear(4, 8, bias=False)
    nn.init.zeros_(model.lora_a.weight)
    with pytest.raises(InspectionError, match="has a nonzero bias"):
        initialize(model, "A")


def test_a_frozen_drawn_factor_is_drawn():
    """A is drawn even if it is frozen, so a pair in which only the zero matrix B trains (LoRA-FA)
    can be initialised.
    """
    model = mlp()
    for layer in (model.layer0, model.layer1):
        layer.lora_A.requires_grad_(False)
    before = model.layer0.lora_A.clone()
    initialize(model, "A")
    assert not torch.equal(before, model.layer0.lora_A)
