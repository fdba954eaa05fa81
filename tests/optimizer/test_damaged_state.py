"""Damaged checkpoints: refused in one sentence with nothing changed, or loaded so that a step works."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankaware_optim import CheckpointError, RankAwareOptimizer, Reference

from ..helpers.models import mlp, same, snapshot, train


class EightBit(torch.optim.Optimizer):
    """Moments in bytes with a scale per row, as 8-bit optimizers keep them, and a step that takes them for whole."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                state = self.state[param]
                if not state:
                    state["step"] = 0
                    state["state1"] = torch.full_like(param, 128, dtype=torch.uint8)
                    state["absmax1"] = torch.zeros(len(param))
                state["step"] += 1
                scale = state["absmax1"].view(-1, *(1 for _ in param.shape[1:]))
                mean = (
                    0.9 * (state["state1"].float() / 127 - 128 / 127) * scale
                    + 0.1 * param.grad
                )
                state["absmax1"].copy_(mean.abs().reshape(len(param), -1).amax(1))
                state["state1"].copy_(
                    (mean / mean.abs().max().clamp(1e-12) * 127 + 128).round()
                )
                param -= group["lr"] * mean.sign()


class StateWhenBuilt(torch.optim.Adagrad):
    """Adagrad of older versions of torch: it makes its state when it is built, and a step without state fails."""

    def _init_group(self, group, *lists):
        for param in group["params"]:
            self.state[param]["sum"]
        return super()._init_group(group, *lists)


class NeedsMore(torch.optim.AdamW):
    """A subclass whose constructor needs more than groups."""

    def __init__(self, params, kind, **rest):
        super().__init__(params, **rest)
        self.kind = kind


class Preconditioned(torch.optim.Optimizer):
    """A square matrix beside each parameter, and a scale per row: state of shapes that are no parameter's."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for param in (
            p
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ):
            state, grad = self.state[param], param.grad.reshape(len(param), -1)
            state["left"] = state.get("left", 0) + grad @ grad.T
            state["rows"] = grad.square().mean(1, keepdim=True)
            param -= 1e-3 * (state["left"] @ grad / (state["rows"].sum() + 1)).reshape(
                param.shape
            )


KINDS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True}),
    "adamw-foreach-amsgrad": (torch.optim.AdamW, {"foreach": True, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd-fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "adagrad-fused": (torch.optim.Adagrad, {"fused": True}),
    "state when built": (StateWhenBuilt, {"fused": True}),
    "a constructor that needs more": (NeedsMore, {"kind": "any"}),
    "adafactor": (torch.optim.Adafactor, {}),
    "eight bits": (EightBit, {}),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    KINDS["muon"] = (torch.optim.Muon, {})


def built(kind, ranks=(4, 8), policy="raise"):
    """A new model and the optimizer of `kind` on it; Muon has no vectors."""
    native, options = KINDS[kind]
    model = mlp(ranks)
    if kind == "muon":
        model.head.bias.requires_grad_(False)
    return model, RankAwareOptimizer(
        model,
        native,
        lr=1e-2,
        tuned_at=Reference(16, 16),
        init="A",
        on_rank_change=policy,
        **options,
    )


@cache
def _stepped(kind, ranks):
    model, opt = built(kind, ranks)
    train(model, opt, steps=2)
    return copy.deepcopy(opt.state_dict())


def checkpoint(kind, ranks, plain):
    state = copy.deepcopy(_stepped(kind, ranks))
    for group in state["param_groups"] if plain else ():
        for key in [
            k for k in group if k.startswith(("lora_", "rank", "param_", "user_"))
        ]:
            del group[key]
    return state


@pytest.mark.filterwarnings("ignore:.* is of an unknown family")
def test_state_of_other_shapes_is_the_optimizers_own_affair():
    """An optimizer whose state has other shapes than its parameters resumes, bit for bit."""
    models = [mlp((4, 8)) for _ in range(2)]
    first, second = (
        RankAwareOptimizer(model, Preconditioned, lr=1e-2, init="A") for model in models
    )
    for steps in (3, 2):
        train(models[0], first, steps=steps)
        models[1].load_state_dict(models[0].state_dict())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, opt in zip(models, (first, second), strict=True):
        train(model, opt, steps=2)
    assert same(*map(snapshot, models))


@pytest.mark.filterwarnings("ignore:.* is of an unknown family")
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 16), (16, 4)])
def test_bytes_of_another_shape_are_refused(shape):
    """A moment that the optimizer makes with its parameter's shape must have it, in other packages too."""
    state = checkpoint("eight bits", (4, 8), plain=False)
    state["state"][0]["state1"] = torch.zeros(shape, dtype=torch.uint8)
    with pytest.raises(
        CheckpointError,
        match=r"state1 of layer0.lora_A has shape .*, where \(4, 16\) is needed",
    ):
        built("eight bits")[1].load_state_dict(state)


