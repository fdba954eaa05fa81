"""Training loops: parameters move at the base learning rate times their multiplier, whoever sets
the base learning rate.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optim

from rankaware_optim import (
    Constant,
    OptimizerError,
    Power,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
    rank_aware_param_groups,
)
from rankaware_optim._warn import warn

from ..helpers.models import PlainLoRA, mlp, same, snapshot, train, trained

LR = 0.5
LAW = {
    "law": Power(exponent=-0.5, law=Constant()),
    "tuned_at": Reference(rank=4, alpha=4),
    "init": "A",
}
WANTED = {"small": 1.0, "large": 0.25, "head": 1.0}


class Model(nn.Module):
    """A float64 model with LoRA pairs of rank 4 and 64 and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = (
            PlainLoRA(nn.Linear(8, 8), rank).double() for rank in (4, 64)
        )
        self.head = nn.Linear(8, 2, bias=False, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.large(self.small(x)))


def named(model):
    """Return the parameters that train, with their names."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def moved(model, opt, closure=None):
    """Return how far each parameter moved in one step with gradients of one, which is its learning
    rate with SGD.
    """
    before = {name: p.detach().clone() for name, p in named(model)}
    backward(model)
    opt.step() if closure is None else opt.step(closure)
    return {
        name: (before[name] - p.detach()).flatten()[0].item()
        for name, p in named(model)
    }


def assert_at(model, rates, base):
    """Check that every parameter moved by the base learning rate times the multiplier for its rank."""
    wanted = {name: base * WANTED[name.partition(".")[0]] for name, _ in named(model)}
    assert rates == pytest.approx(wanted, rel=1e-9)


def by_class(model, kind=torch.optim.SGD, lr=LR, **options):
    return RankAwareOptimizer(model, kind, lr=lr, **LAW, **options)


def by_instance(model, kind=torch.optim.SGD, lr=LR, **settings):
    built = kind(trained(model), lr=lr, **settings)
    return RankAwareOptimizer(built, model=model, **LAW)


each_form = pytest.mark.parametrize("form", [by_class, by_instance])


# --- learning rates that the optimizer writes itself ----------------------------------------------------------------


class Decays(torch.optim.SGD):
    """An optimizer that halves the learning rate of each group after its step."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["lr"] = group["lr"] / 2


def test_a_rate_that_the_optimizer_writes_is_shown_as_a_base_rate():
    """A learning rate that the optimizer writes to its groups counts as a base learning rate, and
    is multiplied at the next step.
    """
    model = Model()
    # the first of these parameters has a multiplier other than 1
    params = trained(model)[::-1][1:] + trained(model.head)
    opt = RankAwareOptimizer(params, Decays, model=model, lr=LR, **LAW)
    for rate in (LR, LR / 2):
        assert_at(model, moved(model, opt), rate)
    assert [group["lr"] for group in opt.param_groups] == [LR / 4]


# --- the step -------------------------------------------------------------------------------------------------------


def test_a_closure_runs_at_base_rates_and_may_set_them():
    """A closure sees base learning rates, and may set them for the step that called it."""
    model, seen = Model(), []
    opt = by_class(model)

    def closure():
        seen.append({group["lr"] for group in opt.param_groups})
        for group in opt.param_groups:
            group["lr"] = LR / 4
        return torch.zeros(())

    assert_at(model, moved(model, opt, closure), LR / 4)
    assert seen == [{LR}]
    assert {group["lr"] for group in opt.param_groups} == {LR / 4}


@pytest.mark.parametrize("where", ["step", "closure"])
def test_an_exception_leaves_the_base_rates(where):
    """After an error inside the step or its closure, the groups show base learning rates, and the
    next step uses the multipliers.
    """
    model = Model()
    opt = by_class(model, Failing)

    def closure():
        raise ValueError("stop")

    Failing.fails = where == "step"
    with pytest.raises(ValueError, match="stop"):
        opt.step(closure if where == "closure" else None)
    Failing.fails = False
    assert {group["lr"] for group in opt.param_groups} == {LR}
    assert_at(model, moved(model, opt), LR)


class Failing(torch.optim.SGD):
    fails = False

    def step(self, closure=None):
        if self.fails:
            raise ValueError("stop")
        return super().step(closure)


