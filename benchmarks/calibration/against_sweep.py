"""Does a calibration replace the sweep? Regret of its rates at every rank and for full finetuning, by what it cost.

    python benchmarks/calibration/against_sweep.py run --domain image_generation  # resumable
    python benchmarks/calibration/against_sweep.py run --domain vision_classification
    python benchmarks/calibration/against_sweep.py table                     # results/calibration.md, .json and figures

Two tasks of the study, three configurations, AdamW (0.9, 0.999, decay 0.01), clip 1, cosine to a tenth, and a
warm-up of 30 % of the steps, long enough for full finetuning. A sweep of three seeds finds the best rate of every
rank; three other seeds, run every half octave within 1.5 octaves of it, score all rates there by a monotone spline
(scipy's PCHIP), and those farther away by runs of their own at the nearest half octave:

    regret = (loss at a rate − loss at the sweep's best rate) / (loss before training − loss at the sweep's best rate)

Cost is training steps weighted by each arm's step time, as a share of 9 rates × (5 ranks + full) × one seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

import click
import torch
from calibration.searches import LORA, PLANS, RANGE_TEST, TO_FULL, TPE, WARMUP, WITH_FULL, Search, ranks_of, searched
from recording import RESULTS, machine
from study.contenders import CONTENDERS, Known
from study.domains import Domain, get_domain
from study.domains._configs import CONFIGS, LORAPLUS, PRODIGY, TUNED, run_at, start_of, starts
from study.domains._runs import FULL, Cell, Grid, Job, Listed, Losses, complete, curve, read
from study.domains._tables import where

DOMAINS, SEEDS, SCORING, NEAR = ("image_generation", "vision_classification"), 3, (3, 4, 5), 1.5
RUNS, SEARCHES = RESULTS / "calibration_runs.jsonl", RESULTS / "calibration_searches.jsonl"
SHARES = {  # of the sweep's cost, and seeds, by plan
    LORA: ((0.05, 0.1, 0.2, 0.4), (0, 1)),
    TO_FULL: ((0.05, 0.1, 0.2, 0.4), (0,)),
    WITH_FULL: ((0.1, 0.2, 0.4), (0,)),
    TPE: ((0.05, 0.1, 0.2), (0,)),
    RANGE_TEST: ((0.11,), (0,)),
}
COARSE = {
    **{config: range(-13, -2, 2) for config in CONFIGS},
    **{config + LORAPLUS: range(-15, -4, 2) for config in CONFIGS},
    "full": range(-15, -4, 2),
}


@click.group()
def main() -> None:
    """Make the missing runs, or the table."""


@main.command()
@click.option("--domain", "name", type=click.Choice(DOMAINS), required=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--only", type=click.Choice(("sweep", "search", "score")), help="One stage; by default all, in turn.")
def run(name: str, workers: int, only: str | None) -> None:
    """Append every missing run and search of a domain to the results."""
    domain = get_domain(name)
    domain.warm()
    if only in (None, "sweep"):
        for grid in (starts(name, SCORING), truth(domain), tuned_once(domain)):
            complete(grid, run_one, RUNS, workers, click.echo)
    if only in (None, "search"):
        search_all(domain, workers)
    if only in (None, "score"):
        complete(Listed(scoring(domain, read(RUNS))), run_one, RUNS, workers, click.echo)


def run_one(job: Job) -> float | None:
    """One run at the rate 2^x itself."""
    return run_at(job, WARMUP)


# --- the sweep ------------------------------------------------------------------------------------------------------


def truth(domain: Domain) -> Grid:
    """Every configuration and rank, and full finetuning, on three seeds."""
    cells = [(domain.name, config, rank) for config in CONFIGS for rank in ranks_of(domain)]
    return Grid([*cells, (domain.name, "full", FULL)], COARSE, lambda cell: cell, SEEDS, half=2)


def tuned_once(domain: Domain) -> Grid:
    """LoRA+ at the rank at which a user tunes once, on one seed."""
    cells = [(domain.name, config + LORAPLUS, TUNED) for config in CONFIGS]
    return Grid(cells, COARSE, lambda cell: cell, 1, half=2)


# --- searches -------------------------------------------------------------------------------------------------------


def search_all(domain: Domain, workers: int) -> None:
    """Run the searches that are not on file, each appended at its end."""
    have = [Search(*(row[name] for name in Search._fields)) for row in on_file()]
    todo = [each for each in searches(domain) if each not in have]
    click.echo(f"{len(todo)} searches to go, {len(have)} on file")
    spawn = get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(searched, each) for each in todo]):
            with SEARCHES.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")


def searches(domain: Domain) -> list[Search]:
    plans = [(plan, share, seed) for plan in PLANS for seed in SHARES[plan][1] for share in SHARES[plan][0]]
    return [
        Search(domain.name, config, *plan)
        for config, own in CONFIGS.items()
        for plan in plans
        if plan[0] != TO_FULL or own.init == "B"  # from Init[A] the plan for full finetuning is the plain one
    ]


def on_file() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SEARCHES.read_text().splitlines()] if SEARCHES.exists() else []


# --- scoring --------------------------------------------------------------------------------------------------------


def scoring(domain: Domain, done: Losses) -> list[Job]:
    """The runs on fresh seeds: half octaves around the sweep's best rates, and contenders' rates farther away."""
    cells = [
        (cell, x + half / 2)
        for cell, x in winners(domain, done)
        for half in range(-round(2 * NEAR), round(2 * NEAR) + 1)
    ]
    named = [rates for config in CONFIGS for rates in picks(domain, config, done).values()]
    chosen = [at for rates in reversed(named) for at in rates.values()]  # the searches' before the contenders'
    best = dict(winners(domain, done))
    cells += [(cell, x) for cell, x in chosen if not is_near(best, cell, x)]
    return [Job(*cell, x, seed) for cell, x in dict.fromkeys(cells) for seed in SCORING]


At = tuple[Cell, float]  # what is trained, and log2 of its rate


def winners(domain: Domain, done: Losses) -> Iterator[At]:
    """Every cell with the best rate of its sweep on three seeds."""
    for cell in truth(domain).cells:
        means = curve(done, cell, SEEDS)
        yield cell, min(means, key=lambda x: means[x])


def is_near(best: Mapping[Cell, float], cell: Cell, x: float) -> bool:
    """Whether a rate lies where the scoring seeds were run every half octave."""
    return cell in best and abs(x - best[cell]) <= NEAR


def picks(domain: Domain, config: str, done: Losses) -> dict[str, dict[int, At]]:
    """What each contender and each search trains at every rank."""
    known = Known(domain, config, ranks_of(domain), done)
    rates = {name: pick(known) for name, pick in CONTENDERS.items()}
    rates["Prodigy"] = dict.fromkeys((*known.ranks, FULL), 0.0)
    for row in on_file():
        if (row["domain"], row["config"]) == (domain.name, config):
            name = f"{row['plan']}, {row['share']:.0%}, seed {row['seed']}"
            rates[name] = {int(rank): math.log2(rate[0]) for rank, rate in row["rates"].items()}
    best = dict(winners(domain, done))
    return {name: {rank: placed(known, best, name, rank, x) for rank, x in of.items()} for name, of in rates.items()}


def placed(known: Known, best: Mapping[Cell, float], name: str, rank: int, x: float) -> At:
    """The cell and the rate: as it is near the sweep's best, to the nearest half octave elsewhere."""
    scheme = "full" if rank == FULL else known.config
    own = {"Prodigy": PRODIGY, "LoRA+ 16": "" if rank == FULL else LORAPLUS}.get(name, "")
    cell = (known.domain.name, scheme + own, rank)
    return (cell, x) if is_near(best, cell, x) else (cell, round(2 * x) / 2)


