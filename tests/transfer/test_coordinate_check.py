"""The coordinate check, and the capture of a real batch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rankaware_optim import Constant, LawError, MuA, Power
from rankaware_optim.laws import law_title
from rankaware_optim.transfer import capture, coordinate_check
from rankaware_optim.transfer._simulate import (
    Batch,
    Stepper,
    change_of,
    draw_pair,
    rates_for,
    rms_of_product,
    step_pair,
    synthetic,
)

from ..helpers.models import mlp, same, snapshot
from ..helpers.optimizers import muon

SQUARE = {"q": (128, 128)}


class SignSGD(torch.optim.Optimizer):
    """The paper's model of Adam: every entry moves by the rate; nobody's table knows the name."""

    def __init__(self, params, lr, noise=0.0):
        super().__init__(params, {"lr": lr, "noise": noise})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(
                    p.grad.sign() + group["noise"] * torch.randn_like(p),
                    alpha=group["lr"],
                )


class NeedsClosure(SignSGD):
    """An optimizer that cannot step without a closure."""

    def step(self, closure):
        closure()


class Still(SignSGD):
    """An optimizer that never moves anything."""

    def step(self):
        pass


# --- one layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", "AB")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_are_those_of_a_real_layer(kind, init):
    """The pair moves as it does when autograd trains a LoRA layer on the loss that has these output gradients."""
    batch, start = synthetic(12, 20, 7), draw_pair(12, 20, 3, 0.5, init)
    found = step_pair(batch, start, Stepper(kind, {}), 0.02, 0.03)
    a, b = nn.Parameter(start.a.clone()), nn.Parameter(start.b.clone())
    opt = kind(
        [{"params": [a], "lr": 0.02}, {"params": [b], "lr": 0.03}], weight_decay=0.0
    )
    for _ in range(4):
        opt.zero_grad()
        (batch.gradients * (0.5 * b @ (a @ batch.inputs))).sum().backward()
        opt.step()
    assert torch.allclose(found.a, a, atol=1e-6)
    assert torch.allclose(found.b, b, atol=1e-6)
    moved = 0.5 * (b @ a - start.b @ start.a) @ batch.inputs
    assert change_of(batch, found) == pytest.approx(
        moved.square().mean().sqrt().item(), rel=1e-4
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_the_size_of_a_product(rows, rank, columns, seed):
    """The root mean square of a product is found without forming it."""
    source = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(rows, rank, generator=source),
        torch.randn(rank, columns, generator=source),
    )
    assert rms_of_product(left, right) == pytest.approx(
        (left @ right).square().mean().sqrt().item(), rel=1e-4
    )


@given(
    power=st.floats(0.5, 8),
    size=st.floats(-30, 30),
    start=st.floats(-20, 20),
    target=st.floats(0.01, 100),
)
def test_rates_are_found_from_anywhere(power, size, start, target):
    """A power of the rate, overflowing far above, is solved to 1 % of the target from any start."""
    rate = rates_for(
        lambda lr: (lr * 2.0**size) ** power if lr < 2.0**50 else math.inf,
        target,
        start=2.0**start,
    )
    assert (rate * 2.0**size) ** power == pytest.approx(target, rel=0.01)


UNREACHED = [
    (lambda lr: 0.0, "none"),
    (lambda lr: min(lr, 0.5), r"2\^-1.0 of it at 2\^\d+"),
    (lambda lr: math.nan, r"2\^inf of it"),
    (lambda lr: 1e-3 if lr < 0.1 else 1e3, r"2\^-10.0 of it at 2\^-3.3 and 2\^10.0"),
]


@pytest.mark.parametrize(("change", "message"), UNREACHED)
def test_a_target_that_is_never_reached_is_an_error(change, message):
    """Where no rate reaches the target, by a cap, an overflow or a jump, the error says how near it came."""
    with pytest.raises(LawError, match=rf"never moves by 1 at any rate.*{message}"):
        rates_for(change)


# --- the check ------------------------------------------------------------------------------------------------------

GOOD = [
    ("AdamW", "A", {}),
    ("AdamW", "B", {}),
    ("RMSprop", "A", {}),
    muon("A", {}, kind="Muon"),
    muon("B", {"adjust_lr_fn": "match_rms_adamw"}, kind="Muon"),
]


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize(("optimizer", "init", "settings"), GOOD)
def test_the_law_keeps_features_alike_at_every_rank(optimizer, init, settings, gamma):
    """At µA's rates, in the optimizer's own form and at the check's tokens, the output moves alike at every rank."""
    check = coordinate_check(
        {"q": (256, 256)},
        optimizer,
        init=init,
        settings=settings,
        scaling=lambda r: r**-gamma,
        tokens=256,
        ranks=(4, 16),
        tolerance=0.3,
    )
    assert check.ok, check
    assert "are rank-invariant" in check.sentence
    assert check.rows[0].change == pytest.approx(1.0, rel=0.02)


