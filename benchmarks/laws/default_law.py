"""How many tokens has the default law, and does a moved rate keep a small distance? By a rule, on stored sweeps.

    python benchmarks/laws/default_law.py ../shared/data/sft_sweep.csv    # no training: results/default_law.md

**Candidates.** The default law is `Falling(law=MuA(tokens=b))`, with b = 1, 2, 3, 4, 6 or 8 (8 was the default when
this was written). The second question is a distance: whether a rate that was moved is multiplied by .9, since too high
costs more than too low. The distance is applied once, where a rate is used, and never inside a law. It does not apply
where nothing moves, to exact moves, or to recipes, which have a margin of their own.

**Figure of a candidate.** The study's sweeps (`study/suite.py`): alpha = rank, alpha kept and rsLoRA, at Init[A]. In
each of these columns the best rate found at a rank is moved to every other rank. There are two sources of that rate:
the best in the mean over seeds, and the best of each seed alone. Where there is one seed, both are the same. Regret is
the study's (`study/regret.py`): the share of the attainable gain that is lost, on the mean loss over seeds, on straight
lines between the rates tried, beyond them at the last. A diverged run counts as 500 %, and so does a larger regret. A
domain's figure is the mean over its three columns of the mean over both sources of the mean over moves. All domains
weigh the same.

**Rule**, committed before it was run.

1. The number of tokens is the one with the least mean figure over domains. Means that agree in percent to two decimals
   tie, and the largest number wins, since published language models prefer more. The mean over domains is also the mean
   over the folds that leave one domain out, so the folds do not combine in another way. Each fold's own choice is
   reported, with its figure on the domain left out, beside one rate, the paper's law and 8 tokens there.
2. With that number, the distance is supported if it lowers the mean figure over domains, and also the mean without any
   one domain, each of them.
3. The bar, which chooses nothing: columns are alpha = rank, alpha kept and Init[B] from rank to rank, and full
   finetuning from Init[A] (alpha = rank and alpha kept together) and from Init[B]. All moves of all domains, from the
   rates that are best over all seeds, count the same, as in the README's table. The bar holds in a column if neither
   the mean nor the 95th percentile is above the lower one of one rate's and the paper's law's. With rates from one seed
   the same is shown, and judges nothing.
4. Checks, which choose nothing: the same figures on every stored sweep outside the study in which a rate moves, and on
   published sweeps in loss.
5. The prior of a calibration (`MuA`) gets the same number, unless the simulation (`calibration/simulated.py`) speaks
   against it: with its five plans, on the study's surfaces, 20 studies each that draw alike under both priors, the
   chosen number loses more than 8 tokens, in the mean over LoRA's ranks or in full finetuning, and the 95 % interval of
   the paired difference, from 10,000 bootstraps of the domains, lies above 0.

**Since then** all pages estimate the loss between rates by a monotone spline (`study/loss_curves.py`). The rule is
applied on straight lines, as it was committed. Everything else here is by the spline, and what the rule would name by
it is said. The sweeps called "moved by 8 tokens in the runs" tried the very rates to which 8 tokens move, which favours
that number.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from calibration.simulated import PLANS, calibrated, rate_of
from calibration.surfaces import Surface, study_surfaces
from laws import published
from laws.scoring import bench_law
from recording import RESULTS, block, machine, made_on, number, percent
from study.configurations import CONFIGS, RSLORA, START, start_of
from study.domains import STUDY
from study.grids import FULL, Cell, Job, Losses, curve
from study.loss_curves import on_lines, regret_between
from study.moving import Shift, by_law, kept, octaves
from study.optima import ranks_in, seeds_in, tried_rates
from study.regret import Score, best_at, best_by_seed, score
from study.runs_on_file import read
from study.suite import STORES, finished

from rankaware_optim import Falling, Law, MuA, RankAwareWarning, Recipe, Reference

RESTS_ON = ("laws.adam", "scores")
TOKENS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
DISTANCE = math.log2(0.9)
FOLLOWS, KEPT, RS, AT_B = "alpha = rank", "alpha kept", "rsLoRA", "Init[B]"
COLUMNS = dict(zip((*CONFIGS, *RSLORA), (FOLLOWS, KEPT, AT_B, RS), strict=True))
CHOOSING = (FOLLOWS, KEPT, RS)
FROM_A, FROM_B = "to full from Init[A]", "to full from Init[B]"
JUDGED = (FOLLOWS, KEPT, AT_B, FROM_A, FROM_B)
ALL_SEEDS, ONE_SEED = "all seeds", "one seed"
# losses before training of two_rates.jsonl
STARTS = {"image_generation": 0.7159937620162964, "digits_vision": 2.305133104324341}
# mean fan-in of the adapted layers, weighted by size, and the largest
WIDTHS = {
    "Llama 192": (2368 / 9, 512.0),
    "Llama 192, MLP 192": (192.0, 192.0),
    "Llama 192, MLP 1024": (6208 / 15, 1024.0),
    "Llama 96": (1184 / 9, 256.0),
    "Llama 384": (4736 / 9, 1024.0),
    "DiT 64": (320 / 3, 256.0),
    "DiT 256": (1280 / 3, 1024.0),
    "DiT 128": (640 / 3, 512.0),
}


# --- ways to move a rate --------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """A way to move a rate: its name, its law (None keeps the rate), and octaves added to a moved rate."""

    name: str
    law: Law | None
    added: float = 0.0


def default_of(tokens: float, added: float = 0.0) -> Way:
    return Way(
        f"{tokens:g} token" + "s" * (tokens != 1.0) + " × .9" * (added != 0.0),
        Falling(law=MuA(tokens=tokens)),
        added,
    )


ONE_RATE, PAPER = Way("one rate", None), Way("the paper's law", MuA(tokens=None))
TODAY = default_of(8.0)
WAYS = (
    ONE_RATE,
    PAPER,
    *map(default_of, TOKENS),
    *(default_of(tokens, DISTANCE) for tokens in TOKENS),
)


# --- sweeps ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sweep:
    """Runs of one task, whose schemes are configurations of the study and "full".

    Args:
        group: the sweeps that are shown together.
        name: the sweep's name.
        domain: the domain that its jobs name.
        done: the runs.
        by_law: (configuration, law) -> how the law moves a rate in this network.
    """

    group: str
    name: str
    domain: str
    done: Losses
    by_law: Callable[[str, Law], Shift]

    def cell(self, config: str, rank: int) -> Cell:
        return self.domain, "full" if rank == FULL else config, rank

    def sources(self, cell: Cell) -> dict[str, list[float]]:
        """log2 of a cell's best rate: over all seeds, and of each seed alone. The grid's where there is no vertex."""
        return {
            ALL_SEEDS: [best_at(self.done, cell)],
            ONE_SEED: best_by_seed(self.done, cell),
        }

    def regret(self, cell: Cell) -> Callable[[float], tuple[float, float]]:
        """A cell's regret by log2 of the rate: by the spline, and on straight lines."""
        seeds = seeds_in(self.done, *cell[:2])
        tried, best = (
            tried_rates(self.done, cell, seeds),
            min(curve(self.done, cell, seeds).values()),
        )
        start = start_of(self.domain, self.done)
        shares = {x: (loss - best) / (start - best) for x, loss in tried.items()}
        return lambda x: (
            regret_between(shares, x),
            on_lines(shares, min(max(x, min(tried)), max(tried))),
        )


