"""Cost of a step on the device by implementation: RankAwareOptimizer against the bare optimizer with the same groups.

The tensors are the 448 of an 8B model's rank-16 adapters, as in costs/step_cost.py, but at full width. Steps are
compared in the same pairs and ABBA order. They are timed by CUDA events, so that a time ends when the device is done.
Every ratio is the median of 10 turns, then the median of three fresh builds, with their range beside it. Compiled steps
are built once. The noise floor is a step against itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import torch
from costs.step_cost import (
    LAYOUTS,
    SETTINGS,
    Step,
    contestants,
    measure_pairs,
    milliseconds,
)
from gpu.setup import Setup, append, rows_in
from llama_shapes import LLAMA_8B, LLAMA_8B_EIGHTH, adapters
from recording import block, made_with, number
from torch import nn
from torch.optim import AdamW

ROUNDS, BUILDS = 20, 3
GRAPHS, COMPILED, EIGHT_BIT = "capturable, in a CUDA graph", "compiled", "8-bit"
FLAGS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    GRAPHS: {"capturable": True},
    "fused, tensor rate": {"fused": True, "lr": torch.tensor(SETTINGS["lr"])},
    EIGHT_BIT: {},
    "for-loop": {"foreach": False},
    COMPILED: {},
}
# the only layout if building takes minutes, or the network has one block
TWO_GROUPS = (2,)
STORE = "step_cost.jsonl"


def run(setup: Setup) -> None:
    """Measure every implementation that is not on file for this device."""
    store = setup.folder / STORE
    done = {(row["device"], row["implementation"]) for row in rows_in(store)}
    for name in FLAGS:
        if (setup.name, name) not in done and not setup.over:
            why = left_out(name, setup)
            click.echo(f"step cost: {name}" + (f" is left out: {why}" if why else ""))
            if not why:
                row = {
                    "device": setup.name,
                    "implementation": name,
                    "ratios": measure(name, setup),
                }
                append(store, {**row, "machine": setup.machine()})


def left_out(name: str, setup: Setup) -> str | None:
    """Why an implementation cannot be measured here; None if it can."""
    if name == GRAPHS and setup.device == "cpu":
        return "a CPU has no CUDA graphs"
    if name == EIGHT_BIT:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            return "bitsandbytes is not installed"
        if setup.device == "cpu":
            return "bitsandbytes' optimizers are for GPUs"
    return None


def measure(name: str, setup: Setup) -> list[dict[str, float]]:
    """The ratios of all pairs, one dict for each build."""
    layouts = TWO_GROUPS if setup.smallest or name == COMPILED else LAYOUTS
    pairs = [
        (f"{who} {n}", f"native {n}") for n in layouts for who in ("ours", "native")
    ]
    pairs += [(f"native {n}", "native 1") for n in layouts]
    builds = 1 if setup.smallest or name == COMPILED else BUILDS
    found = []
    for _ in range(builds):
        torch.compiler.reset()
        steps = contestants(model(setup), flags(name, setup), kind(name), layouts)
        made = {who: prepared(name, step, setup) for who, step in steps.items()}
        found.append(
            measure_pairs(made, 2 if setup.smallest else ROUNDS, pairs, timer(setup))
        )
    return found


def model(setup: Setup) -> nn.Module:
    """The adapters on the device, with random gradients."""
    torch.manual_seed(0)
    made = adapters(*((1, LLAMA_8B_EIGHTH) if setup.smallest else (32, LLAMA_8B))).to(
        setup.device
    )
    for param in made.parameters():
        param.grad = torch.randn_like(param)
    return made


def flags(name: str, setup: Setup) -> dict[str, Any]:
    """The optimizer's options. A tensor rate is put on the device, where a graph reads it at every replay."""
    own = FLAGS[name] | ({"lr": torch.tensor(SETTINGS["lr"])} if name == GRAPHS else {})
    return {
        key: value.to(setup.device) if isinstance(value, torch.Tensor) else value
        for key, value in own.items()
    }


def kind(name: str) -> Any:
    if name != EIGHT_BIT:
        return AdamW
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def prepared(name: str, step: Step, setup: Setup) -> Step:
    """The step to time: captured in a graph, compiled, or unchanged."""
    if name == GRAPHS:
        return captured(step)
    if name == COMPILED:
        # On a CPU Inductor takes a minute to compile, and aot_eager traces the same code.
        return torch.compile(
            step, backend="aot_eager" if setup.smallest else "inductor"
        )
    return step


def captured(step: Step) -> Step:
    """The replay of a CUDA graph of one step. The first steps, which make the moments, run on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timer(setup: Setup) -> Callable[[Step], float]:
    return by_events if setup.device == "cuda" else milliseconds


def by_events(step: Step) -> float:
    """Milliseconds of a step by the device's clock, from an idle device until the step is done."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# --- the table ------------------------------------------------------------------------------------------------------

HEADS = (
    *("card", "implementation", "groups", "native, one group, ms"),
    *("ours / native", "range", "native / itself", "native / one group"),
)


def blocks(setup: Setup) -> Iterator[str]:
    """The table of the rows on file."""
    rows = list(rows_in(setup.folder / STORE))
    if rows:
        yield block(
            "What a step costs",
            HEADS,
            [cells for row in rows for cells in cells_of(row)],
        )
        yield (__doc__ or "").partition("\n\n")[2].strip()
        yield made_with([row["machine"] for row in rows])


def cells_of(row: dict[str, Any]) -> Iterator[list[str]]:
    """One row of the table for each layout."""
    runs: Sequence[dict[str, float]] = row["ratios"]
    for n in (n for n in LAYOUTS if f"ours {n} / native {n}" in runs[0]):
        same, itself, one = (
            [run[f"{above} {n} / {below}"] for run in runs]
            for above, below in (
                ("ours", f"native {n}"),
                ("native", f"native {n}"),
                ("native", "native 1"),
            )
        )
        native = statistics.median(run["native 1, ms"] for run in runs)
        middle = [statistics.median(found) for found in (same, itself, one)]
        between = f"{min(same):.3f} to {max(same):.3f}"
        figures = [
            number(native, 3),
            number(middle[0], 3),
            between,
            *(number(x, 3) for x in middle[1:]),
        ]
        yield [row["device"], row["implementation"], str(n), *figures]
