"""The page of `against_sweep.py`: regret by contender, by cost, and whether each bar was met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from calibration.against_sweep_scores import (
    EVERY_FOURTH,
    ONE_SEED,
    ORACLE,
    SHARES,
    Cost,
    Score,
    costs_of,
    named,
    on_file,
)
from calibration.plain import BY_RANK, GRID, TPE
from calibration.searches import LORA, RANGE_TEST, WITH_FULL
from matplotlib.figure import Figure
from recording import block, draw, number, percent
from study.configurations import CONFIGS
from study.contenders import CONTENDERS
from study.domains import Domain
from study.grids import FULL, Losses
from study.loss_curves import DIVERGED

COLOURS = {LORA: "#0072B2", WITH_FULL: "#D55E00", TPE: "#CC79A7"}  # Okabe and Ito's
SEARCHED = [named(plan, share) for plan in SHARES for share in SHARES[plan]]
ROWS = [ORACLE, ONE_SEED, EVERY_FOURTH, *SEARCHED, GRID, *CONTENDERS, "Prodigy"]
WITHIN = 0.01  # of the attainable gain
NOTE = (
    "By rank: means over search seeds. Worst and median: over ranks and search seeds. In loss: the worst as a "
    "difference of held-out losses. From–to: the lowest and the highest median on one scoring seed; where two of these "
    "overlap, neither row is better. Runs and cost: what it takes to name the rates, for a law the sweep at rank 16. "
    "The first row is what the sweep's own choice loses on the scoring seeds: a regret below it says nothing."
)


def page(
    domains: Sequence[Domain],
    scores: Sequence[Score],
    start: Mapping[str, float],
    done: Losses,
) -> list[str]:
    """The page's parts."""
    costs = {domain.name: costs_of(domain, done) for domain in domains}
    parts = [f"## By configuration and rank\n\n{NOTE}"]
    for domain in domains:
        for config in CONFIGS:
            here = [s for s in scores if (s.domain, s.config) == (domain.name, config)]
            ranks = domain.ranks_swept
            heads = [
                "",
                "runs",
                "cost",
                "worst",
                "in loss",
                "median",
                "from–to",
                *(f"r = {r}" for r in ranks),
                "full",
            ]
            by_name = {
                name: [s for s in here if matches(s.name, name)] for name in ROWS
            }
            spent = costs[domain.name][config]
            rows = [
                row_of(name, found, ranks, spent.get(name))
                for name, found in by_name.items()
                if found
            ]
            title = f"{domain.name}, {config} (loss before training {start[domain.name]:.3f})"
            parts.append(block(title, heads, rows))
    asked = block(
        "The bars", ["bar", "asked", *(d.name for d in domains)], bars(domains, scores)
    )
    return [asked, within(domains, scores, costs), *parts]


def matches(scored: str, name: str) -> bool:
    return scored == name or scored.startswith(f"{name}, seed")


def row_of(
    name: str, mine: Sequence[Score], ranks: Sequence[int], cost: Cost | None
) -> list[str]:
    by_rank = {
        rank: [s.regret for s in mine if s.rank == rank] for rank in (*ranks, FULL)
    }
    lora = [s for s in mine if s.rank != FULL]
    figures = ["–"] * 4
    if all(by_rank[rank] for rank in ranks):  # no worst and no median of a part
        medians = sorted(
            statistics.median(each)
            for each in zip(*(s.by_seed for s in lora), strict=True)
        )
        figures = [
            percent(max(s.regret for s in lora)),
            number(max(s.loss for s in lora), 3),
            percent(statistics.median(s.regret for s in lora)),
            f"{percent(medians[0])} to {percent(medians[-1])}",
        ]
    paid = ["–", "–"] if cost is None else [f"{cost.runs:.0f}", f"{cost.share:.0%}"]
    cells = [
        percent(statistics.fmean(by_rank[rank])) if by_rank[rank] else "–"
        for rank in (*ranks, FULL)
    ]
    return [name, *paid, *figures, *cells]


def within(
    domains: Sequence[Domain],
    scores: Sequence[Score],
    costs: Mapping[str, dict[str, dict[str, Cost]]],
) -> str:
    """What a user pays for rates within 1 % of the best: runs, minutes, how often they were that near, what they lose."""
    rows = []
    for name in (EVERY_FOURTH, ONE_SEED, *SEARCHED, GRID, *CONTENDERS):
        cells = []
        for domain in domains:
            spent = [own[name] for own in costs[domain.name].values() if name in own]
            mine = [
                s for s in scores if s.domain == domain.name and matches(s.name, name)
            ]
            near = [s.regret <= WITHIN for s in mine]
            lost = [min(max(0.0, s.regret), DIVERGED) for s in mine if s.rank != FULL]
            cells += [
                number(statistics.fmean(c.runs for c in spent), 1) if spent else "–",
                number(statistics.fmean(c.minutes for c in spent), 1) if spent else "–",
                f"{sum(near)} of {len(near)}" if near else "–",
                percent(statistics.fmean(lost)) if lost else "–",
            ]
        rows.append([name, *cells])
    heads = [
        "",
        *(
            f"{d.name}: {what}"
            for d in domains
            for what in ("runs", "minutes", "within 1 %", "LoRA ranks lose")
        ),
    ]
    text = (
        "For all five ranks and full finetuning of one configuration, on one core: runs, minutes of training, and how "
        "many of all rates (configurations, ranks, full, search seeds) lose at most 1 % of the gain on fresh seeds. "
        "LoRA's ranks: the mean, where a regret below zero counts as zero and a diverged run as 500 %."
    )
    return (
        block("What it costs to be within 1 % of the best", heads, rows) + "\n\n" + text
    )