class Moved(NamedTuple):
    """The regret of a rate that was moved, and what it is on straight lines, as in the rule."""

    group: str
    sweep: str
    column: str
    way: str
    source: str
    regret: float
    on_lines: float


def moves(sweep: Sweep, ways: Sequence[Way] = WAYS) -> Iterator[Moved]:
    """Every way, from every rank to every other and to full finetuning, in every configuration of a sweep."""
    full = (FULL,) if ranks_in(sweep.done, sweep.domain, "full") else ()
    for config, column in COLUMNS.items():
        ranks = ranks_in(sweep.done, sweep.domain, config)
        whole = () if config in RSLORA else full
        regrets = {
            rank: sweep.regret(sweep.cell(config, rank)) for rank in (*ranks, *whole)
        }
        into_full = FROM_B if column == AT_B else FROM_A
        for a in ranks:
            for source, rates in sweep.sources(sweep.cell(config, a)).items():
                for way in ways:
                    shift = kept if way.law is None else sweep.by_law(config, way.law)
                    for b in regrets.keys() - {a}:
                        moved = (x + shift(a, b) + way.added for x in rates)
                        named = (
                            sweep.group,
                            sweep.name,
                            into_full if b == FULL else column,
                            way.name,
                            source,
                        )
                        yield from (Moved(*named, *regrets[b](x)) for x in moved)


