"""torch.distributed.checkpoint: nested and flattened, in memory and through files."""

from __future__ import annotations

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

from rankaware_optim import CheckpointError, RankAwareOptimizer, RankAwareWarning

from ...helpers.models import mlp, same
from .training import (
    AT_16,
    KINDS,
    LR,
    RANKS,
    WIDTH,
    by_class,
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
    """Six steps, and three with three more after a checkpoint; with a folder the state goes through files."""
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
    trained = [p for p in model.parameters() if p.requires_grad]
    native, settings = KINDS[kind]
    params = trained[::-1] if reverse else trained
    return RankAwareOptimizer(
        params, native, model=model, lr=LR, tuned_at=AT_16, init="A", **settings
    )


@each_option
@each_wrapper
@pytest.mark.parametrize("how", ["AdamW", "SGD", "through files", "reversed"])
def test_a_state_resumes(pair, how, wrapper, options, tmp_path):
    """A state set again goes on bit for bit with rates and tags: in memory, through files, listed in another order."""
    folder = str(tmp_path / "saved") if how == "through files" else ""
    kind = "SGD" if how == "SGD" else "AdamW"
    reverse = how == "reversed"
    for got in pair.run(resumed, wrapper, options, kind, folder, reverse):
        assert same(*got["both"])
        assert got["tags"][0] == got["tags"][1]
        assert "str" not in got["keys"]


# --- what does not fit ----------------------------------------------------------------------------------------------


def refused(wrapper: str, options: str) -> str:
    """The sentence for a checkpoint of other ranks."""
    other = WRAPPERS[wrapper](mlp(RANKS[::-1], width=WIDTH, seed=3))
    opt = by_class(other)
    train(other, opt, 0, 1)
    how = StateDictOptions(**OPTIONS[options])
    state = get_optimizer_state_dict(other, opt, options=how)
    model = new(wrapper)
    try:
        set_optimizer_state_dict(model, by_class(model), state, options=how)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("options", ["nested", "flattened"])
@each_wrapper
def test_state_of_other_ranks_is_refused(pair, wrapper, options):
    """A distributed checkpoint of other ranks is refused with both numbers, on both processes."""
    for sentence in pair.run(refused, wrapper, options):
        assert "has rank" in sentence
        assert "start with a new optimizer state" in sentence


def plain_taken(wrapper: str, options: str) -> str:
    """What is said of a plain optimizer's checkpoint, whose one group is several here."""
    model = new(wrapper)
    plain = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2 * LR
    )
    train(model, plain, 0, 1)
    how = StateDictOptions(**OPTIONS[options])
    state = get_optimizer_state_dict(model, plain, options=how)
    try:
        set_optimizer_state_dict(model, by_class(model, init="A"), state, options=how)
    except (CheckpointError, RankAwareWarning, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


SAYINGS = {  # torch gives a saved group's settings to one of its parts only: see what each way makes of that
    "nested": "CheckpointError: The checkpoint's groups are split differently",
    "nested, whole": "RankAwareWarning: torch.distributed.checkpoint loaded several base rates",
    "flattened": "KeyError: 'param_groups.layer0.lora_A.rank_multiplier'",  # torch's own, before ours is asked
}


@each_option
@each_wrapper
def test_plain_distributed_checkpoint_is_not_taken_silently(pair, wrapper, options):
    """torch cannot cut a plain optimizer's distributed checkpoint into more groups, and that is said."""
    for saying in pair.run(plain_taken, wrapper, options):
        assert saying.startswith(SAYINGS[options])


def looks_after_a_dry_step(wrapper: str) -> bool:
    model = new(wrapper)
    opt = by_class(model)
    set_optimizer_state_dict(model, opt, get_optimizer_state_dict(model, opt))
    before = bool(opt._rankaware_unchecked)
    train(model, opt, 0, 1)
    return before and not opt._rankaware_unchecked


@each_wrapper
def test_dry_step_is_no_first_step(pair, wrapper):
    """The step without a rate that torch takes to fill a checkpoint does not use up the look at the first step."""
    assert all(pair.run(looks_after_a_dry_step, wrapper))
