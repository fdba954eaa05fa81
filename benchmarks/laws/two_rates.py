"""Two rates, `MuA(split=True)`, against one rate and LoRA+ with ratio 16: each at its best, and moved from rank 16.

    python benchmarks/laws/two_rates.py run --domain image_generation    # resumable
    python benchmarks/laws/two_rates.py run --domain digits_vision
    python benchmarks/laws/two_rates.py table                            # results/two_rates.md, .json and figures

All schemes use LoRA by PEFT at Init[A] with alpha = rank, and AdamW with betas 0.9 and 0.999, weight decay 0.01,
gradients clipped at norm 1, 5 % warm-up and cosine decay to a tenth. Heads have a fixed rate, the same in all schemes.
Every run has a base rate, that of rank 16, and the package's law derives the rates of the run's rank from it. A scheme
that moves rates perfectly has the same best base rate at every rank. Base rates are octaves apart, with three seeds. A
coarse pass of one seed at rank 16 places the grid of all ranks, which grows where the best lies at an edge.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
from laws.loss_figure import draw
from recording import RESULTS, block, machine, number
from study.best_rates import best_of, in_words
from study.configurations import ADAMW, CLIP, TUNED, before_training, tuned_at
from study.domains import Domain, DomainError, get_domain
from study.grids import Cell, Grid, Job, Losses, curve, losses_at, lowest
from study.moving import octaves_by_role
from study.runs_on_file import complete, made_by, whole
from study.suite import provenance
from study.training import train

from rankaware_optim import Constant, Law, LoRAPlus, MuA, RankAwareOptimizer
from rankaware_optim.sweeps._bench import vertex_of

RESTS_ON = ("laws.adam", "optimizer")
DOMAINS, SEEDS, CONFIG = ("image_generation", "digits_vision"), 3, "Init[A], s = 1"
SCHEMES = {"one rate": MuA(), "two rates": MuA(split=True), "LoRA+ 16": LoRAPlus(16.0)}
COARSE = {"one rate": range(-12, -3, 2), "two rates": range(-14, -3, 2), "LoRA+ 16": range(-16, -5, 2)}
HALF = 2  # octaves to either side, at first
NOTE = (
    "Three seeds; means ± standard deviation; differences are paired by seed, ± standard error. The best rate of a "
    "table of losses is the grid's, an octave apart, by the mean over seeds; the rate moved from rank 16 is the base "
    "rate best there, run at the other ranks through the package's law. `kept`: LoRA+ and one rate as they are, at "
    "every rank. Octaves compare vertices of parabolas through the best three means, positive where too high. "
    "Recipe: AdamW 0.9 / 0.999, decay 0.01, clip 1, 5 % warm-up, cosine to a tenth; Init[A], alpha = rank."
)
STORE = RESULTS / "two_rates.jsonl"


@click.group()
def main() -> None:
    """Make the missing runs, or the table."""


@main.command()
@click.option("--domain", "name", type=click.Choice(DOMAINS), required=True)
@click.option("--workers", default=2, show_default=True)
def run(name: str, workers: int) -> None:
    """Append every missing run of a domain to the store."""
    complete(grid(get_domain(name)), run_one, STORE, workers, click.echo, provenance(name))


def grid(*domains: Domain) -> Grid:
    every = [cell for domain in domains for cell in cells(domain)]
    return Grid(every, COARSE, SEEDS, HALF, placed_at=TUNED)


def cells(domain: Domain) -> list[Cell]:
    return [(domain.name, scheme, rank) for scheme in SCHEMES for rank in domain.ranks]


def run_one(job: Job) -> float | None:
    """Make one run at base rate 2^x, taken as tuned at rank 16."""
    domain, law = get_domain(job.domain), SCHEMES[job.scheme]
    model, rates = domain.build(job.rank, job.rank, "A", job.seed), domain.head_rates
    opt = RankAwareOptimizer(model, "adamw", lr=2.0**job.x, law=law, tuned_at=tuned_at(CONFIG), rates=rates, **ADAMW)
    return train(domain, model, opt, job.seed, CLIP)


# --- the table ------------------------------------------------------------------------------------------------------


@main.command()
def table() -> None:
    """Write results/two_rates.json, .md and .png from the store, which must hold complete grids of both domains."""
    domains = [get_domain(name) for name in DOMAINS]
    try:
        done = whole(STORE, grid(*domains), "python benchmarks/laws/two_rates.py run --domain, for both domains")
    except DomainError as error:
        raise click.ClickException(str(error)) from error
    on, starts = machine(1), {domain.name: before_training(domain, SEEDS) for domain in domains}
    rows = [row for domain in domains for row in rows_of(domain, done, starts[domain.name])]
    moves = [move for domain in domains for move in moves_of(domain, done)]
    document = {"machine": on, "starts": starts, "rows": rows, "moves": moves}
    text = "\n\n".join([*page(domains, rows, moves, starts), made_by(on, STORE)]) + "\n"
    (RESULTS / "two_rates.json").write_text(json.dumps(document) + "\n")
    (RESULTS / "two_rates.md").write_text(text)
    for domain in domains:
        panels = [(scheme, {rank: (domain.name, scheme, rank) for rank in domain.ranks}) for scheme in SCHEMES]
        path = RESULTS / f"two_rates_{domain.name}.png"
        draw(done, panels, SEEDS, starts[domain.name], len(SCHEMES), "base rate at rank 16", path)
    click.echo(text)


def rows_of(domain: Domain, done: Losses, start: float) -> Iterator[dict[str, Any]]:
    """Every cell: its best rate, and its losses by seed there and at the base rate that was best at rank 16."""
    for cell in cells(domain):
        at_tuned = curve(done, (*cell[:2], TUNED), SEEDS)
        found = best_of(done, cell, SEEDS, start)
        if not found or not at_tuned:
            continue
        moved = lowest(at_tuned)
        if moved not in curve(done, cell, SEEDS):
            continue
        yield {
            **dict(zip(("domain", "scheme", "rank"), cell, strict=True)),
            **found,
            "losses": losses_at(done, cell, found["lowest"], SEEDS),
            "moved": moved,
            "moved_losses": losses_at(done, cell, moved, SEEDS),
        }


# How rates move from rank 16: the scheme whose best rates are moved, and the law that moves them.
MOVERS: dict[str, tuple[str, Law]] = {
    "one rate, µA": ("one rate", MuA()),
    "one rate, the paper's µA": ("one rate", MuA(tokens=None)),
    "one rate, kept": ("one rate", Constant()),
    "two rates, µA": ("two rates", MuA(split=True)),
    "LoRA+ 16, kept": ("LoRA+ 16", LoRAPlus(16.0)),
    "LoRA+ 16, µA": ("LoRA+ 16", MuA(ratio=16.0)),
}


def moves_of(domain: Domain, done: Losses) -> Iterator[dict[str, Any]]:
    """Error in octaves of the rate moved from rank 16 to every other rank, by each way of moving."""
    for mover, (scheme, law) in MOVERS.items():
        best = {rank: vertex_of(curve(done, (domain.name, scheme, rank), SEEDS) or {0: 0.0}) for rank in domain.ranks}
        for rank in domain.ranks:
            here, there = best[rank], best[TUNED]
            if rank != TUNED and here is not None and there is not None:
                moved = octaves_of_a(domain, rank, law) - octaves_of_a(domain, rank, SCHEMES[scheme])
                yield {"domain": domain.name, "mover": mover, "rank": rank, "error": there + moved - here}


def octaves_of_a(domain: Domain, rank: int, law: Law) -> float:
    """log2 of the multiplier that the package gives A at `rank`, for a rate tuned at rank 16."""
    return octaves_by_role(domain.name, CONFIG, rank, law)["A"][0]


def page(
    domains: Sequence[Domain],
    rows: Sequence[dict[str, Any]],
    moves: Sequence[dict[str, Any]],
    starts: Mapping[str, float],
) -> list[str]:
    """The page's parts."""
    parts = ["# Two rates against one rate and against LoRA+", NOTE]
    for domain in domains:
        mine = {(row["scheme"], row["rank"]): row for row in rows if row["domain"] == domain.name}
        missed = {(move["mover"], move["rank"]): move["error"] for move in moves if move["domain"] == domain.name}
        ranks = [rank for rank in domain.ranks if any((scheme, rank) in mine for scheme in SCHEMES)]
        heads = ["", *(f"rank {rank}" for rank in ranks)]
        best = [[s, *(in_words(mine[s, rank]) if (s, rank) in mine else "–" for rank in ranks)] for s in SCHEMES]
        title = f"{domain.name} (loss before training {starts[domain.name]:.3f}): "
        parts += [
            block(title + "loss at each one's best rate", heads, grid_of(mine, ranks, "losses")),
            block(title + "loss at the rate moved from rank 16", heads, grid_of(mine, ranks, "moved_losses")),
            block(
                title + "how far the rate moved from rank 16 misses the best, octaves",
                heads,
                [[m, *(number(missed.get((m, rank)), 2, sign=True) for rank in ranks)] for m in MOVERS],
            ),
            block(title + "log2 of the best base rate, seed by seed", heads, best),
            f"![Held-out loss against log2 base rate](two_rates_{domain.name}.png)",
        ]
    return parts


def grid_of(mine: Mapping[tuple[str, int], dict[str, Any]], ranks: Sequence[int], key: str) -> list[list[str]]:
    """Schemes by ranks: mean ± standard deviation over seeds; then each against one rate, paired by seed."""
    lines = [[scheme, *(spread(mine.get((scheme, rank)), key) for rank in ranks)] for scheme in SCHEMES]
    for scheme in list(SCHEMES)[1:]:
        cells = [paired(mine.get((scheme, rank)), mine.get(("one rate", rank)), key) for rank in ranks]
        lines.append([f"{scheme} − one rate", *cells])
    return lines


def spread(row: Mapping[str, Any] | None, key: str) -> str:
    losses = row[key] if row else [math.inf]
    if not all(map(math.isfinite, losses)):
        return "diverged" if row else "–"
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"


def paired(row: Mapping[str, Any] | None, other: Mapping[str, Any] | None, key: str) -> str:
    """Mean difference over seeds ± its standard error."""
    gaps = [a - b for a, b in zip(row[key], other[key], strict=True)] if row and other else [math.inf]
    if not all(map(math.isfinite, gaps)):
        return "–"
    return f"{statistics.mean(gaps):+.4f} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.4f}"


if __name__ == "__main__":
    main()
