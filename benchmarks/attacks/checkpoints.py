"""Damaged optimizer checkpoints: each must be refused with nothing loaded, or be loaded and able to step."""

from __future__ import annotations

import copy
import math
import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attacks.damage import VALUES, damaged_values
from attacks.outcomes import Attack, Outcomes
from made_up import Pair
from torch import nn

import rankaware_optim as ra

KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("adamw", {}),
    ("adamw", {"fused": True}),
    ("adamw", {"foreach": True, "amsgrad": True}),
    ("sgd", {"momentum": 0.9}),
    ("adafactor", {}),
    ("rmsprop", {"momentum": 0.5, "centered": True}),
)
SHAPES = ((), (1,), (1, 1), (4, 8), (8, 4), (2, 8), (0,), (64, 64), (8,))
DTYPES = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)


class Model(nn.Module):
    """Two LoRA pairs and a head."""

    def __init__(self, ranks: tuple[int, int]) -> None:
        super().__init__()
        self.small, self.large = Pair(ranks[0]), Pair(ranks[1])
        self.head = nn.Linear(8, 2)


def build(
    ranks: tuple[int, int], kind: str, settings: dict[str, Any], change: str
) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Model(ranks)
    opt = ra.RankAwareOptimizer(
        model,
        kind,
        lr=1e-3,
        tuned_at=ra.Reference(rank=4, alpha=4),
        on_rank_change=change,
        **settings,
    )
    return model, opt


def step(model: nn.Module, opt: Any) -> None:
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p) if p.requires_grad and name else None
    opt.step()


def run(seed: int, count: int, folder: Path) -> Outcomes:
    warnings.simplefilter("ignore")
    chance, outcomes = random.Random(seed), Outcomes()
    torch.set_num_threads(1)
    for number in range(count):
        kind, settings = chance.choice(KINDS)
        saved_at = chance.choice([(4, 16), (4, 16), (4, 8), (16, 4)])
        model, opt = build(saved_at, kind, settings, "raise")
        step(model, opt)
        state = damaged(copy.deepcopy(opt.state_dict()), chance)
        model, opt = build((4, 16), kind, settings, chance.choice(("raise", "reset")))
        if chance.random() < 0.5:
            step(model, opt)
        outcomes.attempt(
            (seed, number, kind),
            lambda m=model, o=opt, s=state: load(m, o, s),
            ra.CheckpointError,
        )
    return outcomes


RATES = ("lr", "initial_lr", "rank_multiplier", "lr_multiplier", "pinned_lr")
NO_RATES = (-1.0, math.nan, math.inf, "1e-3", [1e-3], True, torch.zeros(2))


def each_rate(seed: int, count: int, folder: Path) -> Outcomes:
    """Every rate that a group of a checkpoint may hold, with each impossible value in turn."""
    warnings.simplefilter("ignore")
    outcomes = Outcomes()
    for key in RATES:
        for value in NO_RATES:
            model, opt = build((4, 16), "adamw", {}, "raise")
            step(model, opt)
            state = copy.deepcopy(opt.state_dict())
            state["param_groups"][0][key] = value
            outcomes.attempt(
                (key, str(value)),
                partial(must_refuse, model, opt, state),
                ra.CheckpointError,
            )
    return outcomes


def must_refuse(model: nn.Module, opt: Any, state: Any) -> None:
    load(model, opt, state)
    raise AssertionError("an impossible rate was loaded")


def damaged(state: dict[str, Any], chance: random.Random) -> Any:
    for _ in range(chance.randint(1, 2)):
        if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
            return state
        where = chance.randrange(10)
        try:
            if where < 4:
                harm_tensor(state["state"], chance)
            elif where < 8:
                state["param_groups"] = damaged_values(state["param_groups"], chance)
            elif where < 9:
                harm_ids(state["state"], chance)
            else:
                state[chance.choice([*state])] = copy.deepcopy(chance.choice(VALUES))
        except (AttributeError, IndexError, TypeError, KeyError):
            return state  # nothing left to damage
    return state


def harm_tensor(state: dict[Any, Any], chance: random.Random) -> None:
    """Change the shape, dtype or value of one entry of one parameter's state, copy it to another, or remove it."""
    mine = state[chance.choice([*state])]
    name = chance.choice([*mine])
    match chance.randrange(6):
        case 0:
            mine[name] = torch.zeros(chance.choice(SHAPES))
        case 1 if isinstance(mine[name], torch.Tensor):
            mine[name] = mine[name].to(chance.choice(DTYPES))
        case 2 if isinstance(mine[name], torch.Tensor):
            mine[name] = (
                mine[name].to_sparse()
                if chance.random() < 0.3
                else mine[name].to("meta")
            )
        case 3:
            mine[chance.choice((*mine, "odd"))] = mine[name]
        case 4:
            del mine[name]
        case _:
            mine[name] = copy.deepcopy(chance.choice(VALUES))


def harm_ids(state: dict[Any, Any], chance: random.Random) -> None:
    """Remove the state of one parameter, or move it to another id."""
    key = chance.choice([*state])
    moved = state.pop(key)
    if chance.random() < 0.7:
        state[chance.choice((-1, 99, "0", None, 1.5, *state))] = moved


def contents(opt: Any) -> Any:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in opt.param_groups
    ]
    state = {
        id(p): {
            k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in s.items()
        }
        for p, s in opt.state.items()
    }
    return copy.deepcopy(groups), state


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


def load(model: nn.Module, opt: Any, state: Any) -> None:
    """If the state is refused, nothing has changed. If it is loaded, rates are finite and a step runs."""
    before = contents(opt)
    try:
        opt.load_state_dict(state)
    except ra.CheckpointError as error:
        if not same(contents(opt), before):
            raise AssertionError(
                f"refused ({error}), but the optimizer changed"
            ) from error
        raise
    for group in opt.param_groups:
        rate = float(group["lr"]) * group["rank_multiplier"]
        if not 0 <= rate < math.inf:
            raise AssertionError(f"rate {rate}")
    step(model, opt)


ATTACKS = (
    Attack("damaged checkpoints", 25_000, 1000, run),
    Attack("impossible rates in checkpoints", 1, 1, each_rate),
)
