"""Checkpoints: which ones load, which ones raise an error without changing anything, and what a
save during a step contains.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import pickle
import site
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from rankaware_optim import (
    CheckpointError,
    OptimizerError,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
)
from rankaware_optim.optimizer import rank_aware_param_groups
from rankaware_optim.optimizer._parts import read_outside_a_step

from ..helpers.models import mlp, same, snapshot, train, trained
from ..helpers.optimizers import rates_of

LR = 1e-2
LAW = {"tuned_at": Reference(rank=16, alpha=16), "init": "A"}
AdamW = torch.optim.AdamW


def ours(model, kind=AdamW, groups=None, **options):
    given = model if groups is None else groups
    return RankAwareOptimizer(
        given, kind, **{"model": model, "lr": LR, **LAW, **options}
    )


def loaded(opt, state):
    opt.load_state_dict(copy.deepcopy(state))
    return opt


def alike(a, b) -> bool:
    """Return whether two nested states hold the same bits, whatever the order of their keys."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def on_groups(model):
    return AdamW(rank_aware_param_groups(model, lr=LR, **LAW), lr=LR)


# --- checkpoints that raise an error --------------------------------------------------------------------------------


def stepped(ranks=(4, 8), kind=AdamW, make=ours, width=16):
    model = mlp(ranks, width=width)
    opt = make(model, kind)
    for param in trained(model):
        param.grad = torch.ones_like(param)
    opt.step()
    return copy.deepcopy(opt.state_dict())


def plain(model, kind=AdamW, **own):
    return kind(trained(model), lr=LR, **own)


def matrices(model):
    """Return the parameters that train and have two axes, the only ones that torch's Muon accepts."""
    return [param for param in trained(model) if param.dim() > 1]


def ours_of_matrices(model, kind):
    return ours(model, kind, groups=matrices(model))


def plain_of_matrices(model, kind):
    return kind(matrices(model), lr=LR)


class OfAnotherPackage(AdamW):
    """An optimizer whose state this package does not know."""


Muon = getattr(torch.optim, "Muon", None)  # torch has had Muon since 2.9
MAKE_MUON = (ours_of_matrices, plain_of_matrices) if Muon else ()

OF_SHAPES = r"exp_avg of layer1.lora_A has shape \(16, 16\) .* but \(8, 16\)"
Adafactor = torch.optim.Adafactor
OTHERS = [
    # checkpoints of another model or of other groups
    ({"ranks": (4, 4)}, r"layer1.lora_A has shape \(4, 16\) .* but \(8"),
    ({"ranks": (4, 16)}, OF_SHAPES),
    ({"ranks": (4, 16), "make": plain}, OF_SHAPES),
    ({"ranks": (4, 16), "kind": Adafactor}, r"row_var of layer1.lora_A .* \(8, 1\)"),
    ({"ranks": (4, 16), "kind": Adafactor, "make": plain}, r"row_var of layer1.lora_A"),
    ({"ranks": (4, 16), "kind": OfAnotherPackage}, r"layer1.lora_A .* but \(8, 16\)"),
    *[({"ranks": (4, 2), "kind": Muon, "make": m}, "momentum_buffer") for m in MAKE_MUON],
    ({"width": 32}, r"has shape \(4, 32\) .* but \(4, 16\)"),
    ({"ranks": (4,), "width": 16}, "has shape|match the size of optimizer's group"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), OTHERS)
def test_a_checkpoint_of_another_model_is_refused(given, message):
    """Loading a checkpoint of a model with other ranks, widths or groups raises an error, and the
    optimizer stays unchanged.
    """
    kind = given.get("kind", AdamW)
    make = ours if kind is not Muon else ours_of_matrices
    opt = make(mlp((4, 8)), kind)
    before, held = copy.deepcopy(opt.state_dict()), (opt.state, opt.param_groups)
    with pytest.raises(CheckpointError, match=message) as caught:
        opt.load_state_dict(stepped(**given))
    assert caught.value.cure.endswith(".")
    assert (opt.state, opt.param_groups) == held
    assert alike(before, opt.state_dict())


def test_numbers_that_became_strings_are_refused():
    """A checkpoint whose parameter numbers became strings in JSON raises an error, because torch
    would ignore its moments.
    """
    state = stepped()
    state["state"] = {str(key): value for key, value in state["state"].items()}
    opt = ours(mlp((4, 8)))
    with pytest.raises(CheckpointError, match=r"string '0'.*JSON.*torch\.save"):
        opt.load_state_dict(state)
    assert not opt.state