NUMBERS = [
    math.nan,
    math.inf,
    -1.0,
    0,
    0.0,
    1e300,
    5e-324,
    True,
    "1e-3",
    "x",
    "",
    None,
    [],
    {},
    (1, 2),
    b"x",
    10**400,
]
TENSORS = [
    torch.tensor(math.nan),
    torch.ones(()),
    torch.ones(3),
    torch.ones(1, 1),
    torch.tensor(True),
    torch.ones(0),
]
VALUES = st.sampled_from(NUMBERS + TENSORS)


def other_tensor(value, draw):
    """A tensor like `value` in all but one respect: its sizes, its layout in memory, its kind of numbers."""
    shape = list(value.shape)
    axis = draw(st.integers(0, max(0, len(shape) - 1)))
    return draw(
        st.sampled_from(
            [
                lambda: torch.zeros([1] * len(shape)),
                lambda: torch.zeros(
                    [n if i != axis else 1 for i, n in enumerate(shape)]
                ),
                lambda: torch.zeros(
                    [n if i != axis else n + 1 for i, n in enumerate(shape)]
                ),
                lambda: torch.zeros(
                    [n if i != axis else max(0, n - 1) for i, n in enumerate(shape)]
                ),
                lambda: torch.zeros(shape[::-1]),
                lambda: torch.zeros(shape[::-1]).permute(*range(len(shape))[::-1]),
                lambda: torch.zeros(1).expand(shape),
                lambda: torch.zeros([2 * n for n in shape])[
                    tuple(slice(None, None, 2) for _ in shape)
                ],
                lambda: torch.zeros([*shape, 1]),
                lambda: value.reshape(-1),
                lambda: torch.zeros(()),
                lambda: torch.zeros(shape, dtype=torch.int64),
                lambda: torch.zeros(shape, dtype=torch.float64),
                lambda: torch.zeros(shape, dtype=torch.bool),
                lambda: torch.zeros(shape, device="meta"),
                lambda: torch.zeros(shape).to_sparse(),
                lambda: nn.Parameter(torch.zeros(shape)),
            ]
        )
    )()


