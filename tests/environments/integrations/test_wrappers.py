"""Other packages' optimizers around ours: the same numbers as around groups by hand."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rankaware_optim import RankAwareOptimizer, Reference

from ...helpers.models import batches, mlp, same, snapshot
from .by_hand import groups_by_hand

LR = 1e-2
AT_16 = Reference(rank=16, alpha=16)
STEPS = 6


def rank_aware(model, lr=LR, kind=torch.optim.AdamW, **settings):
    return RankAwareOptimizer(model, kind, lr=lr, tuned_at=AT_16, **settings)


def wrapped(model, lr=LR, kind=torch.optim.AdamW, **settings):
    """The instance form."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return RankAwareOptimizer(
        kind(trained, lr=lr, **settings), model=model, tuned_at=AT_16
    )


def by_hand(model, lr=LR, kind=torch.optim.AdamW, **settings):
    """torch's own class with the groups written out."""
    return kind(groups_by_hand(model, lr, kind), lr=lr, **settings)


each_form = pytest.mark.parametrize("form", [rank_aware, wrapped])


def loss_of(model, x):
    return (model(x) - x[:, :3].sin()).square().mean()


def finals(loop, *forms):
    """The parameters that `loop(model, make)` leaves for every way to make the optimizer."""
    ends = []
    for make in forms:
        model = mlp((4, 8), seed=3)
        loop(model, make)
        ends.append(snapshot(model))
    assert not same(ends[0], snapshot(mlp((4, 8), seed=3)))
    return ends


def plain_loop(kernel, around):
    """A loop; `around` makes what is stepped in the optimizer's place."""

    def loop(model, make):
        opt = around(make(model, **kernel))
        for name in ("train", "eval"):
            getattr(opt, name, lambda: None)()
            for x in batches(STEPS) if name == "train" else ():
                opt.zero_grad()
                loss_of(model, x).backward()
                opt.step()

    return loop


# --- optimizers around ours -----------------------------------------------------------------------------------------

AROUND = {
    "torch_optimizer.Lookahead": {"k": 2},
    "pytorch_optimizer.Lookahead": {"k": 2},
    "pytorch_optimizer.OrthoGrad": {},
    "pytorch_optimizer.ScheduleFreeWrapper": {},
    "pytorch_optimizer.TRAC": {},
    "schedulefree.ScheduleFreeWrapper": {"kind": torch.optim.SGD},
}


@each_form
@pytest.mark.parametrize("name", AROUND)
def test_optimizers_around_it(form, name):
    """An optimizer put around ours gives the numbers of the same around groups by hand."""
    package, _, kind = name.rpartition(".")
    outer, own = getattr(pytest.importorskip(package), kind), dict(AROUND[name])
    inner = {"kind": own.pop("kind", torch.optim.AdamW)}
    assert same(
        *finals(plain_loop(inner, lambda opt: outer(opt, **own)), form, by_hand)
    )


@pytest.mark.parametrize("name", ["SAM", "LookSAM", "FriendlySAM"])
def test_sam_around_it(name):
    """SAM makes its inner optimizer from its own groups: given ours, its numbers are those with groups by hand."""
    outer = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def ours(model):
        def inner(groups, **own):
            return RankAwareOptimizer(
                groups, torch.optim.AdamW, model=model, tuned_at=AT_16, **own
            )

        return outer([p for p in model.parameters() if p.requires_grad], inner, lr=LR)

    def hand(model):
        return outer(groups_by_hand(model, LR), torch.optim.AdamW, lr=LR)

    assert same(*finals(sharpness_aware, ours, hand))


def sharpness_aware(model, make):
    """A loop that evaluates the loss twice a step, as SAM needs."""
    opt = make(model)
    for x in batches(STEPS):

        def closure(x=x):
            opt.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        closure()
        opt.step(closure)


# --- warnings -------------------------------------------------------------------------------------------------------


def test_a_warning_is_seen_where_frameworks_are_loaded(tmp_path):
    """With accelerate, transformers and Lightning imported a warning is said once, at the user's line."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import accelerate, lightning, transformers, torch\n"
        "from rankaware_optim import RankAwareOptimizer\n"
        "model = torch.nn.Module()\n"
        "model.lora_A, model.lora_B = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 8, bias=False)\n"
        "model.r, model.scaling = 4, 1.0\n"
        "opt = RankAwareOptimizer(model, torch.optim.SGD, lr=0.1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.stderr.count("RankAwareWarning") == 1
    assert "mine.py:6: RankAwareWarning" in done.stderr