def bars(domains: Sequence[Domain], scores: Sequence[Score]) -> list[list[str]]:
    """Each bar with the figure of every domain."""
    asked = [
        (
            "LoRA ranks at 10 % of the cost: worst",
            "≤ 2 %",
            lambda d: max(regrets(scores, d, LORA, 0.1)),
        ),
        (
            "LoRA ranks at 10 %: median",
            "≤ 0.5 %",
            lambda d: statistics.median(regrets(scores, d, LORA, 0.1)),
        ),
        (
            "full at 20 %, LoRA trials only: worst",
            "≤ 5 %",
            lambda d: max(regrets(scores, d, LORA, 0.2, True)),
        ),
        (
            "full with three full runs at 20 %: worst",
            "≤ 1 %",
            lambda d: max(regrets(scores, d, WITH_FULL, 0.2, True)),
        ),
    ]
    rows = [
        [what, bar, *(percent(figure(d)) for d in domains)]
        for what, bar, figure in asked
    ]
    beside = [
        max(
            r["beside_training"]
            for r in on_file()
            if r["domain"] == d.name and r["plan"] in (LORA, WITH_FULL)
        )
        for d in domains
    ]
    return [
        *rows,
        [
            "calibration's own time beside training: worst",
            "≤ 5 %",
            *map(percent, beside),
        ],
    ]


def regrets(
    scores: Iterable[Score], domain: Domain, plan: str, share: float, full: bool = False
) -> list[float]:
    name = named(plan, share)
    return [
        s.regret
        for s in scores
        if s.domain == domain.name
        and matches(s.name, name)
        and (s.rank == FULL) == full
    ]


# --- figures --------------------------------------------------------------------------------------------------------


def draw_costs(domains: Sequence[Domain], scores: Sequence[Score], path: Path) -> None:
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
                xs = SHARES[plan]
                ys = [
                    100 * of(regrets(scores, domain, plan, share, full)) for share in xs
                ]
                axis.plot(
                    [100 * x for x in xs], ys, marker="o", color=colour, label=plan
                )
            axis.set_title(f"{domain.name}: {title}", fontsize=9)
            axis.set_yscale("symlog", linthresh=1)
            axis.yaxis.set_major_formatter("{x:g}")
            axis.set_xlabel("cost, % of the sweep", fontsize=8)
            axis.axhline(0, color="#999999", linewidth=0.8)
        line[0].set_ylabel("regret, %", fontsize=8)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
    )
    draw(figure, path, dpi=110)


def draw_contenders(
    domains: Sequence[Domain], scores: Sequence[Score], path: Path
) -> None:
    """Regret of every contender over all configurations and ranks, a dot each."""
    names = [
        ORACLE,
        named(LORA, 0.1),
        named(WITH_FULL, 0.2),
        *CONTENDERS,
        "Prodigy",
        named(RANGE_TEST, 0.11),
        named(TPE, 0.2),
        GRID,
        named(BY_RANK, 0.3),
    ]
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    for axis, domain in zip(
        figure.subplots(1, len(domains), sharey=True, squeeze=False)[0],
        domains,
        strict=True,
    ):
        for y, name in enumerate(reversed(names)):
            for full, marker, colour in (
                (False, "o", "#0072B2"),
                (True, "D", "#D55E00"),
            ):
                mine = [
                    s
                    for s in scores
                    if s.domain == domain.name and matches(s.name, name)
                ]
                found = [
                    min(100 * s.regret, 300.0) for s in mine if (s.rank == FULL) == full
                ]
                axis.plot(
                    found,
                    [y + (0.15 if full else -0.1)] * len(found),
                    marker,
                    color=colour,
                    alpha=0.6,
                    markersize=4,
                )
        axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axis.set_xscale("symlog", linthresh=1)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(
            min(-3.0, 130 * min(s.regret for s in scores if s.domain == domain.name)),
            330,
        )
        axis.set_xlabel("regret, % (300: that or diverged)", fontsize=8)
        axis.set_title(f"{domain.name}: LoRA ranks (blue), full (orange)", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    draw(figure, path, dpi=110)
