"""Are the rate that `suggest_lr` gives and its band honest? Tests with models left out in turn, and on our own tasks.

    python benchmarks/laws/suggestion.py ../shared/data/sft_sweep.csv    # results/suggestion.md

The CSV has columns model, rank, lr and a loss. Alpha was 32. The best rate of a cell (model, rank) is the vertex of the
parabola through the best three log2 rates. Where the best lies at an edge of the grid, we know only that the vertex
lies beyond the middle of the last two rates. The law moves all best rates to rank 16 and fan-in 4096. Then a normal
distribution is fitted to them, with weight 1 per model; cells at an edge count by their tail (Tobit). Its mean and
standard deviation are LOG2_RATE and SPREAD of rankaware_optim/transfer/_suggest.py.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from internals import LOG2_RATE, MARGIN, PUBLISHED, SPREAD, TASK_SD, Z90
from laws import elsewhere
from recording import machine, record
from study.loss_curves import vertex_of

from rankaware_optim import MuA, Reference
from rankaware_optim.laws import checked_multiplier
from rankaware_optim.transfer import suggest_lr

RESTS_ON = ("laws.adam", "transfer", "recipes")

# Hidden sizes, from the models' published configurations.
HIDDEN = {
    **dict.fromkeys(
        (
            "Qwen/Qwen3-30B-A3B",
            "Qwen/Qwen3-30B-A3B-Instruct-2507",
            "meta-llama/Llama-3.2-1B",
        ),
        2048,
    ),
    **dict.fromkeys(
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3.5-35B-A3B-Base"), 2048
    ),
    **dict.fromkeys(
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3.5-9B-Base", "Qwen/Qwen3.5-397B-A17B"), 4096
    ),
    **dict.fromkeys(
        (
            "Qwen/Qwen3-VL-235B-A22B-Instruct",
            "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
        ),
        4096,
    ),
    **dict.fromkeys(("Qwen/Qwen3-32B", "Qwen/Qwen3.6-27B"), 5120),
    **dict.fromkeys(
        (
            "deepseek-ai/DeepSeek-V3.1-Base",
            "moonshotai/Kimi-K2.5",
            "moonshotai/Kimi-K2.6",
        ),
        7168,
    ),
    **{
        "Qwen/Qwen3-4B-Instruct-2507": 2560,
        "openai/gpt-oss-20b": 2880,
        "meta-llama/Llama-3.3-70B-Instruct": 8192,
    },
}

# Our own small sweeps (as in full_width.py): hidden size, the largest fan-in, then log2 of the best rate at scaling 1
# by rank under Init[A] and Init[B], and of full finetuning. AdamW, 40 to 150 steps, batches of 8 to 32.
SMALL: dict[str, tuple[int, int, dict[int, float], dict[int, float], float]] = {
    "transformer": (
        128,
        512,
        {1: -5.0, 4: -5.5, 16: -6.5, 64: -7.6},
        {4: -6.8, 16: -7.5, 64: -8.2},
        -9.2,
    ),
    "DiT": (
        128,
        512,
        {2: -5.8, 8: -6.9, 32: -7.8, 96: -8.7},
        {8: -6.5, 32: -8.0, 96: -8.8},
        -9.7,
    ),
    "SmolLM2-135M": (576, 1536, {4: -7.8, 64: -10.1}, {4: -10.1, 64: -11.7}, -12.8),
}


class Cell(NamedTuple):
    """log2 of a model's best rate at a rank, moved to PUBLISHED: from `low` to `high`, equal if the rate was found."""

    model: str
    low: float
    high: float


@click.command()
@click.argument("sweep", type=click.Path(exists=True, path_type=Path))
def main(sweep: Path) -> None:
    """Write results/suggestion.md."""
    on = machine(1)
    cells = read(sweep)
    middle, spread = fit(cells)
    if (middle, spread) != (LOG2_RATE, SPREAD):
        raise SystemExit(
            f"The package holds {LOG2_RATE}, {SPREAD}; the sweep gives {middle}, {spread}."
        )
    rows = [*left_out(cells), *own_tasks()]
    title = "Suggested rates: does the 90 % band hold what it says?"
    recipes = elsewhere.table(curves_in(sweep), HIDDEN.__getitem__)
    said = [*notes(sweep, cells), compared(sweep), recipes]
    record("suggestion", title, rows, on, said)


def curves_in(sweep: Path) -> dict[tuple[str, int], dict[float, float]]:
    """The mean loss by log2 rate, of each model at each rank."""
    losses: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in csv.DictReader(sweep.open()):
        losses[row["model"], int(row["rank"])][math.log2(float(row["lr"]))].append(
            float(list(row.values())[-1])
        )
    return {
        cell: {lr: statistics.mean(each) for lr, each in curve.items()}
        for cell, curve in losses.items()
    }


def read(sweep: Path, width: Callable[[str], float] = HIDDEN.__getitem__) -> list[Cell]:
    cells = []
    for (model, rank), curve in curves_in(sweep).items():
        if len(curve) > 1:  # one rate does not show where the best one is
            at = Reference(rank, PUBLISHED.alpha, fan_in=width(model))
            moved = math.log2(
                checked_multiplier(MuA(tokens=8.0), at.as_factor(), PUBLISHED)
            )
            low, high = bounds(curve)
            cells.append(Cell(model, low - moved, high - moved))
    return cells


