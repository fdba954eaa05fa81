"""Which form of a law generalises: choose its constants on all domains of the study but one, and score it on that one.

Each domain is scored with the constants that are best on all others. Every domain and every use has the same weight.
There are three criteria for "best": the least mean regret, with each move capped at 100 %, and the least mean square
error in octaves by either estimator of a best rate, the vertex and the cliff (`study/optima.py`). For regret, the rate
that is moved is the vertex.

The rule: a form's figure is its worst regret in any use beyond the noise floor of the cell where the rate lands (the
floor is 0 in cells of one seed, which have none). The form with the least figure wins. Forms whose rms error is at most
.1 octaves above the winner's, by each estimator, tie with it. Of these the form with the fewest chosen constants wins,
then the one with the least figure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any, NamedTuple

import click
from recording import RESULTS, block, machine, made_on, percent
from study.configurations import CONFIGS
from study.domains import STUDY, get_domain
from study.grids import FULL, Losses
from study.optima import ESTIMATORS, ranks_in, seeds_in, tried_rates
from study.regret import best_and_start, noise_floor, share_lost
from study.runs_on_file import read
from study.suite import STORES, finished

VERTEX, _ = ESTIMATORS


class Site(NamedTuple):
    """The configuration of a rate: init "A", "B" or "full", rank, scaling and fan-in."""

    init: str
    rank: float
    scaling: float
    fan_in: float


USES = ("between ranks", "to full finetuning")
CRITERIA = ("regret", *(f"octaves of the {estimator}" for estimator in ESTIMATORS))
CAP, TIE = 1.0, 0.1  # share of the gain; octaves
Constants = Mapping[str, float]


# --- forms ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Form:
    """A way to move log2 of a rate between two sites, with the values from which its constants are chosen.

    Args:
        name: the form's name in tables.
        move: (source site, target site, log2 rate, constants) -> log2 of the moved rate.
        grid: the values that each constant may take, by name.
        judged: whether the form takes part in the rule.
    """

    name: str
    move: Callable[[Site, Site, float, Constants], float]
    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    judged: bool = True

    def choices(self) -> list[Constants]:
        return [
            dict(zip(self.grid, values, strict=True))
            for values in product(*self.grid.values())
        ]

    @property
    def free(self) -> int:
        """How many constants are chosen."""
        return sum(len(values) > 1 for values in self.grid.values())


def by_level(
    level: Callable[[Site, Constants], float], a: Site, b: Site, x: float, of: Constants
) -> float:
    """Add the difference of two levels to log2 rate `x`, and the constant "o" from LoRA to full finetuning."""
    offset = of.get("o", 0.0) * ((b.init == "full") - (a.init == "full"))
    return x + level(b, of) - level(a, of) + offset


def eighths(low: float, high: float) -> list[float]:
    return [low + step / 8 for step in range(round((high - low) * 8) + 1)]


def halves(low: float, high: float) -> list[float]:
    """Powers of two, half an octave apart."""
    return [2.0 ** (low + step / 2) for step in range(round((high - low) * 2) + 1)]


# --- what the study found -------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A cell of the study (configuration and rank): its site, its best rates, and the losses that score a rate.

    Args:
        scheme: the configuration's name, or "full".
        site: where the law is evaluated, with the mean fan-in.
        found: log2 of the best rate, by estimator.
        tried: mean loss by log2 rate.
        lowest: the lowest mean loss.
        start: the loss before training.
        floor: the noise floor of regret; None with one seed.
    """

    scheme: str
    site: Site
    found: Mapping[str, float]
    tried: Mapping[float, float]
    lowest: float
    start: float
    floor: float | None

    def regret(self, x: float) -> float:
        return share_lost(self.tried, self.lowest, self.start, x)


def stored(schemes: Sequence[str]) -> dict[str, list[Place]]:
    """The places of each domain that has complete grids in all these configurations and in full finetuning."""
    found = {}
    for domain in STUDY:
        done = finished(read(STORES / f"{domain}.jsonl"), "full")
        if all(ranks_in(done, domain, scheme) for scheme in (*schemes, "full")):
            found[domain] = [
                place
                for scheme in (*schemes, "full")
                for place in places_of(done, domain, scheme)
            ]
    return found