UNSOUND = [
    (AdamW, {"amsgrad": True}, "exp_avg_sq", -1.0),
    (AdamW, {"amsgrad": True}, "max_exp_avg_sq", -1.0),
    (torch.optim.RMSprop, {}, "square_avg", -1.0),
    (torch.optim.Adagrad, {}, "sum", -1.0),
    (Adafactor, {}, "row_var", -1.0),
    *[(AdamW, {}, key, math.nan) for key in ("exp_avg", "exp_avg_sq")],
    (AdamW, {}, "step", -1.0),
]


@pytest.mark.parametrize("wrap", [nn.Parameter, torch.Tensor.clone])
@pytest.mark.parametrize(("kind", "own", "key", "value"), UNSOUND)
def test_moments_that_give_nan_are_refused(kind, own, key, value, wrap):
    """Loading raises an error if a moment is NaN, or if a second moment or the step count is
    negative, in a tensor or in an nn.Parameter.
    """
    state = stepped(kind=kind, make=partial(ours, **own))
    moment = state["state"][2][key]
    moment.flatten()[:1].fill_(value)
    state["state"][2][key] = wrap(moment)
    opt = ours(mlp((4, 8)), kind, **own)
    held = opt.state
    with pytest.raises(CheckpointError, match=r"NaN, infinite values, or negative"):
        opt.load_state_dict(state)
    assert opt.state is held


def test_rates_that_are_multiplied_already_are_refused():
    """A checkpoint of an optimizer that was built on rank_aware_param_groups raises an error,
    because its learning rates would be multiplied a second time.
    """
    state = on_groups(mlp((4,), head=False)).state_dict()
    model = mlp((4,), head=False)
    opt = ours(model, groups=[{"params": [p]} for p in trained(model)])
    with pytest.raises(CheckpointError, match="already been multiplied"):
        opt.load_state_dict(state)


MISFITS = {
    "one entry": lambda moment: torch.ones(1, 1),
    "a column": lambda moment: moment[:, :1],
    "a number": lambda moment: 3.0,
    "of no axis": lambda moment: torch.tensor(3.0),
    "transposed": lambda moment: moment.T,
    "sparse": torch.Tensor.to_sparse,
    "empty": lambda moment: moment[:0],
}
KEPT = [
    (AdamW, {"amsgrad": True}, "max_exp_avg_sq"),
    (torch.optim.SGD, {"momentum": 0.9}, "momentum_buffer"),
]


@pytest.mark.parametrize(("kind", "settings", "key"), KEPT)
@pytest.mark.parametrize("misfit", MISFITS.values(), ids=list(MISFITS))
def test_a_moment_of_another_shape_is_refused(misfit, kind, settings, key):
    """A moment whose shape differs from its parameter's shape raises an error, because a fused
    kernel would read and write outside the tensor.
    """

    def make(model, kind):
        return ours(model, kind, fused=True, **settings)

    state = stepped(kind=kind, make=make)
    state["state"][0][key] = misfit(state["state"][0][key])
    opt = make(mlp((4, 8)), kind)
    before = repr(opt.state_dict())
    with pytest.raises(CheckpointError):
        opt.load_state_dict(state)
    assert repr(opt.state_dict()) == before


VALUES = [math.nan, math.inf, -1.0, 0, 1e300, "x", None, [], {}, (1, 2), 10**400]
VALUES += [torch.tensor(math.nan), torch.ones(3), torch.ones(1, 1), torch.ones(0)]


def damage(state, draw):
    """Change one value, key or list entry, anywhere in a checkpoint."""
    moments = [each for each in state["state"].values() if isinstance(each, dict)]
    parts = [state, state["state"], *moments, *state["param_groups"]]
    parts += [group["params"] for group in state["param_groups"]]
    part = draw(
        st.sampled_from([part for part in [*parts, state["param_groups"]] if part])
    )
    keys = list(part) if isinstance(part, dict) else list(range(len(part)))
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["drop", "value", "swap"]))
    if how == "drop":
        del part[key]
    elif how == "swap":
        other = draw(st.sampled_from(keys))
        part[key], part[other] = part[other], part[key]
    else:
        part[key] = draw(st.sampled_from(VALUES))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fused", [False, True])
