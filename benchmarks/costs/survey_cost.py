"""Cost of inspection and grouping by number of adapted layers, on the meta device and with real weights.

The model has PEFT adapters of rank 16 on blocks as wide as Llama-70B's (fan-in 8,192 and 28,672), with seven linear
layers a block. The adapters' factors are real tensors. A frozen weight is one zero, expanded to the weight's shape,
since nothing reads it.

    python benchmarks/costs/survey_cost.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from llama_shapes import LLAMA_70B, RANK
from peft import LoraConfig, get_peft_model
from recording import machine, record
from torch import nn

from rankaware_optim import inspect_model, rank_aware_param_groups

RESTS_ON = ()  # times: made again at a release
BLOCKS = (20, 40, 80, 160)  # 140, 280, 560 and 1,120 layers
BARS_MS = {"meta": 30.0, "cpu": 60.0}  # for 560 layers
LINEAR = (
    1.25  # bar: time per layer over that at half the layers; quadratic cost would be 2
)


@click.command()
@click.option(
    "--repeats",
    default=25,
    show_default=True,
    help="Calls timed; their median is reported.",
)
@click.option("--threads", default=1, show_default=True)
def main(repeats: int, threads: int) -> None:
    """Measure, print the table, and write it to the results. Exit with status 1 if a bar is not met."""
    torch.set_num_threads(threads)
    on = machine(threads)
    rows = [row for device in BARS_MS for row in device_rows(device, repeats)]
    record("survey_cost", "Cost of inspection and grouping", rows, on, notes(repeats))
    sys.exit(not all(row["met"] for row in rows))


def device_rows(device: str, repeats: int) -> list[dict[str, Any]]:
    """One row per model size. Bars: the time for 560 layers, and how much a doubling adds to the time per layer."""
    rows: list[dict[str, Any]] = []
    for blocks in BLOCKS:
        layers = blocks * len(LLAMA_70B)
        inspecting, both, wall = time_both(adapted(blocks, device), repeats)
        per_layer = both / layers * 1e3
        linear = per_layer <= LINEAR * (rows[-1]["µs per layer"] if rows else per_layer)
        rows.append(
            {
                "device": device,
                "layers": layers,
                "inspection, ms": inspecting,
                "grouping, ms": both - inspecting,
                "both, ms": both,
                "both, wall ms": wall,
                "µs per layer": per_layer,
                "met": linear and (layers != 560 or both <= BARS_MS[device]),
            }
        )
    return rows


def adapted(blocks: int, device: str) -> nn.Module:
    """A PEFT model with `blocks` blocks on a device."""
    layers = [
        {name: frozen_linear(*fans, device) for name, fans in LLAMA_70B.items()}
        for _ in range(blocks)
    ]
    base = nn.Sequential(*map(nn.ModuleDict, layers))
    return get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LLAMA_70B))
    )


def frozen_linear(fan_in: int, fan_out: int, device: str) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out, bias=False, device="meta")
    if device != "meta":
        weight = torch.zeros((), device=device).expand(fan_out, fan_in)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def time_both(model: nn.Module, repeats: int) -> tuple[float, float, float]:
    """Median milliseconds: processor time of inspection, processor and wall time of inspection and grouping."""
    inspecting = [milliseconds(lambda: inspect_model(model)) for _ in range(repeats)]
    both = [
        milliseconds(lambda: rank_aware_param_groups(model, lr=1e-4))
        for _ in range(repeats)
    ]
    (cpu, _), (both_cpu, both_wall) = (
        [statistics.median(t) for t in zip(*x, strict=True)] for x in (inspecting, both)
    )
    return cpu, both_cpu, both_wall


def milliseconds(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a call in processor time, which other jobs hardly change, and in wall time."""
    cpu, wall = time.thread_time(), time.perf_counter()
    call()
    return (time.thread_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3


def notes(repeats: int) -> list[str]:
    meta, cpu = BARS_MS.values()
    return [
        "PEFT adapters of rank 16 on blocks as wide as Llama-70B's: A factors of (16, 8192) and (16, 28672), B factors "
        "of (1024, 16) to (28672, 16).",
        "`rank_aware_param_groups` inspects and groups. Grouping is its time less that of "
        f"`inspect_model`. Medians of {repeats} calls, in processor time (the bars too, since the machine is shared); "
        "on an idle machine the wall clock agrees.",
        f"Bars: {meta:g} ms (meta) and {cpu:g} ms (cpu) for 560 layers; each doubling at most {LINEAR} times the time "
        "per layer before it (linear 1, quadratic 2). It grows somewhat, probably since a larger model no longer fits "
        "in the caches; on the cpu 1,024 entries of each B are read.",
    ]


if __name__ == "__main__":
    main()
