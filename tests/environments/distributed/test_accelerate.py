"""Tests of accelerate's `prepare` in two processes, under DDP and under FSDP2.

Under FSDP2 accelerate replaces the parameters that the optimizer holds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ...helpers.models import batches, same
from .training import (
    WIDTH,
    by_class,
    by_hand,
    expected_tags,
    loss,
    lrs,
    new_model,
    tagged,
    train,
    weights,
)

pytest.importorskip("accelerate")


def accelerator(kind: str, accumulate: int = 1) -> Any:
    """Return an Accelerator.

    accelerate does not offer FSDP on a CPU, so its state is overwritten by hand.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import (
        AcceleratorState,
        DistributedType,
        GradientState,
        PartialState,
    )

    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    made = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if kind == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1
        )
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state.update(
            distributed_type=DistributedType.FSDP, fsdp_plugin=plugin
        )
    return made


def trained(kind: str, form: str, accumulate: int) -> dict[str, Any]:
    acc = accelerator(kind, accumulate)
    model = new_model()
    opt = by_class(model) if form == "class" else by_hand(model)
    loader = torch.utils.data.DataLoader(
        torch.cat(list(batches(4, width=WIDTH))), batch_size=4
    )
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    model, opt, loader, scheduler = acc.prepare(model, opt, loader, scheduler)
    for x in loader:
        with acc.accumulate(model):
            acc.backward(loss(model, x))
            acc.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            opt.zero_grad()
    return {"weights": weights(model), "lrs": lrs(opt), "type": type(model).__name__}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_prepared_trains_as_by_hand(pair, kind, accumulate):
    """After `prepare`, a run with clipping, a schedule and accumulation gives exactly the native weights."""
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPSequential"}[kind]
    hand = pair.run(trained, kind, "hand", accumulate)
    answers = pair.run(trained, kind, "class", accumulate)
    for got, expected in zip(answers, hand, strict=True):
        assert same(got["weights"], expected["weights"])
        assert got["lrs"] == expected["lrs"]
        assert got["type"] == expected["type"] == wrapper


def resumed(
    kind: str, folder: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], bool]:
    """Return the weights of a run of six steps, and of one that saved and loaded its state after three.

    The third value says whether learning rates and ranks stayed the same.
    """
    straight, opt = accelerator(kind).prepare(*built())
    train(straight, opt, 0, 6)
    acc = accelerator(kind)
    broken, opt = acc.prepare(*built())
    train(broken, opt, 0, 3)
    acc.save_state(folder)
    tags = tagged(opt)
    acc = accelerator(kind)
    again, opt = acc.prepare(*built())
    acc.load_state(folder)
    train(again, opt, 3, 6)
    return weights(straight), weights(again), tags == tagged(opt) == expected_tags()


def built() -> tuple[nn.Module, Any]:
    model = new_model()
    return model, by_class(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_state_of_accelerate_resumes(pair, kind, tmp_path):
    """A run resumed with save_state and load_state continues exactly, at the same learning rates and ranks."""
    for straight, again, tags in pair.run(resumed, kind, str(tmp_path)):
        assert same(straight, again)
        assert tags
