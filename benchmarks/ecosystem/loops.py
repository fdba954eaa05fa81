"""Does every loop keep the law? Rates computed from how parameters moved, under schedulers and hand-written loops.

    python benchmarks/ecosystem/loops.py     # results/loops.json and .md, a few seconds

The model has LoRA pairs of rank 4 and 64 and a head, in float64. All gradients are one, so plain SGD moves every entry
by the rate that it used. Schedule-free SGD moves it by this rate times a factor that depends only on the step. The law
is r^(-1/2) from rank 4, so the multipliers are 1, 1/4 and 1. The base rate is what the same loop gives the native
optimizer with one group. A row is a loop. Its error is the largest |rate / (base rate × multiplier) − 1| over twelve
steps and all parameters. It is given for `RankAwareOptimizer`, and for the native optimizer with groups whose rates
were multiplied by hand.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from recording import machine, record
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim import lr_scheduler as schedulers

import rankaware_optim as ra
from rankaware_optim._optimizers import get_optimizer_class

RESTS_ON = ("optimizer.common",)
STEPS, BASE, BAR = 12, 1e-2, 1e-5
LAW = ra.Power(exponent=-0.5, law=ra.Constant())
AT = ra.Reference(rank=4, alpha=4)
NOTES = (
    f"Largest relative error of a rate over base rate × multiplier, {STEPS} steps, all parameters. Bar: {BAR:g}.",
    "Lists are those of the user's own groups: one here.",
)
Advance = Callable[[int], Any]


class Loop(NamedTuple):
    """A way to set rates: `start(opt)` returns what is called with the step's number, before or after every step."""

    package: str
    name: str
    start: Callable[[Any], Advance]
    before: bool = False
    optimizer: str = "torch.optim:SGD"


def main() -> None:
    """Run every loop, print, and write results/loops.json and .md."""
    warnings.simplefilter("ignore")
    rows = [row(loop) for loop in LOOPS]
    record(
        "loops",
        "Loops that set rates, and the law",
        rows,
        machine(torch.get_num_threads()),
        NOTES,
    )


def row(loop: Loop) -> dict[str, Any]:
    native = get_optimizer_class(loop.optimizer)
    wanted = moves(loop, lambda model: native([model.head.weight], lr=BASE))[
        "head.weight"
    ]
    builders = {"ours": wrapped, "native groups, multiplied by hand": by_hand}
    found = {
        name: error(loop, partial(build, native), wanted)
        for name, build in builders.items()
    }
    return {
        "package": loop.package,
        "loop": loop.name,
        **found,
        f"ours ≤ {BAR:g}": found["ours"] <= BAR,
    }


class Pair(nn.Module):
    """A LoRA pair on a layer of 8 × 8, alpha = rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.ones(rank, 8, dtype=torch.float64))
        self.lora_B = nn.Parameter(torch.zeros(8, rank, dtype=torch.float64))
        self.r, self.scaling = rank, 1.0


class Model(nn.Module):
    """Pairs of rank 4 and 64, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = Pair(4), Pair(64)
        self.head = nn.Linear(8, 2, bias=False, dtype=torch.float64)


def wrapped(native: type[Optimizer], model: nn.Module) -> Optimizer:
    return ra.RankAwareOptimizer(model, native, lr=BASE, law=LAW, tuned_at=AT)


def by_hand(native: type[Optimizer], model: nn.Module) -> Optimizer:
    return native(
        ra.rank_aware_param_groups(model, lr=BASE, law=LAW, tuned_at=AT), lr=BASE
    )


