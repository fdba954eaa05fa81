"""Laws that depend on the optimizer, against a small real sweep: do they move the best rate from rank to rank?

    python benchmarks/laws/law_check.py run       # every missing run, kept in results/law_check.jsonl; resumable
    python benchmarks/laws/law_check.py table     # results/law_check.json, .md and two figures

Setup: the image_generation domain (a diffusion transformer of 1.2 M parameters, digits 0-4 to 5-9), LoRA by PEFT at
Init[A], 100 steps of 32, 5 % warm-up, cosine decay to a tenth. There is no weight decay and no clipping: no law covers
them, and SGD's decay is not decoupled. Rates are in octaves. It needs pytorch_optimizer, schedulefree and
torch_optimizer.

**Runs.** The first sweep covers seven optimizers at ranks 4 and 64, with alpha = rank, three seeds and seven octaves.
The pretrained network that it used is lost. The second sweep covers the four optimizers that are not sign-like, all on
one network. With alpha = rank it has ranks 4, 16, 64 and 128 and two seeds. With alpha = 16 it has ranks 4, 16 and 64
and one seed. Its coarse pass of three rates around the first sweep's best places a grid of five octaves, which grows
where the best lies at an edge.

**Rule** for what the default law does in a family of optimizers. It was committed before the second sweep, and only
that sweep decides. Candidates, the simplest first: keeping one rate; the family's form at one rank, 16, so that
alpha moves the rate and the rank does not; the family's form. Moves are all ordered pairs of ranks, of all optimizers
of the family. The floor of a cell is the share of the gain that the sweep's own best rate loses on a left-out seed (on
the same seed, where there is only one). Amended when all octaves were run: SGD diverges on a seed or two within an
octave of its lowest loss, so a grid of octaves can by chance put its best rate at a rank an octave off. Where the next
rate above the lowest diverged, half octaves to either side are run too, and the rule is applied to all runs.

1. A candidate helps if the share of the gain lost at the rates that it moves is above that of one rate by no more than
   the floor, both at alpha = rank and at alpha = 16. This must be true of the median share, with the median floor over
   the cells, and of the worst share, with the largest floor.
2. The default is one rate, unless a candidate that helps has an rms error over all moves that is lower by .1 octaves.
   If two candidates do, the simpler one is the default, unless the other's error is lower by another .1.
3. A family without a sweep (LARS) gets the form at one rank if that helps in all three families here. Otherwise it gets
   one rate.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import click
from laws.loss_figure import draw
from recording import RESULTS, block, machine, number, percent
from study.best_rates import best_of, in_words
from study.configurations import START, start_of, starts
from study.domains import DomainError, get_domain
from study.grids import Cell, Grid, Job, Losses, Wanting, curve, curves_by_seed, lowest
from study.optima import seeds_in
from study.regret import lost
from study.runs_on_file import complete, made_by, rounded, whole
from study.suite import provenance
from study.training import train

from rankaware_optim import Constant, Law, MuA, RankAwareOptimizer, Reference
from rankaware_optim._optimizer_classes import get_optimizer_class
from rankaware_optim._optimizers import optimizer_family
from rankaware_optim.laws import OneRank
from rankaware_optim.sweeps._bench import loss_between, vertex_of

RESTS_ON = ("laws", "optimizer", "scores")
STORE = RESULTS / "law_check.jsonl"
DOMAIN, EARLIER = "image_generation", "image_generation, earlier weights"  # networks of the second and the first sweep
RANKS, TUNED, SEEDS, HALF = (4, 16, 64, 128), 16, 2, 2
FIXED = f", alpha {TUNED}"  # suffix of a scheme; without it, alpha = rank
# Optimizer, settings and log2 rates of the coarse pass.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], range]] = {
    "AdamW": ("adamw", {"weight_decay": 0.0}, range(-9, -4, 2)),
    "Lion": ("pytorch_optimizer:Lion", {}, range(-10, -5, 2)),
    "SGD, momentum 0.9": ("sgd", {"momentum": 0.9}, range(-1, 4, 2)),
    "Muon": ("muon", {"weight_decay": 0.0}, range(-8, -3, 2)),
    "Adafactor": ("adafactor", {}, range(-3, 2, 2)),
    "LAMB": ("torch_optimizer:Lamb", {"debias": True}, range(-4, 1, 2)),
    "schedule-free AdamW": ("schedulefree:AdamWScheduleFree", {"warmup_steps": 5}, range(-9, -4, 2)),
}
OTHERS = ("SGD, momentum 0.9", "Muon", "Adafactor", "LAMB")  # not sign-like
PACKAGES = ("pytorch_optimizer", "schedulefree", "torch_optimizer")


KEPT, BY_ALPHA, FORM, AS_ADAM = "one rate", "its form at one rank", "µA of its family", "µA as for Adam"
CANDIDATES = (KEPT, BY_ALPHA, FORM)  # the simplest first
LAWS: dict[str, Law] = {
    KEPT: Constant(),
    BY_ALPHA: OneRank(),
    FORM: MuA(),
    AS_ADAM: MuA(),
}
NEAR = 0.1  # octaves of rms error within which the simpler law wins


@click.group()
def main() -> None:
    """Make the missing runs, or the table."""


@main.command()
@click.option("--workers", default=2, show_default=True)
@click.option("--optimizer", "names", type=click.Choice(list(OPTIMIZERS)), multiple=True, default=OTHERS)
def run(workers: int, names: tuple[str, ...]) -> None:
    """Append every missing run to the store."""
    on = {**provenance(DOMAIN), **{name: version(name) for name in PACKAGES}}
    for task in (starts(DOMAIN, range(1)), *tasks(names)):
        complete(task, run_one, STORE, workers, click.echo, on)


@dataclass(frozen=True)
class AtCliffs:
    """Jobs half an octave to either side of a cell's lowest loss, where the next rate above it diverged."""

    grid: Grid

    def wanted(self, done: Losses) -> list[Job]:
        asked = []
        for cell in self.grid.cells:
            means = curve(done, cell, self.grid.seeds)
            best = lowest(means)
            if math.isinf(min((x, loss) for x, loss in means.items() if x > best)[1]):
                asked += [Job(*cell, best + x, seed) for x in (-0.5, 0.5) for seed in range(self.grid.seeds)]
        return [job for job in asked if job not in done]


