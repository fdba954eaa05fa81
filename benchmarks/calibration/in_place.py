"""What calibrating in place costs: seconds between trials, memory beside the model, and what Ctrl-C leaves behind.

The model has 224 adapted linear layers with frozen weights, shaped like an 8B model's with every width divided by 8.
Time and memory are measured in fresh processes. Memory is the resident set. The interruptions are those of the tests,
but there are more of them.

    python benchmarks/calibration/in_place.py
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from llama_shapes import LLAMA_8B_EIGHTH, RANK
from recording import in_fresh_process, machine, record
from torch import nn
from torch.optim import AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook

import rankaware_optim as ra

RESTS_ON = ()  # times: made again at a release
ROOT = Path(__file__).parents[2]
BLOCKS, STEPS, TRIALS, LARGE = 32, 5, 6, 64


@click.command()
@click.option(
    "--interruptions",
    default=100,
    show_default=True,
    help="Ctrl-C's sent, and as many in pairs.",
)
@click.option("--threads", default=1, show_default=True)
@click.option(
    "--worker", default="", hidden=True, help="Run one measured process and print JSON."
)
def main(interruptions: int, threads: int, worker: str) -> None:
    """Measure, print the table, and write it to the results. Exit with status 1 if a model was not restored."""
    torch.set_num_threads(threads)
    if worker:
        print(json.dumps(WORKERS[worker]()))
        return
    on = machine(threads)
    found = {
        name: in_fresh_process(__file__, f"--worker={name}", f"--threads={threads}")
        for name in WORKERS
    }
    rows = [
        *time_rows(found["time"]),
        *memory_rows(found),
        *(interrupt(interruptions, twice) for twice in (False, True)),
    ]
    record("in_place", "Calibration in place", rows, on, notes())
    sys.exit(not all(row["met"] for row in rows if row["met"] is not None))


# --- the model ------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen linear layer and its LoRA pair, with PEFT's names and attributes."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(fan_in, fan_out, bias=False).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(fan_in, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, fan_out, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.r, self.scaling = {"default": RANK}, {"default": 1.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + self.scaling["default"] * low  # type: ignore[no-any-return]


class Block(nn.Module):
    """The seven linear layers of a Llama block without attention, connected so that each has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: Adapted(*fans) for name, fans in LLAMA_8B_EIGHTH.items()}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = self.layers
        keys = at["k"](x) * at["v"](x)
        x = x + at["o"](at["q"](x) * keys.repeat(1, x.shape[1] // keys.shape[1])) / 8
        return x + at["down"](torch.sigmoid(at["gate"](x)) * at["up"](x)) / 8


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


def step(model: nn.Module, i: int) -> torch.Tensor:
    # one batch, so that a few steps lower the loss
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    return (model(x) - x.roll(1, 1)).square().mean()


# --- the processes --------------------------------------------------------------------------------------------------


def between_trials() -> dict[str, Any]:
    """Seconds from the end of a trial's last step to the start of the next trial's first, by the next one's rank.

    Also seconds before the first step, after the last, and of a median step; and the number of LoRA pairs.
    """
    model, started, ended = build(), list[tuple[int, float, int]](), list[float]()
    register_optimizer_step_post_hook(lambda *_: ended.append(time.perf_counter()))

    def stamped(model: nn.Module, i: int) -> torch.Tensor:
        rank = len(model.get_submodule("0.layers.q.lora_A.default").weight)
        started.append((i, time.perf_counter(), rank))
        return step(model, i)

    begin = time.perf_counter()
    calibrate(model, stamped, (RANK // 4, LARGE))
    end = time.perf_counter()
    firsts = [n for n, (i, _, _) in enumerate(started) if i == 0]
    gaps = [(started[n][2], started[n][1] - ended[n - 1]) for n in firsts[1:]]
    taken = [b - a for (_, a, _), b in zip(started, ended, strict=True)]
    whole = {
        "first": started[0][1] - begin,
        "last": end - ended[-1],
        "step": statistics.median(taken),
    }
    return {
        "gaps": gaps,
        **whole,
        "pairs": sum(isinstance(m, Adapted) for m in model.modules()),
    }


def calibrate(model: nn.Module, step: Any, ranks: tuple[int | None, ...]) -> None:
    ra.calibrate_in_place(
        model,
        step,
        AdamW,
        ranks=ranks,
        steps=STEPS,
        trials=TRIALS,
        lr_range=(1e-5, 1e-4),
    )


def plain() -> dict[str, Any]:
    """Memory in MB of plain training at rank `LARGE`, without a calibration."""
    model = build()
    for module in model.modules():
        if isinstance(module, Adapted):
            module.lora_A["default"] = nn.Linear(
                module.base_layer.in_features, LARGE, bias=False
            )
            module.lora_B["default"] = nn.Linear(
                LARGE, module.base_layer.out_features, bias=False
            )
            nn.init.zeros_(module.lora_B["default"].weight)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = {
        "before": resident(),
        "model": size(model.parameters()),
        "trained": size(trained),
    }
    opt = AdamW(trained, lr=1e-5)
    for i in range(STEPS):
        step(model, i).backward()
        opt.step()
        opt.zero_grad()
    return {**found, "peak": peak()}


def in_place(*ranks: int | None) -> dict[str, Any]:
    """Memory in MB of calibrating in place at these ranks; None is full finetuning."""
    model = build()
    found = {"before": resident(), "model": size(model.parameters())}
    calibrate(model, step, ranks)
    return {**found, "peak": peak()}


WORKERS = {
    "time": between_trials,
    "plain": plain,
    "lora": lambda: in_place(RANK // 4, LARGE),
    "full": lambda: in_place(RANK // 4, None),
}


def resident() -> float:
    """This process's resident set now, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def peak() -> float:
    """This process's largest resident set so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def size(tensors: Any) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**20


# --- the table ------------------------------------------------------------------------------------------------------


def row(what: str, value: str, note: str, met: bool | None = None) -> dict[str, Any]:
    return {"what": what, "figure": value, "of": note, "met": met}


def time_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for rank in sorted({rank for rank, _ in found["gaps"]}):
        gaps = [gap for at, gap in found["gaps"] if at == rank]
        text = f"{statistics.median(gaps):.2f} s ({min(gaps):.2f} to {max(gaps):.2f})"
        rows.append(
            row(
                f"from a trial's last step to the first one at rank {rank}",
                text,
                f"{found['pairs']} pairs",
            )
        )
    rows.append(
        row(
            "from the call to the first step",
            f"{found['first']:.2f} s",
            "with Optuna's import",
        )
    )
    rows.append(
        row(
            "from the last step to the recipe",
            f"{found['last']:.2f} s",
            "model put back, fit",
        )
    )
    return [*rows, row("a training step beside it", f"{found['step']:.2f} s", "4 rows")]


def memory_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    names = {
        "plain": f"plain training at rank {LARGE}",
        "lora": f"in place, ranks {RANK // 4} and {LARGE}",
        "full": f"in place, rank {RANK // 4} and full finetuning",
    }
    rows = []
    for name, words in names.items():
        memory = found[name]
        text = f"{memory['peak'] - memory['before']:.0f} MB"
        rows.append(
            row(
                f"peak beside the model: {words}",
                text,
                f"model {memory['model']:.0f} MB",
            )
        )
    return rows


def interrupt(count: int, twice: bool) -> dict[str, Any]:
    """Send Ctrl-C to a real process at `count` random moments. The row says how rounds ended and how many differed."""
    source, ends, differed = random.Random(0), Counter[str](), 0
    command = [sys.executable, "-m", "tests.helpers.interrupted", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {
        "text": True,
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
    }
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as child:
        for _ in range(count):
            assert child.stdout.readline() == "go\n"
            for pause in (
                source.uniform(0, 0.3),
                *([source.uniform(0, 0.003)] * twice),
            ):
                time.sleep(pause)
                child.send_signal(signal.SIGINT)
            ended, *differs = child.stdout.readline().split()
            ends[ended] += 1
            differed += bool(differs)
            child.stdin.write("next\n")
            child.stdin.flush()
    words = ", ".join(f"{kind} {number}" for kind, number in ends.most_common())
    what = f"models changed by {count} interruptions at random moments{', each of two Ctrl-C' * twice}"
    return row(what, str(differed), words, differed == 0)


def notes() -> list[str]:
    return [
        f"{BLOCKS} blocks of 7 linear layers with a pair each, widths of an 8B model divided by 8, float32; AdamW, "
        f"{TRIALS} trials of {STEPS} steps. Between trials: the trial recorded, the model put back, adapters built "
        "again and drawn, the optimizer built.",
        "Peak beside the model is the largest resident set of the process less what it held with the model built; it "
        "holds adapters, their gradients and moments, activations, and Optuna's import (about 60 MB).",
        "Interruptions: tests/helpers/interrupted.py: every object, value, gradient, hook, mode, generator compared.",
    ]


if __name__ == "__main__":
    main()
