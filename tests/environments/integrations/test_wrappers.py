"""What is put around an optimizer, and what is called from it: the same numbers as around groups by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optim
from torch.optim import swa_utils

from rankaware_optim import RankAwareOptimizer, Reference

from ...helpers.models import batches, mlp, same, snapshot
from .by_hand import Case, multiplier

# torch.compile imports parts of torch that warn of other parts of torch.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script.*` is deprecated:DeprecationWarning"
)

LR = 1e-2
AT_16 = Reference(rank=16, alpha=16)
STEPS = 6
KERNELS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


def rank_aware(model, lr=LR, kind=torch.optim.AdamW, **settings):
    return RankAwareOptimizer(model, kind, lr=lr, tuned_at=AT_16, **settings)


def wrapped(model, lr=LR, kind=torch.optim.AdamW, **settings):
    """The instance form."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return RankAwareOptimizer(
        kind(trained, lr=lr, **settings), model=model, tuned_at=AT_16
    )


def by_hand(model, lr=LR, kind=torch.optim.AdamW, **settings):
    """torch's own class with the groups of `mlp((4, 8))` written out."""
    return kind(groups_by_hand(model, lr, kind), lr=lr, **settings)


def groups_by_hand(model, lr=LR, kind=torch.optim.AdamW):
    layers = [
        (model.layer0.lora_A, 4),
        (model.layer0.lora_B, 4),
        (model.layer1.lora_A, 8),
        (model.layer1.lora_B, 8),
    ]
    groups = [
        {"params": [p], "lr": lr * multiplier(rank, Case(kind))} for p, rank in layers
    ]
    return [*groups, {"params": list(model.head.parameters())}]


each_form = pytest.mark.parametrize("form", [rank_aware, wrapped])


def loss_of(model, x):
    return (model(x) - x[:, :3].sin()).square().mean()


def finals(loop, *forms):
    """The parameters that `loop(model, make)` leaves for every way to make the optimizer."""
    ends = []
    for make in forms:
        model = mlp((4, 8), seed=3)
        loop(model, make)
        ends.append(snapshot(model))
    assert not same(ends[0], snapshot(mlp((4, 8), seed=3)))
    return ends


# --- scaling, clipping, closures ------------------------------------------------------------------------------------


@each_form
@each_kernel
@pytest.mark.parametrize("infinite", [None, 2])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(form, kernel, infinite, unscale):
    """Under GradScaler, clipped or not, training is that of groups by hand; a step with an infinite one is skipped."""

    def loop(model, make):
        opt, scaler = (
            make(model, **kernel),
            torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2),
        )
        for i, x in enumerate(batches(STEPS)):
            before = snapshot(model)
            opt.zero_grad()
            scaler.scale(loss_of(model, x)).backward()
            if i == infinite:
                model.head.weight.grad[0, 0] = torch.inf
            if unscale:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(opt)
            scaler.update()
            assert same(before, snapshot(model)) == (i == infinite)

    assert same(*finals(loop, form, by_hand))


CLIPS = {
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
}


@each_form
@each_kernel
@pytest.mark.parametrize("clip", CLIPS)
def test_clipping(form, kernel, clip):
    """Gradients clipped before the step train as with groups by hand."""

    def loop(model, make):
        opt = make(model, **kernel)
        for x in batches(STEPS):
            opt.zero_grad()
            loss_of(model, x).backward()
            CLIPS[clip](model)
            opt.step()

    assert same(*finals(loop, form, by_hand))


@each_form
@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Rprop]
)
def test_closures(form, kind):
    """step(closure) calls it once, gives its loss back, and trains as with groups by hand."""

    def loop(model, make):
        opt = make(model, kind=kind)
        for x in batches(STEPS):
            losses = []

            def closure(x=x, losses=losses):
                opt.zero_grad()
                losses.append(loss_of(model, x))
                losses[-1].backward()
                return losses[-1]

            assert opt.step(closure) is losses[0]
            assert len(losses) == 1

    assert same(*finals(loop, form, by_hand))


# --- compiled steps and tensor rates --------------------------------------------------------------------------------


def plain_loop(kernel, *, scheduled=False, rate=float, graphs=None, around=None):
    """A loop; `around` makes what is stepped in the optimizer's place.

    With a list of graphs the steps are compiled, and the size of every graph that was built goes there.
    """

    def backend(module, inputs):
        graphs.append(len(module.graph.nodes))
        return module.forward

    def loop(model, make):
        opt = make(model, lr=rate(LR), **kernel)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5) if scheduled else None
        opt = opt if around is None else around(opt)
        mode(opt, "train")
        torch._dynamo.reset()
        step = opt.step if graphs is None else torch.compile(opt.step, backend=backend)
        for x in batches(STEPS):
            opt.zero_grad()
            loss_of(model, x).backward()
            step()
            if scheduler is not None:
                scheduler.step()
        mode(opt, "eval")

    return loop