def interrupted(act, number):
    """Return whether `act` was interrupted by the KeyboardInterrupt that is raised at the
    `number`-th call or line of the wrapper.
    """
    left = number

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.endswith(("_parts.py", "_wrapper.py")):
            return None
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("by", ["gradients", "a closure"])
def test_an_interrupt_at_any_moment_leaves_the_next_step_right(by):
    """Wherever Ctrl-C interrupts a step, the user's groups are restored with base learning rates,
    and the next step uses the multipliers.
    """
    model = Model()
    opt = by_class(model)
    groups = opt.param_groups
    backward(model)
    given = [] if by == "gradients" else [lambda: torch.zeros(())]
    number = 0
    while interrupted(partial(opt.step, *given), number):
        assert opt.param_groups is groups
        assert [(len(g["params"]), g["lr"]) for g in groups] == [(5, LR)]
        assert_at(model, moved(model, opt), LR)
        number += 1
    assert number > 50


class Twice(torch.optim.SGD):
    """An optimizer whose step calls self.step once more, as some line searches do."""

    inner = False

    def step(self, closure=None):
        if self.inner:
            return super().step(closure)
        self.inner = True
        try:
            return self.step(closure)
        finally:
            self.inner = False


def test_a_step_inside_a_step_multiplies_once():
    """If a step calls itself, the learning rates are multiplied only once."""
    model = Model()
    opt = by_class(model, Twice)
    groups = opt.param_groups
    assert_at(model, moved(model, opt), LR)
    assert opt.param_groups is groups


class CountsInPlace(torch.optim.SGD):
    """An optimizer that counts its steps in a tensor of each group."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"].add_(1)
        return super().step(closure)


def test_what_a_step_counts_in_a_tensor_is_counted_once():
    """An optimizer that counts its steps in a tensor of a group counts each step once, even if the
    group is split into several parts.
    """
    model, count = Model(), torch.zeros(())
    groups = [{"params": trained(model), "count": count}]
    opt = RankAwareOptimizer(groups, CountsInPlace, model=model, lr=LR, **LAW)
    moved(model, opt)
    moved(model, opt)
    assert len(opt.rates.groups) > 1
    assert opt.param_groups[0]["count"] is count
    assert count == 2


def test_an_equal_tensor_replaces_the_one_before():
    """If the user replaces a group's tensor by another tensor of the same value, the next step counts in the new one."""
    model, old, new = Model(), torch.zeros(()), torch.ones(())
    groups = [{"params": trained(model), "count": old}]
    opt = RankAwareOptimizer(groups, CountsInPlace, model=model, lr=LR, **LAW)
    moved(model, opt)
    opt.param_groups[0]["count"] = new
    moved(model, opt)
    assert (old, new) == (1, 2)


class TensorRates(torch.optim.SGD):
    """An optimizer that turns each group's learning rate into a tensor when it is built, as
    torchao's classes do.
    """

    def __init__(self, params, lr=LR):
        super().__init__(params, lr)
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)


def test_a_rate_that_the_class_makes_a_tensor_is_one_for_all_parts():
    """If a class keeps its learning rate in a tensor and a scheduler changes that tensor, all
    parameters train at the new value.
    """
    model = Model()
    opt = by_class(model, TensorRates)
    opt.param_groups[0]["lr"].fill_(LR / 4)
    assert_at(model, moved(model, opt), LR / 4)


@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)], ids=["float", "tensor"])
@pytest.mark.filterwarnings("ignore")
def test_compiling_the_step_makes_no_more_graphs(rate):
    """torch.compile(opt.step) makes no more graphs than with native groups, and trains the same."""

    def graphs(build):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, count = mlp((4, 64)), []
        opt = build(model)
        step = torch.compile(
            opt.step,
            backend=lambda graph, inputs: (count.append(graph), graph.forward)[1],
        )
        for _ in range(3):
            model(torch.ones(2, 16)).square().mean().backward()
            step()
            opt.zero_grad()
        return len(count), [p.detach().clone() for p in model.parameters()]

    native, there = graphs(
        lambda m: torch.optim.AdamW(
            rank_aware_param_groups(m, lr=copy.deepcopy(rate), **LAW), lr=1.0
        )
    )
    ours, here = graphs(
        lambda m: RankAwareOptimizer(
            m, torch.optim.AdamW, lr=copy.deepcopy(rate), **LAW
        )
    )
    assert ours <= native
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b)


# --- groups without parameters --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [LR, torch.tensor(LR)], ids=["float", "tensor"])
@pytest.mark.parametrize("emptied", ["one", "all", "cleared"])
def test_emptied_groups_step_as_native_ones_do(rate, emptied):
    """If the user empties one group or all groups, the next steps leave the removed parameters
    unchanged and train the others.
    """
    model = mlp((4, 8))
    opt = RankAwareOptimizer(model, "adamw", lr=copy.deepcopy(rate), **LAW)
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


# --- around the step: the same numbers as with groups that were split by hand ---------------------------------------

RATE = 0.0625


