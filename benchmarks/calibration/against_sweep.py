"""Does a calibration replace the sweep? Regret of its rates at every rank and for full finetuning, by what it cost.

    python benchmarks/calibration/against_sweep.py run --domain image_generation  # resumable
    python benchmarks/calibration/against_sweep.py run --domain vision_classification
    python benchmarks/calibration/against_sweep.py table                     # results/calibration.md and figures

Two tasks of the study, three configurations, AdamW (0.9, 0.999, decay 0.01), clip 1, cosine to a tenth, and a
warm-up of 30 % of the steps, long enough for full finetuning. A sweep of three seeds finds the best rate of every
rank; three other seeds, run every half octave within 1.5 octaves of it, score all rates there by a monotone spline
(`study/loss_curves.py`), and those farther away by runs of their own at the nearest half octave:

    regret = (loss at a rate − loss at the sweep's best rate) / (loss before training − loss at the sweep's best rate)

What a user would write with Optuna stands beside the calibrations. Of TPE and of the grid at rank 16 the rate is moved
by the default law. The grid is the sweep's own at that rank, on two of its seeds, so that its rates are among those by
which regret is measured. TPE with the rank as a parameter has 16 runs and one search seed.

The calibrations of image generation are from another processor than its sweep and scores, and so are TPE with the rank
as a parameter and three rates that score it. Its network is trained before it is tuned, and comes out with other bits
there: its loss before training is .706 instead of .716.

Cost is training steps weighted by each arm's step time, as a share of 9 rates × (5 ranks + full) × one seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from typing import Any

import click
import torch
from calibration.against_sweep_page import draw_contenders, draw_costs, page
from calibration.against_sweep_scores import (
    SCORING,
    SEARCHES,
    on_file,
    scores_of,
    scoring,
    searches,
    truth,
    tuned_once,
)
from calibration.searches import WARMUP, Search, searched
from recording import RESULTS, machine, searched_with
from study.configurations import run_at, start_of, starts
from study.domains import Domain, get_domain
from study.grids import Listed
from study.runs_on_file import complete, made_by, read
from study.suite import provenance

RESTS_ON = ("search.adam", "calibration.adam")
DOMAINS = ("image_generation", "vision_classification")
RUNS = RESULTS / "calibration_runs.jsonl"


@click.group()
def main() -> None:
    """Make the missing runs, or the table."""


@main.command()
@click.option("--domain", "name", type=click.Choice(DOMAINS), required=True)
@click.option("--workers", default=2, show_default=True)
@click.option(
    "--only",
    type=click.Choice(("sweep", "search", "score")),
    help="One stage; by default all, in turn.",
)
def run(name: str, workers: int, only: str | None) -> None:
    """Append every missing run and search of a domain to the results."""
    domain, run_one, made = (
        get_domain(name),
        partial(run_at, warmup=WARMUP),
        provenance(name),
    )
    if only in (None, "sweep"):
        for grid in (starts(name, SCORING), truth(domain), tuned_once(domain)):
            complete(grid, run_one, RUNS, workers, click.echo, made)
    if only in (None, "search"):
        search_all(domain, workers, made)
    if only in (None, "score"):
        complete(
            Listed(scoring(domain, read(RUNS))),
            run_one,
            RUNS,
            workers,
            click.echo,
            made,
        )


def search_all(domain: Domain, workers: int, made: Mapping[str, Any]) -> None:
    """Run the searches that are not on file, each appended at its end, with the commit and the network's hash."""
    have = [Search(*(row[name] for name in Search._fields)) for row in on_file()]
    todo = [each for each in searches(domain) if each not in have]
    click.echo(f"{len(todo)} searches to go, {len(have)} on file")
    spawn = get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for future in as_completed([pool.submit(searched, each) for each in todo]):
            with SEARCHES.open("a") as file:
                row = {
                    **future.result(),
                    "commit": made["commit"],
                    "weights": made["weights"],
                }
                file.write(json.dumps(row) + "\n")


@main.command()
def table() -> None:
    """Write results/calibration.md and two figures from what is on file; what was not run yet is a dash."""
    done, on = read(RUNS), machine(1)
    domains = [
        get_domain(name)
        for name in DOMAINS
        if any(row["domain"] == name for row in on_file())
    ]
    start = {domain.name: start_of(domain.name, done) for domain in domains}
    scores = [
        score
        for domain in domains
        for score in scores_of(domain, done, start[domain.name])
    ]
    draw_costs(domains, scores, RESULTS / "calibration-cost.png")
    draw_contenders(domains, scores, RESULTS / "calibration-contenders.png")
    figures = [f"![Regret](calibration-{name}.png)" for name in ("cost", "contenders")]
    left = {
        domain.name: sum(job not in done for job in scoring(domain, done))
        for domain in domains
    }
    missing = [
        f"Not run yet: {n} scoring runs of {name}; its dashes, and 5 % in the figure, wait for them."
        for name, n in left.items()
        if n
    ]
    missing += [
        f"Not run yet: the searches of {name}." for name in DOMAINS if name not in left
    ]
    bars, *rest = page(domains, scores, start, done)
    parts = [
        "# Calibration against the sweep",
        __doc__ or "",
        *missing,
        bars,
        *rest,
        *figures,
    ]
    parts += [searched_with(on_file()), made_by(on, RUNS)]
    (RESULTS / "calibration.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join([*missing, bars]))


if __name__ == "__main__":
    main()
