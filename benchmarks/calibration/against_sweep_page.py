"""The page of `against_sweep.py`: regret by contender, by cost, and whether each bar was met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from calibration.against_sweep_scores import ORACLE, SHARES, Score, costs_of, named, on_file
from calibration.searches import LORA, RANGE_TEST, TO_FULL, TPE, WITH_FULL
from matplotlib.figure import Figure
from recording import block, percent
from study.configurations import CONFIGS
from study.contenders import CONTENDERS
from study.domains import Domain
from study.grids import FULL

COLOURS = {LORA: "#0072B2", TO_FULL: "#009E73", WITH_FULL: "#D55E00", TPE: "#CC79A7"}  # Okabe and Ito's
ROWS = [ORACLE, *(named(plan, share) for plan in SHARES for share in SHARES[plan][0]), *CONTENDERS, "Prodigy"]


def page(domains: Sequence[Domain], scores: Sequence[Score], start: Mapping[str, float]) -> list[str]:
    """The page's parts."""
    parts = []
    for domain in domains:
        mine, costs = [s for s in scores if s.domain == domain.name], costs_of(domain)
        for config in CONFIGS:
            here = [s for s in mine if s.config == config]
            ranks = domain.ranks_swept
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