def places_of(done: Losses, domain: str, scheme: str) -> Iterator[Place]:
    """The place of every rank in a configuration, or that of full finetuning."""
    mean, _ = get_domain(domain).widths
    for rank in (FULL,) if scheme == "full" else ranks_in(done, domain, scheme):
        cell, seeds = (domain, scheme, rank), seeds_in(done, domain, scheme)
        site = Site("full", 1, 1.0, mean)
        if rank:
            config = CONFIGS[scheme]
            site = Site(config.init, rank, config.alpha(rank) / rank, mean)
        estimates = {
            name: x
            for name, by in ESTIMATORS.items()
            if (x := by(done, cell).x) is not None
        }
        tried, floor = tried_rates(done, cell, seeds), noise_floor(done, cell)
        ends = best_and_start(done, cell, cell)
        yield Place(scheme, site, estimates, tried, *ends, floor)


class Move(NamedTuple):
    """A best rate that a form moved from one place to another.

    Args:
        use: one of `USES`.
        off: error in octaves by estimator, positive if too high. Only estimators with a rate in both cells.
        regret: regret of the moved vertex, a share of the gain.
        beyond: the regret beyond the noise floor.
    """

    use: str
    off: Mapping[str, float]
    regret: float
    beyond: float


def moves(form: Form, of: Constants, places: Sequence[Place]) -> Iterator[Move]:
    """Move by all pairs of ranks in a configuration, and from every rank to full finetuning.

    Only between cells with a vertex inside the grid.
    """
    for a, b in permutations(places, 2):
        known = [name for name in a.found if name in b.found]
        if (
            a.scheme == "full"
            or b.scheme not in (a.scheme, "full")
            or VERTEX not in known
        ):
            continue
        moved = {name: form.move(a.site, b.site, a.found[name], of) for name in known}
        regret = b.regret(moved[VERTEX])
        off = {name: x - b.found[name] for name, x in moved.items()}
        yield Move(
            USES[b.site.init == "full"],
            off,
            regret,
            max(0.0, regret - (b.floor or 0.0)),
        )


# --- fits -----------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """A left-out domain: the constants chosen on the other domains, and its moves with these constants."""

    form: Form
    criterion: str
    domain: str
    constants: Constants
    moves: Sequence[Move]


def fits(form: Form, places: Mapping[str, Sequence[Place]]) -> Iterator[Fit]:
    """Leave each domain out in turn, by each criterion."""
    choices = form.choices()
    moved = {
        domain: [list(moves(form, of, each)) for of in choices]
        for domain, each in places.items()
    }
    for criterion in CRITERIA:
        costs = {
            domain: [cost(each, criterion) for each in moved[domain]]
            for domain in places
        }
        for domain in places:
            others = [costs[other] for other in places if other != domain]
            best = min(
                range(len(choices)), key=lambda i: sum(each[i] for each in others)
            )
            yield Fit(form, criterion, domain, choices[best], moved[domain][best])


def cost(moved: Sequence[Move], criterion: str) -> float:
    """The mean regret or mean square error of each use, summed over both uses."""
    by_use = [[move for move in moved if move.use == use] for use in USES]
    if criterion == "regret":
        return sum(
            statistics.fmean(min(move.regret, CAP) for move in each) for each in by_use
        )
    return sum(rms(each, criterion.split()[-1]) ** 2 for each in by_use)


def rms(moved: Sequence[Move], estimator: str) -> float:
    return math.sqrt(
        statistics.fmean(
            move.off[estimator] ** 2 for move in moved if estimator in move.off
        )
    )


class Score(NamedTuple):
    """Score of moves: rms octaves by each estimator, median and worst regret, worst regret beyond the noise floor."""

    vertex: float
    cliff: float
    median: float
    worst: float
    beyond: float

    def __str__(self) -> str:
        return f"{self.vertex:.2f} / {self.cliff:.2f}, {percent(self.median)}, {percent(self.worst)}"


