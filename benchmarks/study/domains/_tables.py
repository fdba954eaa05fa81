"""What was found on a grid of runs, as rows, tables and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankaware_optim.sweeps._bench import vertex_of

from ._runs import Cell, Job, Losses, curve, or_inf

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's
Panel = tuple[str, Mapping[int, Cell]]  # title, cells by rank


def best_of(done: Losses, cell: Cell, seeds: int, start: float) -> dict[str, Any] | None:
    """A cell's best rate; None where it has no grid yet.

    best: log2, the vertex of the parabola through the best three of the mean over seeds, None at an edge. by_seed: the
    same seed by seed. lowest: the grid's best rate; loss and spread: mean and standard deviation there. octave_above:
    what the next octave loses, as a share of the gain from `start`; None where it diverged.
    """
    means = curve(done, cell, seeds)
    if len(means) < 3:
        return None
    lowest = min(means, key=lambda x: means[x])
    losses = losses_at(done, cell, lowest, seeds)
    above = (means.get(lowest + 1, math.inf) - means[lowest]) / (start - means[lowest])
    return {
        "best": vertex_of(means),
        "by_seed": [vertex_of(each) for each in curves_by_seed(done, cell, seeds)],
        "lowest": lowest,
        "loss": means[lowest],
        "spread": statistics.stdev(losses) if math.isfinite(means[lowest]) else None,
        "octave_above": above if math.isfinite(above) else None,
    }


def losses_at(done: Losses, cell: Cell, x: int, seeds: int) -> list[float]:
    """The loss of every seed at a rate, infinite where it diverged."""
    return [or_inf(done[Job(*cell, x, seed)]) for seed in range(seeds)]


def curves_by_seed(done: Losses, cell: Cell, seeds: int) -> list[dict[float, float]]:
    """Every seed's {log2 rate: loss} at the rates that all seeds have run."""
    xs = curve(done, cell, seeds)
    return [{x: or_inf(done[Job(*cell, x, seed)]) for x in xs} for seed in range(seeds)]


def best_rate(means: Mapping[float, float], start: float) -> float | None:
    """log2 of a curve's best rate: the parabola's vertex, None at an edge of the grid.

    At a cliff a parabola says nothing: there it is the lowest.
    """
    vertex, xs = vertex_of(means), sorted(means)
    if vertex is None:
        return None
    i = min(range(len(xs)), key=lambda j: means[xs[j]])
    untrained = max(means[xs[i - 1]], means[xs[i + 1]]) >= start
    return xs[i] if untrained or jumps([means[x] for x in xs[i:]]) else vertex


def jumps(upward: Sequence[float]) -> bool:
    """Whether the loss, from its lowest to higher rates, rises at once to about where it then stays.

    That is: the first octave loses more than half of what any further one does. A parabola's loses a third at most,
    where its vertex lies half an octave below the lowest.
    """
    risen = [loss - upward[0] for loss in upward[1:] if math.isfinite(loss)]
    return len(risen) > 1 and risen[0] > max(risen) / 2


def slope(octaves: Mapping[int, float]) -> float:
    """Of octaves over log2 rank."""
    return statistics.linear_regression([math.log2(rank) for rank in octaves], list(octaves.values())).slope


def runs_of(done: Losses) -> list[list[Any]]:
    """Every run as [domain, scheme, rank, log2 rate, seed, loss], the loss None where it diverged."""
    return [[*job, loss if loss is None else round(loss, 5)] for job, loss in sorted(done.items())]


def block(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A heading and a table in markdown."""
    return f"## {title}\n\n{table_of(heads, rows)}"


def table_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def number(value: float | None, digits: int = 2, sign: bool = False, missing: str = "–") -> str:
    """A figure, or `missing`."""
    return missing if value is None or not math.isfinite(value) else f"{value:{'+' if sign else ''}.{digits}f}"


def percent(share: float) -> str:
    """A regret."""
    return "diverged" if not math.isfinite(share) else number(100 * share, 1) + " %"


def rates(row: Mapping[str, Any]) -> str:
    """A best rate with those of its seeds: "−7.9 (−8.0, −7.8, −7.9)"."""
    return f"{number(row['best'], 2)} ({', '.join(number(x, 1) for x in row['by_seed'])})"


def where(on: Mapping[str, Any]) -> str:
    """The machine, and the command."""
    named = ", ".join(f"{key} {value}" for key, value in on.items() if key != "command")
    return f"Machine: {named}.\n\nCommand: `{on['command']}`"


def on_machines(by_domain: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Where each domain's runs were made."""
    said: dict[str, list[str]] = {}
    for domain, found in by_domain.items():
        for on in found or [{"cpu": "not noted"}]:
            said.setdefault(", ".join(f"{key} {value}" for key, value in on.items()), []).append(domain)
    return "\n\n".join(f"Machine: {on}: {', '.join(domains)}." for on, domains in said.items())


def draw(done: Losses, panels: Sequence[Panel], seeds: int, start: float, columns: int, label: str, path: Path) -> None:
    """Loss against log2 rate, a panel each, a line a rank: the mean over seeds in a band from least to most."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (title, cells) in zip(axes, panels, strict=False):
        _draw_panel(axis, done, cells, seeds, start)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"log2 {label}", fontsize=8)
    for axis in list(figure.axes)[len(panels) :]:
        axis.axis("off")
    figure.axes[0].set_ylabel("held-out loss", fontsize=8)
    figure.savefig(path, dpi=90)


def _draw_panel(axis: Any, done: Losses, cells: Mapping[int, Cell], seeds: int, start: float) -> None:
    lowest = start
    for colour, (rank, cell) in zip(COLOURS, cells.items(), strict=False):
        means = {x: loss for x, loss in curve(done, cell, seeds).items() if math.isfinite(loss)}
        if not means:
            continue
        ends = [losses_at(done, cell, x, seeds) for x in means]
        axis.plot(list(means), list(means.values()), marker="o", markersize=3, color=colour, label=f"rank {rank}")
        axis.fill_between(list(means), [min(e) for e in ends], [max(e) for e in ends], color=colour, alpha=0.2)
        lowest = min(lowest, *means.values())
    axis.set_ylim(lowest - 0.08 * (start - lowest), start)
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7)
