"""The borders of a checkpoint: native groups and back, orders without names, pinned rates, a save during a step."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from rankaware_optim import (
    CheckpointError,
    RankAwareOptimizer,
    Reference,
    to_plain_state_dict,
)
from rankaware_optim.inspection import Walk, walk
from rankaware_optim.optimizer import effective_lr, rank_aware_param_groups
from rankaware_optim.optimizer._param_groups import user_groups

from ..helpers.models import mlp, train

LR = 1e-3
LAW = {"tuned_at": Reference(rank=16, alpha=16), "init": "A"}


def ours(model, kind="adamw", **options):
    return RankAwareOptimizer(model, kind, **{"lr": LR} | LAW | options)


def native_on_groups(model):
    return torch.optim.AdamW(rank_aware_param_groups(model, lr=LR, **LAW), lr=LR)


def rates(opt):
    """The rate at which every parameter trains, by name."""
    return {
        name: effective_lr(group)
        for group in opt.param_groups
        for name in group["param_names"]
    }


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# --- native groups and back -----------------------------------------------------------------------------------------

WAYS = {
    "ours, plain": lambda model, opt: to_plain_state_dict(opt),
    "ours, plain, native": lambda model, opt: loaded(
        native_on_groups(model), to_plain_state_dict(opt)
    ).state_dict(),
    "ours, native": lambda model, opt: loaded(
        native_on_groups(model), opt.state_dict()
    ).state_dict(),
    "native alone": lambda model, opt: native_on_groups(model).state_dict(),
    "ours, plain, native, plain class": lambda model, opt: loaded(
        ours(model, native_type=True), to_plain_state_dict(opt)
    ).state_dict(),
}


def loaded(opt, state):
    opt.load_state_dict(copy.deepcopy(state))
    return opt


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_no_way_to_native_groups_and_back_multiplies_twice(way, scheduled):
    """A state that went to a native optimizer trains at the rates of before when it comes back."""
    model = mlp((4, 64))
    opt = ours(model)
    if scheduled and "native alone" not in way:
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        train(model, opt, steps=1)
        scheduler.step()
    back = loaded(ours(mlp((4, 64))), WAYS[way](model, opt))
    assert rates(back) == pytest.approx(rates(opt), rel=1e-9)
    assert [group["lr"] for group in back.param_groups] == pytest.approx(
        [g["lr"] for g in opt.param_groups]
    )
    assert not any("rank_multiplied" in group for group in back.param_groups)


def test_a_kept_decay_comes_back_once():
    """A decay that was divided for native groups is the user's again after the way back."""
    options = {"scale_weight_decay": False, "weight_decay": 0.5}
    model = mlp((4, 64))
    opt = ours(model, **options)
    native = loaded(ours(model, native_type=True, **options), to_plain_state_dict(opt))
    assert len({group["weight_decay"] for group in native.param_groups}) == 3
    back = loaded(ours(mlp((4, 64)), **options), native.state_dict())
    assert [group["weight_decay"] for group in back.param_groups] == pytest.approx(
        [0.5] * len(back.param_groups)
    )


# --- orders without names -------------------------------------------------------------------------------------------


def layers_reversed(model):
    params = trainable(model)
    return [
        {"params": [p for n, p in params.items() if n.startswith(name)]}
        for name in ("layer1", "layer0", "head")
    ]


def stepped_plain(model, params):
    native = torch.optim.AdamW(params, lr=LR)
    train(model, native, steps=2)
    return native


def test_two_orders_that_disagree_are_refused():
    """A checkpoint without names that fits the model's order and that of the groups is not guessed at."""
    model = mlp((4, 4))
    state = stepped_plain(model, trainable(model).values()).state_dict()
    opt = RankAwareOptimizer(layers_reversed(model), "adamw", model=model, lr=LR, **LAW)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(
        CheckpointError, match=r"without names.*layer1.lora_A.*named_parameters"
    ):
        opt.load_state_dict(state)
    assert opt.state_dict() == before


def test_the_order_that_shapes_allow_is_taken():
    """Where the shapes of the moments fit only the model's order, every parameter gets its own."""
    model = mlp((4, 8))
    native = stepped_plain(model, trainable(model).values())
    opt = RankAwareOptimizer(layers_reversed(model), "adamw", model=model, lr=LR, **LAW)
    opt.load_state_dict(native.state_dict())
    for p in trainable(model).values():
        assert torch.equal(opt.state[p]["exp_avg"], native.state[p]["exp_avg"])


def test_groups_of_the_same_sizes_are_matched_by_position():
    """A native optimizer of the same groups leaves no doubt, as in torch itself."""
    model = mlp((4, 4))
    native = stepped_plain(model, layers_reversed(model))
    opt = RankAwareOptimizer(layers_reversed(model), "adamw", model=model, lr=LR, **LAW)
    opt.load_state_dict(native.state_dict())
    for p in trainable(model).values():
        assert torch.equal(opt.state[p]["exp_avg"], native.state[p]["exp_avg"])