def study() -> Iterator[Sweep]:
    for domain in STUDY:
        done = finished(read(STORES / f"{domain}.jsonl"), "full")
        yield Sweep("the study", domain, domain, done, partial(by_law, domain))


def outside() -> Iterator[Sweep]:
    """Every stored sweep outside the study in which a rate moves between ranks or to full finetuning."""
    yield from of_seeds("30 % warm-up", RESULTS / "calibration_runs.jsonl", 3)
    for store in sorted((RESULTS / "short_long").glob("*.jsonl")):
        yield from of_seeds("4 and 8 times the steps", store, 2, " | ")
    for store in sorted((RESULTS / "one_constant").glob("*.jsonl")):
        yield from of_seeds("batch, steps or warm-up changed", store, 3, " | ")
    yield from of_seeds(
        "Init[B], batch, steps or warm-up changed",
        RESULTS / "init_b_runs.jsonl",
        2,
        "; ",
    )
    yield from other_optimizers()
    yield from base_rates()
    yield from widths()


def of_seeds(group: str, store: Path, seeds: int, mark: str = " | ") -> Iterator[Sweep]:
    """Sweeps of a store by domain and by what follows a mark in the scheme's name. The first seeds placed the grids."""
    every = read(store)
    sweeps: dict[tuple[str, str], dict[Job, float | None]] = {}
    for job, loss in every.items():
        config, _, change = job.scheme.partition(mark)
        if (
            job.scheme != START
            and job.seed < seeds
            and config in (*CONFIGS, "full")
            and "frozen" not in change
        ):
            sweeps.setdefault((job.domain, change), {})[job._replace(scheme=config)] = (
                loss
            )
    for (domain, change), done in sweeps.items():
        start = {job: loss for job, loss in every.items() if job[:2] == (domain, START)}
        yield Sweep(
            group,
            f"{domain}, {change}".removesuffix(", "),
            domain,
            start | done,
            partial(by_law, domain),
        )


def other_optimizers() -> Iterator[Sweep]:
    """Adam and its variants of law_check.jsonl's first sweep, at alpha = rank."""
    every, domain = read(RESULTS / "law_check.jsonl"), "image_generation"
    mine = {
        job._replace(domain=domain): loss
        for job, loss in every.items()
        if job.domain != domain
    }
    for name in ("AdamW", "Lion", "schedule-free AdamW"):
        done = {
            job
            if job.scheme == START
            else job._replace(scheme=next(iter(CONFIGS))): loss
            for job, loss in mine.items()
            if job.scheme in (START, name)
        }
        yield Sweep(
            "Adam's variants, another network",
            f"{domain}, {name}",
            domain,
            done,
            partial(by_law, domain),
        )


def base_rates() -> Iterator[Sweep]:
    """One rate of two_rates.jsonl. Base rates are those of rank 16, which the law with 8 tokens moved to the run's."""
    every, config = read(RESULTS / "two_rates.jsonl"), next(iter(CONFIGS))
    for domain, start in STARTS.items():
        done: dict[Job, float | None] = {Job(domain, START, FULL, 0.0, 0): start}
        for job, loss in every.items():
            if job[:2] == (domain, "one rate"):
                x = job.x + octaves(domain, config, job.rank, MuA(tokens=8.0))
                done[job._replace(scheme=config, x=x)] = loss
        yield Sweep(
            "moved by 8 tokens in the runs",
            domain,
            domain,
            done,
            partial(by_law, domain),
        )


def widths() -> Iterator[Sweep]:
    """Networks of other widths, from rank 16 to full finetuning."""
    for store in ("llama", "dit"):
        every = read(RESULTS / "width" / f"{store}.jsonl")
        for name in dict.fromkeys(job.domain for job in every):
            done = {job: loss for job, loss in every.items() if job.domain == name}
            move = partial(to_full, *WIDTHS[name])
            yield Sweep("other widths", name, name, done, move)


def to_full(mean: float, largest: float, config: str, law: Law) -> Shift:
    """To full finetuning in a network of a mean and a largest fan-in. From Init[A] the largest counts there."""
    at_b = config == list(CONFIGS)[-1]
    here = Reference(16, 16, init="B" if at_b else "A", fan_in=mean)
    there = Reference(method="full", fan_in=mean if at_b else largest)
    moved = math.log2(law.multiplier(there.as_factor(), here))
    return lambda a, b: moved