def moves(loop: Loop, build: Callable[[Any], Optimizer]) -> dict[str, list[float]]:
    """How far every parameter moved in every step, by name."""
    model = Model()
    opt = build(model)
    trained = {id(p) for group in opt.param_groups for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if id(p) in trained}
    moved: dict[str, list[float]] = {name: [] for name in named}
    with contextlib.redirect_stdout(io.StringIO()):
        advance = loop.start(opt)
        for step in range(STEPS):
            if loop.before:
                advance(step)
            for p in named.values():
                p.grad = torch.ones_like(p)
            before = {name: p.detach().clone() for name, p in named.items()}
            opt.step()
            for name, p in named.items():
                moved[name].append((before[name] - p.detach()).flatten()[0].item())
            if not loop.before:
                advance(step)
    return moved


def error(loop: Loop, build: Callable[[Any], Optimizer], wanted: list[float]) -> float:
    multipliers = {"small": 1.0, "large": 0.25, "head": 1.0}
    try:
        found = moves(loop, build)
    except (
        Exception
    ) as stopped:  # a loop that cannot run on these groups has an infinite error
        warnings.warn(f"{loop.name}: {stopped}", stacklevel=1)
        return math.inf
    return max(
        abs(rate / (base * multipliers[name.partition(".")[0]]) - 1.0)
        for name, rates in found.items()
        for rate, base in zip(rates, wanted, strict=True)
        if base > 1e-12
    )


# --- schedulers -----------------------------------------------------------------------------------------------------


def scheduled(package: str, name: str, build: Callable[[Any], Any]) -> Loop:
    """A scheduler that is stepped after the optimizer."""

    def start(opt: Any) -> Advance:
        made = build(opt)
        return lambda step: made.step()

    return Loop(package, name, start)


def found_in(module: str, name: str, **options: Any) -> Callable[[Any], Any]:
    return lambda opt: getattr(import_module(module), name)(opt, **options)


def plateau(opt: Any) -> Advance:
    made = schedulers.ReduceLROnPlateau(opt, factor=0.5, patience=0, min_lr=BASE / 4)
    return lambda step: made.step(1.0)


def swa(opt: Any) -> Advance:
    made = schedulers.SequentialLR(
        opt,
        [
            schedulers.LinearLR(opt, total_iters=4),
            torch.optim.swa_utils.SWALR(opt, swa_lr=BASE / 10),
        ],
        [4],
    )
    return lambda step: made.step()


def two_in_turn(opt: Any) -> Any:
    parts = [
        schedulers.LinearLR(opt, total_iters=3),
        schedulers.CosineAnnealingLR(opt, 9, eta_min=BASE / 10),
    ]
    return schedulers.SequentialLR(opt, parts, [3])


TORCH: Mapping[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [2, 5], 0.3),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.5, 4),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 0.1, 1.0, 6),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, STEPS + 1, 2.0),
    "CosineAnnealingLR, eta_min": lambda opt: schedulers.CosineAnnealingLR(opt, STEPS, eta_min=BASE / 10),
    "CosineAnnealingWarmRestarts, eta_min": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 4, 2, BASE / 10),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, max_lr=2 * BASE, total_steps=STEPS + 1, cycle_momentum=False),
    "OneCycleLR, a list": lambda opt: schedulers.OneCycleLR(
        opt, max_lr=opt.expand([2 * BASE]) if hasattr(opt, "expand") else 2 * BASE, total_steps=STEPS + 1,
        cycle_momentum=False,
    ),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, BASE / 10, BASE, 4, cycle_momentum=False),
    "SequentialLR, eta_min": two_in_turn,
    "ChainedScheduler": lambda opt: schedulers.ChainedScheduler(
        [schedulers.LinearLR(opt, 0.2, total_iters=4), schedulers.ExponentialLR(opt, 0.9)]
    ),
}  # fmt: skip
TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": BASE / 20},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": BASE / 10},
    "cosine_warmup_with_min_lr": {"min_lr": BASE / 10},
    "warmup_stable_decay": {"num_decay_steps": 4, "min_lr_ratio": 0.1},
}


