"""The page of `calibration.py`: regret by contender, by cost, and whether each bar was met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from calibration.against_sweep import SCORING, SHARES, on_file, picks, winners
from calibration.searches import LORA, RANGE_TEST, RATES_SWEPT, TO_FULL, TPE, WITH_FULL, ranks_of
from matplotlib.figure import Figure
from scipy.interpolate import PchipInterpolator
from study.contenders import CONTENDERS
from study.domains import Domain
from study.domains._configs import CONFIGS
from study.domains._runs import FULL, Cell, Job, Losses, or_inf
from study.domains._tables import block, percent

COLOURS = {LORA: "#0072B2", TO_FULL: "#009E73", WITH_FULL: "#D55E00", TPE: "#CC79A7"}  # Okabe and Ito's
ORACLE = "the sweep itself"


class Score(NamedTuple):
    """A contender's regret at one rank, a share; infinite where a run diverged."""

    domain: str
    config: str
    name: str
    rank: int
    regret: float


def scores_of(domain: Domain, done: Losses, start: float) -> Iterator[Score]:
    """Every contender at every rank; the sweep itself against the best of its neighbours on the scoring seeds."""
    best = dict(winners(domain, done))
    for config in CONFIGS:
        chosen = {name: list(rates.items()) for name, rates in picks(domain, config, done).items()}
        for name, rates in chosen.items():
            for rank, (cell, x) in rates:
                own = cell_of(domain, config, rank)
                if has_run(done, cell, x):
                    yield Score(domain.name, config, name, rank, regret(done, start, (cell, x), (own, best[own])))
        for rank in (*ranks_of(domain), FULL):
            own = cell_of(domain, config, rank)
            x = min((best[own] + half / 2 for half in range(-3, 4)), key=lambda x: fresh(done, own, x))
            yield Score(domain.name, config, ORACLE, rank, regret(done, start, (own, best[own]), (own, x)))


def has_run(done: Losses, cell: Cell, x: float) -> bool:
    """Whether the runs that score a rate are on file: those at it, or on either side of it."""
    rates = fresh_rates(done, cell)
    return bool(rates) and rates[0] <= x <= rates[-1]


def cell_of(domain: Domain, config: str, rank: int) -> Cell:
    return (domain.name, "full" if rank == FULL else config, rank)


def regret(done: Losses, start: float, at: tuple[Cell, float], best: tuple[Cell, float]) -> float:
    """(loss at a rate − loss at the best) / (loss before training − loss at the best), means over the scoring seeds."""
    lowest = fresh(done, *best)
    return (fresh(done, *at) - lowest) / (start - lowest)


def fresh(done: Losses, cell: Cell, x: float) -> float:
    """Mean loss over the scoring seeds at 2^x: as run, or by a monotone spline between runs; infinite beside one that
    diverged."""
    means = {at: fresh_mean(done, cell, at) for at in fresh_rates(done, cell)}
    if x in means:
        return means[x]
    below, above = max(at for at in means if at < x), min(at for at in means if at > x)
    if not math.isfinite(means[below] + means[above]):
        return math.inf
    grid = [at for at in sorted(means) if math.isfinite(means[at])]
    return float(PchipInterpolator(grid, [means[at] for at in grid])(x))


def fresh_rates(done: Losses, cell: Cell) -> list[float]:
    """Rates that every scoring seed has run; what an earlier search asked for and was stopped is left out."""
    rates = {job.x for job in done if job[:3] == cell}
    return sorted(x for x in rates if all(Job(*cell, x, seed) in done for seed in SCORING))


def fresh_mean(done: Losses, cell: Cell, x: float) -> float:
    return statistics.fmean(or_inf(done[Job(*cell, x, seed)]) for seed in SCORING)


# --- cost -----------------------------------------------------------------------------------------------------------


def costs_of(domain: Domain) -> dict[str, list[float]]:
    """What each search spent, by name: steps weighted by the arm's step time, as a share of the sweep's."""
    rows = [row for row in on_file() if row["domain"] == domain.name]
    seconds = {rank: step_time(rows, rank) for rank in (*ranks_of(domain), FULL)}
    sweep = RATES_SWEPT * domain.steps * sum(seconds.values())
    costs: dict[str, list[float]] = {}
    for row in rows:
        spent = sum(steps * seconds[int(rank)] for rank, (steps, _) in row["arms"].items())
        costs.setdefault(named(row["plan"], row["share"]), []).append(spent / sweep)
    return costs


def step_time(rows: Iterable[Mapping[str, Any]], rank: int) -> float:
    """Median seconds a step of an arm."""
    return statistics.median(s / n for row in rows for arm, (n, s) in row["arms"].items() if int(arm) == rank and n)


def named(plan: str, share: float) -> str:
    return f"{plan}, {share:.0%}"


# --- the page -------------------------------------------------------------------------------------------------------

ROWS = [ORACLE, *(named(plan, share) for plan in SHARES for share in SHARES[plan][0]), *CONTENDERS, "Prodigy"]