WRONG = [
    ("AdamW", "A", 0.0, Constant()),
    ("AdamW", "A", 0.0, MuA(tokens=None)),
    ("AdamW", "A", 1.0, Constant()),
    ("AdamW", "A", 0.0, Power(0.3, law=MuA(tokens=256))),
    ("AdamW", "B", 1.0, Constant()),
    ("SGD", "A", 1.0, Constant()),
    muon("B", 1.0, Constant(), kind="Muon"),
]


@pytest.mark.parametrize(("optimizer", "init", "gamma", "law"), WRONG)
def test_a_wrong_law_is_flagged(optimizer, init, gamma, law):
    """Rates that are wrong by a power of the rank are seen, and named in the sentence."""
    check = coordinate_check(
        SQUARE,
        optimizer,
        init=init,
        scaling=lambda r: r**-gamma,
        law=law,
        tokens=256,
        tolerance=0.2,
    )
    assert not check.ok, check
    assert f"NOT rank-invariant with {optimizer}, {law_title(law)}: over" in str(check)


@pytest.mark.parametrize(("init", "still"), [("A", "from_a"), ("B", "from_b")])
def test_rows_say_where_the_change_comes_from(init, still):
    """The share of the factor that starts at zero has no partner, and the others bound the whole change."""
    for row in coordinate_check(SQUARE, "AdamW", init=init, tokens=64).rows:
        assert getattr(row, still) == 0.0
        assert row.change <= row.from_a + row.from_b + row.from_both + 1e-6
        assert row.lr_a == row.lr_b > 0


def test_widths_and_shapes_are_named():
    """Every width of every shape is checked, equal shapes once, fan-outs in proportion, at a rate that is moved."""
    shapes = {"q": (64, 64), "k": (64, 64), "up": (128, 64)}
    check = coordinate_check(shapes, "AdamW", widths=(32, 128), ranks=(2, 8), tokens=64)
    assert [(row.layer, row.fan_in, row.fan_out) for row in check.rows[::2]] == [
        ("q at width 32", 32, 32),
        ("q at width 128", 128, 128),
        ("up at width 32", 32, 64),
        ("up at width 128", 128, 256),
    ]
    assert all(0.5 < row.change < 2.0 for row in check.rows)


def test_a_given_rate_is_used_and_nothing_global_is_touched():
    """The base rate may be given; two checks are equal, and global randomness and gradients are left alone."""
    model = mlp((4, 4), width=32)
    before, state = snapshot(model), torch.random.get_rng_state()
    first, second = (
        coordinate_check(
            model, SignSGD, lr=0.01, ranks=(2, 8), tokens=32, settings={"noise": 0.1}
        )
        for _ in range(2)
    )
    assert first == second
    assert first.lr == first.rows[0].lr_a == 0.01
    assert [row.layer for row in first.rows] == ["layer0", "layer0"]
    assert torch.equal(state, torch.random.get_rng_state())
    assert same(before, snapshot(model))