def of_transformers(kind: str, options: Mapping[str, Any]) -> Loop:
    def build(opt: Any) -> Any:
        make = import_module("transformers").get_scheduler
        return make(
            kind,
            opt,
            num_warmup_steps=3,
            num_training_steps=STEPS + 1,
            scheduler_specific_kwargs=dict(options) or None,
        )

    return scheduled("transformers", kind, build)


TIMM: Mapping[str, Mapping[str, Any]] = {
    "CosineLRScheduler": {
        "t_initial": STEPS,
        "lr_min": BASE / 10,
        "warmup_t": 3,
        "warmup_lr_init": BASE / 50,
    },
    "StepLRScheduler": {
        "decay_t": 4,
        "decay_rate": 0.3,
        "warmup_t": 2,
        "warmup_lr_init": BASE / 50,
    },
    "MultiStepLRScheduler": {"decay_t": [3, 6], "decay_rate": 0.3},
    "PolyLRScheduler": {"t_initial": STEPS, "lr_min": BASE / 10},
    "TanhLRScheduler": {
        "t_initial": STEPS,
        "lr_min": BASE / 10,
        "warmup_t": 2,
        "warmup_lr_init": BASE / 50,
    },
}


def of_timm(name: str, options: Mapping[str, Any]) -> Loop:
    def start(opt: Any) -> Advance:
        made = getattr(import_module("timm.scheduler"), name)(opt, **options)
        return lambda step: made.step(step + 1)

    return Loop("timm", name, start)


_RAISED = {
    "t_max": STEPS + 1,
    "max_lr": 2 * BASE,
    "min_lr": BASE / 10,
    "init_lr": BASE / 50,
    "warmup_steps": 3,
}
PYTORCH_OPTIMIZER: Mapping[str, Mapping[str, Any]] = {
    "LinearScheduler": _RAISED,
    "CosineScheduler": _RAISED,
    "PolyScheduler": {"poly_order": 2, **_RAISED},
    "CosineAnnealingWarmupRestarts": {
        "first_cycle_steps": 6,
        "max_lr": 2 * BASE,
        "min_lr": BASE / 10,
        "warmup_steps": 2,
    },
    "REXScheduler": {"total_steps": STEPS + 1, "max_lr": 2 * BASE, "min_lr": BASE / 10},
}
DEEPSPEED: Mapping[str, Mapping[str, Any]] = {
    "WarmupLR": {
        "warmup_min_lr": BASE / 100,
        "warmup_max_lr": BASE,
        "warmup_num_steps": 4,
    },
    "WarmupDecayLR": {
        "total_num_steps": 20,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": BASE,
        "warmup_num_steps": 4,
    },
    "WarmupCosineLR": {"total_num_steps": 20, "warmup_num_steps": 4},
    "OneCycle": {
        "cycle_min_lr": BASE / 10,
        "cycle_max_lr": BASE,
        "cycle_first_step_size": 4,
        "cycle_momentum": False,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": BASE / 10,
        "lr_range_test_step_size": 3,
        "lr_range_test_step_rate": 2.0,
    },
}


# --- loops written by hand ------------------------------------------------------------------------------------------


def cosine_of(step: int) -> float:
    """nanoGPT's get_lr: a warm-up, then a cosine to a floor."""
    if step < 3:
        return BASE * (step + 1) / 4
    return BASE / 10 + 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3))) * (
        BASE - BASE / 10
    )


def nanogpt(opt: Any) -> Advance:
    def set_rates(step: int) -> None:
        for group in opt.param_groups:
            group["lr"] = cosine_of(step)

    return set_rates


def dinov2(opt: Any) -> Advance:
    """DINOv2's loop: it multiplies the rate by the `lr_multiplier` of each group."""
    for group in opt.param_groups:
        group.setdefault("lr_multiplier", 1.0)

    def set_rates(step: int) -> None:
        for group in opt.param_groups:
            group["lr"] = cosine_of(step) * group["lr_multiplier"]

    return set_rates