def score(moved: Sequence[Move]) -> Score:
    regrets = [move.regret for move in moved]
    vertex, cliff = (rms(moved, estimator) for estimator in ESTIMATORS)
    return Score(
        vertex,
        cliff,
        statistics.median(regrets),
        max(regrets),
        max(move.beyond for move in moved),
    )


def scores(
    fitted: Sequence[Fit], criterion: str, use: str | None = None
) -> dict[Form, Score]:
    """Every form's score over all left-out domains, in one use or in both."""
    found: dict[Form, list[Move]] = {}
    for fit in fitted:
        if fit.criterion == criterion:
            found.setdefault(fit.form, []).extend(
                move for move in fit.moves if use in (None, move.use)
            )
    return {form: score(moved) for form, moved in found.items()}


def winner(scored: Mapping[Form, Score]) -> tuple[Form, list[Form]]:
    """The form that wins by the rule, and all forms that tie for it."""
    least = min(scored.values(), key=lambda each: each.beyond)
    tied = [
        form
        for form, each in scored.items()
        if each is least
        or (each.vertex <= least.vertex + TIE and each.cliff <= least.cliff + TIE)
    ]
    return min(tied, key=lambda form: (form.free, scored[form].beyond)), tied


def judged(scored: Mapping[Form, Score]) -> dict[Form, Score]:
    return {form: each for form, each in scored.items() if form.judged}


# --- the page -------------------------------------------------------------------------------------------------------


def write(
    page: str,
    title: str,
    text: str,
    verdict: str,
    places: Mapping[str, Any],
    fitted: Sequence[Fit],
) -> None:
    """Write results/<page>.md: verdict, `text` without its first line, tables."""
    on = machine(1)
    parts = [
        f"# {title}",
        verdict,
        text.partition("\n")[2].strip("\n"),
        *(
            block(
                f"All left-out domains, constants by {each}",
                HEADS,
                [*overview(fitted, each)],
            )
            for each in CRITERIA
        ),
        *(
            block(
                BY_DOMAIN.format(use.capitalize()),
                ["form", *places],
                [*by_domain(fitted, use)],
            )
            for use in USES
        ),
        *(
            block(
                f"Constants chosen without each domain, by {each}",
                ["form", *places],
                [*constants(fitted, each)],
            )
            for each in CRITERIA
        ),
        made_on(on),
    ]
    (RESULTS / f"{page}.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts))


HEADS = [
    "form",
    "constants chosen",
    *(
        f"{use}: {what}"
        for use in USES
        for what in ("rms octaves, vertex / cliff", "median regret", "worst")
    ),
    "worst beyond the floor",
]
BY_DOMAIN = "{}, by domain: rms octaves by vertex / cliff, median and worst regret, constants by regret"


def overview(fitted: Sequence[Fit], criterion: str) -> Iterator[list[str]]:
    by_use = [scores(fitted, criterion, use) for use in USES]
    for form, both in scores(fitted, criterion).items():
        cells = [
            [
                f"{each[form].vertex:.2f} / {each[form].cliff:.2f}",
                percent(each[form].median),
                percent(each[form].worst),
            ]
            for each in by_use
        ]
        yield [
            form.name,
            str(form.free) if form.judged else "not judged",
            *cells[0],
            *cells[1],
            percent(both.beyond),
        ]


def by_domain(fitted: Sequence[Fit], use: str) -> Iterator[list[str]]:
    for form in dict.fromkeys(fit.form for fit in fitted):
        found = [
            fit for fit in fitted if fit.form is form and fit.criterion == CRITERIA[0]
        ]
        yield [
            form.name,
            *(
                str(score([move for move in fit.moves if move.use == use]))
                for fit in found
            ),
        ]


def constants(fitted: Sequence[Fit], criterion: str) -> Iterator[list[str]]:
    for form in dict.fromkeys(fit.form for fit in fitted):
        if form.free:
            yield [
                form.name,
                *(
                    said(fit)
                    for fit in fitted
                    if fit.form is form and fit.criterion == criterion
                ),
            ]


def said(fit: Fit) -> str:
    return ", ".join(
        f"{name} {fit.constants[name]:.3g}"
        for name, values in fit.form.grid.items()
        if len(values) > 1
    )