# --- the rule -------------------------------------------------------------------------------------------------------


def figures(
    moved: Sequence[Moved], by: str = "on_lines"
) -> dict[str, dict[str, float]]:
    """{way: {domain: its figure}}: the mean over columns of the mean over sources of the mean over moves."""
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for each in moved:
        if each.column in CHOOSING:
            found.setdefault((each.way, each.sweep), {}).setdefault(
                (each.column, each.source), []
            ).append(getattr(each, by))
    by_way: dict[str, dict[str, float]] = {}
    for (
        (
            way,
            domain,
        ),
        cells,
    ) in found.items():  # both sources are in every column, so they weigh the same
        by_way.setdefault(way, {})[domain] = statistics.fmean(
            map(statistics.fmean, cells.values())
        )
    return by_way


def least(of: Mapping[str, Mapping[str, float]], left_out: str | None = None) -> float:
    """The number of tokens with the least mean figure over domains, the largest of those that tie."""

    def mean(tokens: float) -> float:
        return round(100 * over_domains(of[default_of(tokens).name], left_out), 2)

    return min(sorted(TOKENS, reverse=True), key=mean)


def over_domains(by_domain: Mapping[str, float], left_out: str | None = None) -> float:
    return statistics.fmean(
        figure for domain, figure in by_domain.items() if domain != left_out
    )


def keeps_distance(of: Mapping[str, Mapping[str, float]], tokens: float) -> bool:
    """Whether the distance is supported: it lowers the mean over domains, and the mean without each domain."""
    near, far = (of[default_of(tokens, added).name] for added in (0.0, DISTANCE))
    return all(
        over_domains(far, left_out) < over_domains(near, left_out)
        for left_out in (None, *near)
    )


def scores(moved: Iterable[Moved], source: str) -> dict[tuple[str, str], Score]:
    """{(way, column): score} of moves whose rates come from a source."""
    mine = sorted((each for each in moved if each.source == source), key=cell_of)
    return {
        cell: score(each.regret for each in moves)
        for cell, moves in groupby(mine, cell_of)
    }


def cell_of(moved: Moved) -> tuple[str, str]:
    return moved.way, moved.column


def bar(of: Mapping[tuple[str, str], Score], way: Way) -> Iterator[tuple[str, str]]:
    """Every column and whether the bar holds there, in words."""
    for column in JUDGED:
        mine, others = (
            of[way.name, column],
            [of[other.name, column] for other in (ONE_RATE, PAPER)],
        )
        mean, high = (
            min(each.mean for each in others),
            min(each.high for each in others),
        )
        said = [
            f"{what} {percent(own)} against {percent(best)}"
            for what, own, best in (
                ("mean", mine.mean, mean),
                ("95th percentile", mine.high, high),
            )
            if own > best
        ]
        yield column, "does NOT hold: " + ", ".join(said) if said else "holds"


# --- the prior of a calibration -------------------------------------------------------------------------------------

STUDIES, BOOTSTRAPS = 20, 10_000  # of every surface and plan


class Simulation(NamedTuple):
    """Mean regret of simulated calibrations with today's prior and with another, and the interval of the difference."""

    today: float
    other: float
    low: float
    high: float

    @property
    def worse(self) -> bool:
        return self.low > 0.0


def priors(tokens: float) -> dict[str, Simulation]:
    """Simulate with both priors: LoRA's ranks, and full finetuning."""
    laws = MuA(tokens=8.0), MuA(tokens=tokens)
    regrets: dict[str, dict[str, list[tuple[float, ...]]]] = {"LoRA": {}, "full": {}}
    with warnings.catch_warnings():
        # extrapolations are asked for on purpose
        warnings.simplefilter("ignore", RankAwareWarning)
        for index, on in enumerate(study_surfaces()):
            for plan in PLANS:
                for draw in range(STUDIES):
                    both = [
                        losses_of(on, calibrated(on, plan, (index, draw), law))
                        for law in laws
                    ]
                    for what, pairs in regrets.items():
                        ranks = on.ranks if what == "LoRA" else [FULL]
                        pairs.setdefault(on.domain, []).extend(
                            tuple(each[rank] for each in both) for rank in ranks
                        )
    return {what: compared(by_domain) for what, by_domain in regrets.items()}


