"""The user's parameter groups: in every training loop, parameters train bit for bit as with groups
that were split by hand.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from rankaware_optim import CheckpointError, OptimizerError, RankAwareOptimizer

from ..helpers.models import mlp, trained
from ..helpers.split_by_hand import (
    AT_16,
    LR,
    STEPS,
    AdamW,
    ByHand,
    Ours,
    Run,
    first_difference,
    one,
    three,
    two,
)

SGD = torch.optim.SGD

# --- schedulers, with a value for each of the user's groups ---------------------------------------------------------


def half(step):
    return 1 / (1 + step)


def slow(step):
    return 0.9**step


def sequential(opt):
    parts = [
        schedulers.LinearLR(opt, 0.1, total_iters=4),
        schedulers.CosineAnnealingLR(opt, 8),
    ]
    return schedulers.SequentialLR(opt, parts, [4])


def chained(opt):
    parts = [schedulers.ConstantLR(opt, 0.5, 4), schedulers.ExponentialLR(opt, 0.9)]
    return schedulers.ChainedScheduler(parts)


class Plateau:
    def __init__(self, opt):
        self.scheduler = schedulers.ReduceLROnPlateau(
            opt, patience=0, min_lr=[1e-3, 1e-4]
        )

    def step(self):
        self.scheduler.step(1.0)


SCHEDULES = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [slow, half]),
    "LambdaLR, one": lambda o: schedulers.LambdaLR(o, slow),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(
        o, [lambda e: 0.9, lambda e: 0.8]
    ),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, STEPS),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8, eta_min=1e-4),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 1, 1e-4),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [1e-2, 3e-2], total_steps=14),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, [1e-3, 2e-3], [1e-2, 2e-2], 4, cycle_momentum=True
    ),
    "ReduceLROnPlateau": Plateau,
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda o: SWALR(o, swa_lr=[1e-3, 2e-3], anneal_epochs=5),
}


def scheduled(run, schedule):
    scheduler = SCHEDULES[schedule](run.opt)
    run.train(STEPS, scheduler.step)


def resumed_schedule(run, schedule):
    """Resume in the order that torch documents: build the scheduler, then load both states."""
    made = [SCHEDULES[schedule](run.opt)]
    run.train(6, made[0].step)
    state = made[0].state_dict()
    run.side.resume(lambda opt: made.append(SCHEDULES[schedule](opt)))
    made[-1].load_state_dict(state)
    run.train(6, made[-1].step)


# --- what training loops write into the groups ----------------------------------------------------------------------


def rate_by_index_under_a_scheduler(run):
    scheduler = schedulers.LambdaLR(run.opt, lambda step: 1.0)
    run.train(4, scheduler.step)
    for number in range(8):
        run.groups[0]["lr"] = 1e-3 * (1 + number)
        run.groups[1]["lr"] = 2e-3 * (1 + number)
        run.train(1)


def rate_by_index_before_a_chainable_scheduler(run):
    scheduler = schedulers.ExponentialLR(run.opt, 0.9)
    run.train(4, scheduler.step)
    run.groups[0]["lr"] = 3e-3
    run.train(8, scheduler.step)


def options_by_index(run):
    run.train(4)
    run.groups[0]["betas"] = (0.5, 0.9)
    run.groups[0]["weight_decay"] = 0.3
    run.train(8)


def gradients_inside_a_closure(run):
    run.train(step=lambda: run.side.step(run.backward))


def tensor_rates(model):
    return [{**g, "lr": torch.tensor(g.get("lr", LR))} for g in two(model)]


def tensor_filled_in_place(run):
    run.train(4)
    run.groups[0]["lr"].fill_(3e-3)
    run.train(8)


# --- groups and parameters ------------------------------------------------------------------------------------------


def first_layer(model):
    return [{"params": trained(model.layer0)}]


def a_later_group(run):
    run.train(4)
    model = run.side.model
    later = [*trained(model.layer1), *trained(model.head)]
    run.side.add_param_group({"params": later, "lr": 4e-3})
    run.train(4)
    run.groups[1]["lr"] = 1e-3
    run.train(4)


def frozen_and_thawed(run):
    run.train(4)
    layer = run.side.model.layer1
    factors = trained(layer)
    for trains in (False, True):
        for param in factors:
            param.requires_grad_(trains)
        run.train(4)


def parameters_replaced_in_place(run):
    """Put other tensors in the places of the parameters, as accelerate does for FSDP2."""
    run.train(1)
    if not run.is_ours:
        run.train(11)
        return
    model = run.side.model
    other = copy.deepcopy(model)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    place = {id(old): new for old, new in pairs}
    for group in run.groups:
        for i, param in enumerate(group["params"]):
            new = place[id(param)]
            run.opt.state[new] = run.opt.state.pop(param)
            group["params"][i] = new
    run.side.model = other
    run.train(11)


def a_group_dict_replaced(run):
    run.train(4)
    run.groups[0] = {**run.groups[0], "lr": 2e-3}
    run.train(8)


# --- copies and checkpoints -----------------------------------------------------------------------------------------


def resumed(run):
    run.train(6)
    run.side.resume()
    run.train(6)


def resumed_after_decay_by_hand(run):
    def decay():
        for group in run.groups:
            group["lr"] *= 0.9

    run.train(6, decay)
    run.side.resume()
    run.train(6, decay)


def deep_copied(run):
    run.train(6)
    run.side.copied()
    run.groups[0]["weight_decay"] = 0.2
    run.train(6)


def pickled(run):
    run.train(6)
    run.side.pickled()
    run.groups[0]["weight_decay"] = 0.2
    run.train(6)


def wrapped_in_the_middle(run):
    """Wrap the optimizer of a plain run after its first step, so that training continues with
    multipliers and with the old state.
    """
    if run.is_ours:
        native = AdamW(three(run.side.model), lr=LR)
        run.side.opt = native
        run.train(1)
        options = {"model": run.side.model, "tuned_at": AT_16, "init": "A"}
        RankAwareOptimizer(native, **options)
    else:
        owner = run.side.owner
        run.side.owner = [(number, 1.0) for number, _ in owner]
        run.train(1)
        run.side.owner = owner
    run.train(6)


# --- values that an optimizer keeps in its groups -------------------------------------------------------------------


class Counting(SGD):
    """An optimizer that keeps values in each group which depend on the group's parameters, as
    schedule-free optimizers do.
    """

    def step(self, closure=None):
        for group in self.param_groups:
            size = sum(param.numel() for param in group["params"])
            group["count"] = group.get("count", 0) + size
            group["momentum"] = 0.9 / (1 + group["count"] / 1000)
        return super().step(closure)

    def train(self):
        for group in self.param_groups:
            group["count"] = group["count"] // 2


def options_that_parts_hold_apart(run, how):
    run.train(4)
    run.side.call("train")
    if how != "on":
        getattr(run.side, how)()
    run.groups[0]["weight_decay"] = 0.2
    run.train(8)


plain = Run.train
SCENARIOS = [
    *((f"{s}", partial(scheduled, schedule=s), two, SGD, {"momentum": 0.9}) for s in SCHEDULES),
    *((f"{s}, resumed", partial(resumed_schedule, schedule=s), two, AdamW, {})
      for s in ("LambdaLR", "OneCycleLR", "SequentialLR", "CosineAnnealingLR")),
    ("two groups", plain, two, AdamW, {}),
    ("three groups", plain, three, AdamW, {}),
    *((f.__name__, f, two, AdamW, {}) for f in (
        rate_by_index_under_a_scheduler,
        rate_by_index_before_a_chainable_scheduler, options_by_index,
        gradients_inside_a_closure,
        frozen_and_thawed, a_group_dict_replaced,
    )),
    *((f.__name__, f, three, AdamW, {}) for f in (
        parameters_replaced_in_place, resumed, deep_copied, pickled, wrapped_in_the_middle,
    )),
    ("a later group", a_later_group, first_layer, AdamW, {}),
    ("other_lr", partial(scheduled, schedule="LambdaLR, one"), one, AdamW, {"pinned": 5e-4}),
    ("other_lr, resumed", resumed_after_decay_by_hand, one, AdamW, {"pinned": 5e-4}),
    ("rates in tensors", partial(scheduled, schedule="ExponentialLR"), tensor_rates, AdamW, {"foreach": False}),
    ("a tensor filled in place", tensor_filled_in_place, tensor_rates, AdamW, {"foreach": False}),
    ("tensors, copied", deep_copied, tensor_rates, AdamW, {"foreach": False}),
    *((f"parts apart, {how}", partial(options_that_parts_hold_apart, how=how), three, Counting, {})
      for how in ("on", "copied", "pickled", "resume")),
]  # fmt: skip
KINDS = [
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (AdamW, {"fused": True}),
    (AdamW, {"foreach": True}),
    (torch.optim.Adam, {"amsgrad": True, "foreach": False}),
    (torch.optim.Adafactor, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.NAdam, {}),
]


def ends(scenario, groups, kind, given):
    """Return the logs of two runs: one with groups that were split by hand, and one with our
    optimizer.
    """
    logs = []
    for side in (ByHand, Ours):
        torch.manual_seed(0)
        run = Run(side, groups, kind, **given)
        scenario(run)
        logs.append(run.log)
    return logs


# In the run by hand, schedulers see an optimizer that never steps, so torch warns.
@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.filterwarnings("ignore:Loading the checkpoint changed")
@pytest.mark.parametrize(
    ("scenario", "groups", "kind", "given"),
    [pytest.param(*row, id=name) for name, *row in SCENARIOS],
)
def test_it_trains_as_groups_split_by_hand(scenario, groups, kind, given):
    """Whatever schedulers, loops, frameworks and checkpoints do to the groups, parameters train bit
    for bit as in groups that were split by hand.
    """
    assert first_difference(*ends(scenario, groups, kind, given)) is None


@pytest.mark.parametrize(("kind", "given"), KINDS)
def test_classes_and_kernels_of_torch_train_as_split_groups(kind, given):
    """With torch's other optimizer classes and kernels, parameters train bit for bit as in groups
    that were split by hand.
    """
    assert first_difference(*ends(resumed, three, kind, given)) is None


# --- the groups and the state are those of a plain optimizer --------------------------------------------------------


def ours(model, groups=two, **options):
    given = {"model": model, "lr": LR, "tuned_at": AT_16, "init": "A", **options}
    return RankAwareOptimizer(groups(model), AdamW, **given)


def without_params(groups):
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


NAMED = {
    "one": one,
    "two": two,
    "three": three,
    "named": lambda model: [(n, p) for n, p in model.named_parameters() if p.requires_grad],
    "an empty one": lambda model: [*two(model), {"params": [], "weight_decay": 0.5}],
    "frozen ones": lambda model: list(model.parameters()),
    "a tensor rate": tensor_rates,
}  # fmt: skip


@pytest.mark.parametrize("groups", NAMED.values(), ids=list(NAMED))
@pytest.mark.parametrize("stepped", [False, True])
def test_groups_and_state_are_those_of_the_native_class(groups, stepped):
    """param_groups shows the groups of a plain optimizer, with the parameters in the same order, and state_dict has
    the same layout.
    """
    model, twin = mlp((4, 8)), mlp((4, 8))
    opt, native = ours(model, groups), AdamW(groups(twin), lr=LR)
    for each, optimizer in ((model, opt), (twin, native)):
        for param in trained(each) if stepped else ():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert without_params(opt.param_groups) == without_params(native.param_groups)
    names = [{id(p): n for n, p in each.named_parameters()} for each in (model, twin)]
    shown = [
        [[of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        for of, optimizer in zip(names, (opt, native), strict=True)
    ]
    assert shown[0] == shown[1]
    assert opt.state_dict()["param_groups"] == native.state_dict()["param_groups"]
    ours_keys, theirs = (
        {key: list(value) for key, value in o.state_dict()["state"].items()}
        for o in (opt, native)
    )
    assert ours_keys == theirs


# --- plain checkpoints, both ways -----------------------------------------------------------------------------------


def stepped(model, opt):
    for param in trained(model):
        param.grad = torch.ones_like(param)
    opt.step()
    return copy.deepcopy(opt.state_dict())


@pytest.mark.filterwarnings("ignore:Loading the checkpoint changed")
@pytest.mark.parametrize("groups", [one, two, three])
def test_plain_checkpoints_load_both_ways(groups):
    """A checkpoint of a plain AdamW loads into ours, which reads its learning rates as base rates, and a checkpoint of
    ours loads into a plain AdamW.
    """
    plain_model, model = mlp((4, 8)), mlp((4, 8))
    native, opt = AdamW(groups(plain_model), lr=LR / 2), ours(model, groups)
    theirs = stepped(plain_model, native)
    opt.load_state_dict(theirs)
    assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in native.param_groups]
    back = AdamW(groups(plain_model), lr=1.0)
    back.load_state_dict(opt.state_dict())
    assert without_params(back.param_groups) == without_params(native.param_groups)
    for param, other in zip(trained(plain_model), trained(model), strict=True):
        for key, value in native.state[param].items():
            assert torch.equal(value, opt.state[other][key])
            assert torch.equal(value, back.state[param][key])


def test_a_plain_optimizer_continues_at_the_base_learning_rate():
    """A plain AdamW that loads our checkpoint trains every LoRA matrix at the base learning rate
    0.01, although rank 4 trained at 0.022 before.
    """
    model = mlp((4, 8))
    opt = ours(model, one, lr=1e-2)
    state = stepped(model, opt)
    before = {name: group.lr for name, group in opt.rates.items()}
    assert before["layer0.lora_A"] == pytest.approx(0.0223, rel=0.01)
    assert before["layer1.lora_A"] == pytest.approx(0.0154, rel=0.01)
    plain = AdamW(trained(model), lr=1.0)
    plain.load_state_dict(state)
    assert [group["lr"] for group in plain.param_groups] == [1e-2]


# --- changes that raise an error ------------------------------------------------------------------------------------


def appended(opt, model):
    opt.param_groups[0]["params"].append(model.head.weight)


def flattened(opt, model):
    opt.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(8))]


def reordered(opt, model):
    # The parameters of this group have one learning rate, so their order does not matter.
    opt.param_groups[1]["params"].reverse()
    opt.param_groups[0]["params"].reverse()


def two_swapped(opt, model):
    new = [
        torch.nn.Parameter(p.detach().clone()) for p in opt.param_groups[0]["params"]
    ]
    opt.param_groups[0]["params"] = new[::-1]


COUNTED = r"had 4 parameters \(layer0"
REORDERED = r"\(layer0.* changed their order or shapes"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (appended, COUNTED),
        (flattened, COUNTED),
        (reordered, REORDERED),
        (two_swapped, REORDERED),
    ],
)
def test_a_group_that_no_longer_fits_its_parts_is_refused(change, words):
    """If the user adds, flattens or reorders parameters of a group, the next step raises an error
    and moves nothing.
    """
    model = mlp((4, 8))
    opt = ours(model)
    change(opt, model)
    before = [param.detach().clone() for param in model.parameters()]
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    with pytest.raises(OptimizerError, match=words):
        opt.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_parameters_are_not_kept_alive():
    """Parameters that a framework replaced are freed, because our optimizer keeps no reference to
    them between steps.
    """
    import gc
    import weakref

    model = mlp((4, 8))
    opt = ours(model, one)
    stepped(model, opt)
    old = weakref.ref(opt.param_groups[0]["params"][0])
    other = copy.deepcopy(model)
    opt.param_groups[0]["params"] = trained(other)
    opt.state.clear()
    del model
    gc.collect()
    assert old() is None


def test_names_that_differ_are_refused():
    """A checkpoint whose parameter names are in another order raises an error, but a prefix such as
    "module." before every name does not matter.
    """

    def named(model):
        return [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    model = mlp((4, 4))
    state = stepped(model, ours(model, named))
    other = ours(
        mlp((4, 4)),
        lambda model: named(model)[2:4] + named(model)[:2] + named(model)[4:],
    )
    with pytest.raises(CheckpointError, match=r"layer0\.lora_A .* layer1"):
        other.load_state_dict(state)
    for group in state["param_groups"]:
        group["param_names"] = [f"module.{name}" for name in group["param_names"]]
    ours(mlp((4, 4)), named).load_state_dict(state)