def bounds(curve: dict[float, float]) -> tuple[float, float]:
    """Interval of log2 rates where a curve's vertex lies: one point, or all beyond the middle of the last two rates."""
    vertex = vertex_of(curve)
    if vertex is not None:
        return vertex, vertex
    rates = sorted(curve)
    if min(curve, key=curve.__getitem__) == rates[0]:
        return -math.inf, (rates[0] + rates[1]) / 2
    return (rates[-2] + rates[-1]) / 2, math.inf


def fit(cells: Sequence[Cell]) -> tuple[float, float]:
    """Maximum-likelihood mean and standard deviation of log2 rates, on a grid of 0.05 octaves."""
    grid = [(-13 + i / 20, j / 20) for i in range(61) for j in range(4, 31)]
    middle, spread = max(grid, key=lambda point: likelihood(cells, *point))
    return round(middle, 2), round(spread, 2)


def likelihood(cells: Sequence[Cell], middle: float, spread: float) -> float:
    """Log-likelihood: averaged over a model's cells, summed over models."""
    share = Counter(cell.model for cell in cells)
    return sum(one(cell, middle, spread) / share[cell.model] for cell in cells)


def one(cell: Cell, middle: float, spread: float) -> float:
    low, high = (cell.low - middle) / spread, (cell.high - middle) / spread
    if low == high:
        return -low * low / 2 - math.log(spread * math.sqrt(2 * math.pi))
    return math.log(
        max((math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2, 1e-300)
    )


def left_out(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Judge each model by the fit to the others: a row per case."""
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for model in HIDDEN:
        middle, spread = fit([c for c in cells if c.model != model])
        for kind, sd in (("chat", 0.0), ("other", TASK_SD)):
            half = Z90 * math.hypot(spread, sd)
            for cell in (c for c in cells if c.model == model):
                error = outside(cell, middle)
                where = "seen" if cell.low == cell.high else "at an edge"
                found[f"published, task={kind!r}, best rate {where}"].append(
                    (error, half, abs(error))
                )
    return [summary(case, errors) for case, errors in found.items()]


def outside(cell: Cell, middle: float) -> float:
    """Octaves from `middle` to the nearest possible best rate: 0 where the interval of a cell at an edge holds it."""
    return max(0.0, cell.low - middle) - max(0.0, middle - cell.high)


def own_tasks() -> list[dict[str, Any]]:
    rows = []
    for task, (width, largest, init_a, init_b, full) in SMALL.items():
        asked = [(Reference(r, r, fan_in=width), best) for r, best in init_a.items()]
        other = [
            (Reference(r, r, init="B", fan_in=width), best)
            for r, best in init_b.items()
        ]
        whole = [(Reference(method="full", fan_in=largest), full)]
        for name, points in (
            ("Init[A]", asked),
            ("Init[B]", other),
            ("full finetuning", whole),
        ):
            rows.append(
                summary(f"{task}, {name}", [away(at, best) for at, best in points])
            )
    return rows


def away(at: Reference, best: float) -> tuple[float, float, float]:
    found = suggest_lr(at)
    middle = math.log2(found.lr) + MARGIN
    return best - middle, math.log2(found.high / found.low) / 2, abs(best - middle)


def summary(case: str, found: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    return {
        "case": case,
        "rates": len(found),
        "best above the middle, mean, octaves": statistics.mean(
            error for error, _, _ in found
        ),
        "farthest": max(size for _, _, size in found),
        "half the band": statistics.mean(half for _, half, _ in found),
        "inside, %": 100.0 * sum(size <= half for _, half, size in found) / len(found),
    }


def notes(sweep: Path, cells: Sequence[Cell]) -> list[str]:
    edges = sum(c.low != c.high for c in cells)
    chat = Z90 * SPREAD
    seen = {c.model for c in cells if c.low == c.high}
    missed = {
        c.model for c in cells if c.low == c.high and abs(outside(c, LOG2_RATE)) > chat
    }
    return [
        f"Published: {sweep.name}, as published with the tinker-cookbook (Apache-2.0): {len(HIDDEN)} models, each "
        f"judged by the fit of the others; {len(cells)} cells, of which {edges} have their best at an edge of the grid "
        "and count as inside where the best rate may lie inside. Cells of a model are not independent: of "
        f"{len(seen)} models with a best rate seen, {len(seen - missed)} have all of theirs inside the band of "
        "task='chat'. The middle is half an octave above the suggestion. For our own tasks (task='other') the fan-in "
        "is the hidden size, for full finetuning the largest fan-in. All lie above the middle, further above it the "
        "narrower the network is. There the suggestion is too low, which costs less than too high.",
    ]


def compared(sweep: Path) -> str:
    """Other fits of the sweep: without the cells at an edge, and with one width for all models."""
    found = []
    for name, width in (
        ("by the law", HIDDEN.__getitem__),
        ("left out", lambda model: 4096.0),
    ):
        cells = read(sweep, width)
        for what, chosen in (
            ("all cells", cells),
            ("without edges", [c for c in cells if c.low == c.high]),
        ):
            middle, spread = fit(chosen)
            found.append(
                f"{what}, width {name}: {middle:.2f} ± {spread:.2f} (log-likelihood "
                f"{likelihood(chosen, middle, spread):.1f})"
            )
    return (
        f"Log2 of the best rate at {PUBLISHED}, fan-in 4096: " + "; ".join(found) + "."
    )


if __name__ == "__main__":
    main()