def by_hand(model, kind, lr, **settings):
    """Return torch's own class with the law's multipliers written into its groups."""
    groups = [
        {"params": [p], "lr": lr * WANTED[name.partition(".")[0]]}
        for name, p in named(model)
    ]
    return kind(groups, lr=lr, **settings)


def passes(model, opt, count=6):
    """Yield the number of each step and its loss."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        opt.zero_grad()
        x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        yield number, (model(x) - x[:, :2].sin()).square().mean()


def with_scaler(model, opt, infinite=None, unscale=False):
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2)
    for number, loss in passes(model, opt):
        before = snapshot(model)
        scaler.scale(loss).backward()
        if number == infinite:
            model.head.weight.grad[0, 0] = torch.inf
        if unscale:
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(opt)
        scaler.update()
        assert same(before, snapshot(model)) == (number == infinite)


AROUND = {
    "GradScaler": with_scaler,
    "GradScaler, clipped": partial(with_scaler, unscale=True),
    "GradScaler, an infinite gradient": partial(with_scaler, infinite=2),
}
KERNELS = {
    "for loop, tensor rate": (torch.optim.AdamW, torch.tensor, {"foreach": False}),
    "fused": (torch.optim.AdamW, float, {"fused": True}),
    "sgd": (torch.optim.SGD, float, {"momentum": 0.9}),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loop", AROUND)
def test_what_is_put_around_it_gives_the_same_numbers(loop, kernel):
    """With GradScaler, gradient clipping and infinite gradients, parameters train bit for bit as in
    groups that were split by hand.
    """
    kind, rate, settings = KERNELS[kernel]
    ends = []
    for make in (by_class, by_hand):
        torch.manual_seed(3)
        model = Model()
        start = snapshot(model)
        AROUND[loop](model, make(model, kind, rate(RATE), **settings))
        ends.append(snapshot(model))
    assert same(*ends)
    assert not same(start, ends[0])


# --- hooks ----------------------------------------------------------------------------------------------------------

HOOKS = {
    "register_step_pre_hook": "step",
    "register_step_post_hook": "step",
    "register_state_dict_pre_hook": "save",
    "register_state_dict_post_hook": "save",
    "register_load_state_dict_pre_hook": "load",
    "register_load_state_dict_post_hook": "load",
    "register_optimizer_step_pre_hook": "step",  # a hook for all optimizers
    "register_optimizer_step_post_hook": "step",
}


@each_form
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_fire_once_with_the_object_held(form, name):
    """Every kind of optimizer hook is called exactly once, and receives the optimizer object that
    the user holds.
    """
    opt, seen = form(model := Model()), []
    where = torch_optim if name.startswith("register_optimizer") else opt
    backward(model)
    handle = getattr(where, name)(lambda held, *_: seen.append((event, held)))
    event = "step"
    opt.step()
    event = "save"
    state = opt.state_dict()
    event = "load"
    opt.load_state_dict(state)
    handle.remove()
    ((fired, held),) = seen
    assert fired == HOOKS[name]
    assert held is opt


# --- parameters that never train ------------------------------------------------------------------------------------


def backward(model):
    for p in trained(model):
        p.grad = torch.ones_like(p)


def replaced(rank):
    """Return an adapter that was created again, so that no optimizer holds its tensors."""
    return PlainLoRA(nn.Linear(8, 8), rank).double()


@pytest.mark.parametrize("first", ["a step without gradients", "nothing"])
@pytest.mark.parametrize("by", ["gradients", "a closure"])
def test_a_replaced_adapter_is_refused_though_a_head_trains_before_it(first, by):
    """If an adapter was replaced, the first step with gradients raises an error, although a head still trains."""
    model = Model()
    factors = [*trained(model.small), *trained(model.large)]
    groups = [{"params": [model.head.weight]}, {"params": factors}]
    opt = RankAwareOptimizer(groups, "sgd", model=model, lr=LR, **LAW)
    if first == "a step without gradients":
        opt.step()
    model.large = replaced(64)
    closure = partial(backward, model)
    if by == "gradients":
        closure = closure()
    lost = r"lora_A has a gradient.*were replaced.*shard the model"
    with pytest.raises(OptimizerError, match=lost):
        opt.step(closure)


def test_gradients_from_before_a_closure_say_nothing():
    """A step with a closure checks the gradients that the closure computes, and ignores those from before."""
    model = Model()
    opt = RankAwareOptimizer(trained(model.small), "sgd", model=model, lr=LR)
    for param in trained(model.large):
        param.grad = torch.ones_like(param)

    def closure():
        model.zero_grad()
        backward(model.small)

    before = model.small.lora_B.detach().clone()
    opt.step(closure)
    assert not torch.equal(model.small.lora_B, before)


def test_an_adapter_made_active_later_is_said():
    """If an adapter that is not in the optimizer gets gradients while a head trains, exactly one
    warning names the adapter.
    """
    model = Model()
    opt = by_class(model)
    for layer in (model.small, model.large):
        layer.requires_grad_(False)
    model.added = replaced(4)
    backward(model)
    with pytest.warns(
        RankAwareWarning, match=r"added.lora_A has a gradient, but no RankAware"
    ) as caught:
        opt.step()
    opt.step()
    assert len(caught) == 1


def activate(model, layer):
    """Let one adapter train and freeze all others, as PEFT's set_adapter does."""
    for each in (model.small, model.large):
        for factor in each.pair():
            factor.requires_grad_(each is layer)