def page(domains: Sequence[Domain], scores: Sequence[Score], start: Mapping[str, float]) -> list[str]:
    """The page's parts."""
    parts = []
    for domain in domains:
        mine, costs = [s for s in scores if s.domain == domain.name], costs_of(domain)
        for config in CONFIGS:
            here = [s for s in mine if s.config == config]
            ranks = ranks_of(domain)
            heads = ["", "cost", "worst", "median", *(f"r = {rank}" for rank in ranks), "full"]
            by_name = {name: [s for s in here if matches(s.name, name)] for name in ROWS}
            rows = [row_of(name, found, ranks, costs) for name, found in by_name.items() if found]
            title = f"{domain.name}, {config} (loss before training {start[domain.name]:.3f})"
            parts.append(block(title, heads, rows))
    return [block("The bars", ["bar", "asked", *(d.name for d in domains)], bars(domains, scores)), *parts]


def matches(scored: str, name: str) -> bool:
    return scored == name or scored.startswith(f"{name}, seed")


def row_of(name: str, mine: Sequence[Score], ranks: Sequence[int], costs: Mapping[str, list[float]]) -> list[str]:
    by_rank = {rank: [s.regret for s in mine if s.rank == rank] for rank in (*ranks, FULL)}
    lora = [x for rank in ranks for x in by_rank[rank]]
    cost = statistics.fmean(costs[name]) if name in costs else None
    whole = all(by_rank[rank] for rank in ranks)  # no worst and no median of a part
    figures = [percent(max(lora)), percent(statistics.median(lora))] if whole else ["–", "–"]
    cells = [percent(statistics.fmean(by_rank[rank])) if by_rank[rank] else "–" for rank in (*ranks, FULL)]
    return [name, "–" if cost is None else f"{cost:.0%}", *figures, *cells]


def bars(domains: Sequence[Domain], scores: Sequence[Score]) -> list[list[str]]:
    """Each bar with the figure of every domain."""
    asked = [
        ("LoRA ranks at 10 % of the cost: worst", "≤ 2 %", lambda d: max(regrets(scores, d, LORA, 0.1))),
        ("LoRA ranks at 10 %: median", "≤ 0.5 %", lambda d: statistics.median(regrets(scores, d, LORA, 0.1))),
        ("full at 20 %, LoRA trials only: worst", "≤ 5 %", lambda d: max(regrets(scores, d, LORA, 0.2, True))),
        ("the same, planned for full: worst", "≤ 5 %", lambda d: max(regrets(scores, d, TO_FULL, 0.2, True))),
        ("full with three full runs at 20 %: worst", "≤ 1 %", lambda d: max(regrets(scores, d, WITH_FULL, 0.2, True))),
    ]
    rows = [[what, bar, *(percent(figure(d)) for d in domains)] for what, bar, figure in asked]
    beside = [
        max(
            r["beside_training"] for r in on_file() if r["domain"] == d.name and r["plan"] in (LORA, TO_FULL, WITH_FULL)
        )
        for d in domains
    ]
    return [*rows, ["calibration's own time beside training: worst", "≤ 5 %", *map(percent, beside)]]


def regrets(scores: Iterable[Score], domain: Domain, plan: str, share: float, full: bool = False) -> list[float]:
    name = named(plan, share)
    return [s.regret for s in scores if s.domain == domain.name and matches(s.name, name) and (s.rank == FULL) == full]


# --- figures --------------------------------------------------------------------------------------------------------


def draw(domains: Sequence[Domain], scores: Sequence[Score], path: Path) -> None:
    """Regret against cost: worst and median over LoRA ranks and configurations, and full finetuning's worst."""
    figure = Figure(figsize=(9.5, 3.1 * len(domains)), layout="constrained")
    axes = figure.subplots(len(domains), 3, squeeze=False, sharex=True)
    panels = (
        ("LoRA ranks, worst", False, max),
        ("LoRA ranks, median", False, statistics.median),
        ("full, worst", True, max),
    )
    for line, domain in zip(axes, domains, strict=True):
        for axis, (title, full, of) in zip(line, panels, strict=True):
            for plan, colour in COLOURS.items():
                xs = SHARES[plan][0]
                ys = [100 * of(regrets(scores, domain, plan, share, full)) for share in xs]
                axis.plot([100 * x for x in xs], ys, marker="o", color=colour, label=plan)
            axis.set_title(f"{domain.name}: {title}", fontsize=9)
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xlabel("cost, % of the sweep", fontsize=8)
            axis.axhline(0, color="#999999", linewidth=0.8)
        line[0].set_ylabel("regret, %", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_contenders(domains: Sequence[Domain], scores: Sequence[Score], path: Path) -> None:
    """Regret of every contender over all configurations and ranks, a dot each."""
    names = [
        ORACLE,
        named(LORA, 0.1),
        named(WITH_FULL, 0.2),
        *CONTENDERS,
        "Prodigy",
        named(RANGE_TEST, 0.11),
        named(TPE, 0.1),
    ]
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    for axis, domain in zip(figure.subplots(1, len(domains), sharey=True, squeeze=False)[0], domains, strict=True):
        for y, name in enumerate(reversed(names)):
            for full, marker, colour in ((False, "o", "#0072B2"), (True, "D", "#D55E00")):
                mine = [s for s in scores if s.domain == domain.name and matches(s.name, name)]
                found = [min(100 * s.regret, 300.0) for s in mine if (s.rank == FULL) == full]
                axis.plot(
                    found, [y + (0.15 if full else -0.1)] * len(found), marker, color=colour, alpha=0.6, markersize=4
                )
        axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(min(-3.0, 130 * min(s.regret for s in scores if s.domain == domain.name)), 330)
        axis.set_xlabel("regret, % (300: that or diverged)", fontsize=8)
        axis.set_title(f"{domain.name}: LoRA ranks (blue), full (orange)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