BAD = [
    ({"ranks": (4,)}, r"ranks=\(4,\).*at least two"),
    ({"ranks": (0, 4)}, "positive ranks"),
    ({"tokens": 0}, "tokens=0"),
    ({"steps": 0}, "steps=0"),
    ({"lr": math.nan}, "lr=nan"),
    ({"lr": 1e30}, "moves by inf"),
    ({"init": "C"}, "init='C'"),
    ({"optimizer": "adamx"}, "Unknown optimizer"),
    ({"optimizer": NeedsClosure}, "NeedsClosure could not step.*without a closure"),
    ({"optimizer": Still}, "never moves by 1"),
    ({"settings": {"beta": 1}}, "AdamW could not step LoRA factors with settings"),
    ({"model_or_shapes": {}}, "no layer to check"),
    ({"model_or_shapes": {"q": 256}}, r"q has the shape 256.*\(n_out, n_in\)"),
    ({"model_or_shapes": {"q": (256,)}}, r"q has the shape \(256,\)"),
    ({"model_or_shapes": {"q": (16, 16, 3)}}, r"q has the shape \(16, 16, 3\)"),
    ({"model_or_shapes": {"q": (16, 0)}}, r"q has the shape \(16, 0\)"),
    ({"model_or_shapes": {"q": (16.5, 16)}}, r"q has the shape \(16\.5, 16\)"),
    ({"model_or_shapes": {"q": "16x16"}}, r"q has the shape '16x16'"),
    ({"model_or_shapes": {"q": None}}, r"q has the shape None"),
    ({"model_or_shapes": (256, 256)}, r"has the shape 256"),
    ({"model_or_shapes": 256}, r"256 is neither a model nor shapes"),
    ({"model_or_shapes": "q"}, r"'q' is neither a model nor shapes"),
    ({"widths": 64}, r"widths=64"),
    ({"widths": (64, 0)}, r"widths=\(64, 0\)"),
    ({"ranks": 4}, r"ranks=4"),
    ({"ranks": (4, 8.5)}, r"ranks=\(4, 8\.5\)"),
    (
        {"captured": {"q": (torch.ones(3, 2), torch.ones(3, 4))}},
        r"captured as \(3, 2\) and \(3, 4\)",
    ),
    ({"captured": {"q": (torch.ones(3, 2), torch.zeros(3, 2))}}, "has no gradient"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_requests_are_refused(arguments, message):
    """What cannot be checked is an error with its cause and a cure."""
    with pytest.raises(LawError, match=message):
        coordinate_check(
            **{
                "model_or_shapes": {"q": (16, 16)},
                "optimizer": "AdamW",
                "tokens": 16,
                **arguments,
            }
        )


# --- a real batch ---------------------------------------------------------------------------------------------------


def test_a_captured_batch_is_the_real_one():
    """Inputs and output gradients are those of the real pass; padding's zero gradients are left out of the check."""
    model, x = (
        mlp((4, 4), width=16),
        torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0)),
    )
    x[4] = 0.0
    captured = capture(model, lambda m: m(x)[:4].square().sum())
    inner = model.layer0(x).detach().requires_grad_()
    model[1:](inner)[:4].square().sum().backward()
    inputs, gradients = captured["layer0"]
    assert torch.equal(inputs, x.reshape(-1, 16).T)
    assert torch.allclose(gradients, inner.grad.reshape(-1, 16).T)
    check = coordinate_check(model, "AdamW", captured=captured, ranks=(2, 4))
    assert [row.layer for row in check.rows] == ["layer0", "layer0", "layer1", "layer1"]


def test_capturing_leaves_the_model_as_found():
    """Weights, statistics, gradients, mode, hooks and random state are what they were, even where the run fails."""
    model = nn.Sequential(
        mlp((4,), width=16, head=False), nn.BatchNorm1d(16), nn.Dropout(0.5)
    )
    model(torch.randn(4, 16)).sum().backward()
    model[1].eval()
    before, state = snapshot(model), torch.random.get_rng_state()
    gradients = [
        (p, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]

    def run(m, fail=False):
        m.train()
        loss = m(torch.randn(4, 16)).square().sum()
        loss.backward(retain_graph=True)
        return None if fail else loss

    assert set(capture(model, run)) == {"0.layer0"}
    with pytest.raises(LawError, match="no loss"):
        capture(model, lambda m: run(m, fail=True))
    assert same(before, snapshot(model))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(
        p.grad is None if g is None else torch.equal(p.grad, g) for p, g in gradients
    )
    assert [m.training for m in model] == [True, False, True]
    assert not any(m._forward_hooks for m in model.modules())


def test_a_loss_without_adapters_is_refused():
    """A run that uses no adapted layer has nothing to capture."""
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(LawError, match="No adapted linear layer had a gradient"):
        capture(mlp(), lambda m: weight.sum())


# --- the exponents --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", "AB")
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_formula_and_check_have_the_same_rank_exponent(gamma, init):
    """From rank 4 to 16 at width 256 and 64 tokens, AdamW's exponents of formula and check differ by less than .1."""
    law, batch = MuA(tokens=64), synthetic(256, 256, 64)
    logs = []
    for rank in (4, 16):
        start = draw_pair(256, 256, rank, rank**-gamma, init)
        formula = law.sigma(init, rank, rank**-gamma, 256)
        rate = rates_for(
            lambda lr, start=start: change_of(
                batch, step_pair(batch, start, Stepper(torch.optim.AdamW, {}), lr, lr)
            )
        )
        logs.append((math.log2(formula), math.log2(rate)))
    formula, check = (after - before for before, after in zip(*logs, strict=True))
    assert abs(formula - check) / 2 < 0.1


def test_results_are_frozen():
    """A result cannot be changed after the fact."""
    check = coordinate_check({"q": (16, 16)}, "AdamW", ranks=(2, 4), tokens=16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        check.lr = 1.0
    assert isinstance(synthetic(4, 4, 2), Batch)
