"""Tests of other packages' optimizers that wrap ours, compared with the same wrappers around groups by hand."""

from __future__ import annotations

import pytest
import torch

from rankaware_optim import RankAwareOptimizer, Reference

from ...helpers.models import batches, mlp, same, snapshot
from ...helpers.optimizers import groups_by_hand

LR = 1e-2
AT_16 = Reference(rank=16, alpha=16)
STEPS = 6


def ours(model, kind):
    return RankAwareOptimizer(model, kind, lr=LR, tuned_at=AT_16)


def by_hand(model, kind):
    return kind(groups_by_hand(model, LR, kind), lr=LR)


def trained_by(around, make, kind):
    """Return the weights after some steps with a closure of the optimizer that `around` builds."""
    model = mlp((4, 8), seed=3)
    start = snapshot(model)
    opt = around(model, make, kind)
    getattr(opt, "train", lambda: None)()
    for x in batches(STEPS):

        def closure(x=x):
            opt.zero_grad()
            loss = (model(x) - x[:, :3].sin()).square().mean()
            loss.backward()
            return loss

        closure()
        opt.step(closure)
    getattr(opt, "eval", lambda: None)()
    assert not same(start, snapshot(model))
    return snapshot(model)


AROUND = {
    "torch_optimizer.Lookahead": {"k": 2},
    "pytorch_optimizer.OrthoGrad": {},
    "pytorch_optimizer.ScheduleFreeWrapper": {},
    "pytorch_optimizer.TRAC": {},
    "schedulefree.ScheduleFreeWrapper": {},
}


@pytest.mark.parametrize("name", AROUND)
def test_optimizers_around_it(name):
    """A wrapper around our optimizer trains exactly as the same wrapper around groups by hand."""
    package, _, outer = name.rpartition(".")
    outer = getattr(pytest.importorskip(package), outer)
    kind = torch.optim.SGD if package == "schedulefree" else torch.optim.AdamW

    def around(model, make, kind):
        return outer(make(model, kind), **AROUND[name])

    assert same(trained_by(around, ours, kind), trained_by(around, by_hand, kind))