def losses_of(on: Surface, recipe: Recipe) -> dict[int, float]:
    """Regret of a recipe's rates, by rank."""
    return {
        rank: on.mean[rank](rate_of(recipe, on, rank)[0]) for rank in (*on.ranks, FULL)
    }


def compared(by_domain: Mapping[str, Sequence[tuple[float, ...]]]) -> Simulation:
    today, other = np.array([np.mean(pairs, axis=0) for pairs in by_domain.values()]).T
    drawn = np.random.default_rng(0).integers(len(today), size=(BOOTSTRAPS, len(today)))
    low, high = np.quantile((other - today)[drawn].mean(axis=1), (0.025, 0.975))
    return Simulation(float(today.mean()), float(other.mean()), float(low), float(high))


def said_of_prior(tokens: float, of: Mapping[str, Simulation]) -> str:
    """What the simulation says about the prior."""
    against = [what for what, found in of.items() if found.worse]
    said = [
        f"{what} {number(100 * found.today, 2)} % with 8 tokens, {number(100 * found.other, 2)} % with {tokens:g} "
        f"(difference {number(100 * (found.other - found.today), 2, sign=True)} points, 95 % interval "
        f"{number(100 * found.low, 2, sign=True)} to {number(100 * found.high, 2, sign=True)})"
        for what, found in of.items()
    ]
    word = "speaks against" if against else "does not speak against"
    return f"As the prior of a calibration, simulated: {'; '.join(said)}. This {word} {default_of(tokens).name} there."


# --- the page -------------------------------------------------------------------------------------------------------

SCORED = "Mean / 95th percentile / share above 5 %, all in %. A diverged run counts as 500 %."
IN_LOSS = (
    "Octaves: |log2(moved rate / best rate found there)|, median. Loss: what the moved rate loses, as a share of the "
    "lowest loss, on straight lines between the rates tried."
)


