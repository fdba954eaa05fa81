"""Laws that know the optimizer, against a small real sweep: does the law move the best rate from one rank to another?

    python benchmarks/laws/law_check.py run       # every missing run, kept in ~/.cache/rankaware-optim; resumable
    python benchmarks/laws/law_check.py table     # results/law_check.json, .md and .png

The image_generation domain (a 1.2 M diffusion transformer, digits 0-4 to 5-9), LoRA by PEFT at Init[A] with alpha =
rank, 100 steps of 32; 5 % warm-up, cosine to a tenth. No weight decay and no clipping: no law knows of them, and SGD's
decay is not decoupled. Rates in octaves: a coarse pass of one seed two octaves apart places each rank's grid of seven,
three seeds each, which grows where its best lies at an edge. Needs pytorch_optimizer and schedulefree.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import click
from laws.loss_figure import draw
from recording import RESULTS, block, machine, made_on, number
from study.best_rates import best_of, in_words
from study.configurations import before_training
from study.domains import DomainError, get_domain
from study.domains._assets import CACHE
from study.grids import Cell, Grid, Job, Losses, curve
from study.runs_on_file import complete, read, rounded, whole
from study.training import train

from rankaware_optim import Constant, Law, Measured, MuA, RankAwareOptimizer, Reference
from rankaware_optim.sweeps._bench import LossCurve, vertex_of

DOMAIN, SEEDS, RANKS = "image_generation", 3, (4, 64)
STORE = CACHE / "law_check.jsonl"
# Optimizer, settings and log2 rates of the coarse pass.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], range]] = {
    "AdamW": ("adamw", {"weight_decay": 0.0}, range(-14, -1, 2)),
    "Lion": ("pytorch_optimizer:Lion", {}, range(-16, -3, 2)),
    "SGD, momentum 0.9": ("sgd", {"momentum": 0.9}, range(-8, 9, 2)),
    "Muon": ("muon", {"weight_decay": 0.0}, range(-12, 1, 2)),
    "Adafactor": ("adafactor", {}, range(-12, 1, 2)),
    "LAMB": ("torch_optimizer:Lamb", {"debias": True}, range(-12, 3, 2)),
    "schedule-free AdamW": ("schedulefree:AdamWScheduleFree", {"warmup_steps": 5}, range(-14, -1, 2)),
}
OTHERS = ("SGD, momentum 0.9", "Muon", "Adafactor", "LAMB")  # not sign-like
AS_ADAM = "µA as for Adam"
LAWS: dict[str, Law] = {"one rate": Constant(), AS_ADAM: MuA(), "µA of its family": MuA(), "measured": Measured()}
OPTIMA = ("optimizer", "rank", "log2 best (seed by seed)", "loss", "± over seeds", "an octave above loses")
NOTES = (
    "Predicted moves are the multipliers that `RankAwareOptimizer` gives the adapters, laws at their defaults; in "
    "brackets how far the moved rate lands from the best one found, positive where too high. A best rate is the vertex "
    "of the parabola through the best three rates of the mean over seeds; where the octave above diverged, half an "
    "octave below the lowest point. Losses between rates lie on straight lines.",
    "Settings: " + "; ".join(f"{name}: {settings}" for name, (_, settings, _) in OPTIMIZERS.items()) + ". Other "
    "settings are the classes' defaults; no decay, no clipping, 5 % warm-up and cosine to a tenth for all but the "
    "schedule-free one. SGD, Muon, Adafactor and LAMB are the four of other families.",
)


@click.group()
def main() -> None:
    """Make the missing runs, or the table."""


@main.command()
@click.option("--workers", default=2, show_default=True)
@click.option("--rank", "ranks", type=int, multiple=True, default=RANKS, show_default=True)
def run(workers: int, ranks: tuple[int, ...]) -> None:
    """Append every missing run to the store."""
    get_domain(DOMAIN).warm()
    complete(grid(ranks), run_one, STORE, workers, click.echo)


def grid(ranks: Sequence[int]) -> Grid:
    return Grid(cells(ranks), {name: xs for name, (_, _, xs) in OPTIMIZERS.items()}, SEEDS)


def cells(ranks: Sequence[int]) -> list[Cell]:
    return [(DOMAIN, name, rank) for name in OPTIMIZERS for rank in ranks]


def run_one(job: Job) -> float | None:
    """One run at the rate 2^x itself: the laws are asked afterwards."""
    domain, (optimizer, settings, _) = get_domain(job.domain), OPTIMIZERS[job.scheme]
    model = domain.build(job.rank, job.rank, "A", job.seed)
    opt = RankAwareOptimizer(model, optimizer, lr=2.0**job.x, law="constant", **settings)
    return train(domain, model, opt, job.seed)


# --- the table ------------------------------------------------------------------------------------------------------


@main.command()
def table() -> None:
    """Write results/law_check.json, .md and .png from the store; it is to hold whole grids."""
    try:
        ranks = tuple(sorted({job.rank for job in read(STORE)})) or RANKS
        done = whole(STORE, grid(ranks), "python benchmarks/laws/law_check.py run")
    except DomainError as error:
        raise click.ClickException(str(error)) from error
    on, start = machine(1), before_training(get_domain(DOMAIN), 1)
    bests = {cell[1:]: row for cell in cells(ranks) if (row := best_of(done, cell, SEEDS, start))}
    moves = [move for name in OPTIMIZERS for move in moves_of(name, done, start)]
    rows = [{"optimizer": name, "rank": rank, **row} for (name, rank), row in bests.items()]
    document = {"machine": on, "start": start, "best": rows, "moves": moves, "runs": rounded(done)}
    text = "\n\n".join([*page(bests, moves, start), made_on(on)]) + "\n"
    (RESULTS / "law_check.json").write_text(json.dumps(document) + "\n")
    (RESULTS / "law_check.md").write_text(text)
    panels = [(name, {rank: (DOMAIN, name, rank) for rank in ranks}) for name in OPTIMIZERS]
    draw(done, panels, SEEDS, start, 4, "rate", RESULTS / "law_check.png")
    click.echo(text)


def moves_of(name: str, done: Losses, start: float) -> list[dict[str, Any]]:
    """Every law's move of the best rate, between every ordered pair of ranks whose best lies inside its grid."""
    curves = []
    for rank in sorted({job.rank for job in done}):
        means = curve(done, (DOMAIN, name, rank), SEEDS)
        if means and (x := vertex_of(means)) is not None:
            curves.append(LossCurve(name, Reference(rank=rank, alpha=rank), x, means, ()))
    return [move_of(law, a, b, start) for a, b in itertools.permutations(curves, 2) for law in LAWS]


