"""DeepSpeed's ZeRO-1 and 2 on CPU over gloo: it flattens every group and hands each process a share."""

from __future__ import annotations

from typing import Any

import pytest

import rankaware_optim as ra
from rankaware_optim.optimizer import effective_lr

from ...helpers.deepspeed import on_cpu
from ...helpers.models import batches, same
from .training import (
    AT_16,
    FORMS,
    LR,
    WIDTH,
    by_hand,
    half,
    loss,
    new_model,
    weights,
)

pytest.importorskip("deepspeed")

IGNORED = (
    ("`torch.jit", DeprecationWarning, "torch"),  # its Muon is compiled at import
    # its collectives' names
    ("`torch.distributed.* is deprecated", FutureWarning, "torch"),
)
# not called at import: both processes import this module, and one would remove the other's lock
environment = on_cpu


BUILT = {**FORMS, "hand": by_hand}


def engine_of(form: str, stage: int) -> Any:
    """An engine around the form named, or what DeepSpeed builds from groups of ours ("groups")."""
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


def run(engine: Any, first: int = 0, last: int = 4) -> None:
    for x in list(batches(last, width=WIDTH))[first:]:
        engine.backward(loss(engine, half(x)))
        engine.step()


def trained(form: str, stage: int) -> dict[str, Any]:
    engine = engine_of(form, stage)
    run(engine)
    return {
        "weights": weights(engine),
        "lrs": sorted({effective_lr(group) for group in engine.optimizer.param_groups}),
    }


@pytest.mark.parametrize("form", [*FORMS, "groups"])
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_as_by_hand(pair, stage, form):
    """Under ZeRO every weight and rate is, bit for bit, that of the native optimizer with groups by hand."""
    hand = pair.run(trained, "hand", stage)
    for got, expected in zip(pair.run(trained, form, stage), hand, strict=True):
        assert got["lrs"] == expected["lrs"]
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
    """DeepSpeed's own checkpoint goes on bit for bit."""
    for straight, again in pair.run(resumed, stage, str(tmp_path)):
        assert same(straight, again)