def tasks(names: Sequence[str]) -> tuple[Wanting, ...]:
    """Grids of octaves at alpha = rank and at alpha = 16, then half octaves at their cliffs."""
    coarse = {name + added: xs for name, (*_, xs) in OPTIMIZERS.items() for added in ("", FIXED)}
    by_rank = [(DOMAIN, name, rank) for name in names for rank in RANKS]
    fixed = [(DOMAIN, name + FIXED, rank) for name in names for rank in (4, 64)]
    octaves = Grid(by_rank, coarse, SEEDS, HALF), Grid(fixed, coarse, 1, HALF)
    return *octaves, *map(AtCliffs, octaves)


def run_one(job: Job) -> float | None:
    """Make one run at the rate 2^x, without a law: the laws are applied to the results."""
    domain = get_domain(job.domain)
    if job.scheme == START:
        return domain.evaluate(domain.build(None, 1.0, "A", job.seed))
    optimizer, settings, _ = OPTIMIZERS[job.scheme.removesuffix(FIXED)]
    model = domain.build(job.rank, alpha_of(job[:3]), "A", job.seed)
    opt = RankAwareOptimizer(model, optimizer, lr=2.0**job.x, law="constant", **settings)
    return train(domain, model, opt, job.seed)


def alpha_of(cell: Cell) -> int:
    return TUNED if cell[1].endswith(FIXED) else cell[2]


# --- moves by the laws ----------------------------------------------------------------------------------------------


class Sweep(NamedTuple):
    """An optimizer's ranks on one network, between which a rate is moved."""

    network: str
    optimizer: str
    arm: str
    cells: Sequence[Cell]


