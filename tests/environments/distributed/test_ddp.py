"""DistributedDataParallel and ZeroRedundancyOptimizer around one model, gradients averaged over two processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import rankaware_optim as ra
from rankaware_optim import OptimizerError, RankAwareOptimizer
from rankaware_optim.optimizer import effective_lr

from ...helpers.models import same
from .training import (
    AT_16,
    FORMS,
    KINDS,
    LR,
    by_class,
    by_hand,
    expected_tags,
    hand_groups,
    new_model,
    tagged,
    train,
    weights,
)

# torch.distributed.optim scripts at import
IGNORED = (("`torch.jit", DeprecationWarning, "torch"),)


def ours(form: str, kind: str, first: str) -> dict[str, Any]:
    model = new_model()
    opt = FORMS[form](model, kind) if first == "optimizer" else None
    wrapped = DistributedDataParallel(model)
    opt = FORMS[form](wrapped, kind) if opt is None else opt
    train(wrapped, opt)
    return {"weights": weights(wrapped), "tags": tagged(opt)}


def native(kind: str) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(new_model())
    train(model, by_hand(model, kind))
    return weights(model)


@pytest.mark.parametrize("first", ["optimizer", "wrapper"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_ddp_trains_as_by_hand(pair, form, kind, first):
    """Under DDP every weight is the native optimizer's bit for bit, and names carry no `module.`."""
    expected = pair.run(native, kind)
    for got, hand in zip(pair.run(ours, form, kind, first), expected, strict=True):
        assert same(got["weights"], hand)
        assert got["tags"] == expected_tags(kind=kind)


def test_ddp_trains_as_one_process(pair):
    """Two halves of a batch under DDP give what the whole batch gives one process, to rounding."""
    model = new_model()
    train(model, by_class(model))
    for got in pair.run(ours, "class", "AdamW", "wrapper"):
        torch.testing.assert_close(got["weights"], weights(model), rtol=1e-4, atol=1e-6)


def saved_then_resumed() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    straight, broken = (
        DistributedDataParallel(new_model()),
        DistributedDataParallel(new_model()),
    )
    train(straight, by_class(straight), 0, 6)
    opt = by_class(broken)
    train(broken, opt, 0, 3)
    later = new_model()
    later.load_state_dict(broken.module.state_dict())
    # built before the model is wrapped, from a checkpoint of a wrapped one
    resumed = by_class(later, init="A")
    resumed.load_state_dict(opt.state_dict())
    train(DistributedDataParallel(later), resumed, 3, 6)
    return weights(straight), weights(later)


def test_checkpoint_of_ddp_resumes(pair):
    """A state saved under DDP goes on bit for bit in an optimizer that was built on the bare model."""
    for straight, resumed in pair.run(saved_then_resumed):
        assert same(straight, resumed)


# --- ZeroRedundancyOptimizer ----------------------------------------------------------------------------------------


def zero(kind: str, source: str) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(new_model())
    cls, settings = KINDS[kind]
    by_law = ra.rank_aware_param_groups(
        model, lr=LR, tuned_at=AT_16, named=False, optimizer_class=cls
    )
    groups = by_law if source == "law" else hand_groups(model, kind)
    opt = ZeroRedundancyOptimizer(groups, optimizer_class=cls, lr=LR, **settings)
    train(model, opt)
    return {
        "weights": weights(model),
        "lrs": sorted({effective_lr(group) for group in opt.param_groups}),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_zero_redundancy_trains_as_by_hand(pair, kind):
    """ZeroRedundancyOptimizer on unnamed groups of ours is, bit for bit, that on groups by hand, and plain DDP."""
    plain = pair.run(native, kind)
    for got, hand, expected in zip(
        pair.run(zero, kind, "law"), pair.run(zero, kind, "hand"), plain, strict=True
    ):
        assert got["lrs"] == hand["lrs"]
        assert same(got["weights"], hand["weights"])
        assert same(got["weights"], expected)


def zero_refuses(make: str) -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = new_model()
    built = RankAwareOptimizer(model, torch.optim.AdamW, lr=LR, tuned_at=AT_16)
    cls = (
        type(built)
        if make == "type"
        else partial(RankAwareOptimizer, optimizer="adamw", model=model)
    )
    with pytest.raises(OptimizerError) as refused:
        ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, lr=LR)
    return str(refused.value)


@pytest.mark.parametrize("make", ["class", "type"])
def test_zero_redundancy_of_ours_is_refused(pair, make):
    """ZeroRedundancyOptimizer cannot hold our class, or that of an instance of it, and the error says what it takes."""
    for message in pair.run(zero_refuses, make):
        assert "rank_aware_param_groups(model, ..., named=False)" in message
