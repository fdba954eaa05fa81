"""torch.distributed.checkpoint: nested and flattened, in memory and through files."""

from __future__ import annotations

import re
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

from ...helpers.models import mlp, same, trained
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
    native, settings = KINDS[kind]
    own = {"lr": LR, "tuned_at": AT_16, "init": "A", **settings}
    params = trained(model)[::-1] if reverse else trained(model)
    return RankAwareOptimizer(params, native, model=model, **own)


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


def said(wrapper: str, options: str, saved: str) -> str:
    """What is said of a checkpoint of other ranks, or of a plain optimizer, whose one group is several here."""
    ranks = RANKS[::-1] if saved == "other ranks" else RANKS
    model = WRAPPERS[wrapper](mlp(ranks, width=WIDTH, seed=3))
    opt = by_class(model)
    if saved == "plain":
        opt = torch.optim.AdamW(trained(model), lr=2 * LR)
    train(model, opt, 0, 1)
    how = StateDictOptions(**OPTIONS[options])
    state = get_optimizer_state_dict(model, opt, options=how)
    fresh = new(wrapper)
    try:
        set_optimizer_state_dict(fresh, by_class(fresh), state, options=how)
    except (CheckpointError, RankAwareWarning, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# torch gives a saved group's settings to one of its parts only: see what each way makes of that
SAYINGS = [
    ("other ranks", "nested", "has rank 1, the model's has rank 4"),
    ("other ranks", "flattened", "has rank 1, the model's has rank 4"),
    ("plain", "nested", "CheckpointError: The .* groups are split differently"),
    ("plain", "nested, whole", "RankAwareWarning: .* loaded several base rates"),
    # torch's own, before ours is asked
    ("plain", "flattened", r"KeyError: 'param_groups.*lora_A\.rank_multiplier'"),
]


@pytest.mark.parametrize(("saved", "options", "saying"), SAYINGS)
@each_wrapper
def test_a_checkpoint_that_does_not_fit_is_said(pair, wrapper, saved, options, saying):
    """Other ranks are refused with both numbers; torch cannot cut a plain optimizer's groups, and that is said."""
    for sentence in pair.run(said, wrapper, options, saved):
        assert re.search(saying, sentence)
