"""Regret: the share of the attainable gain that a rate loses which was best at one rank and is moved to another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from calibration.make_recipes import paths_of
from calibration.searches import rate_of
from study.configurations import CONFIGS, LORAPLUS, start_of
from study.domains import get_domain
from study.grids import FULL, Cell, Losses, curve, curves_by_seed, lowest
from study.loss_curves import loss_between
from study.moving import Shift, by_inverse_rank, by_law, kept
from study.optima import domains_in, optimum, ranks_in, seeds_in, tried_rates

from rankaware_optim import Falling, Law, MuA, Recipe

LAWS: dict[str, Law] = {"the paper's law": MuA(tokens=None), "µA at 8 tokens": MuA(), "µA, falling at B": Falling()}
FLOOR = "noise floor"  # listed with the ways: what a sweep's own choice of the rate loses, by rank and in full


class Moved(NamedTuple):
    """What a way of moving a rate loses: over all ordered pairs of ranks, and from every rank to full finetuning."""

    domain: str
    config: str
    way: str
    lora: tuple[float, ...]
    full: tuple[float, ...]


def moves(done: Losses, laws: Mapping[str, Law] = LAWS) -> list[Moved]:
    """The noise floor, then every way, in every domain and configuration that was swept at two ranks."""
    return [each for domain in domains_in(done) for each in moves_in(done, domain, laws)]


def moves_in(done: Losses, domain: str, laws: Mapping[str, Law]) -> Iterator[Moved]:
    full = (domain, "full", FULL)
    has_full = bool(ranks_in(done, domain, "full"))
    for config in CONFIGS:
        floors = [noise_floor(done, (domain, config, rank)) for rank in ranks_in(done, domain, config)]
        if len(floors) > 1:
            both = (floors, [noise_floor(done, full)] if has_full else [])
            yield Moved(domain, config, FLOOR, *(tuple(x for x in each if x is not None) for each in both))
        lost_by: dict[str, tuple[list[float], list[float]]] = {}
        for way, scheme, shift in ways(done, domain, config, laws):
            sources = {rank: best_at(done, (domain, scheme, rank)) for rank in ranks_in(done, domain, scheme)}
            pairs = [(a, b) for a in sources for b in sources if a != b]
            lora, whole = lost_by.setdefault(way, ([], []))
            lora += [lost(done, (domain, scheme, b), (domain, config, b), sources[a] + shift(a, b)) for a, b in pairs]
            whole += [lost(done, full, full, x + shift(a, FULL)) for a, x in sources.items() if has_full]
        for way, (lora, whole) in lost_by.items():
            if lora:
                yield Moved(domain, config, way, tuple(lora), tuple(whole))


def ways(done: Losses, domain: str, config: str, laws: Mapping[str, Law]) -> Iterator[tuple[str, str, Shift]]:
    """Name, the scheme that is trained, and how it moves a rate. A name may come more than once: all count."""
    for name, law in laws.items():
        yield name, config, by_law(domain, config, law)
    for path in paths_of(domain, config):  # a search seed each; the recipe's rate at the target, whatever the source
        yield "calibrated recipe", config, by_recipe(done, (domain, config), Recipe.load(path))
    yield "one rate everywhere", config, kept
    yield "1/r", config, by_inverse_rank(domain)
    full = optimum(done, (domain, "full", FULL)).x
    if full is not None:  # from whatever rate to ten times full finetuning's own
        ten = {True: full + math.log2(10), False: full}
        yield "ten times full", config, lambda a, b: ten[b != FULL] - best_at(done, (domain, config, a))
    plus = config + LORAPLUS
    yield "LoRA+ 16", plus, kept
    yield "LoRA+ 16, moved", plus, by_law(domain, config, Falling())
    if full is not None:  # each rank's own, as if it were tuned there
        yield "LoRA+ 16, own best", plus, own_best(done, (domain, plus), full)


def by_recipe(done: Losses, of: tuple[str, str], recipe: Recipe) -> Shift:
    """From a rank's best rate to the recipe's rate at another rank, or for full finetuning."""
    domain, config = of
    rates = {rank: math.log2(rate_of(recipe, config, rank)[0]) for rank in (*get_domain(domain).ranks_swept, FULL)}
    return lambda a, b: rates[b] - best_at(done, (domain, config, a))


def own_best(done: Losses, of: tuple[str, str], full: float) -> Shift:
    """From a rank's best rate to another's, or to full finetuning's."""
    return lambda a, b: (full if b == FULL else best_at(done, (*of, b))) - best_at(done, (*of, a))


def best_at(done: Losses, cell: Cell) -> float:
    """log2 of a cell's best rate, the grid's where the vertex lies outside."""
    found = optimum(done, cell).x
    return lowest(curve(done, cell, seeds_in(done, *cell[:2]))) if found is None else found


def lost(done: Losses, trained: Cell, best: Cell, x: float) -> float:
    """Regret at 2^x; beyond the grid of all seeds by the coarse pass of one."""
    seeds = seeds_in(done, *trained[:2])
    tried, at_best = tried_rates(done, trained, seeds), min(curve(done, best, seeds).values())
    return share_lost(tried, at_best, start_of(trained[0], done), x)


def share_lost(tried: Mapping[float, float], at_best: float, start: float, x: float) -> float:
    """The share of the gain lost at 2^x, on straight lines between the rates tried, beyond them at the last."""
    there = loss_between(tried, min(max(x, min(tried)), max(tried)))
    return (there - at_best) / (start - at_best)


def noise_floor(done: Losses, cell: Cell) -> float | None:
    """Regret on a seed of the rate that all other seeds choose, the mean over seeds; None for one seed.

    What a sweep's own choice loses on runs that it has not seen: a regret below it says nothing.
    """
    curves, start = curves_by_seed(done, cell, seeds_in(done, *cell[:2])), start_of(cell[0], done)
    if len(curves) < 2:
        return None
    regrets = []
    for left_out in curves:
        others = {x: sum(each[x] for each in curves if each is not left_out) for x in left_out}
        regrets.append(share_lost(left_out, min(left_out.values()), start, lowest(others)))
    return statistics.fmean(regrets)


def pooled(moved: Sequence[Moved], way: str) -> dict[str, tuple[list[float], list[float]]]:
    """A way's regrets in every domain, over its configurations: from rank to rank, and to full finetuning."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for each in moved:
        if each.way == way:
            lora, full = found.setdefault(each.domain, ([], []))
            lora.extend(each.lora)
            full.extend(each.full)
    return found