@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from([AdamW, torch.optim.SGD, torch.optim.Adafactor]),
    make=st.sampled_from([ours, plain]),
)
def test_a_damaged_checkpoint_is_refused_or_right(fused, data, kind, make):
    """A damaged checkpoint raises a CheckpointError and changes nothing, or it loads, and the next step gives finite
    weights.
    """
    own = {AdamW: {"amsgrad": True}, torch.optim.SGD: {"momentum": 0.9}}.get(kind, {})
    if own:
        own["fused"] = fused
    state = stepped(kind=kind, make=lambda model, kind: make(model, kind, **own))
    part = state
    if data.draw(st.booleans()):  # damage only the moments of one parameter
        number = data.draw(st.sampled_from(sorted(state["state"])))
        part = {"state": {number: state["state"][number]}, "param_groups": []}
    damage(part, data.draw)
    model = mlp((4, 8))
    opt = ours(model, kind, **own)
    before, held = repr(opt.state_dict()), (opt.state, opt.param_groups)
    try:
        opt.load_state_dict(state)
    except CheckpointError:
        assert (opt.state, opt.param_groups) == held
        assert repr(opt.state_dict()) == before
        return
    assert all(0 <= rate < math.inf for rate in rates_of(opt).values())
    if part is not state:
        for param in trained(model):
            param.grad = torch.ones_like(param)
        opt.step()
        assert all(param.isfinite().all() for param in model.parameters())


def test_a_group_put_in_by_hand_is_refused():
    """If the user appended a group to param_groups, the next step raises an error, because no
    multipliers were computed for that group.
    """
    model, lone = mlp((4, 8)), nn.Parameter(torch.zeros(1))
    opt = ours(model, torch.optim.SGD)
    opt.param_groups.append(torch.optim.SGD([lone], lr=LR).param_groups[0])
    with pytest.raises(
        OptimizerError, match=r"appended to param_groups.*add_param_group"
    ):
        opt.step()


# --- torch.distributed.checkpoint -----------------------------------------------------------------------------------

MAKE = {"ours": ours_of_matrices, "plain": plain_of_matrices}


def reversed_of_matrices(model, kind):
    return ours(model, kind, groups=matrices(model)[::-1])


