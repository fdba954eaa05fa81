"""What `against_sweep.py` compares: the sweep, the searches on file, the rates of each, and their regret.

Regret is scored on fresh seeds. See `against_sweep.py` for how.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from calibration.plain import BY_RANK, GRID, TPE, moved
from calibration.searches import (
    LORA,
    PLANS,
    RANGE_TEST,
    RATES_SWEPT,
    WITH_FULL,
    Search,
    by_arm,
)
from recording import RESULTS
from study.configurations import CONFIGS, LORAPLUS, PRODIGY, TUNED
from study.contenders import CONTENDERS, Known
from study.domains import Domain
from study.grids import FULL, Cell, Grid, Job, Losses, curve, lowest, or_inf
from study.loss_curves import between

SEEDS, SCORING, NEAR = 3, (3, 4, 5), 1.5
SEARCHES = RESULTS / "calibration_searches.jsonl"
ORACLE, ONE_SEED, EVERY_FOURTH = (
    "the sweep itself",
    "the sweep, one seed",
    "a rate in two octaves, one seed",
)
At = tuple[Cell, float]  # what is trained, and log2 of its rate
SHARES = {  # of the sweep's cost, by plan
    LORA: (0.05, 0.1, 0.2),
    WITH_FULL: (0.1, 0.2),
    TPE: (0.2,),
    RANGE_TEST: (0.11,),
    BY_RANK: (0.3,),
}
SEARCH_SEEDS = (0, 1, 2)
COARSE = {
    **{config: range(-13, -2, 2) for config in CONFIGS},
    **{config + LORAPLUS: range(-15, -4, 2) for config in CONFIGS},
    "full": range(-15, -4, 2),
}


# --- the sweep, and the searches ------------------------------------------------------------------------------------


def truth(domain: Domain) -> Grid:
    """Every configuration and rank, and full finetuning, on three seeds."""
    cells = [
        (domain.name, config, rank) for config in CONFIGS for rank in domain.ranks_swept
    ]
    return Grid([*cells, (domain.name, "full", FULL)], COARSE, SEEDS, half=2)


def tuned_once(domain: Domain) -> Grid:
    """LoRA+ at the rank at which a user tunes once, on one seed."""
    cells = [(domain.name, config + LORAPLUS, TUNED) for config in CONFIGS]
    return Grid(cells, COARSE, 1, half=2)


def searches(domain: Domain) -> list[Search]:
    """Every search, a seed after the other: what is on file is whole for the first seeds."""
    return [
        Search(domain.name, config, plan, share, seed)
        for seed in SEARCH_SEEDS
        for config in CONFIGS
        for plan in PLANS
        for share in SHARES[plan]
    ]


def on_file() -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in SEARCHES.read_text().splitlines()]
        if SEARCHES.exists()
        else []
    )


# --- rates ----------------------------------------------------------------------------------------------------------


def scoring(domain: Domain, done: Losses) -> list[Job]:
    """The runs on fresh seeds: half octaves around the sweep's best rates, and contenders' rates farther away."""
    cells = [
        (cell, x + half / 2)
        for cell, x in winners(domain, done)
        for half in range(-round(2 * NEAR), round(2 * NEAR) + 1)
    ]
    named = [
        rates for config in CONFIGS for rates in picks(domain, config, done).values()
    ]
    # the searches' before the contenders'
    chosen = [at for rates in reversed(named) for at in rates.values()]
    best = dict(winners(domain, done))
    cells += [(cell, x) for cell, x in chosen if not is_near(best, cell, x)]
    return [Job(*cell, x, seed) for cell, x in dict.fromkeys(cells) for seed in SCORING]


def winners(domain: Domain, done: Losses) -> Iterator[At]:
    """Every cell with the best rate of its sweep on three seeds."""
    for cell in truth(domain).cells:
        yield cell, lowest(curve(done, cell, SEEDS))


def is_near(best: Mapping[Cell, float], cell: Cell, x: float) -> bool:
    """Whether a rate lies where the scoring seeds were run every half octave."""
    return cell in best and abs(x - best[cell]) <= NEAR


def picks(domain: Domain, config: str, done: Losses) -> dict[str, dict[int, At]]:
    """What each contender and each search trains at every rank."""
    known = Known(domain, config, domain.ranks_swept, done)
    rates = {name: pick(known) for name, pick in CONTENDERS.items()}
    rates["Prodigy"] = dict.fromkeys((*known.ranks, FULL), 0.0)
    x = lowest(curve(done, cell_of(domain, config, TUNED), 2))
    rates[GRID] = moved({TUNED: x}, domain.name, config, (*known.ranks, FULL))
    for name, jobs in swept_once(known).items():
        rates[name] = {
            rank: lowest({job.x: or_inf(done[job]) for job in of})
            for rank, of in jobs.items()
        }
    for row in on_file():
        if (row["domain"], row["config"]) == (domain.name, config):
            name = f"{row['plan']}, {row['share']:.0%}, seed {row['seed']}"
            found = {
                int(rank): math.log2(lr) for rank, (lr, *_) in row["rates"].items()
            }
            rates[name] = moved(found, domain.name, config, (*known.ranks, FULL))
    best = dict(winners(domain, done))
    return {
        name: {rank: placed(known, best, name, rank, x) for rank, x in of.items()}
        for name, of in rates.items()
    }


def swept_once(known: Known) -> dict[str, dict[int, list[Job]]]:
    """The runs of a sweep of one seed, by rank: whole, and its coarse pass alone."""
    found: dict[str, dict[int, list[Job]]] = {ONE_SEED: {}, EVERY_FOURTH: {}}
    for rank in (*known.ranks, FULL):
        cell = cell_of(known.domain, known.config, rank)
        coarse = COARSE[cell[1]]
        found[ONE_SEED][rank] = [
            job for job in known.done if job[:3] == cell and job.seed == 0
        ]
        found[EVERY_FOURTH][rank] = [Job(*cell, float(x), 0) for x in coarse]
    return found


def placed(
    known: Known, best: Mapping[Cell, float], name: str, rank: int, x: float
) -> At:
    """The cell and the rate: as it is near the sweep's best, to the nearest half octave elsewhere."""
    scheme = "full" if rank == FULL else known.config
    own = {"Prodigy": PRODIGY, "LoRA+ 16": "" if rank == FULL else LORAPLUS}.get(
        name, ""
    )
    cell = (known.domain.name, scheme + own, rank)
    return (cell, x) if is_near(best, cell, x) else (cell, round(2 * x) / 2)