def mode(opt, name):
    if hasattr(opt, name):
        getattr(opt, name)()


@each_form
@each_kernel
@pytest.mark.parametrize("scheduled", [False, True])
def test_compiled_steps(form, kernel, scheduled):
    """torch.compile(opt.step) builds no more graphs than for groups by hand, and gives the same numbers."""
    ours, hand = [], []
    ends = finals(plain_loop(kernel, scheduled=scheduled, graphs=ours), form)
    ends += finals(plain_loop(kernel, scheduled=scheduled, graphs=hand), by_hand)
    assert same(*ends)
    assert len(ours) <= len(hand)


@each_form
@pytest.mark.parametrize("kernel", [{"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_rates_that_are_tensors(form, kernel, compiled):
    """A base rate given as a tensor, under a schedule, compiled or not, trains as with groups by hand."""
    ours, hand = ([], []) if compiled else (None, None)
    ends = finals(
        plain_loop(kernel, scheduled=True, rate=torch.tensor, graphs=ours), form
    )
    ends += finals(
        plain_loop(kernel, scheduled=True, rate=torch.tensor, graphs=hand), by_hand
    )
    assert same(*ends)
    assert ours == hand


@each_form
def test_a_schedule_fills_the_users_tensor(form):
    """A schedule fills a tensor rate in place, as on a native optimizer, and the step leaves it what it was."""
    rate = torch.tensor(LR)
    opt = form(model := mlp((4, 8), seed=3), lr=rate, foreach=False)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    held = [group["lr"] for group in opt.param_groups]
    loss_of(model, next(batches(1))).backward()
    opt.step()
    assert [float(one) for one in held] == [pytest.approx(LR)] * len(held)
    scheduler.step()
    assert all(
        group["lr"] is one for group, one in zip(opt.param_groups, held, strict=True)
    )
    assert [float(one) for one in held] == [pytest.approx(LR / 2)] * len(held)


# --- hooks ----------------------------------------------------------------------------------------------------------

ON_OPTIMIZER = {
    "register_step_pre_hook": "step",
    "register_step_post_hook": "step",
    "register_state_dict_pre_hook": "save",
    "register_state_dict_post_hook": "save",
    "register_load_state_dict_pre_hook": "load",
    "register_load_state_dict_post_hook": "load",
}
GLOBAL = ("register_optimizer_step_pre_hook", "register_optimizer_step_post_hook")


@each_form
@pytest.mark.parametrize("name", [*ON_OPTIMIZER, *GLOBAL])
def test_hooks_fire_once_with_the_object_held(form, name):
    """Every kind of hook fires once at its event, at no other, with the object that the user holds."""
    opt = form(model := mlp((4, 8)))
    seen = []

    def note(optimizer, *_):
        seen.append(optimizer)

    handle = (
        getattr(torch_optim, name)(note) if name in GLOBAL else getattr(opt, name)(note)
    )
    loss_of(model, next(batches(1))).backward()
    counts = Counter()
    for event, act in {"step": opt.step, "save": opt.state_dict}.items():
        state = act()
        counts[event] = len(seen) - counts.total()
    opt.load_state_dict(state)
    counts["load"] = len(seen) - counts.total()
    handle.remove()
    assert counts == {"step": 0, "save": 0, "load": 0} | {
        ON_OPTIMIZER.get(name, "step"): 1
    }
    assert seen == [opt]
    assert seen[0] is opt


def test_hooks_set_before_wrapping_stay():
    """A hook on the instance handed in fires once at each step of the same instance, wrapped."""
    model, seen = mlp((4, 8)), []
    built = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    built.register_step_pre_hook(lambda opt, *_: seen.append(opt))
    opt = RankAwareOptimizer(built, model=model)
    loss_of(model, next(batches(1))).backward()
    opt.step()
    assert [held is opt for held in seen] == [True]


@each_form
def test_hooks_may_replace_what_is_saved_and_loaded(form):
    """A hook that gives another dict back is obeyed, on saving and on loading."""
    opt = form(mlp((4, 8)))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    opt.register_load_state_dict_pre_hook(
        lambda _, state: {**state, "param_groups": faster(state["param_groups"])}
    )
    before = [group["lr"] for group in opt.param_groups]
    saved = opt.state_dict()
    assert saved["note"] == 1
    opt.load_state_dict(saved)
    assert [group["lr"] for group in opt.param_groups] == [2 * lr for lr in before]


def faster(groups):
    return [{**group, "lr": 2 * group["lr"]} for group in groups]


# --- averaging ------------------------------------------------------------------------------------------------------


@each_form
@pytest.mark.parametrize(
    "average", [None, swa_utils.get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"]
)
def test_averaged_models(form, average):
    """AveragedModel with SWALR averages what groups by hand would leave."""

    def loop(model, make):
        opt = make(model)
        rates = LR / 2 if make is form else [g["lr"] / 2 for g in opt.param_groups]
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
        scheduler = swa_utils.SWALR(opt, swa_lr=rates, anneal_epochs=3)
        for x in batches(STEPS):
            opt.zero_grad()
            loss_of(model, x).backward()
            opt.step()
            averaged.update_parameters(model)
            scheduler.step()
        model.load_state_dict(averaged.module.state_dict())

    assert same(*finals(loop, form, by_hand))


# --- one optimizer per parameter, and optimizers around ours --------------------------------------------------------


def test_the_optimizer_inside_the_backward_pass():
    """One optimizer per parameter, stepped as its gradient arrives, trains as one optimizer after the pass."""

    def inside(model, make):
        for param in [p for p in model.parameters() if p.requires_grad]:
            step_on_arrival(
                param,
                RankAwareOptimizer(
                    [param], torch.optim.AdamW, model=model, lr=LR, tuned_at=AT_16
                ),
            )
        for x in batches(STEPS):
            loss_of(model, x).backward()

    assert same(*finals(inside, rank_aware), *finals(plain_loop({}), by_hand))


def step_on_arrival(param, opt):
    def step(_):
        opt.step()
        opt.zero_grad()

    param.register_post_accumulate_grad_hook(step)


AROUND = {
    "torch_optimizer.Lookahead": {"k": 2},
    "pytorch_optimizer.Lookahead": {"k": 2},
    "pytorch_optimizer.OrthoGrad": {},
    "pytorch_optimizer.ScheduleFreeWrapper": {},
    "pytorch_optimizer.TRAC": {},
    "schedulefree.ScheduleFreeWrapper": {"kind": torch.optim.SGD},
}


@each_form
@pytest.mark.parametrize("name", AROUND)
def test_optimizers_around_it(form, name):
    """An optimizer put around ours gives the numbers of the same around groups by hand."""
    package, _, kind = name.rpartition(".")
    outer, own = getattr(pytest.importorskip(package), kind), dict(AROUND[name])
    inner = {"kind": own.pop("kind", torch.optim.AdamW)}
    assert same(
        *finals(plain_loop(inner, around=lambda opt: outer(opt, **own)), form, by_hand)
    )


@pytest.mark.parametrize("name", ["SAM", "LookSAM", "FriendlySAM"])
def test_sam_around_it(name):
    """SAM makes its inner optimizer from its own groups: given ours, its numbers are those with groups by hand."""
    outer = getattr(pytest.importorskip("pytorch_optimizer"), name)

    def ours(model):
        def inner(groups, **own):
            return RankAwareOptimizer(
                groups, torch.optim.AdamW, model=model, tuned_at=AT_16, **own
            )

        return outer([p for p in model.parameters() if p.requires_grad], inner, lr=LR)

    def hand(model):
        return outer(groups_by_hand(model), torch.optim.AdamW, lr=LR)

    assert same(*finals(sharpness_aware, ours, hand))


def sharpness_aware(model, make):
    """A loop that evaluates the loss twice a step, as SAM needs."""
    opt = make(model)
    for x in batches(STEPS):

        def closure(x=x):
            opt.zero_grad()
            loss = loss_of(model, x)
            loss.backward()
            return loss

        closure()
        opt.step(closure)


# --- warnings -------------------------------------------------------------------------------------------------------


def test_a_warning_is_seen_where_frameworks_are_loaded(tmp_path):
    """With accelerate, transformers and Lightning imported a warning is said once, at the user's line."""
    script = tmp_path / "mine.py"
    script.write_text(
        "import accelerate, lightning, transformers, torch\n"
        "from rankaware_optim import RankAwareOptimizer\n"
        "model = torch.nn.Module()\n"
        "model.lora_A, model.lora_B = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(4, 8, bias=False)\n"
        "model.r, model.scaling = 4, 1.0\n"
        "opt = RankAwareOptimizer(model, torch.optim.SGD, lr=0.1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.stderr.count("RankAwareWarning") == 1
    assert "mine.py:6: RankAwareWarning" in done.stderr
