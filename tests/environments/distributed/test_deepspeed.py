"""DeepSpeed's ZeRO-1 and 2 on CPU over gloo: it flattens every group and hands each process a share."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim.optimizer import effective_lr

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
    new_model,
    train,
    weights,
)

pytest.importorskip("deepspeed")

IGNORED = (
    ("`torch.jit", DeprecationWarning, "torch"),  # its Muon is compiled at import
    # its collectives' names
    (
        "`torch.distributed.* is deprecated",
        FutureWarning,
        "torch",
    ),
)
# not called at import: both processes import this module, and one would remove the other's lock
environment = on_cpu


def engine_of(form: str, stage: int, **own: Any) -> Any:
    """An engine around the form named, or around one that DeepSpeed builds from groups of ours ("groups")."""
    model = new_model()
    if form == "groups":
        groups = ra.rank_aware_param_groups(model, lr=LR, tuned_at=AT_16)
        settings = {"torch_adam": True, "lr": LR, "weight_decay": 0.1}
        return initialize(
            model,
            stage,
            optimizer={"type": "AdamW", "params": settings},
            model_parameters=groups,
        )
    return initialize(
        model,
        stage,
        built=by_hand(model) if form == "hand" else FORMS[form](model, **own),
    )


def initialize(
    model: nn.Module,
    stage: int,
    built: Any = None,
    model_parameters: Any = None,
    **further: Any,
) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **further,
    }
    return deepspeed.initialize(
        model=model,
        optimizer=built,
        model_parameters=model_parameters,
        config=config,
        dist_init_required=False,
    )[0]


def run(engine: Any, first: int = 0, last: int = 4) -> None:
    for x in list(batches(last, width=WIDTH))[first:]:
        engine.backward(loss(engine, half(x)))
        engine.step()


def trained(form: str, stage: int, native_type: bool = False) -> dict[str, Any]:
    engine = engine_of(form, stage, **({"native_type": True} if native_type else {}))
    run(engine)
    return {
        "weights": weights(engine),
        "lrs": sorted({effective_lr(group) for group in engine.optimizer.param_groups}),
    }


@pytest.mark.parametrize("native_type", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_as_by_hand(pair, stage, form, native_type):
    """Under ZeRO every weight and rate is, bit for bit, that of the native optimizer with groups by hand."""
    hand = pair.run(trained, "hand", stage)
    for got, expected in zip(
        pair.run(trained, form, stage, native_type), hand, strict=True
    ):
        assert got["lrs"] == expected["lrs"]
        assert same(got["weights"], expected["weights"])


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_takes_groups(pair, stage):
    """An optimizer that DeepSpeed builds itself from groups of ours trains as the native one by hand, bit for bit."""
    hand = pair.run(trained, "hand", stage)
    for got, expected in zip(pair.run(trained, "groups", stage), hand, strict=True):
        assert got["lrs"] == expected["lrs"]
        assert same(got["weights"], expected["weights"])


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_as_one_process(pair, stage):
    """Shared out by ZeRO the model trains as in one process, to rounding."""
    model = new_model()
    train(model, by_class(model))
    for got in pair.run(trained, "class", stage):
        torch.testing.assert_close(got["weights"], weights(model), rtol=1e-4, atol=1e-6)


def resumed(
    stage: int, folder: str, **own: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    straight, broken = (
        engine_of("class", stage, **own),
        engine_of("class", stage, **own),
    )
    run(straight, 0, 6)
    run(broken, 0, 3)
    broken.save_checkpoint(folder)
    again = engine_of("class", stage, **own)
    again.load_checkpoint(folder)
    run(again, 3, 6)
    return weights(straight), weights(again)


@pytest.mark.parametrize("native_type", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_checkpoint_of_zero_resumes(pair, stage, native_type, tmp_path):
    """DeepSpeed's own checkpoint goes on bit for bit, with our class and with the native one."""
    for straight, again in pair.run(
        partial(resumed, native_type=native_type), stage, str(tmp_path)
    ):
        assert same(straight, again)
