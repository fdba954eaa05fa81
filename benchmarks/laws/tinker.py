"""The sweep that is published with the tinker-cookbook: supervised finetuning of 35 language models, ranks by rates.

It is a Markdown file, `sft_sweep.md`, with a table for each model: learning rate, LoRA's rank, test loss. Nothing of it is
kept here but its hash and the widths of its models.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from internals import PUBLISHED
from study.loss_curves import between, vertex_of

from rankaware_optim import Rate, Reference

SHA256 = "ef4d8afaf871dd890141f22e74dce83640b38131d35f7fccd3439d473f624682"
SET_UP = (
    "Supervised finetuning of 35 language models on Tulu 3, AdamW, batch 128, 780 steps: test losses on a grid of ranks and "
    "rates, no rate by a formula. Alpha is 32 by that service's documentation, Init[A] is assumed, and runs that diverged "
    "are left out. The default law was chosen after a look at 18 of the models. "
    "github.com/thinking-machines-lab/tinker-cookbook, commit 9dfcc3a2, Apache-2.0, "
    "`tinker_cookbook/recipes/chat_sl/results/`."
)
WORDS = f"**sft_sweep.md**, sha256 {SHA256[:16]}: {SET_UP}"
ALPHA = 32.0  # at every rank, by that service's documentation
MODEL = re.compile(r"- Model: `(?P<model>.+)`")
RUN = re.compile(r"\| (?P<lr>\d\S*) \| (?P<rank>\d+) \| (?P<loss>[\d.]+) \|")

# Hidden sizes, from the models' published configurations: of the 18 that were there when the default law was chosen,
# and of those added since.
_FIRST = {
    2048: (
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
        "Qwen/Qwen3.5-35B-A3B-Base",
        "meta-llama/Llama-3.2-1B",
    ),
    2560: ("Qwen/Qwen3-4B-Instruct-2507",),
    2880: ("openai/gpt-oss-20b",),
    4096: (
        "Qwen/Qwen3-8B-Base",
        "Qwen/Qwen3-VL-235B-A22B-Instruct",
        "Qwen/Qwen3.5-397B-A17B",
        "Qwen/Qwen3.5-9B-Base",
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
    ),
    5120: ("Qwen/Qwen3-32B", "Qwen/Qwen3.6-27B"),
    7168: (
        "deepseek-ai/DeepSeek-V3.1-Base",
        "moonshotai/Kimi-K2.5",
        "moonshotai/Kimi-K2.6",
    ),
    8192: ("meta-llama/Llama-3.3-70B-Instruct",),
}
_ADDED = {
    2048: (
        "Qwen/Qwen3-30B-A3B-Base",
        "Qwen/Qwen3.5-35B-A3B",
        "Qwen/Qwen3.6-35B-A3B",
    ),
    2560: ("Qwen/Qwen3.5-4B",),
    2688: ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",),
    2880: ("openai/gpt-oss-120b",),
    3072: ("meta-llama/Llama-3.2-3B",),
    4096: (
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3.5-9B",
        "meta-llama/Llama-3.1-8B",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    5120: ("Qwen/Qwen3.5-27B",),
    7168: ("deepseek-ai/DeepSeek-V3.1", "moonshotai/Kimi-K2-Thinking"),
    8192: (
        "meta-llama/Llama-3.1-70B",
        "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    ),
}
FIRST = {name: width for width, names in _FIRST.items() for name in names}
ADDED = {name: width for width, names in _ADDED.items() for name in names}
HIDDEN = FIRST | ADDED

# The cookbook's `get_lr`: a power of the hidden size, fitted for each family.
POWERS = {"llama": 0.781, "qwen": 0.0775}


def power_of(model: str) -> float | None:
    """The power of a model's family, None for the others."""
    return next((at for name, at in POWERS.items() if name in model.lower()), None)


def get_lr(model: str, hidden: float, is_lora: bool = True) -> float | None:
    """The cookbook's `get_lr`, None for a family without a formula."""
    power = power_of(model)
    if power is None:
        return None
    return (5e-4 if is_lora else 5e-5) * (2000 / hidden) ** power


def checked(path: Path) -> Path:
    """The same path, of the file that was read."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise click.ClickException(
            f"{path} is not the sft_sweep.md that was read. large_models.md names its source and hash."
        )
    return path


def runs(path: Path) -> Iterator[dict[str, Any]]:
    """The runs of all models. Those that diverged are not in the file's tables."""
    model = ""
    for line in path.read_text().splitlines():
        named, run = MODEL.match(line), RUN.match(line)
        if named:
            model = named["model"]
        if run:
            yield {
                "model": model,
                "rank": int(run["rank"]),
                "alpha": ALPHA,
                "fan_in": HIDDEN[model],
                "lr": float(run["lr"]),
                "loss": float(run["loss"]),
            }


def of_models(path: Path, models: Container[str] = HIDDEN) -> list[dict[str, Any]]:
    """The runs of some of the models, by default of all."""
    return [run for run in runs(path) if run["model"] in models]


def added(path: Path) -> list[dict[str, Any]]:
    """The runs of the models that were added since the default law was chosen."""
    return of_models(path, ADDED)


def curves(path: Path) -> dict[tuple[str, int], dict[float, float]]:
    """The mean loss by log2 rate, of each model at each rank."""
    losses: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for run in runs(path):
        losses[run["model"], run["rank"]][math.log2(run["lr"])].append(run["loss"])
    return {
        cell: {lr: statistics.mean(each) for lr, each in curve.items()}
        for cell, curve in losses.items()
    }


class Target(NamedTuple):
    """A model at a rank whose best rate lies inside the grid: mean loss by log2 rate, and log2 of the best rate."""

    at: Reference
    curve: Mapping[float, float]
    best: float
    model: str


def targets(path: Path) -> list[Target]:
    """All best rates inside the grid."""
    found = []
    for (model, rank), curve in curves(path).items():
        best = vertex_of(curve) if len(curve) > 1 else None
        if best is not None:
            at = Reference(rank, PUBLISHED.alpha, fan_in=HIDDEN[model])
            found.append(Target(at, curve, best, model))
    return found


class Score(NamedTuple):
    """Over all targets: the loss above the lowest, %; octaves above the best rate; share of best rates in the band."""

    lost: float
    octaves: float
    held: float


def score_of(targets: Sequence[Target], rates: Sequence[Rate]) -> Score:
    """The means over the targets, of a rate for each. Beyond the grid the loss is that of its end."""
    lost, octaves, held = [], [], 0
    for target, given in zip(targets, rates, strict=True):
        x, least = math.log2(given.lr), min(target.curve.values())
        lost.append(100 * (between(target.curve, x) - least) / least)
        octaves.append(x - target.best)
        held += given.low <= 2.0**target.best <= given.high
    return Score(statistics.fmean(lost), statistics.fmean(octaves), held / len(targets))
