"""Are the rate that `suggest_lr` gives and its band honest? Tests with models left out in turn, and on our own tasks.

    python benchmarks/laws/suggestion.py sft_sweep.md    # results/suggestion.md; without the file its rows stay

`tinker.py` reads the file. Alpha was 32. The best rate of a cell (model, rank) is the vertex of the
parabola through the best three log2 rates. Where the best lies at an edge of the grid, we know only that the vertex
lies beyond the middle of the last two rates. The law moves all best rates to rank 16 and fan-in 4096. Then a normal
distribution is fitted to them, with weight 1 per model; cells at an edge count by their tail (Tobit). Its mean and
standard deviation are LOG2_RATE and SPREAD of rankaware_optim/transfer/_suggest.py.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from internals import LOG2_RATE, PUBLISHED, SPREAD, TASK_SD, Z90
from laws import suggested, tinker
from recording import RESULTS, machine, record
from study.loss_curves import vertex_of

from rankaware_optim import MuA, Reference
from rankaware_optim.laws import checked_multiplier

RESTS_ON = ("laws", "transfer", "recipe")
PAGE = RESULTS / "suggestion.md"


class Cell(NamedTuple):
    """log2 of a model's best rate at a rank, moved to PUBLISHED: from `low` to `high`, equal if the rate was found."""

    model: str
    low: float
    high: float


@click.command()
@click.argument("sweep", type=click.Path(exists=True, path_type=Path), required=False)
def main(sweep: Path | None) -> None:
    """Write results/suggestion.md. Without the file the page keeps what was made of it."""
    on = machine(1)
    if sweep is None:
        write([*kept_rows()], [kept_note()], on)
        return
    cells = read(tinker.checked(sweep))
    middle, spread = fit(cells)
    if (middle, spread) != (LOG2_RATE, SPREAD):
        raise SystemExit(
            f"The package holds {LOG2_RATE}, {SPREAD}; the sweep gives {middle}, {spread}."
        )
    write(left_out(cells), notes(cells), on)


def write(
    published: Sequence[dict[str, Any]], notes: Sequence[str], on: dict[str, Any]
) -> None:
    title = "Suggested rates: does the 90 % band hold what it says?"
    said = [*notes, tinker.WORDS, suggested.losses(), suggested.reinforcement()]
    record("suggestion", title, [*published, *own_tasks()], on, said)


def kept_rows() -> Iterator[dict[str, Any]]:
    """The page's own rows of published models. They depend on the law and on nothing of full finetuning."""
    lines = PAGE.read_text().splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    for cells in table:
        if cells[0].startswith("published"):
            yield dict(zip(table[0], cells, strict=True))


def kept_note() -> str:
    """The page's own note on the published models."""
    lines = PAGE.read_text().splitlines()
    return next(line for line in lines if line.startswith("Published: "))


def read(sweep: Path) -> list[Cell]:
    cells = []
    for (model, rank), curve in tinker.curves(sweep).items():
        if len(curve) > 1:  # one rate does not show where the best one is
            at = Reference(rank, PUBLISHED.alpha, fan_in=tinker.HIDDEN[model])
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
    for model in tinker.HIDDEN:
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
    """A row for each kind, over the study's nine tasks."""
    rows = []
    for kind in suggested.KINDS:
        seen = [
            (each.above, each.half, abs(each.above))
            for each in suggested.found_in(kind)
            if each.above is not None
        ]
        rows.append(summary(f"the study's nine tasks, {kind}", seen))
    return rows


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


def notes(cells: Sequence[Cell]) -> list[str]:
    edges = sum(c.low != c.high for c in cells)
    chat = Z90 * SPREAD
    seen = {c.model for c in cells if c.low == c.high}
    missed = {
        c.model for c in cells if c.low == c.high and abs(outside(c, LOG2_RATE)) > chat
    }
    return [
        f"Published: {len(tinker.HIDDEN)} models, each judged by the fit of the others; {len(cells)} cells, of which {edges} "
        "have their best at an edge of the grid and count as inside where the best rate may lie inside. Cells of a model "
        f"are not independent: of {len(seen)} models with a best rate seen, {len(seen - missed)} have all of theirs inside "
        "the band of task='chat'. The middle is half an octave above the suggestion. The study's tasks are small networks "
        "(task='other'); best rates outside their grids are left out. The fan-in is the most common one, for full "
        "finetuning the largest.",
    ]


if __name__ == "__main__":
    main()
