"""Tests under DeepSpeed's ZeRO on a CPU, which flattens every group and gives each process a share of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rankaware_optim as ra

from ...helpers.deepspeed import on_cpu
from ...helpers.models import batches, same
from .training import (
    AT_16,
    FORMS,
    LR,
    WIDTH,
    by_class,
    by_hand,
    half,
    loss,
    lrs,
    new_model,
    weights,
)

pytest.importorskip("deepspeed")

IGNORED = (
    ("`torch.jit", DeprecationWarning, "torch"),  # its Muon is compiled at import
    # DeepSpeed uses old names of torch's collectives
    ("`torch.distributed.* is deprecated", FutureWarning, "torch"),
)
# Not called at import. Both processes import this module, and one would remove the other's lock.
environment = on_cpu


def by_part(form: str) -> Callable[..., Any]:
    """Return a function that builds our optimizer in this form on groups with one learning rate each."""

    def built(model: nn.Module) -> Any:
        parts = FORMS[form](model).rates.groups
        return FORMS[form](model, params=[{"params": list(p.params)} for p in parts])

    return built


BUILT = {**{form: by_part(form) for form in FORMS}, "whole": by_class, "hand": by_hand}


def engine_of(form: str, stage: int) -> Any:
    """Return a DeepSpeed engine around an optimizer of this form.

    For "groups", DeepSpeed builds its own optimizer on our parameter groups.
    """
    import deepspeed

    model, groups, optimizer = new_model(), None, None
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if form == "groups":
        groups = ra.rank_aware_param_groups(model, lr=LR, tuned_at=AT_16)
        settings = {"torch_adam": True, "lr": LR, "weight_decay": 0.1}
        config["optimizer"] = {"type": "AdamW", "params": settings}
    else:
        optimizer = BUILT[form](model)
    return deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=groups,
        config=config,
        dist_init_required=False,
    )[0]


def in_one_group(stage: int) -> str:
    engine = engine_of("whole", stage)
    before = gathered(engine)
    with pytest.raises(ra.OptimizerError) as refused:
        run(engine, 0, 1)
    assert same(gathered(engine), before)
    return str(refused.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_group_of_several_rates_is_refused(pair, stage):
    """A group with several learning rates, which ZeRO would flatten, is an error at the first step."""
    for sentence in pair.run(in_one_group, stage):
        assert "opt.rates.groups" in sentence


def run(engine: Any, first: int = 0, last: int = 4) -> None:
    for x in list(batches(last, width=WIDTH))[first:]:
        engine.backward(loss(engine, half(x)))
        engine.step()


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    """Return the whole trained parameters, also under ZeRO-3, where each process holds a share of each."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.parameters())):
        return weights(engine)


def trained(form: str, stage: int) -> dict[str, Any]:
    engine = engine_of(form, stage)
    run(engine)
    return {
        "weights": gathered(engine),
        "lrs": lrs(engine.optimizer),
    }


@pytest.mark.parametrize("form", [*FORMS, "groups"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_trains_as_by_hand(pair, stage, form):
    """Under ZeRO, all weights and learning rates are exactly those of the native optimizer with
    groups by hand.
    """
    hand = pair.run(trained, "hand", stage)
    for got, expected in zip(pair.run(trained, form, stage), hand, strict=True):
        assert got["lrs"] == expected["lrs"]
        assert all(weight.numel() for weight in got["weights"].values())
        assert same(got["weights"], expected["weights"])


def resumed(stage: int, folder: str) -> tuple[Any, Any]:
    straight, broken, again = (engine_of("class", stage) for _ in range(3))
    run(straight, 0, 6)
    run(broken, 0, 3)
    broken.save_checkpoint(folder)
    again.load_checkpoint(folder)
    run(again, 3, 6)
    return weights(straight), weights(again)


@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoint_of_zero_resumes(pair, stage, tmp_path):
    """A run that is resumed from DeepSpeed's own checkpoint continues exactly."""
    for straight, again in pair.run(resumed, stage, str(tmp_path)):
        assert same(straight, again)