@pytest.mark.parametrize("given", ["a model", "its parameters"])
def test_an_adapter_that_is_activated_in_mid_run_trains_at_its_ranks_rate(given):
    """An adapter that is activated in the middle of a run trains at the learning rate of its own rank."""
    model = Model()
    activate(model, model.small)
    params = model if given == "a model" else model.parameters()
    opt = RankAwareOptimizer(params, "sgd", model=model, lr=LR, **LAW)
    for layer in (model.small, model.large, model.small):
        model.zero_grad()
        activate(model, layer)
        assert_at(model, moved(model, opt), LR)


@pytest.mark.parametrize("head", [True, False])
def test_an_activated_adapter_that_is_not_held_is_noticed(head):
    """Activating an adapter that is not in the optimizer raises an error at the next step, or gives
    a warning if a head trains too.
    """
    model = Model()
    activate(model, model.small)
    model.head.requires_grad_(head)
    opt = RankAwareOptimizer(trained(model), "sgd", model=model, lr=LR, **LAW)
    backward(model)
    opt.step()
    opt.zero_grad()
    activate(model, model.large)
    backward(model)
    words = "large.lora_A has a gradient"
    if head:
        with pytest.warns(RankAwareWarning, match=words):
            opt.step()
        return
    with pytest.raises(OptimizerError, match=f"{words}.*a different adapter"):
        opt.step()


def test_a_later_groups_parameters_are_checked():
    """If an adapter whose group was added later is replaced in the model, the next step raises an
    error.
    """
    model = Model()
    for factor in model.large.pair():
        factor.requires_grad_(False)
    opt = RankAwareOptimizer(trained(model), "sgd", model=model, lr=LR, **LAW)
    backward(model)
    opt.step()
    opt.add_param_group({"params": list(model.large.pair())})
    model.large = replaced(64)
    model.large.requires_grad_(True)
    model.large.base_layer.requires_grad_(False)
    backward(model)
    with pytest.raises(OptimizerError, match=r"large.lora_A has a gradient"):
        opt.step()


def test_groups_by_rank_list_what_trains():
    """rank_aware_param_groups leaves out inactive adapters, so that no group has only frozen parameters."""
    model = Model()
    activate(model, model.small)
    groups = rank_aware_param_groups(model, lr=LR, **LAW)
    names = [name for group in groups for name, _ in group["params"]]
    assert names == ["small.lora_A", "small.lora_B", "head.weight"]


@pytest.mark.filterwarnings("error")
def test_two_optimizers_with_an_adapter_each_are_fine():
    """Two optimizers with one adapter each give no warning while only one of the adapters trains."""
    model = Model()
    opts = [
        RankAwareOptimizer(trained(layer), "sgd", model=model, lr=LR)
        for layer in (model.small, model.large)
    ]
    backward(model.large)
    for opt in opts:
        opt.step()


# --- warnings that are seen -----------------------------------------------------------------------------------------


def test_a_warning_reaches_a_person(tmp_path):
    """Each of our warnings is shown once, even if all UserWarnings are ignored, and points at the
    user's line.
    """
    script = tmp_path / "mine.py"
    script.write_text(
        "import warnings, torch\n"
        "warnings.simplefilter('ignore'); warnings.filterwarnings('ignore', category=UserWarning)\n"
        "from rankaware_optim import RankAwareOptimizer\n"
        "model = torch.nn.Module()\n"
        "model.lora_A, model.lora_B = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 8, bias=False)\n"
        "model.r, model.scaling = 4, 1.0\n"
        "for _ in range(3): opt = RankAwareOptimizer(model, torch.optim.SGD)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=True
    )
    shown = re.findall(r"mine\.py:7: RankAwareWarning: (\w+)", done.stderr)
    assert shown == ["No", "No"]


def test_a_filter_that_names_it_holds():
    """A filter that ignores RankAwareWarning by name is respected."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", RankAwareWarning)
        warn("not to be seen")
    assert not caught