def move_of(law: str, source: LossCurve, target: LossCurve, start: float) -> dict[str, Any]:
    """How far a law's rate lands from the best one, in octaves, and the share of the gain from `start` lost there."""
    shift = predicted(source.model, law, int(source.at.rank or 0), int(target.at.rank or 0))
    lost, best = target.lost_at(source.best + shift), min(target.losses.values())
    return {
        "optimizer": source.model,
        "law": law,
        "from": source.at.rank,
        "to": target.at.rank,
        "measured": target.best - source.best,
        "predicted": shift,
        "error": source.best + shift - target.best,
        "off_grid": lost is None,
        "lost": None if lost is None or not math.isfinite(lost) else lost * best / (start - best),
    }


@cache
def predicted(name: str, law: str, source: int, target: int) -> float:
    """Octaves by which the package moves the rate: the multiplier that its optimizer gives the adapters."""
    optimizer, settings, _ = OPTIMIZERS["AdamW" if law == AS_ADAM else name]
    model = get_domain(DOMAIN).build(target, target, "A", 0)
    at = Reference(rank=source, alpha=source)
    opt = RankAwareOptimizer(model, optimizer, lr=1e-3, law=LAWS[law], tuned_at=at, **settings)
    (octaves,) = {math.log2(group["lr_multiplier"]) for group in opt.param_groups}
    return octaves


def page(bests: Mapping[tuple[str, int], dict[str, Any]], moves: list[dict[str, Any]], start: float) -> list[str]:
    """The page's parts."""
    pairs = dict.fromkeys((m["optimizer"], m["from"], m["to"]) for m in moves)
    found = {(m["optimizer"], m["from"], m["to"], m["law"]): m for m in moves}
    shifts = [shift_cells(key, found) for key in pairs if key[1] < key[2]]
    costs = [[key[0], f"{key[1]} → {key[2]}", *(lost_cell(found[(*key, law)]) for law in LAWS)] for key in pairs]
    optima = [[name, str(rank), *optimum_cells(row)] for (name, rank), row in bests.items()]
    heads = ["law", "seven optimizers: median", "worst", "the four of other families: median", "worst"]
    return [
        "# Laws that know the optimizer, against a real sweep",
        *NOTES,
        block("The move of the best rate, octaves", ["optimizer", "ranks", "found", *LAWS], shifts),
        block("Error of the moved rate, octaves, absolute", heads, [error_cells(law, moves) for law in LAWS]),
        block("Share of the attainable gain lost at the moved rate", ["optimizer", "move", *LAWS], costs),
        block(f"Best rates (loss before training {start:.3f})", OPTIMA, optima),
        "![Held-out loss against log2 rate](law_check.png)",
    ]


def shift_cells(key: tuple[str, int, int], found: Mapping[Any, dict[str, Any]]) -> list[str]:
    moves = [found[(*key, law)] for law in LAWS]
    predictions = [f"{move['predicted']:+.2f} ({move['error']:+.2f})" for move in moves]
    return [key[0], f"{key[1]} → {key[2]}", f"{moves[0]['measured']:+.2f}", *predictions]


def lost_cell(move: Mapping[str, Any]) -> str:
    if move["off_grid"]:
        return "off the grid"
    return "diverged" if move["lost"] is None else f"{100 * move['lost']:.1f} %"


def error_cells(law: str, moves: list[dict[str, Any]]) -> list[str]:
    """Median and worst of |error| over all moves, and over those of optimizers that are not sign-like."""
    every = [abs(m["error"]) for m in moves if m["law"] == law]
    others = [abs(m["error"]) for m in moves if m["law"] == law and m["optimizer"] in OTHERS]
    return [law, *(number(f(x)) for x in (every, others) for f in (statistics.median, max))]


def optimum_cells(row: Mapping[str, Any]) -> list[str]:
    above = "diverged" if row["octave_above"] is None else f"{100 * row['octave_above']:.0f} %"
    return [in_words(row), number(row["loss"], 4), number(row["spread"], 4), above]


if __name__ == "__main__":
    main()
