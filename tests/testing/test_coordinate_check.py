"""The coordinate check: right laws pass, wrong ones are named, and nothing outside is touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankaware_optim import Constant, LawError, MuA, Power, Reference
from rankaware_optim.laws import law_title
from rankaware_optim.testing import coordinate_check
from rankaware_optim.testing._coordinate_check import Factor, _Stepper, _tokens

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


@pytest.mark.parametrize("init", "AB")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_are_those_of_a_real_layer(kind, init):
    """The output moves as where autograd trains a LoRA layer on the loss that has these output gradients."""
    factor = Factor("", "A", 3, 12, 20, 0.5, init)
    at = Reference(3, 1.5, init=init, fan_in=12)
    stepper = _Stepper(kind, {}, Constant(), at, 4, 0)
    x, g = _tokens(12, 7, 0), _tokens(20, 7, 1)
    a, b = stepper._pair(factor)
    opt = kind([a, b], lr=0.02, weight_decay=0.0)
    for _ in range(4):
        opt.zero_grad()
        (g * (0.5 * b @ (a @ x))).sum().backward()
        opt.step()
    moved = (0.5 * b @ a @ x).square().mean().sqrt().item()
    assert stepper.change(x, g, factor, 0.02) == pytest.approx(moved, rel=1e-4)


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


def test_no_random_state_is_touched():
    """Two checks are equal, also with an optimizer that draws numbers, and leave torch's generator as it was."""
    state = torch.random.get_rng_state()
    shapes = {"q": (16, 32), "up": (64, 16)}
    options = {"ranks": (2, 8), "tokens": 32, "settings": {"noise": 0.1}}
    first, second = (coordinate_check(shapes, SignSGD, **options) for _ in range(2))
    assert first == second
    assert [(row.layer, row.fan_in, row.fan_out) for row in first.rows[1:3]] == [
        ("q", 32, 16),
        ("up", 16, 64),
    ]
    assert torch.equal(state, torch.random.get_rng_state())


BAD = [
    ({"ranks": (4,)}, r"length >= 2 - at `\$\.ranks`.*two or more ranks"),
    ({"ranks": (4, 4)}, r"length >= 2 - at `\$\.ranks`"),
    ({"ranks": (0, 4)}, r"\$\.ranks"),
    ({"ranks": (4, 8.5)}, r"\$\.ranks"),
    ({"tokens": 0}, r"\$\.tokens"),
    ({"steps": 0}, r"\$\.steps"),
    ({"law": Power(exponent=7.0), "ranks": (1, 10**4)}, "moves by (inf|nan)"),
    ({"init": "C"}, "init is"),
    ({"optimizer": NeedsClosure}, "could not step.*without a closure"),
    ({"optimizer": Still}, "by an rms of 1 at no rate"),
    ({"settings": {"beta": 1}}, "could not step LoRA factors with settings"),
    ({"shapes": {}}, r"\$\.shapes.*\(n_out, n_in\)"),
    ({"shapes": {"q": 256}}, r"\$\.shapes"),
    ({"shapes": {"q": (16, 16, 3)}}, r"\$\.shapes"),
    ({"shapes": {"q": (16, 0)}}, r"\$\.shapes"),
    ({"shapes": {"q": "16"}}, r"\$\.shapes"),
    ({"shapes": nn.Linear(2, 2)}, r"\$\.shapes"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_requests_are_refused(arguments, message):
    """What cannot be checked is an error with its cause and a cure."""
    given = {"shapes": {"q": (16, 16)}, "optimizer": "AdamW", "tokens": 16, **arguments}
    with pytest.raises(LawError, match=message):
        coordinate_check(**given)
