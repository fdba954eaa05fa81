"""Run the moved rates that the sweeps do not settle: two estimators of their regret differ by over two points.

    python benchmarks/study/moved_runs.py          # resumable: results/moved_runs.jsonl
    python benchmarks/study/moved_runs.py --table  # no training: results/moved_runs.md

The estimators are straight lines and the monotone spline between the rates that were swept. The rates are those of two
rows of README's table: the default law and the calibrated recipes. Each rate is run on the seeds of its sweep. README
and the study then use the run instead of the spline. The sweeps store no hash of their networks, so as a control one
run of every sweep is made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import click
from recording import RESULTS, block, machine, number
from study.configurations import CONFIGS, run_at
from study.grids import Cell, Job, Listed, Losses, or_inf
from study.loss_curves import on_lines, regret_between
from study.optima import domains_in, seeds_in, tried_rates
from study.regret import (
    DEFAULT,
    DIGITS,
    LAWS,
    MOVED_RUNS,
    RECIPE,
    Target,
    best_and_start,
    means_of,
    targets,
)
from study.runs_on_file import complete, made_by, read
from study.suite import STORES, finished_in, provenance
from study.training import WARMUP

RESTS_ON = ("laws.adam", "recipes", "scores")
APART = 0.02  # difference of the two estimates of a regret above which a rate is run
WAYS = (DEFAULT, RECIPE)


def sweeps() -> Losses:
    """The runs of the complete grids, of the study and of the tasks that no choice saw."""
    return finished_in(sorted(STORES.glob("*.jsonl")), "full")


def disputed(done: Losses) -> dict[tuple[Cell, float], tuple[Target, float, float]]:
    """Targets by cell and log2 rate, each with its regret by lines and by the spline."""
    found = {}
    for target in (
        each for domain in domains_in(done) for each in of_domain(done, domain)
    ):
        regrets = regrets_of(done, target)
        x = min(max(target.x, min(regrets)), max(regrets))
        lines, spline = on_lines(regrets, x), regret_between(regrets, x)
        if abs(lines - spline) > APART:
            found[target.trained, round(target.x, DIGITS)] = (target, lines, spline)
    return found


def of_domain(done: Losses, domain: str) -> Iterator[Target]:
    for config in CONFIGS:
        yield from (
            target
            for target in targets(done, domain, config, LAWS)
            if target.way in WAYS
        )


def regrets_of(done: Losses, target: Target) -> dict[float, float]:
    """The regrets of the rates that were swept, by their log2."""
    tried = tried_rates(done, target.trained, seeds_in(done, *target.trained[:2]))
    at_best, start = best_and_start(done, target.trained, target.best)
    return {x: (loss - at_best) / (start - at_best) for x, loss in tried.items()}


def jobs_of(done: Losses, rates: list[tuple[Cell, float]]) -> list[Job]:
    """Every rate on every seed of its sweep."""
    return [
        Job(*cell, x, seed)
        for cell, x in rates
        for seed in range(seeds_in(done, *cell[:2]))
    ]


def controls(done: Losses, rates: list[tuple[Cell, float]]) -> list[Job]:
    """Of each sweep the run of the first seed with the lowest loss."""
    found = []
    for cell in dict.fromkeys(cell for cell, _ in rates):
        runs = {
            job: loss
            for job, loss in done.items()
            if job[:3] == cell and job.seed == 0 and loss is not None
        }
        found.append(min(runs, key=lambda job: runs[job]))
    return found


@click.command()
@click.option(
    "--table",
    is_flag=True,
    help="Write the table of the runs on file, and run nothing.",
)
@click.option("--workers", default=2, show_default=True)
def main(table: bool, workers: int) -> None:
    """Run the rates that are not on file, or write results/moved_runs.md."""
    done = sweeps()
    rates = disputed(done)
    if not table:
        asked = [*jobs_of(done, list(rates)), *controls(done, list(rates))]
        for domain in dict.fromkeys(job.domain for job in asked):
            mine = Listed([job for job in asked if job.domain == domain])
            complete(
                mine,
                partial(run_at, warmup=WARMUP),
                MOVED_RUNS,
                workers,
                click.echo,
                provenance(domain),
            )
        return
    ran = read(MOVED_RUNS)
    means = means_of(ran, done)
    rows = []
    for (cell, x), (target, lines, spline) in rates.items():
        if (cell, x) not in means:
            continue
        regret = target.lost(done, means)
        figures = (number(100 * each, 1) for each in (lines, spline, regret))
        rows.append(
            [
                cell[0],
                cell[1],
                "full" if cell[2] == 0 else str(cell[2]),
                f"{x:.2f}",
                *figures,
            ]
        )
    again = controls(done, list(rates))
    apart = max(abs(or_inf(ran.get(job)) - or_inf(done[job])) for job in again)
    heads = (
        "domain",
        "configuration",
        "rank",
        "log2 rate",
        "lines, %",
        "spline, %",
        "run, %",
    )
    parts = [
        "# Moved rates that were run",
        __doc__ or "",
        block("Regrets", heads, rows),
    ]
    parts.append(
        f"Control: {len(again)} runs of the sweeps were made again. Their losses differ by at most {apart:.1g}."
    )
    parts.append(made_by(machine(1), MOVED_RUNS))
    (RESULTS / "moved_runs.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts[2:4]))


if __name__ == "__main__":
    main()
