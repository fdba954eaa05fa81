"""How far a law moves a published sweep's best rate from the truth, over every ordered pair of ranks of every model.

    python benchmarks/law_on_sweep.py ../shared/data/sft_sweep.csv

The CSV has columns model, rank, lr and a loss. The best rate of a (model, rank) is the vertex of the parabola through
the best three rates, in log2; ranks whose best sits at an edge of the grid are left out. Alpha was constant, so the
effective multiplier is alpha / rank.
"""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections import defaultdict
from pathlib import Path

import click
from recording import RESULTS, machine

from rankaware_optim import Constant, Factor, Law, LoRAPlus, MuA, Reference

ALPHA, FAN_IN = 32.0, 4096.0
LAWS: dict[str, Law] = {
    "mua (8 tokens)": MuA(),
    "mua, 4 tokens": MuA(tokens=4),
    "mua, 16 tokens": MuA(tokens=16),
    "mua-paper": MuA(tokens=None),
    "constant": Constant(),
    "loraplus": LoRAPlus(),
}


@click.command()
@click.argument("sweep", type=click.Path(exists=True, path_type=Path))
def main(sweep: Path) -> None:
    """Write results/law_on_sweep.md."""
    best = best_rates(sweep)
    pairs = [(a, b) for rates in best.values() for a, b in itertools.permutations(rates.items(), 2)]
    lines = [
        "# Error of a rate moved from one rank to another, octaves",
        "",
        "| law | median | worst |",
        "|---|---|---|",
    ]
    for name, law in LAWS.items():
        errors = [error(law, a, b) for a, b in pairs]
        lines.append(f"| {name} | {statistics.median(errors):.2f} | {max(errors):.2f} |")
    cells = sum(map(len, best.values()))
    lines += ["", f"{len(pairs)} ordered pairs among {cells} (model, rank) cells of {len(best)} models; {sweep.name}."]
    lines += [f"Made by `python benchmarks/law_on_sweep.py {sweep}` on {machine(1)}"]
    (RESULTS / "law_on_sweep.md").write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


def best_rates(sweep: Path) -> dict[str, dict[int, float]]:
    """log2 of the best rate by model and rank."""
    cells: dict[tuple[str, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in csv.DictReader(sweep.open()):
        cells[row["model"], int(row["rank"])][math.log2(float(row["lr"]))].append(float(list(row.values())[-1]))
    best: dict[str, dict[int, float]] = defaultdict(dict)
    for (model, rank), curve in cells.items():
        vertex = parabola({x: statistics.mean(losses) for x, losses in curve.items()})
        if vertex is not None:
            best[model][rank] = vertex
    return best


def parabola(curve: dict[float, float]) -> float | None:
    """The vertex through the best point and its neighbours; None where the best is at an edge."""
    xs = sorted(curve)
    i = min(range(len(xs)), key=lambda j: curve[xs[j]])
    if not 0 < i < len(xs) - 1:
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((x, curve[x]) for x in xs[i - 1 : i + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    return (x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)


def error(law: Law, a: tuple[int, float], b: tuple[int, float]) -> float:
    """Octaves between the best rate at rank b and the one moved there from rank a."""
    (rank_a, lr_a), (rank_b, lr_b) = a, b
    factor = Factor("A", "A", rank_b, FAN_IN, FAN_IN, ALPHA / rank_b)
    moved = law.multiplier(factor, Reference(rank_a, ALPHA, fan_in=FAN_IN))
    return abs(lr_a + math.log2(moved) - lr_b)


if __name__ == "__main__":
    main()
