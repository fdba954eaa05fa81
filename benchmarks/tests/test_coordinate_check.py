"""Tests of the coordinate check, which must accept right scaling laws and reject wrong ones."""

from __future__ import annotations

import pytest
import torch
from laws.coordinate_check import CoordinateCheck

from rankaware_optim import Constant, Factor, MuA, Reference


@pytest.mark.parametrize("init", "AB")
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_steps_are_those_of_a_real_layer(kind, init):
    """The check moves the output exactly as autograd does when it trains a real LoRA layer with
    these gradients.
    """
    check = CoordinateCheck(kind, Constant(), width=12, tokens=7)
    factor = Factor("", "A", 3, 12, 12, 0.5, init)
    at = Reference(3, 1.5, init=init, fan_in=12)
    x, g = check._tokens(0), check._tokens(1)
    a, b = check._pair(factor)
    opt = kind([a, b], lr=0.02, weight_decay=0.0)
    for _ in range(4):
        opt.zero_grad()
        (g * (0.5 * b @ (a @ x))).sum().backward()
        opt.step()
    moved = (0.5 * b @ a @ x).square().mean().sqrt().item()
    assert check.change(factor, at, 0.02) == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize(
    ("law", "init", "gamma", "is_right"),
    [
        (MuA(tokens=128.0), "A", 0, True),
        (MuA(tokens=128.0), "B", 1, True),
        (Constant(), "A", 1, False),
        (MuA(tokens=None), "A", 0, False),
    ],
)
def test_a_wrong_law_is_seen(law, init, gamma, is_right):
    """The slope over ranks is near zero for a right scaling law, and clearly different from zero
    for a wrong one.
    """
    check = CoordinateCheck(torch.optim.AdamW, law, width=128, tokens=128)
    slope = check.slope((4, 16), lambda rank: rank**-gamma, init)
    assert (abs(slope) < 0.2) is is_right, slope