BY_RANK, AT_16 = "alpha = rank", f"alpha = {TUNED}"


def sweeps() -> Iterator[Sweep]:
    """Optimizers of the first sweep, then of the second."""
    for name in OPTIMIZERS:
        yield Sweep(EARLIER, name, BY_RANK, [(EARLIER, name, rank) for rank in (4, 64)])
    for name in OTHERS:
        yield Sweep(DOMAIN, name, BY_RANK, [(DOMAIN, name, rank) for rank in RANKS])
        fixed = [(DOMAIN, name + FIXED, 4), (DOMAIN, name, TUNED), (DOMAIN, name + FIXED, 64)]
        yield Sweep(DOMAIN, name, AT_16, fixed)


def moves_of(sweep: Sweep, done: Losses) -> Iterator[dict[str, Any]]:
    """Every law's move of the best rate, between every ordered pair of ranks.

    error: octaves by which the moved rate is above the best one. lost: share of the gain lost at the moved rate,
    infinite where runs diverged.
    """
    for source, target in itertools.permutations(sweep.cells, 2):
        best, there = (best_rate(done, cell) for cell in (source, target))
        for law in LAWS:
            shift = predicted(sweep.optimizer, law, (source[2], alpha_of(source)), (target[2], alpha_of(target)))
            yield {
                **sweep._asdict(),
                "cells": (source[2], target[2]),
                "law": law,
                "measured": there - best,
                "predicted": shift,
                "error": best + shift - there,
                "lost": lost(done, target, target, best + shift),
            }


def best_rate(done: Losses, cell: Cell) -> float:
    """log2 of a cell's best rate: the vertex, or the lowest rate of the grid where there is no vertex."""
    means = curve(done, cell, seeds_in(done, *cell[:2]))
    found = vertex_of(means)
    return lowest(means) if found is None else found


@cache
def predicted(name: str, law: str, source: tuple[int, int], target: tuple[int, int]) -> float:
    """log2 of the multiplier that the package's optimizer gives adapters moved from one (rank, alpha) to another."""
    optimizer, settings, _ = OPTIMIZERS["AdamW" if law == AS_ADAM else name]
    model = get_domain(DOMAIN).build(*target, "A", 0)
    opt = RankAwareOptimizer(model, optimizer, lr=1e-3, law=LAWS[law], tuned_at=Reference(*source), **settings)
    (octaves,) = {math.log2(group["rank_multiplier"]) for group in opt.param_groups}
    return octaves


# --- the rule -------------------------------------------------------------------------------------------------------

Moves = Sequence[Mapping[str, Any]]
Floors = Mapping[str, Sequence[float]]  # of every cell, by arm


def floor(done: Losses, cell: Cell) -> float:
    """Mean share of the gain that the best rate of the other seeds loses on a left-out seed, linearly interpolated."""
    by_seed, start = curves_by_seed(done, cell, seeds_in(done, *cell[:2])), start_of(cell[0], done)
    shares = []
    for seed, own in enumerate(by_seed):
        others = [each for i, each in enumerate(by_seed) if i != seed] or [own]
        means = {x: statistics.fmean(each[x] for each in others) for x in own}
        best, x = min(own.values()), vertex_of(means)
        shares.append((loss_between(own, lowest(means) if x is None else x) - best) / (start - best))
    return statistics.fmean(shares)


def default_of(moves: Moves, floors: Floors) -> str:
    """The default law of a family, by point 2 of the rule."""
    chosen = KEPT
    for law in CANDIDATES[1:]:
        if helps(law, moves, floors) and rms(law, moves) < rms(chosen, moves) - NEAR:
            chosen = law
    return chosen


def helps(law: str, moves: Moves, floors: Floors) -> bool:
    return all(
        of(losses(law, arm, moves)) <= of(losses(KEPT, arm, moves)) + of(cells)
        for arm, cells in floors.items()
        for of in (statistics.median, max)
    )