# --- regret ---------------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """What a contender loses at one rank, in the mean over the scoring seeds; infinite where a run diverged.

    regret: a share of the attainable gain. loss: the same in units of the loss. by_seed: the regret on each seed.
    """

    domain: str
    config: str
    name: str
    rank: int
    regret: float
    loss: float
    by_seed: tuple[float, ...]


def scores_of(domain: Domain, done: Losses, start: float) -> Iterator[Score]:
    """Every contender at every rank; the sweep itself against the best of its neighbours on the scoring seeds."""
    best = dict(winners(domain, done))
    for config in CONFIGS:
        for name, rates in picks(domain, config, done).items():
            for rank, (cell, x) in rates.items():
                own, run = cell_of(domain, config, rank), fresh_curve(done, cell)
                if run and min(run) <= x <= max(run):
                    yield score(
                        done, start, (config, name, rank), (cell, x), (own, best[own])
                    )
        for rank in (*domain.ranks_swept, FULL):
            own = cell_of(domain, config, rank)
            x = min(
                (best[own] + half / 2 for half in range(-3, 4)),
                key=lambda x: fresh(done, own, x),
            )
            yield score(done, start, (config, ORACLE, rank), (own, best[own]), (own, x))


def cell_of(domain: Domain, config: str, rank: int) -> Cell:
    return (domain.name, "full" if rank == FULL else config, rank)


def score(
    done: Losses, start: float, named: tuple[str, str, int], at: At, best: At
) -> Score:
    """Regret: (loss at a rate − loss at the best) / (loss before training − loss at the best)."""
    losses = [
        (fresh(done, *at, seeds), fresh(done, *best, seeds))
        for seeds in (SCORING, *((s,) for s in SCORING))
    ]
    regret, *by_seed = (
        (loss - at_best) / (start - at_best) for loss, at_best in losses
    )
    return Score(at[0][0], *named, regret, losses[0][0] - losses[0][1], tuple(by_seed))


def fresh(
    done: Losses, cell: Cell, x: float, seeds: tuple[int, ...] = SCORING
) -> float:
    """Mean loss over scoring seeds at 2^x: as run, or by a monotone spline between runs; infinite beside one that
    diverged."""
    means = fresh_curve(done, cell, seeds)
    if x in means:
        return means[x]
    below, above = max(at for at in means if at < x), min(at for at in means if at > x)
    if not math.isfinite(means[below] + means[above]):
        return math.inf
    return between({at: loss for at, loss in means.items() if math.isfinite(loss)}, x)


def fresh_curve(
    done: Losses, cell: Cell, seeds: tuple[int, ...] = SCORING
) -> dict[float, float]:
    """{log2 rate: mean loss} of the rates that every scoring seed has run, by rising rate."""
    jobs = {
        x: [Job(*cell, x, seed) for seed in SCORING]
        for x in sorted({job.x for job in done if job[:3] == cell})
    }
    whole = [x for x, each in jobs.items() if all(job in done for job in each)]
    return {
        x: statistics.fmean(or_inf(done[Job(*cell, x, seed)]) for seed in seeds)
        for x in whole
    }


# --- cost -----------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What one search spends: runs, minutes of training on one core, and its share of the sweep's time."""

    runs: float
    minutes: float
    share: float


