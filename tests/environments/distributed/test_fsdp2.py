"""FSDP2, `fully_shard`: parameters are DTensors whose local shapes say nothing of the rank."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import rankaware_optim as ra
from rankaware_optim import OptimizerError

from ...helpers.models import BASES, STYLES, adapted, same
from .training import (
    FORMS,
    KINDS,
    by_class,
    by_hand,
    expected_tags,
    new_model,
    tagged,
    train,
    weights,
)


def sharded(style: str = "plain", init: str = "A") -> nn.Module:
    model = new_model(style, init)
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return model


def ours(form: str, kind: str, init: str = "A") -> dict[str, Any]:
    model = sharded(init=init)
    opt = FORMS[form](model, kind)
    train(model, opt)
    return {"weights": weights(model), "tags": tagged(opt)}


def native(kind: str) -> dict[str, torch.Tensor]:
    model = sharded()
    train(model, by_hand(model, kind))
    return weights(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_fsdp2_trains_as_by_hand(pair, form, kind):
    """Built after fully_shard, ranks come from the global shapes and every weight is the native one's bit for bit."""
    for got, hand in zip(
        pair.run(ours, form, kind), pair.run(native, kind), strict=True
    ):
        assert same(got["weights"], hand)
        assert got["tags"] == expected_tags(kind=kind)


def test_fsdp2_trains_as_one_process(pair):
    """Sharded over two processes the model trains as in one, to rounding."""
    model = new_model()
    train(model, by_class(model))
    for got in pair.run(ours, "class", "AdamW"):
        torch.testing.assert_close(got["weights"], weights(model), rtol=1e-4, atol=1e-6)


def factors(style: str, kind: str, init: str) -> list[Any]:
    """The survey of single layers of rank 4 and 1, sharded."""
    layers = nn.ModuleList(
        adapted(style, kind, rank=rank, init=init) for rank in (4, 1)
    )
    for layer in layers:
        fully_shard(layer)
    return [asdict(factor) for factor in ra.inspect_model(layers).factors]


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("style", STYLES)
def test_survey_of_shards(pair, style, kind, init):
    """A sharded model is surveyed as the whole one is, on a process that holds no row of rank 1 too."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        adapted(style, kind, rank=rank, init=init) for rank in (4, 1)
    )
    expected = [asdict(factor) for factor in ra.inspect_model(layers).factors]
    assert pair.run(factors, style, kind, init) == [expected, expected]


# --- fully_shard after the optimizer was built ----------------------------------------------------------------------


def sharded_too_late(form: str) -> tuple[str, bool]:
    """The refusal, and whether the weights are as they were."""
    model = new_model()
    opt = FORMS[form](model)
    fully_shard(model)
    before = weights(model)
    try:
        train(model, opt, 0, 1)
    except OptimizerError as error:
        return str(error), same(before, weights(model))
    return "", False


@pytest.mark.parametrize("form", FORMS)
def test_sharding_after_the_optimizer_is_refused(pair, form):
    """Where fully_shard came after the optimizer, the first step says so; torch's own would train nothing silently."""
    for sentence, untouched in pair.run(sharded_too_late, form):
        assert "Shard or wrap the model first (fully_shard" in sentence
        assert untouched


def resumed() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    straight, broken = sharded(), sharded()
    train(straight, by_class(straight), 0, 6)
    opt = by_class(broken)
    train(broken, opt, 0, 3)
    again = by_class(broken, init="A")
    again.load_state_dict(opt.state_dict())
    train(broken, again, 3, 6)
    return weights(straight), weights(broken)


def test_state_of_shards_resumes(pair):
    """A sharded optimizer's own state_dict loads into a new one, which goes on bit for bit."""
    for straight, broken in pair.run(resumed):
        assert same(straight, broken)
