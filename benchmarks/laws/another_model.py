"""The same task on another model: how far off is the best rate of one published model for another one?

At each rank that two models have with a best rate inside their grids, the best rate of the one is taken to the other, as
it is or by a rule, and compared with the best rate there. All are of one task, batch, number of steps and alpha.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence

from internals import PUBLISHED
from laws.tinker import HIDDEN, parameters, power_of
from recording import block, number
from study.loss_curves import between, vertex_of

from rankaware_optim import Falling, MuA, Reference
from rankaware_optim.laws import checked_multiplier

Curves = Mapping[tuple[str, int], Mapping[float, float]]
Rule = Callable[[str], float | None]  # octaves of a model's rate, up to a constant
SUGGESTED = MuA(tokens=8.0)  # the law of `suggest_lr`


def kept(model: str) -> float:
    return 0.0


def by_width(model: str) -> float:
    """The default law, from one width to another."""
    at = Reference(PUBLISHED.rank, PUBLISHED.alpha, fan_in=HIDDEN[model])
    return math.log2(checked_multiplier(Falling(), at.as_factor(), PUBLISHED))


def by_parameters(model: str) -> float:
    """The cookbook's `get_lora_lr_multiplier`: one over the root of the number of parameters."""
    return -math.log2(parameters(model)) / 2


def by_family(model: str) -> float | None:
    """The cookbook's `get_lr`: a power of the hidden size, fitted for Llama and for Qwen."""
    power = power_of(model)
    return None if power is None else power * math.log2(2000 / HIDDEN[model])


def kept_in_families(model: str) -> float | None:
    """Kept, for the models of `by_family`."""
    return None if by_family(model) is None else 0.0


RULES: dict[str, Rule] = {
    "kept": kept,
    "the default law, by the hidden size": by_width,
    "1/√parameters (the cookbook's `get_lora_lr_multiplier`)": by_parameters,
    "the cookbook's `get_lr`, Llama and Qwen": by_family,
    "kept, Llama and Qwen": kept_in_families,
}


def table(curves: Curves) -> str:
    """The errors of every rule, and how best rates spread between and within models."""
    found = {
        cell: best
        for cell, curve in curves.items()
        if len(curve) > 1 and (best := vertex_of(curve)) is not None
    }
    rows = []
    for name, rule in RULES.items():
        errors, lost = moved(found, curves, rule)
        rows.append(
            [
                name,
                number(statistics.median(map(abs, errors))),
                number(math.sqrt(statistics.fmean(e * e for e in errors))),
                number(100 * statistics.fmean(lost)),
                f"{len(errors)}",
            ]
        )
    heads = ["rate", "median, octaves", "rms, octaves", "loss lost, mean, %", "moves"]
    shown = block("One task, another model", heads, rows)
    return f"{shown}\n\n{spreads(found)}"


def moved(
    found: Mapping[tuple[str, int], float], curves: Curves, rule: Rule
) -> tuple[list[float], list[float]]:
    """Octaves above the best rate of the target, and the share of its lowest loss that is lost, of every move."""
    errors, lost = [], []
    for (source, rank), (target, same) in itertools.permutations(found, 2):
        ends = rule(source), rule(target)
        if rank != same or None in ends:
            continue
        x = found[source, rank] + (ends[1] or 0.0) - (ends[0] or 0.0)
        curve = curves[target, rank]
        least = min(curve.values())
        errors.append(x - found[target, rank])
        lost.append((between(curve, x) - least) / least)
    return errors, lost


def spreads(found: Mapping[tuple[str, int], float]) -> str:
    """The standard deviations of best rates between models and within one, moved by the law to one rank."""
    by_model: dict[str, list[float]] = {}
    for (model, rank), best in found.items():
        at = Reference(rank, PUBLISHED.alpha, fan_in=HIDDEN[model])
        octaves = math.log2(checked_multiplier(SUGGESTED, at.as_factor(), PUBLISHED))
        by_model.setdefault(model, []).append(best - octaves)
    return (
        f"Moved by µA of 8 tokens to rank 16 and one width, the best rates of {len(by_model)} models spread by "
        f"{number(between_models(by_model.values()))} octaves between models (standard deviation of their means) and by "
        f"{number(within_models(by_model.values()))} within a model over its ranks."
    )


def between_models(groups: Collection[Sequence[float]]) -> float:
    return statistics.stdev(statistics.fmean(each) for each in groups)


def within_models(groups: Collection[Sequence[float]]) -> float:
    squares = sum(
        (best - statistics.fmean(each)) ** 2 for each in groups for best in each
    )
    return math.sqrt(squares / sum(len(each) - 1 for each in groups))
