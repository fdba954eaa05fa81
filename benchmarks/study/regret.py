"""Regret: the share of the attainable gain that a rate loses which was best at one rank and is moved to another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from calibration.make_recipes import paths_of, rate_of
from recording import number
from study.configurations import CONFIGS, LORAPLUS, start_of
from study.domains import get_domain
from study.grids import FULL, Cell, Losses, all_means, curve, curves_by_seed, lowest
from study.loss_curves import regret_between
from study.moving import Shift, by_inverse_rank, by_law, kept
from study.optima import domains_in, optimum, ranks_in, seeds_in, tried_rates

from rankaware_optim import Falling, Law, MuA, Recipe

DEFAULT = "µA, falling at B"
LAWS: dict[str, Law] = {
    "the paper's law": MuA(tokens=None),
    "µA": MuA(),
    DEFAULT: Falling(),
}
ONE_SEED = (
    f"{DEFAULT}, from one seed"  # the rate that is moved is the best of each seed alone
)
RECIPE = "calibrated recipe"
FLOOR = "noise floor"  # listed with the ways: what a sweep's own choice of the rate loses, by rank and in full


LARGE = 0.05  # a regret above which moves are counted


class Score(NamedTuple):
    """Regrets: how many, their mean, their 95th percentile, and the share of them above 5 %."""

    count: int
    mean: float
    high: float
    large: float

    def words(self) -> str:
        """Mean / 95th percentile / share above 5 %, all in %."""
        mean, high = (number(100 * share, 1) for share in (self.mean, self.high))
        return f"{mean} / {high} / {number(100 * self.large, 0)}"


def score(regrets: Iterable[float]) -> Score:
    every = list(regrets)
    high = (
        statistics.quantiles(every, n=20, method="inclusive")[-1]
        if len(every) > 1
        else every[0]
    )
    return Score(
        len(every),
        statistics.fmean(every),
        high,
        statistics.fmean(each > LARGE for each in every),
    )


class Moved(NamedTuple):
    """What a way of moving a rate loses: over all ordered pairs of ranks, and from every rank to full finetuning.

    `worst` and `worst_full` name the moves that lose most, as "4 → 64".
    """

    domain: str
    config: str
    way: str
    lora: tuple[float, ...]
    full: tuple[float, ...]
    worst: str = ""
    worst_full: str = ""


def moves(done: Losses, laws: Mapping[str, Law] = LAWS) -> list[Moved]:
    """The noise floor, then every way, in every domain and configuration that was swept at two ranks.

    Args:
        done: the runs on file.
        laws: laws to compare, by name.
    """
    return [
        each for domain in domains_in(done) for each in moves_in(done, domain, laws)
    ]


def moves_in(done: Losses, domain: str, laws: Mapping[str, Law]) -> Iterator[Moved]:
    has_full = bool(ranks_in(done, domain, "full"))
    for config in CONFIGS:
        floors = [
            noise_floor(done, (domain, config, rank))
            for rank in ranks_in(done, domain, config)
        ]
        if len(floors) > 1:
            both = (
                floors,
                [noise_floor(done, (domain, "full", FULL))] if has_full else [],
            )
            yield Moved(
                domain,
                config,
                FLOOR,
                *(tuple(x for x in each if x is not None) for each in both),
            )
        lost_by: dict[str, tuple[list[Named], list[Named]]] = {}
        for target in targets(done, domain, config, laws):
            lora, whole = lost_by.setdefault(target.way, ([], []))
            mine = whole if target.trained[2] == FULL else lora
            mine.append((target.lost(done), target.name))
        for way, named in lost_by.items():
            if named[0]:
                worst = (max(each, default=(0.0, ""))[1] for each in named)
                yield Moved(
                    domain,
                    config,
                    way,
                    *(tuple(regret for regret, _ in each) for each in named),
                    *worst,
                )


Named = tuple[float, str]  # a regret, and the move that has it


class Target(NamedTuple):
    """A moved rate: its way, the cell that is trained with it, the one whose best run counts, log2 of it, its name."""

    way: str
    trained: Cell
    best: Cell
    x: float
    name: str

    def lost(self, done: Losses) -> float:
        """Its regret."""
        return lost(done, self.trained, self.best, self.x)


def targets(
    done: Losses, domain: str, config: str, laws: Mapping[str, Law]
) -> Iterator[Target]:
    """Every move of a configuration by every way: to all other ranks, and to full finetuning where it was swept."""
    full = (domain, "full", FULL)
    has_full = bool(ranks_in(done, domain, "full"))
    for way, scheme, shift in ways(done, domain, config, laws):
        ranks = ranks_in(done, domain, scheme)
        for a in ranks:
            for x in sources(done, (domain, scheme, a), way):
                for b in ranks:
                    if a != b:
                        cells = (domain, scheme, b), (domain, config, b)
                        yield Target(way, *cells, x + shift(a, b), f"{a} → {b}")
                if has_full:
                    yield Target(way, full, full, x + shift(a, FULL), f"{a} → full")


def sources(done: Losses, cell: Cell, way: str) -> list[float]:
    """log2 of the rates that a way moves: the best of all seeds, or of each seed alone."""
    return best_by_seed(done, cell) if way == ONE_SEED else [best_at(done, cell)]


def ways(
    done: Losses, domain: str, config: str, laws: Mapping[str, Law]
) -> Iterator[tuple[str, str, Shift]]:
    """Name, the scheme that is trained, and how it moves a rate. A name may come more than once: all count."""
    for name, law in laws.items():
        yield name, config, by_law(domain, config, law)
    yield ONE_SEED, config, by_law(domain, config, LAWS[DEFAULT])
    # a search seed each; the recipe's rate at the target, whatever the source
    for path in paths_of(domain, config):
        yield RECIPE, config, by_recipe(done, (domain, config), Recipe.load(path))
    yield "one rate everywhere", config, kept
    yield "1/r", config, by_inverse_rank(domain)
    full = optimum(done, (domain, "full", FULL)).x
    if full is not None:  # from whatever rate to ten times full finetuning's own
        ten = {True: full + math.log2(10), False: full}
        yield (
            "ten times full",
            config,
            lambda a, b: ten[b != FULL] - best_at(done, (domain, config, a)),
        )
    plus = config + LORAPLUS
    yield "LoRA+ 16", plus, kept
    yield "LoRA+ 16, moved", plus, by_law(domain, config, Falling())
    if full is not None:  # each rank's own, as if it were tuned there
        yield "LoRA+ 16, own best", plus, own_best(done, (domain, plus), full)


def by_recipe(done: Losses, of: tuple[str, str], recipe: Recipe) -> Shift:
    """From a rank's best rate to the recipe's rate at another rank, or for full finetuning."""
    domain, config = of
    rates = {
        rank: rate_of(recipe, config, rank)[0]
        for rank in (*get_domain(domain).ranks_swept, FULL)
    }
    return lambda a, b: rates[b] - best_at(done, (domain, config, a))


def own_best(done: Losses, of: tuple[str, str], full: float) -> Shift:
    """From a rank's best rate to another's, or to full finetuning's."""
    return lambda a, b: (
        (full if b == FULL else best_at(done, (*of, b))) - best_at(done, (*of, a))
    )