def test_a_checkpoint_without_moments_has_no_order():
    """Before the first step nothing can be swapped, so nothing is refused."""
    model = mlp((4, 4))
    opt = RankAwareOptimizer(layers_reversed(model), "adamw", model=model, lr=LR, **LAW)
    opt.load_state_dict(
        torch.optim.AdamW(trainable(model).values(), lr=2 * LR).state_dict()
    )
    assert {group["lr"] for group in opt.param_groups} == {2 * LR}


# --- pinned rates ---------------------------------------------------------------------------------------------------

PINNED = {
    "rates": ({"rates": {"*lora_B*": 5e-4}}, "lora_B"),
    "other_lr": ({"other_lr": 5e-4}, "head"),
}
SAVED = {
    "ours": lambda model, options: ours(model, **options).state_dict(),
    "ours, unpinned": lambda model, options: ours(model).state_dict(),
    "plain": lambda model, options: torch.optim.AdamW(
        trainable(model).values(), lr=LR
    ).state_dict(),
}


@pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning")
@pytest.mark.parametrize(("options", "where"), PINNED.values(), ids=list(PINNED))
@pytest.mark.parametrize("saved", SAVED.values(), ids=list(SAVED))
def test_a_pinned_rate_does_not_follow_the_checkpoints_base(options, where, saved):
    """After a load of another base rate, what the user pinned still trains at its rate, and no law is blamed."""
    model = mlp((4, 8))
    opt = loaded(ours(model, **{"lr": 2 * LR} | options), saved(model, options))
    found = rates(opt)
    assert [found[name] for name in found if where in name] == pytest.approx(
        [5e-4, 5e-4]
    )
    assert {group["lr"] for group in opt.param_groups} == {LR}


def test_a_pinned_rate_stays_scheduled():
    """A pinned rate that was halved by hand with the others is half of it after a resume, to the bit."""
    options = {"rates": {"*lora_B*": 5e-4}}
    model = mlp((4, 8))
    opt = ours(model, **options)
    for group in opt.param_groups:
        group["lr"] *= 0.3
    for lr in (LR, 2 * LR):
        again = loaded(ours(mlp((4, 8)), lr=lr, **options), opt.state_dict())
        assert rates(again) == rates(opt)
    moved = loaded(ours(mlp((4, 8)), rates={"*lora_B*": 1e-3}), opt.state_dict())
    assert rates(moved)["layer0.lora_B"] == pytest.approx(3e-4)


# --- a save during a step -------------------------------------------------------------------------------------------


class Saving(torch.optim.AdamW):
    """Calls `save` in the middle of its step."""

    save = staticmethod(lambda opt: None)

    def step(self, closure=None):
        self.saved = type(self).save(self)
        return super().step(closure)


TAKEN = {
    "state_dict": lambda opt: opt.state_dict()["param_groups"],
    "deepcopy": lambda opt: copy.deepcopy(opt).param_groups,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)).param_groups,
    "plain": lambda opt: to_plain_state_dict(opt, own_groups=True)["param_groups"],
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=list(TAKEN))
@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)], ids=["float", "tensor"])
def test_what_is_saved_inside_a_step_holds_base_rates(take, rate, monkeypatch):
    """A state or a copy that the native step takes of itself holds the base rates and decays."""
    monkeypatch.setattr(Saving, "save", staticmethod(take))
    model = mlp((4, 64))
    opt = ours(model, Saving, lr=rate, weight_decay=0.5, scale_weight_decay=False)
    train(model, opt, steps=1)
    assert {float(group["lr"]) for group in opt.saved} == {float(rate)}
    assert {group["weight_decay"] for group in opt.saved} == {0.5}
    assert {float(group["lr"]) for group in opt.param_groups} == {float(rate)}


@pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="timers that signal are POSIX"
)
def test_what_a_signal_handler_saves_holds_base_rates():
    """Whenever a signal comes, a state and a copy that its handler takes hold base rates."""
    model = mlp((4, 64))
    opt = ours(model)
    train(model, opt, steps=1)
    found = []

    def save(*_):
        found.append(
            {
                group["lr"]
                for group in (
                    *opt.state_dict()["param_groups"],
                    *copy.deepcopy(opt).param_groups,
                )
            }
        )
        # A timer that repeats would interrupt a slow machine's handler until the stack is full.
        signal.setitimer(signal.ITIMER_REAL, 1e-3)

    before = signal.signal(signal.SIGALRM, save)
    signal.setitimer(signal.ITIMER_REAL, 1e-4)
    try:
        until = time.monotonic() + 1
        while time.monotonic() < until:
            opt.step()
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(found) > 10
    assert set.union(*found) == {LR}


def test_what_another_thread_saves_holds_base_rates():
    """A thread that saves all the time never sees a multiplied rate."""
    model = mlp((4, 64))
    opt = ours(model)
    train(model, opt, steps=1)
    found, done = [], threading.Event()

    def save():
        while not done.is_set():
            found.append({group["lr"] for group in opt.state_dict()["param_groups"]})
            found.append({group["lr"] for group in opt.__getstate__()["param_groups"]})

    thread = threading.Thread(target=save)
    thread.start()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        opt.step()
    done.set()
    thread.join()
    assert len(found) > 10
    assert set.union(*found) == {LR}