# Without a process group, torch warns that it saves in a single process.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}]
)
@pytest.mark.parametrize("kind", [Adafactor, *([Muon] if Muon else [])])
@pytest.mark.parametrize(
    ("saves", "loads"),
    [("ours", "ours"), ("plain", "ours"), ("ours", "plain"), ("ours", "reversed")],
)
def test_a_distributed_checkpoint_of_a_class_of_torch_loads(
    saves, loads, kind, options, tmp_path
):
    """The moments of Muon and Adafactor are the same after a distributed checkpoint is loaded,
    between our optimizer and torch's, and with the parameters in another order.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    def read(model, opt):
        given = states.StateDictOptions(**options)
        return states.get_optimizer_state_dict(model, opt, options=given)

    make = {**MAKE, "reversed": reversed_of_matrices}
    model, other = mlp((4, 8)), mlp((4, 8))
    first, second = make[saves](model, kind), make[loads](other, kind)
    train(model, first, steps=2)
    dcp.save({"opt": read(model, first)}, checkpoint_id=tmp_path / "saved")
    held = {"opt": read(other, second)}
    dcp.load(held, checkpoint_id=tmp_path / "saved")
    given = states.StateDictOptions(**options)
    states.set_optimizer_state_dict(other, second, held["opt"], options=given)
    for param, twin in zip(matrices(model), matrices(other), strict=True):
        assert alike(first.state[param], second.state[twin])


# --- base learning rates, explicit ones and moments after loading ---------------------------------------------------


PLAIN = 7.8e-5  # a learning rate that a user converted by hand


@pytest.mark.parametrize("given", [LR, PLAIN])
def test_a_plain_runs_rate_trains_on_and_is_said_where_it_is_another(given):
    """After loading, the checkpoint's base learning rate is used with our multipliers, and a
    warning names both base learning rates if they differ.
    """
    model = mlp((4, 8))
    state = AdamW(trained(model), lr=PLAIN).state_dict()
    opt = ours(model, lr=given)
    by_law = {name: rate / given for name, rate in rates_of(opt).items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        opt.load_state_dict(state)
    assert rates_of(opt) == pytest.approx({n: PLAIN * by for n, by in by_law.items()})
    words = [str(each.message) for each in said]
    assert len(words) == (given != PLAIN)
    for part in ("7.8e-05", "0.01", "plain", "set group['lr']"):
        assert all(part in text for text in words)


PINNED = {
    "rates": ({"rates": {"*lora_B*": 5e-4}}, "lora_B"),
    "other_lr": ({"other_lr": 5e-4}, "head"),
}
SAVED = {
    "ours": lambda model, options: ours(model, **options).state_dict(),
    "ours, unpinned": lambda model, options: ours(model).state_dict(),
    "plain": lambda model, options: plain(model).state_dict(),
}


@pytest.mark.filterwarnings("ignore:Loading the checkpoint changed")
@pytest.mark.parametrize(("options", "where"), PINNED.values(), ids=list(PINNED))
@pytest.mark.parametrize("source", SAVED)
def test_a_pinned_rate_does_not_follow_the_checkpoints_base(options, where, source):
    """An explicit learning rate (rates= or other_lr=) stays the same if a checkpoint with another
    base learning rate is loaded.
    """
    model = mlp((4, 8))
    opt = loaded(ours(model, **{"lr": 2 * LR} | options), SAVED[source](model, options))
    pinned = [rate for name, rate in rates_of(opt).items() if where in name]
    assert pinned == pytest.approx([5e-4, 5e-4])
    assert {group["lr"] for group in opt.param_groups} == {LR}


def test_a_pinned_rate_is_scheduled_from_a_cycles_peak():
    """An explicit learning rate starts at 1/25 of its value if the checkpoint comes from a plain
    run whose OneCycleLR starts at 1/25 of its peak.
    """
    model = mlp((4, 8))
    native = plain(model)
    lr_scheduler.OneCycleLR(native, LR, total_steps=9)
    opt = loaded(ours(model, rates={"*lora_B*": 5e-4}), native.state_dict())
    assert rates_of(opt)["layer0.lora_B"] == pytest.approx(5e-4 / 25)


LAYOUTS = {
    "transposed": lambda moment: moment.T.contiguous().T,
    "every second": lambda moment: moment.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda moment: moment.mean().expand(moment.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_moment_is_read_by_its_numbers_however_it_lies_in_memory(layout, fused):
    """Training after loading does not depend on the strides of a saved moment, although a fused
    kernel ignores strides.
    """
    ends = []
    for dense in (False, True):
        state = stepped()
        moment = LAYOUTS[layout](state["state"][0]["exp_avg_sq"])
        state["state"][0]["exp_avg_sq"] = (
            moment.contiguous().clone() if dense else moment
        )
        for group in state["param_groups"]:
            group["fused"] = fused
        model = mlp((4, 8))
        train(model, loaded(ours(model), state), steps=3)
        ends.append(snapshot(model))
    assert same(*ends)


# --- copies, and a save during a step -------------------------------------------------------------------------------


def by_pickle(both):
    return pickle.loads(pickle.dumps(both))


def through_a_process(both):
    spawn = torch.multiprocessing.get_context("spawn")
    # so that the process can import the model's class
    root = str(Path(__file__).parents[2])
    with spawn.Pool(1, initializer=site.addsitedir, initargs=(root,)) as pool:
        return pool.apply_async(copy.copy, (both,)).get(timeout=100)


@pytest.mark.parametrize(
    ("copied", "steps"), [(copy.deepcopy, 0), (through_a_process, 1)]
)
def test_a_copy_goes_on_reports_and_refuses_as_its_original(copied, steps):
    """A copy of model and optimizer trains bit for bit like the original, and gives the same report and the same
    errors.
    """
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=steps)
    twin_model, twin = copied((model, opt))
    assert type(twin).__bases__ == (AdamW,)
    assert str(twin.report()) == str(opt.report())
    train(model, opt)
    train(twin_model, twin)
    assert same(snapshot(model), snapshot(twin_model))
    twin.load_state_dict(stepped())
    with pytest.raises(CheckpointError, match=r"shape \(16, 16\) .* but \(4"):
        twin.load_state_dict(stepped((16, 8)))


class Saving(AdamW):
    """An optimizer that calls `save` in the middle of its step."""

    save = staticmethod(lambda opt: None)

    def step(self, closure=None):
        self.saved = type(self).save(self)
        return super().step(closure)


TAKEN = {
    "state_dict": lambda opt: opt.state_dict()["param_groups"],
    "deepcopy": lambda opt: copy.deepcopy(opt).param_groups,
    "pickle": lambda opt: by_pickle(opt).param_groups,
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=list(TAKEN))
@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)], ids=["float", "tensor"])
def test_what_is_saved_inside_a_step_holds_base_rates(take, rate, monkeypatch):
    """A state or a copy that an optimizer takes of itself during its step contains base learning
    rates, not multiplied ones.
    """
    monkeypatch.setattr(Saving, "save", staticmethod(take))
    model = mlp((4, 64))
    opt = ours(model, Saving, lr=rate)
    train(model, opt, steps=1)
    for groups in (opt.saved, opt.param_groups):
        assert {float(group["lr"]) for group in groups} == {float(rate)}


@contextmanager
def by_a_thread(save):
    """Call `save` again and again in another thread."""
    done = threading.Event()

    def run():
        while not done.is_set():
            save()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    done.set()
    thread.join()


def test_whoever_saves_while_it_steps_sees_base_rates():
    """A state that another thread saves during steps contains base learning rates, not multiplied
    ones.
    """
    model, found = mlp((4, 64)), []
    opt = ours(model)
    train(model, opt, steps=1)

    def save():
        states = (opt.state_dict(), opt.__getstate__())
        found.append({g["lr"] for state in states for g in state["param_groups"]})

    with by_a_thread(save):
        until = time.monotonic() + 1
        while time.monotonic() < until:
            opt.step()
    assert len(found) > 10
    assert set.union(*found) == {LR}


SWAPS = {"show_parts", "hide_parts", "read_outside_a_step"}


class Stops:
    """A thread that runs a function and stops at given lines of the functions in `SWAPS` until
    `proceed` is called.
    """

    def __init__(self, run, *lines):
        self.lines, self.count = lines, 0
        self.here, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self.traced, args=(run,))
        self.thread.start()
        self.here.acquire(timeout=10)

    def traced(self, run):
        sys.settrace(self.trace)
        run()
        sys.settrace(None)
        self.here.release(len(self.lines) + 1)

    def trace(self, frame, event, _):
        if frame.f_code.co_name not in SWAPS:
            return None
        if event == "line":
            if self.count in self.lines:
                self.here.release()
                self.go.acquire(timeout=10)
            self.count += 1
        return self.trace

    def proceed(self):
        """Let the thread run to the next line at which it stops, or to its end."""
        self.go.release()
        self.here.acquire(timeout=10)


def test_every_order_of_a_save_and_a_step_sees_base_rates():
    """A save contains base learning rates, whichever lines the save and a step in another thread
    have reached.
    """
    opt = ours(mlp((4,), head=False))
    opt.step()
    states = []

    def save():
        states.append(read_outside_a_step(opt, AdamW.state_dict))

    lines = [Stops(run).count for run in (save, opt.step)]
    assert lines[0] > 5
    assert lines[1] > 15
    for first, second in itertools.combinations(range(lines[1]), 2):
        for at_save in range(1, lines[0]):
            step = Stops(opt.step, first, second)
            saving = Stops(save, at_save)
            for each in (step, saving, step):
                each.proceed()
            step.thread.join(10)
            saving.thread.join(10)
    assert {g["lr"] for state in states for g in state["param_groups"]} == {LR}


def schedule_free():
    """Return a model and a schedule-free optimizer that has made one step."""
    kind = pytest.importorskip("schedulefree").AdamWScheduleFree
    model = nn.Sequential(nn.Tanh(), nn.Linear(4, 4))
    opt = RankAwareOptimizer(model, kind, lr=1e-3, method="full")
    opt.train()
    evaluate(model)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    return model, opt


@torch.no_grad()
def evaluate(model):
    model.eval()(torch.ones(2, 4))
    model.train()


@pytest.mark.parametrize("way", ["a save", "an evaluation"])
def test_a_schedule_free_optimizer_in_train_mode_is_warned_of(way):
    """Saving or evaluating a schedule-free model gives a warning while its optimizer is in train
    mode, where the weights are not the averaged ones, but not in eval mode.
    """
    model, opt = schedule_free()
    act = opt.state_dict if way == "a save" else partial(evaluate, model)
    with pytest.warns(RankAwareWarning, match=r"opt\.eval\(\) before you save"):
        act()
    opt.eval()
    act()
    assert not model[1]._forward_pre_hooks


def test_the_watch_for_evaluations_is_not_in_the_way():
    """The hook that watches for evaluations gives no warning in training or in copied, pickled and
    compiled models, and it is removed with the optimizer.
    """
    model, opt = schedule_free()
    with torch.no_grad():
        model(torch.ones(2, 4))
    model.eval()(torch.ones(2, 4))
    evaluate(copy.deepcopy(model))
    evaluate(pickle.loads(pickle.dumps(model)))
    evaluate(torch.compile(model, backend="eager", fullgraph=True))
    del opt
    gc.collect()
    assert not model[1]._forward_pre_hooks