@click.command()
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path)
)
def main(files: tuple[Path, ...]) -> None:
    """Apply the rule, make the checks, and write results/default_law.md."""
    on = machine(1)
    inside = [each for sweep in study() for each in moves(sweep)]
    by_way = figures(inside)
    tokens = least(by_way)
    distance = keeps_distance(by_way, tokens)
    shown = (ONE_RATE, PAPER, TODAY, default_of(tokens), default_of(tokens, DISTANCE))
    beyond = [
        each
        for sweep in outside()
        for each in moves(sweep, tuple(dict.fromkeys(shown)))
    ]
    simulated = priors(tokens)
    in_loss = [row for path in files for row in rows_of(path, shown)]
    parts = [
        "# The default law",
        verdict(by_way, tokens, distance),
        by_spline(figures(inside, "regret"), tokens),
        said_of_prior(tokens, simulated),
        (__doc__ or "").partition("default_law.md\n")[2].strip(),
        block(
            "The figure of each candidate, %",
            ["way", "mean", *STUDY],
            list(figure_rows(by_way)),
        ),
        block(
            "The same by the spline",
            ["way", "mean", *STUDY],
            list(figure_rows(figures(inside, "regret"))),
        ),
        block("The folds", FOLDS, list(fold_rows(by_way))),
        *(
            in_columns(f"The study, rates from {source}", scores(inside, source), WAYS)
            for source in SOURCES
        ),
        SCORED,
        block(
            "The bar", ["way", "column", *SOURCES], list(bar_rows(inside, shown[-2:]))
        ),
        *outside_tables(beyond, shown),
        block(
            "Published sweeps, in loss",
            list(in_loss[0]),
            [[*row.values()] for row in in_loss],
        ),
        IN_LOSS,
        made_on(on),
    ]
    (RESULTS / "default_law.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts))


SOURCES = (ALL_SEEDS, ONE_SEED)
FOLDS = [
    "left out",
    "tokens",
    "its figure there, %",
    "8 tokens",
    "the paper's law",
    "one rate",
    "× .9 lowers the rest",
]


def verdict(
    by_way: Mapping[str, Mapping[str, float]], tokens: float, distance: bool
) -> str:
    """What the rule names, with its figures."""
    near, far = (
        over_domains(by_way[default_of(tokens, added).name])
        for added in (0.0, DISTANCE)
    )
    others = ", ".join(
        f"{way.name} {number(100 * over_domains(by_way[way.name]), 2)} %"
        for way in map(default_of, TOKENS)
        if way != default_of(tokens)
    )
    said = "supports" if distance else "does not support"
    return (
        f"The rule names **{default_of(tokens).name}**: a mean figure of {number(100 * near, 2)} % ({others}). It "
        f"{said} the distance: with × .9 the figure is {number(100 * far, 2)} %."
    )


def by_spline(by_way: Mapping[str, Mapping[str, float]], tokens: float) -> str:
    """What the rule would name by the spline, with its figures."""
    named = least(by_way)
    figured = ", ".join(
        f"{way.name} {number(100 * over_domains(by_way[way.name]), 2)} %"
        for way in dict.fromkeys((default_of(tokens), default_of(named), TODAY))
    )
    said = "support" if keeps_distance(by_way, named) else "not support"
    return f"By the spline it would name {default_of(named).name} ({figured}), and {said} the distance."


def figure_rows(by_way: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    for way, by_domain in by_way.items():
        yield [
            way,
            number(100 * over_domains(by_domain), 2),
            *(number(100 * by_domain[name], 2) for name in STUDY),
        ]


def fold_rows(by_way: Mapping[str, Mapping[str, float]]) -> Iterator[list[str]]:
    tokens = least(by_way)
    near, far = (by_way[default_of(tokens, added).name] for added in (0.0, DISTANCE))
    for domain in STUDY:
        own = least(by_way, domain)
        ways = (default_of(own), TODAY, PAPER, ONE_RATE)
        lower = over_domains(far, domain) < over_domains(near, domain)
        yield [
            domain,
            f"{own:g}",
            *(number(100 * by_way[way.name][domain], 2) for way in ways),
            "yes" if lower else "no",
        ]


def in_columns(
    title: str, of: Mapping[tuple[str, str], Score], ways: Sequence[Way]
) -> str:
    """A table of scores, a column of the study each."""
    columns = [
        column
        for column in (FOLLOWS, KEPT, RS, AT_B, FROM_A, FROM_B)
        if (ways[0].name, column) in of
    ]
    heads = [
        "way",
        *(f"{column} ({of[ways[0].name, column].count})" for column in columns),
    ]
    return block(
        title,
        heads,
        [
            [way.name, *(of[way.name, column].words(2) for column in columns)]
            for way in ways
        ],
    )


def bar_rows(moved: Sequence[Moved], ways: Sequence[Way]) -> Iterator[list[str]]:
    """Whether the bar holds, without the distance and with it."""
    by_source = [scores(moved, source) for source in SOURCES]
    for way in ways:
        held = [dict(bar(of, way)) for of in by_source]
        yield from (
            [way.name, column, *(each[column] for each in held)] for column in JUDGED
        )


def outside_tables(moved: Sequence[Moved], ways: Sequence[Way]) -> Iterator[str]:
    """All sweeps outside the study together, then each group."""
    for group in (None, *dict.fromkeys(each.group for each in moved)):
        mine = [each for each in moved if group in (None, each.group)]
        names = ", ".join(dict.fromkeys(each.sweep for each in mine))
        yield in_columns(
            f"Outside the study: {group or 'all of it'}", scores(mine, ALL_SEEDS), ways
        )
        if group:
            yield f"Sweeps: {names}."


# --- published sweeps -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AtDistance(Law):
    """A law whose moved rates keep the distance, to score it on a sweep. The package has it where a rate is used."""

    law: Law
    name = "at a distance"

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        return replace(self, law=self.law.bind(optimizer_class, settings))

    def multiplier(self, factor: Any, reference: Any) -> float:
        moved = self.law.multiplier(factor, reference)
        return moved if moved == 1.0 else moved * 2.0**DISTANCE


def rows_of(path: Path, ways: Sequence[Way]) -> Iterator[dict[str, Any]]:
    """Every way's moves on a published file, in octaves and in loss."""
    source = published.SOURCES[path.name]
    for way in ways:
        law = way.law or "constant"
        if way.added and way.law is not None:
            law = AtDistance(way.law)
        (found,) = bench_law(source.read(path), [law], alpha=32.0)
        lost = found.lost
        yield {
            "sweep": path.name,
            "way": way.name,
            "moves": str(len(found.moves)),
            "octaves": number(found.median),
            "loss: median, %": number(100 * statistics.median(lost), 3),
            "mean, %": number(100 * statistics.fmean(lost), 3),
            "95th, %": number(100 * float(np.quantile(lost, 0.95)), 3),
            "worst, %": number(100 * max(lost), 3),
        }


if __name__ == "__main__":
    main()