def damage(state, draw):
    """One change to a checkpoint, anywhere in it."""
    group = draw(st.sampled_from(state["param_groups"]))
    where = draw(st.sampled_from(["state", "group", "list", "groups", "whole", "keys"]))
    if where == "state":
        entry = state["state"][draw(st.sampled_from(sorted(state["state"], key=str)))]
        if not isinstance(entry, dict) or not entry:
            return
        key = draw(st.sampled_from(sorted(entry, key=str)))
        how = draw(st.sampled_from(["tensor", "value", "drop", "extra"]))
        if how == "tensor" and isinstance(entry[key], torch.Tensor):
            entry[key] = other_tensor(entry[key], draw)
        elif how == "drop":
            del entry[key]
        else:
            entry[key if how == "value" else "more"] = draw(VALUES)
    elif where == "group":
        key = draw(st.sampled_from(sorted(group)))
        if draw(st.booleans()):
            group[key] = draw(VALUES)
        else:
            del group[key]
    elif where == "list":
        name = draw(
            st.sampled_from(
                [k for k in ("params", "param_names") if isinstance(group.get(k), list)]
                or [""]
            )
        )
        if not name or not group[name]:
            return
        listed = group[name]
        at = draw(st.integers(0, len(listed) - 1))
        how = draw(st.sampled_from(["drop", "twice", "value", "first"]))
        if how == "drop":
            del listed[at]
        else:
            listed[at : at + (how != "twice")] = [
                {
                    "value": lambda: draw(VALUES),
                    "twice": lambda: listed[at],
                    "first": lambda: listed[0],
                }[how]()
            ]
    elif where == "groups":
        groups = state["param_groups"]
        at = draw(st.integers(0, len(groups) - 1))
        how = draw(st.sampled_from(["drop", "twice", "value", "reverse"]))
        if how == "reverse":
            groups.reverse()
        elif how == "drop":
            del groups[at]
        else:
            groups.insert(
                at, copy.deepcopy(groups[at]) if how == "twice" else draw(VALUES)
            )
    elif where == "keys":
        key = draw(st.sampled_from(sorted(state["state"], key=str)))
        value = state["state"].pop(key)
        how = draw(st.sampled_from(["drop", "text", "value"]))
        if how == "text":
            state["state"][str(key)] = value
        elif how == "value":
            state["state"][key] = draw(VALUES)
    else:
        state[draw(st.sampled_from(["state", "param_groups", "more"]))] = draw(VALUES)


def described(value):
    """`value` as text, tensors to the bit."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.tolist()}"
    if isinstance(value, dict):
        return {str(k): described(v) for k, v in value.items()}
    return (
        [described(v) for v in value]
        if isinstance(value, (list, tuple))
        else repr(value)
    )


def outcome(kind, policy, ranks, plain, stepped, draw, changes):
    """Damage a checkpoint and load it: "refused" or "loaded"; fails where it is neither, or a half of both."""
    state = checkpoint(kind, ranks, plain)
    for _ in range(changes):
        try:
            damage(state, draw)
        # nothing left there to damage
        except (
            TypeError,
            KeyError,
            AttributeError,
            IndexError,
            ValueError,
            RuntimeError,
        ):
            break
    model, opt = built(kind, policy=policy)
    if stepped:
        train(model, opt, steps=1)
    held, groups, attributes = opt.state, opt.param_groups, set(vars(opt))
    before, weights = described(opt.state_dict()), snapshot(model)
    random = torch.get_rng_state()
    try:
        opt.load_state_dict(state)
    except CheckpointError:
        assert (opt.state is held, opt.param_groups is groups, set(vars(opt))) == (
            True,
            True,
            attributes,
        )
        assert described(opt.state_dict()) == before
        assert same(weights, snapshot(model))
        assert torch.equal(random, torch.get_rng_state())
        return "refused"
    assert same(weights, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())
    for param in (p for group in opt.param_groups for p in group["params"]):
        for key, value in opt.state.get(param, {}).items():
            reduced = key in ("row_var", "col_var") or (
                kind == "eight bits" and key == "more"
            )
            if (
                isinstance(value, torch.Tensor)
                and value.dim() == param.dim()
                and not reduced
            ):
                assert value.shape == param.shape
    # of another package's state the shapes are known, not what its step looks for
    if kind != "eight bits":
        train(model, opt, steps=2)
    return "loaded"


POLICIES = st.sampled_from(["raise", "reset"])
RANKS = st.sampled_from([(4, 8), (4, 8), (2, 8), (8, 8)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.data(), POLICIES, RANKS, st.booleans(), st.booleans(), st.integers(1, 3))
def test_a_damaged_checkpoint_is_refused_or_steps(
    kind, data, policy, ranks, plain, stepped, changes
):
    """However a checkpoint is damaged, it is one error of ours that changes nothing, or the optimizer can step."""
    outcome(kind, policy, ranks, plain, stepped, data.draw, changes)
