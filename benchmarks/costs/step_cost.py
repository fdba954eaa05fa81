"""Cost of one step: RankAwareOptimizer against native AdamW with the same groups.

There are 448 tensors, shaped like an 8B model's rank-16 adapters with every width divided by 8. The optimizers run in
one process and share parameters, gradients and moments. They step in pairs, in ABBA order, with nothing between steps:
placement in memory and the neighbouring step each change a time by up to 5% (native against native). This is repeated
in fresh processes. The table shows the median over processes and their range.

    python benchmarks/costs/step_cost.py
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import click
import torch
from llama_shapes import LLAMA_8B_EIGHTH, RANK, Pair, adapters
from recording import in_fresh_process, machine, record
from torch import nn
from torch.optim import AdamW, Optimizer

from rankaware_optim import RankAwareOptimizer

RESTS_ON = ()  # times: made again at a release
TENSOR = "fused, tensor rate"
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "for-loop": {"foreach": False},
    TENSOR: {"fused": True, "lr": torch.tensor(1e-6)},
}
LAYOUTS = (2, 16, 448)
PAIRS = [
    pair
    for n in LAYOUTS
    for pair in ((f"ours {n}", f"native {n}"), (f"ours {n}", "native 1"))
]
PAIRS += [(f"native {n}", "native 1") for n in LAYOUTS] + [("peft", "native 1")]
PAIRS += [(f"look {n}", f"native {n}") for n in LAYOUTS]
# bars by number of groups, for a float rate
SAME_GROUPS = {
    2: 1.02,
    16: 1.02,
    448: 1.05,
}
TENSOR_GROUPS = {16: 1.05}  # the bar for tensor rates
ONE_GROUP = 1.05
SETTINGS: dict[str, Any] = {"lr": 1e-6, "weight_decay": 0.01}
Step = Callable[[], object]
Timer = Callable[[Step], float]


def milliseconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


@click.command()
@click.option(
    "--processes",
    default=5,
    show_default=True,
    help="Fresh processes; the median over them is reported.",
)
@click.option(
    "--rounds",
    default=40,
    show_default=True,
    help="Steps timed per optimizer and pair, in each process.",
)
@click.option("--threads", default=1, show_default=True)
@click.option(
    "--worker",
    is_flag=True,
    hidden=True,
    help="Run one measured process and print JSON.",
)
def main(processes: int, rounds: int, threads: int, worker: bool) -> None:
    """Measure, print the table, and write it to the results. Exit with status 1 if a bar is not met."""
    torch.set_num_threads(threads)
    if worker:
        print(json.dumps(measure(rounds)))
        return
    on = machine(threads)
    options = ("--worker", f"--rounds={rounds}", f"--threads={threads}")
    runs = [in_fresh_process(__file__, *options) for _ in range(processes)]
    rows = [row for name in IMPLEMENTATIONS for row in step_rows(name, runs)]
    record("step_cost", "Cost of a step", rows, on, notes(processes, rounds))
    sys.exit(not all(row["met"] for row in rows if row["met"] is not None))


# --- one process ----------------------------------------------------------------------------------------------------


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """One process: ratios and milliseconds per step by implementation and pair."""
    torch.manual_seed(0)
    model = adapters(32, LLAMA_8B_EIGHTH)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return {
        name: measure_pairs(contestants(model, flags), rounds)
        for name, flags in IMPLEMENTATIONS.items()
    }


def measure_pairs(
    steps: dict[str, Step],
    rounds: int,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    timed: Timer = milliseconds,
) -> dict[str, float]:
    """Median ratio of each pair whose optimizers exist, as "above / below", and the lower one's milliseconds.

    Args:
        steps: the steps, by name.
        rounds: steps of each optimizer and pair.
        pairs: names of two steps, the upper and lower one of the ratio.
        timed: returns the milliseconds of a step.
    """
    measured = {}
    for above, below in (pair for pair in pairs if pair[0] in steps):
        times = interleave(steps[above], steps[below], rounds, timed)
        measured[f"{above} / {below}"] = statistics.median(a / b for a, b in times)
        measured[f"{below}, ms"] = statistics.median(b for _, b in times)
    return measured


def contestants(
    model: nn.Module,
    flags: dict[str, Any],
    kind: type[Optimizer] = AdamW,
    layouts: Sequence[int] = LAYOUTS,
) -> dict[str, Step]:
    """The steps to compare, by name: native with one group, native and ours with each layout, and PEFT's LoRA+."""
    settings = SETTINGS | flags
    made: dict[str, Optimizer] = {"native 1": kind(model.parameters(), **settings)}
    for count in layouts:
        spread_scalings(model, count // 2)
        ours = RankAwareOptimizer(model, kind, init="A", **settings)
        (group,), parts = ours.param_groups, ours.rates.groups
        assert len(parts) == count, f"{len(parts)} parts in place of {count}"
        by_hand = [
            {"params": part.params, "lr": group["lr"] * part.multiplier}
            for part in parts
        ]
        made |= {f"native {count}": kind(by_hand, **settings), f"ours {count}": ours}
    made |= {} if "lr" in flags or kind is not AdamW else peft_loraplus(model, flags)
    for optimizer in made.values():
        optimizer.state = made["native 1"].state
    steps: dict[str, Step] = {name: each.step for name, each in made.items()}
    for count in layouts:
        steps[f"look {count}"] = partial(look, made[f"ours {count}"])
    return steps


def look(ours: Any) -> str:
    """What the first step does besides: it reads which weights will not move."""
    return "".join(ours.report().unmoved)


def spread_scalings(model: nn.Module, distinct: int) -> None:
    """Give equal shares of the pairs `distinct` different scalings, so that the law needs twice as many groups."""
    pairs = [module for module in model.modules() if isinstance(module, Pair)]
    for i, pair in enumerate(pairs):
        pair.scaling["default"] = (
            32 / RANK * (1 + (i * distinct // len(pairs)) / distinct)
        )


def peft_loraplus(model: nn.Module, flags: dict[str, Any]) -> dict[str, Optimizer]:
    """PEFT's LoRA+ optimizer (two groups, and two empty ones), if PEFT is installed."""
    try:
        from peft.optimizers import create_loraplus_optimizer
    except ImportError:
        return {}
    plus = {
        "loraplus_lr_ratio": 16.0,
        "loraplus_weight_decay": SETTINGS["weight_decay"],
    }
    return {
        "peft": create_loraplus_optimizer(
            model, AdamW, lr=SETTINGS["lr"], **plus, **flags
        )
    }


def interleave(
    a: Step, b: Step, rounds: int, timed: Timer
) -> list[tuple[float, float]]:
    """Mean milliseconds of a and b in each ABBA turn, where each step follows itself as often as the other."""
    taken = []
    for _ in range(3 + rounds // 2):  # the first three warm up
        first, second, third, fourth = (timed(step) for step in (a, b, b, a))
        taken.append(((first + fourth) / 2, (second + third) / 2))
    return taken[3:]


# --- the table ------------------------------------------------------------------------------------------------------


def step_rows(
    implementation: str, runs: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row per layout: median ratios over processes, the range of the first ratio, and whether the bars hold."""
    ratios = [run[implementation] for run in runs]
    rows = []
    for n in LAYOUTS:
        same = [run[f"ours {n} / native {n}"] for run in ratios]
        one = middle(ratios, f"ours {n} / native 1")
        rows.append(
            {
                "implementation": implementation,
                "groups": n,
                "native, one group, ms": middle(ratios, "native 1, ms"),
                "ours / native, same groups": statistics.median(same),
                "range": f"{min(same):.3f} to {max(same):.3f}",
                "native / one group": middle(ratios, f"native {n} / native 1"),
                "ours / one group": one,
                "look at the first step / step": middle(
                    ratios, f"look {n} / native {n}"
                ),
                "PEFT LoRA+ / one group": middle(ratios, "peft / native 1")
                if n == 2
                else None,
                "met": met(implementation, n, statistics.median(same), one),
            }
        )
    return rows


def met(
    implementation: str, groups: int, same: float, one: float | None
) -> bool | None:
    """Whether the bars hold; None if there is none."""
    bar = (TENSOR_GROUPS if implementation == TENSOR else SAME_GROUPS).get(groups)
    return (
        None
        if bar is None
        else same <= bar and (groups != 2 or one is None or one <= ONE_GROUP)
    )


def middle(ratios: Sequence[dict[str, float]], name: str) -> float | None:
    """The median over processes of the figure `name`; None if it was not measured."""
    return statistics.median(run[name] for run in ratios) if name in ratios[0] else None


def notes(processes: int, rounds: int) -> list[str]:
    return [
        "448 tensors shaped like the rank-16 adapters of an 8B model (32 blocks of 7 linear layers), widths divided by "
        "8. Groups come from distinct scalings (1, 8, 224), so every layout steps the same tensors and moments.",
        f"Ratios are medians over {rounds // 2} ABBA turns of two optimizers alone, then over {processes} fresh "
        "processes; the range is that of the processes. 448 groups are one per tensor.",
        f"Bars at the same groups: {', '.join(f'{bar} at {n}' for n, bar in SAME_GROUPS.items())}, with a tensor rate "
        f"{TENSOR_GROUPS[16]} at 16. {ONE_GROUP} for two groups against one.",
        "Once, at the first step, the weights are read for those that it leaves where they are.",
    ]


if __name__ == "__main__":
    main()