def best_at(done: Losses, cell: Cell) -> float:
    """log2 of a cell's best rate, the grid's where the vertex lies outside."""
    found = optimum(done, cell).x
    return (
        lowest(curve(done, cell, seeds_in(done, *cell[:2]))) if found is None else found
    )


def best_by_seed(done: Losses, cell: Cell) -> list[float]:
    """log2 of the best rate of each seed alone, its grid's where the vertex lies outside."""
    alone = curves_by_seed(done, cell, seeds_in(done, *cell[:2]))
    vertices = optimum(done, cell).by_seed
    return [
        lowest(each) if x is None else x
        for x, each in zip(vertices, alone, strict=True)
    ]


def lost(done: Losses, trained: Cell, best: Cell, x: float) -> float:
    """Regret at 2^x: what it loses beyond the lowest loss of any rate that was run there.

    Beyond the rates that all seeds have run it goes by the coarse pass of one.
    """
    tried = tried_rates(done, trained, seeds_in(done, *trained[:2]))
    return share_lost(tried, *best_and_start(done, trained, best), x)


def best_and_start(done: Losses, trained: Cell, best: Cell) -> tuple[float, float]:
    """The lowest mean loss of `best` on the seeds of `trained`, and the loss before training."""
    means = all_means(done, best, seeds_in(done, *trained[:2]))
    return min(means.values()), start_of(best[0], done)


def share_lost(
    tried: Mapping[float, float], at_best: float, start: float, x: float
) -> float:
    """The share of the gain lost at 2^x, by a monotone spline between the rates tried, beyond them at the last.

    A diverged run counts as `DIVERGED`.
    """
    return regret_between(
        {at: (loss - at_best) / (start - at_best) for at, loss in tried.items()}, x
    )


def noise_floor(done: Losses, cell: Cell) -> float | None:
    """Regret on a seed of the rate that all other seeds choose, the mean over seeds; None for one seed.

    What a sweep's own choice loses on runs that it has not seen: a regret below it says nothing.
    """
    seeds = seeds_in(done, *cell[:2])
    if seeds < 2:
        return None
    start = start_of(cell[0], done)
    swept = curves_by_seed(done, cell, seeds)
    every = curves_by_seed(done, cell, seeds, all_means)
    regrets = []
    for seed, tried in enumerate(every):
        others = [each for at, each in enumerate(swept) if at != seed]
        chosen = lowest({x: sum(each[x] for each in others) for x in swept[seed]})
        regrets.append(share_lost(tried, min(tried.values()), start, chosen))
    return statistics.fmean(regrets)


def pooled(
    moved: Sequence[Moved], way: str
) -> dict[str, tuple[list[float], list[float]]]:
    """A way's regrets in every domain, over its configurations: from rank to rank, and to full finetuning."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for each in moved:
        if each.way == way:
            lora, full = found.setdefault(each.domain, ([], []))
            lora.extend(each.lora)
            full.extend(each.full)
    return found