# --- the table ------------------------------------------------------------------------------------------------------


@main.command()
def table() -> None:
    """Write results/calibration.md, .json and two figures from what is on file; what was not run yet is a dash."""
    from calibration import against_sweep_page as made

    done, on = read(RUNS), machine(1)
    domains = [get_domain(name) for name in DOMAINS if any(row["domain"] == name for row in on_file())]
    start = {domain.name: start_of(domain.name, done) for domain in domains}
    scores = [score for domain in domains for score in made.scores_of(domain, done, start[domain.name])]
    made.draw(domains, scores, RESULTS / "calibration-cost.png")
    made.draw_contenders(domains, scores, RESULTS / "calibration-contenders.png")
    document = {"machine": on, "start": start, "scores": [score._asdict() for score in scores]}
    (RESULTS / "calibration.json").write_text(json.dumps(document) + "\n")
    figures = [f"![Regret](calibration-{name}.png)" for name in ("cost", "contenders")]
    left = {domain.name: sum(job not in done for job in scoring(domain, done)) for domain in domains}
    missing = [
        f"Not run yet: {n} scoring runs of {name}; its dashes, and 5 % in the figure, wait for them."
        for name, n in left.items()
        if n
    ]
    bars, *rest = made.page(domains, scores, start)
    parts = ["# Calibration against the sweep", __doc__ or "", *missing, bars, *rest, *figures, where(on)]
    (RESULTS / "calibration.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join([*missing, bars]))


if __name__ == "__main__":
    main()