def losses(law: str, arm: str, moves: Moves) -> list[float]:
    return [move["lost"] for move in moves if (move["law"], move["arm"]) == (law, arm)]


def rms(law: str, moves: Moves) -> float:
    return math.sqrt(statistics.fmean(move["error"] ** 2 for move in moves if move["law"] == law))


def judged(done: Losses, names: Sequence[str], moves: Moves) -> tuple[Moves, Floors]:
    """Moves and floors that the rule uses for a family's optimizers: those of the second sweep."""
    mine = [move for move in moves if move["network"] == DOMAIN and move["optimizer"] in names]
    second = [sweep for sweep in sweeps() if sweep.network == DOMAIN and sweep.optimizer in names]
    arms = (BY_RANK, AT_16)
    return mine, {arm: [floor(done, cell) for s in second if s.arm == arm for cell in s.cells] for arm in arms}


def families() -> dict[str, list[str]]:
    """The second sweep's optimizers by family."""
    found: dict[str, list[str]] = {}
    for name in OTHERS:
        optimizer, settings, _ = OPTIMIZERS[name]
        found.setdefault(optimizer_family(get_optimizer_class(optimizer), settings), []).append(name)
    return found


# --- the table ------------------------------------------------------------------------------------------------------


@main.command()
def table() -> None:
    """Write results/law_check.json, .md and figures from the store, which must hold the whole second sweep."""
    try:
        for task in tasks(OTHERS):
            done = whole(STORE, task, "python benchmarks/laws/law_check.py run")
    except DomainError as error:
        raise click.ClickException(str(error)) from error
    on, every = machine(1), list(sweeps())
    moves = [move for sweep in every for move in moves_of(sweep, done)]
    cells = list(dict.fromkeys(cell for sweep in every for cell in sweep.cells))
    bests = {cell: best_of(done, cell, seeds_in(done, *cell[:2]), start_of(cell[0], done)) or {} for cell in cells}
    rows = [{**dict(zip(("network", "scheme", "rank"), cell, strict=True)), **row} for cell, row in bests.items()]
    finite = [{**move, "lost": move["lost"] if math.isfinite(move["lost"]) else None} for move in moves]
    document = {"machine": on, "best": rows, "moves": finite, "runs": rounded(done)}
    text = "\n\n".join([*page(done, bests, moves), made_by(on, STORE)]) + "\n"
    (RESULTS / "law_check.json").write_text(json.dumps(document) + "\n")
    (RESULTS / "law_check.md").write_text(text)
    for network, path in ((EARLIER, "law_check.png"), (DOMAIN, "law_check_ranks.png")):
        mine = [sweep for sweep in every if sweep.network == network]
        panels = [(f"{s.optimizer}, {s.arm}", {cell[2]: cell for cell in s.cells}) for s in mine]
        draw(done, panels, 1, start_of(network, done), 4, "rate", RESULTS / path)
    click.echo(text)


AND_ERRORS = f"Errors of moved rates, rms octaves, at {BY_RANK}, at {AT_16} and over all:"
NOTES = (
    "Predicted moves are the multipliers that `RankAwareOptimizer` gives the adapters, laws at their defaults; in "
    "brackets how far the moved rate lands from the best one found, positive where too high. A best rate is the vertex "
    "of the parabola through the best three rates of the mean over seeds; where the octave above diverged, half an "
    "octave below the lowest point. Losses between rates lie on straight lines, and beyond the rates tried at the last "
    "one's. Two losses: upward in rank, then downward. `law_check.py` states the rule by which the default was chosen. "
    "Where the floor diverged, as SGD's does, whose best rate lies at the edge of divergence, every candidate helps, "
    "and the errors in octaves alone decide.",
    "Settings: " + "; ".join(f"{name}: {settings}" for name, (_, settings, _) in OPTIMIZERS.items()) + ". Other "
    "settings are the classes' defaults; no decay, no clipping, 5 % warm-up and cosine to a tenth for all but the "
    "schedule-free one. SGD, Muon, Adafactor and LAMB are the four that are not sign-like.",
)
SCORES = ["family", "optimizers", "alpha", "moves", "law", "rms octaves", "lost: median", "worst", "floor", "helps"]
OPTIMA = ("optimizer", "rank", "log2 best (seed by seed)", "loss", "± over seeds", "an octave above loses")