def costs_of(domain: Domain, done: Losses) -> dict[str, dict[str, Cost]]:
    """What each contender spends to name its rates, by configuration and name; the mean over search seeds.

    Seconds are steps times the median seconds of a step at the rank, over all searches: the range test runs at every
    rank. A law's rates cost the sweep at the rank tuned at.
    """
    rows = [
        (row, by_arm(row["runs"])) for row in on_file() if row["domain"] == domain.name
    ]
    taken = [
        (rank, seconds / steps)
        for _, arms in rows
        for rank, (steps, seconds) in arms.items()
        if steps
    ]
    step = {
        rank: statistics.median(t for at, t in taken if at == rank)
        for rank in {rank for rank, _ in taken}
    }
    whole = (
        RATES_SWEPT
        * domain.steps
        * sum(step[rank] for rank in (*domain.ranks_swept, FULL))
    )

    def sweep(cells: Mapping[Cell, int]) -> list[tuple[int, float]]:
        return [
            (
                sum(cells.values()),
                sum(n * domain.steps * step[cell[2]] for cell, n in cells.items()),
            )
        ]

    costs = {}
    for config in CONFIGS:
        spent: dict[str, list[tuple[int, float]]] = {}
        for row, arms in rows:
            if row["config"] == config:
                seconds = sum(steps * step[rank] for rank, (steps, _) in arms.items())
                spent.setdefault(named(row["plan"], row["share"]), []).append(
                    (len(row["runs"]), seconds)
                )
        for name, jobs in swept_once(
            Known(domain, config, domain.ranks_swept, done)
        ).items():
            spent[name] = sweep(
                {cell_of(domain, config, rank): len(of) for rank, of in jobs.items()}
            )
        for name in CONTENDERS:
            added, rank = {
                "LoRA+ 16": (LORAPLUS, TUNED),
                "ten times full": ("", FULL),
            }.get(name, ("", TUNED))
            own, scheme, _ = cell_of(domain, config, rank)
            cell = (own, scheme + added, rank)
            spent[name] = sweep(
                {cell: sum(job[:3] == cell and job.seed == 0 for job in done)}
            )
        cell = cell_of(domain, config, TUNED)
        on_two = sum(job[:3] == cell and job.seed < 2 for job in done)
        spent[GRID] = sweep({cell: on_two})
        means = {
            name: [statistics.fmean(part) for part in zip(*each, strict=True)]
            for name, each in spent.items()
        }
        costs[config] = {
            name: Cost(runs, seconds / 60, seconds / whole)
            for name, (runs, seconds) in means.items()
        }
    return costs


def named(plan: str, share: float) -> str:
    return f"{plan}, {share:.0%}"