# --- groups without parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)], ids=["float", "tensor"])
@pytest.mark.parametrize("emptied", ["one", "all", "cleared"])
def test_emptied_groups_step_as_native_ones_do(kind, rate, emptied):
    """Where the user takes the parameters of a group, or all groups, away, a step does nothing there."""
    model = mlp((4, 8))
    opt = ours(model, kind, lr=rate)
    train(model, opt, steps=1)
    gone = [p for group in opt.param_groups for p in group["params"]]
    if emptied == "cleared":
        opt.param_groups.clear()
    for group in opt.param_groups[: 1 if emptied == "one" else None]:
        group["params"] = []
    kept = {id(p) for group in opt.param_groups for p in group["params"]}
    before = {id(p): p.detach().clone() for p in gone}
    train(model, opt, steps=2)
    assert [torch.equal(before[id(p)], p) for p in gone] == [
        id(p) not in kept for p in gone
    ]


def test_an_empty_group_of_the_users_comes_back():
    """A state for the user's own groups loads into a native optimizer of them, one of which is empty."""
    model = mlp((4, 8))
    params = list(trainable(model).values())
    groups = [
        {"params": params[:3]},
        {"params": [], "weight_decay": 0.0},
        {"params": params[3:], "lr": 0.5},
    ]
    opt = RankAwareOptimizer(
        [dict(group) for group in groups], "adamw", model=model, lr=LR, **LAW
    )
    assert all(group["params"] for group in opt.param_groups)
    train(model, opt, steps=2)
    native = torch.optim.AdamW([dict(group) for group in groups], lr=LR)
    native.load_state_dict(to_plain_state_dict(opt, own_groups=True))
    assert [group["lr"] for group in native.param_groups] == [LR, LR, 0.5]
    for p in params:
        assert torch.equal(native.state[p]["exp_avg"], opt.state[p]["exp_avg"])
    lr_scheduler.LambdaLR(
        opt, opt.expand([lambda step: 1.0, lambda step: 1.0, lambda step: 0.5])
    )
    train(model, native, steps=1)
    loaded(opt, native.state_dict())


# --- the cost -------------------------------------------------------------------------------------------------------


def counting(monkeypatch):
    """A list to which every step of AdamW adds its number of parameters."""
    seen, step = [], torch.optim.AdamW.step

    def counted(self, closure=None):
        seen.append(sum(len(group["params"]) for group in self.param_groups))
        return step.__wrapped__(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    counted.__module__ = "torch.optim.adamw"
    return seen


def test_the_rehearsal_costs_by_kinds(monkeypatch):
    """Forty layers of two kinds rehearse a load with as many stand-ins as two layers do."""
    taken = []
    for times in (1, 20):
        model = mlp((4, 8) * times, head=False)
        opt = ours(model)
        train(model, opt, steps=2)
        state = opt.state_dict()
        again = ours(mlp((4, 8) * times, head=False))
        with monkeypatch.context() as context:
            seen = counting(context)
            again.load_state_dict(state)
        taken.append(seen)
    assert taken[0] == taken[1] == [4] * 4


@pytest.mark.parametrize("key", ["exp_avg", "step"])
def test_one_damaged_tensor_among_many_of_its_kind_is_named(key):
    """The last of forty layers alike is looked at as the first is."""
    model = mlp((4,) * 40, head=False)
    opt = ours(model)
    train(model, opt, steps=2)
    state = copy.deepcopy(opt.state_dict())
    at = [name for group in opt.param_groups for name in group["param_names"]].index(
        "layer39.lora_B"
    )
    state["state"][at][key] = torch.full((3,), float("nan"))
    with pytest.raises(
        CheckpointError, match=rf"{key} of layer39.lora_B has shape \(3,\)"
    ):
        ours(mlp((4,) * 40, head=False)).load_state_dict(state)
    state["state"][at]["step"] = torch.tensor(float("nan"))
    state["state"][at]["exp_avg"] = torch.zeros(16, 4)
    with pytest.raises(CheckpointError, match="not finite"):
        ours(mlp((4,) * 40, head=False)).load_state_dict(state)


class Name(str):
    """A name that counts how often it is hashed."""

    hashed = 0

    def __hash__(self):
        Name.hashed += 1
        return super().__hash__()


def test_building_is_linear_in_groups():
    """Ten times the groups look at ten times the names, not at a hundred times."""
    found = []
    for count in (10, 100):
        model = nn.ParameterList(torch.zeros(2) for _ in range(count))
        modules, parameters = walk(model)
        walked = Walk(modules, [(Name(name), p) for name, p in parameters])
        Name.hashed = 0
        user_groups([{"params": [p]} for p in model], model, walked)
        found.append(Name.hashed)
    assert 0 < found[1] <= 10 * found[0]