def page(done: Losses, bests: Mapping[Cell, dict[str, Any]], moves: Moves) -> Iterator[str]:
    """The page's parts."""
    yield "# Laws that know the optimizer, against a real sweep"
    scores: list[list[str]] = []
    for family, names in families().items():
        mine, floors = judged(done, names, moves)
        parts = [*([m for m in mine if m["arm"] == arm] for arm in floors), mine]
        errors = [f"{law} {', '.join(number(rms(law, part)) for part in parts)}" for law in CANDIDATES]
        chosen = default_of(mine, floors)
        yield f"**{family}** ({', '.join(names)}): the default is {chosen}. {AND_ERRORS} {'; '.join(errors)}."
        scores += score_rows(family, names, mine, floors)
    yield "LARS was not run: by the third rule it keeps one rate."
    yield from NOTES
    yield block("The rule's figures, on the second sweep", SCORES, scores)
    for network, which, picture in ((DOMAIN, "second", "law_check_ranks"), (EARLIER, "first", "law_check")):
        mine, title = [m for m in moves if m["network"] == network], f"The {which} sweep"
        start = start_of(network, done)
        optima = [[cell[1], str(cell[2]), *optimum_cells(row)] for cell, row in bests.items() if cell[0] == network]
        heads = ["optimizer", "ranks", "found", *LAWS]
        yield block(f"{title}: the move of the best rate, octaves", heads, list(shift_rows(mine)))
        yield block(f"{title}: share of the attainable gain lost", heads[:2] + heads[3:], list(lost_rows(mine)))
        yield block(f"{title}: best rates (loss before training {start:.3f})", OPTIMA, optima)
        yield f"![Held-out loss of seed 0 against log2 rate]({picture}.png)"


def score_rows(family: str, names: Sequence[str], moves: Moves, floors: Floors) -> Iterator[list[str]]:
    for arm, cells in floors.items():
        for law in CANDIDATES:
            mine = [move for move in moves if move["arm"] == arm]
            lost_here = losses(law, arm, moves)
            yield [
                family,
                ", ".join(names),
                arm,
                str(len(lost_here)),
                law,
                number(rms(law, mine)),
                percent(statistics.median(lost_here)),
                percent(max(lost_here)),
                f"{percent(statistics.median(cells))}, {percent(max(cells))}",
                "yes" if helps(law, moves, {arm: cells}) else "no",
            ]


def pairs(moves: Moves) -> Iterator[tuple[list[str], list[Mapping[str, Any]], list[Mapping[str, Any]]]]:
    """For every pair of ranks: the row's first cells, and the laws' moves upward and downward."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for move in moves:
        found.setdefault((move["optimizer"], move["arm"], move["cells"]), []).append(move)
    for (name, arm, (low, high)), up in found.items():
        if low < high:
            yield [f"{name}, {arm}", f"{low} → {high}"], up, found[name, arm, (high, low)]


def shift_rows(moves: Moves) -> Iterator[list[str]]:
    for heads, up, _ in pairs(moves):
        predictions = [f"{move['predicted']:+.2f} ({move['error']:+.2f})" for move in up]
        yield [*heads, f"{up[0]['measured']:+.2f}", *predictions]


def lost_rows(moves: Moves) -> Iterator[list[str]]:
    for heads, up, down in pairs(moves):
        yield [*heads, *(f"{percent(a['lost'])}, {percent(b['lost'])}" for a, b in zip(up, down, strict=True))]


def optimum_cells(row: Mapping[str, Any]) -> list[str]:
    above = "diverged" if row["octave_above"] is None else f"{100 * row['octave_above']:.0f} %"
    return [in_words(row), number(row["loss"], 4), number(row["spread"], 4), above]


if __name__ == "__main__":
    main()