def assigned(opt: Any) -> Advance:
    """As in tinygrad and JAX: the rate is one tensor, filled in place."""
    shared = torch.tensor(BASE, dtype=torch.float64)
    for group in opt.param_groups:
        group["lr"] = shared
    return lambda step: shared.fill_(cosine_of(step))


def scaled_in_place(opt: Any) -> Advance:
    def set_rates(step: int) -> None:
        for group in opt.param_groups:
            group["lr"] *= 0.9

    return set_rates


def range_test(opt: Any) -> Advance:
    """Range test, as in Lightning's lr_find and fastai: rates are assigned, and grow from a tiny one."""

    def set_rates(step: int) -> None:
        for group in opt.param_groups:
            group["lr"] = 1e-6 * 3.0**step

    return set_rates


def resumed(opt: Any) -> Advance:
    """A scheduler whose state comes from a plain run's checkpoint."""
    plain = SGD([nn.Parameter(torch.ones(1))], lr=BASE)
    before = schedulers.CosineAnnealingLR(plain, STEPS + 4, eta_min=BASE / 10)
    for _ in range(2):
        plain.step()
        before.step()
    made = schedulers.CosineAnnealingLR(opt, STEPS + 4, eta_min=BASE / 10)
    made.load_state_dict(before.state_dict())
    return lambda step: made.step()


def closure_sets(opt: Any) -> Advance:
    """Rates set inside the closure, as in Lightning's training_step."""
    step_of, taken = opt.step, iter(range(STEPS))

    def closure() -> torch.Tensor:
        for group in opt.param_groups:
            group["lr"] = cosine_of(next_step[0])
        return torch.zeros(())

    next_step = [0]

    def step() -> Any:
        next_step[0] = next(taken)
        return step_of(closure)

    opt.step = step
    return lambda step: None


def without_schedule(by_hand: bool = False) -> Callable[[Any], Advance]:
    """schedule-free's own warm-up, with a constant rate or under nanoGPT's loop."""

    def start(opt: Any) -> Advance:
        opt.train()
        for group in opt.param_groups:
            group["warmup_steps"] = 4
        return nanogpt(opt) if by_hand else lambda step: None

    return start


LOOPS = (
    *(scheduled("torch", name, build) for name, build in TORCH.items()),
    Loop("torch", "ReduceLROnPlateau, min_lr", plateau),
    Loop("torch", "SWALR in a SequentialLR", swa),
    *(of_transformers(kind, options) for kind, options in TRANSFORMERS.items()),
    *(of_timm(name, options) for name, options in TIMM.items()),
    *(
        scheduled(package, name, found_in(module, name, **options))
        for package, module, table in (
            ("pytorch_optimizer", "pytorch_optimizer.lr_scheduler", PYTORCH_OPTIMIZER),
            ("deepspeed", "deepspeed.runtime.lr_schedules", DEEPSPEED),
        )
        for name, options in table.items()
    ),
    *(
        Loop(
            package,
            f"{name}, {words}",
            without_schedule(by_hand),
            True,
            f"{package}:{name}",
        )
        for package, name in (
            ("schedulefree", "SGDScheduleFree"),
            ("pytorch_optimizer", "ScheduleFreeSGD"),
        )
        for words, by_hand in (("its warm-up", False), ("nanoGPT's get_lr", True))
    ),
    Loop("by hand", "nanoGPT's get_lr", nanogpt, before=True),
    Loop("by hand", "DINOv2's, its own lr_multiplier", dinov2, before=True),
    Loop("by hand", "a tensor rate filled in place", assigned, before=True),
    Loop("by hand", "rates multiplied in place", scaled_in_place),
    Loop("by hand", "a range test (Lightning's lr_find)", range_test, before=True),
    Loop("by hand", "a plain run's scheduler state", resumed),
    Loop("by hand", "rates set in a closure", closure_sets),
)

if __name__ == "__main__":
    main()
