"""Tests of our optimizer's state in torch.distributed.checkpoint, nested and flattened, in memory
and in files.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rankaware_optim import CheckpointError, RankAwareOptimizer

from ...helpers.models import mlp, same, trained
from .training import (
    AT_16,
    KINDS,
    LR,
    RANKS,
    WIDTH,
    by_class,
    by_hand,
    new_model,
    tagged,
    train,
    weights,
)

WRAPPERS = {"ddp": DistributedDataParallel, "fsdp2": fully_shard}
OPTIONS = {
    "nested": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "nested, whole": {"full_state_dict": True},
}
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
each_option = pytest.mark.parametrize("options", OPTIONS)


def new(wrapper: str) -> nn.Module:
    return WRAPPERS[wrapper](new_model())


def resumed(
    wrapper: str, options: str, kind: str, folder: str, reverse: bool
) -> dict[str, Any]:
    """Return the weights of a run of six steps, and of one that was resumed after three steps.

    The checkpoint goes through files if a folder is given.
    """
    straight, broken = new(wrapper), new(wrapper)
    train(straight, by_class(straight, kind), 0, 6)
    opt = by_class(broken, kind)
    train(broken, opt, 0, 3)
    how = StateDictOptions(**OPTIONS[options])
    state = get_optimizer_state_dict(broken, opt, options=how)
    again = from_parameters(broken, kind, reverse)
    if folder:
        dcp.save({"optimizer": state}, checkpoint_id=folder)
        state = get_optimizer_state_dict(broken, again, options=how)
        dcp.load(held := {"optimizer": state}, checkpoint_id=folder)
        state = held["optimizer"]
    set_optimizer_state_dict(broken, again, state, options=how)
    keys = [type(key).__name__ for key in again.state]
    train(broken, again, 3, 6)
    return {
        "both": (weights(straight), weights(broken)),
        "tags": (tagged(opt), tagged(again)),
        "keys": set(keys),
    }


def from_parameters(model: nn.Module, kind: str, reverse: bool) -> Any:
    native, settings = KINDS[kind]
    own = {"lr": LR, "tuned_at": AT_16, "init": "A", **settings}
    params = trained(model)[::-1] if reverse else trained(model)
    return RankAwareOptimizer(params, native, model=model, **own)


@each_option
@each_wrapper
@pytest.mark.parametrize("how", ["AdamW", "SGD", "through files", "reversed"])
def test_a_state_resumes(pair, how, wrapper, options, tmp_path):
    """A run continues exactly from its checkpoint, in memory or from files, also with reordered parameters."""
    folder = str(tmp_path / "saved") if how == "through files" else ""
    kind = "SGD" if how == "SGD" else "AdamW"
    reverse = how == "reversed"
    for got in pair.run(resumed, wrapper, options, kind, folder, reverse):
        assert same(*got["both"])
        assert got["tags"][0] == got["tags"][1]
        assert "str" not in got["keys"]


# --- native and ours -------------------------------------------------------------------------------------------------


def plain(model: nn.Module) -> torch.optim.Optimizer:
    native, settings = KINDS["AdamW"]
    return native(trained(model), lr=LR, **settings)


# functions that build the optimizer, and a native one with the same learning rates
MADE = {"plain": (plain, plain), "ours": (partial(by_class, init="A"), by_hand)}


def handed_over(
    wrapper: str, options: str, saved: str, loads: str
) -> list[dict[str, torch.Tensor]]:
    """Return the weights after three steps of one optimizer and three of another, for two ways to continue.

    In the first, the other optimizer loads the checkpoint of the first one. In the second, a native
    optimizer gets the same state and learning rates by hand.
    """
    how, ends = StateDictOptions(**OPTIONS[options]), []
    for by_state in (True, False):
        model = new(wrapper)
        first = MADE[saved][0](model)
        first.param_groups[0]["lr"] = 2 * LR
        train(model, first, 0, 3)
        again = MADE[loads][0 if by_state else 1](model)
        if by_state:
            state = get_optimizer_state_dict(model, first, options=how)
            with warnings.catch_warnings():
                # the checkpoint has another learning rate
                warnings.filterwarnings("ignore", "Loading the checkpoint changed")
                set_optimizer_state_dict(model, again, state, options=how)
        else:
            again.state.update(first.state)
            for group in again.param_groups:
                group["lr"] *= 2
        train(model, again, 3, 6)
        ends.append(weights(model))
    return ends


@pytest.mark.parametrize(("saved", "loads"), [("plain", "ours"), ("ours", "plain")])
@each_option
@each_wrapper
def test_a_plain_state_is_ours_and_ours_is_plain(pair, wrapper, options, saved, loads):
    """Our optimizer continues a native optimizer's checkpoint at its base learning rate, and the
    other way round.
    """
    for loaded, by_hand_ in pair.run(handed_over, wrapper, options, saved, loads):
        assert same(loaded, by_hand_)


# --- what does not fit ----------------------------------------------------------------------------------------------


def said(wrapper: str, options: str) -> str:
    """Return the error for a checkpoint of a model whose LoRA layers have other ranks."""
    model = WRAPPERS[wrapper](mlp(RANKS[::-1], width=WIDTH, seed=3))
    opt = by_class(model)
    train(model, opt, 0, 1)
    how = StateDictOptions(**OPTIONS[options])
    state = get_optimizer_state_dict(model, opt, options=how)
    fresh = new(wrapper)
    with pytest.raises(CheckpointError) as refused:
        set_optimizer_state_dict(fresh, by_class(fresh), state, options=how)
    return str(refused.value)


@pytest.mark.parametrize("options", ["nested", "flattened"])
@each_wrapper
def test_a_checkpoint_of_other_ranks_is_refused(pair, wrapper, options):
    """A checkpoint with other ranks raises an error that gives both shapes of the first LoRA matrix
    that differs.
    """
    for sentence in pair.run(said, wrapper, options):
        assert (
            "layer0.lora_A has shape (1, 16) in the checkpoint, but (4, 16)" in sentence
        )
