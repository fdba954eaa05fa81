"""What a picture of a recipe shows, as numbers: per rank its trials, the fitted curve, the rate with band and ceiling.

Two rooms draw it: `plots` by matplotlib, `report_page` as a page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ._recipe import Rate, Recipe, known_rate

__all__ = ["Arm", "Picture", "Point", "picture_of"]

Array = npt.NDArray[np.float64]

# The drift that trials of recipes without `trial.own_lr` ran along, by init: the prior's mean at that time.
_FORMER_DRIFT = {"A": 0.0, "B": -0.45}
_STEEPNESS = np.array([0.5, 1.0, 2.0, 3.0])  # a, per octave, as in the fit
_CURVATURE = np.geomspace(1e-3, 3.0, 30)  # k, in units of the scores' spread
_NOISE, _GAP_NOISE = 0.05, 0.3  # of a score, and of its gap to the best, in units of the spread
_MARGIN = 0.5  # octaves of rate left and right of what is drawn
_STEPS = 200  # of a curve


class Point(NamedTuple):
    """One trial: the rate its A factors or whole weights had, its score, its seed, and how it ended.

    fate: "finished", "diverged", or "pruned", which has no score: NaN.
    """

    rate: float
    value: float
    seed: int
    fate: str


@dataclass(frozen=True)
class Arm:
    """What was tried at one rank, None for full finetuning. rate: the recipe's, None where it would need an alpha.

    curve: (rate, score) along the bowl of the fit, its optimum where the recipe puts it. by_base: the points stand at
    their base rates, since the rates they ran at are not known.
    """

    rank: int | None
    points: tuple[Point, ...]
    rate: Rate | None
    curve: tuple[tuple[float, float], ...] = ()
    by_base: bool = False

    @property
    def label(self) -> str:
        name = "full finetuning" if self.rank is None else f"rank {self.rank}"
        return f"{name}, by base rate" if self.by_base else name


@dataclass(frozen=True)
class Picture:
    """Arms by rank, full finetuning last; the frame; and the rates at powers of two, where alpha has a rule.

    rates, values: (low, high) of the frame. Scores above it are to be drawn at its edge.
    """

    arms: tuple[Arm, ...]
    rates: tuple[float, float]
    values: tuple[float, float]
    by_rank: tuple[tuple[int, Rate], ...]
    full: Rate | None


def picture_of(recipe: Recipe) -> Picture:
    """The picture of a recipe; without arms where it holds no trials."""
    arms = [_arm(recipe, rank, points) for rank, points in _points(recipe).items()]
    values = _frame([p.value for arm in arms for p in arm.points if math.isfinite(p.value)])
    edges = [p.rate for arm in arms for p in arm.points]
    edges += [edge for arm in arms if arm.rate for edge in (arm.rate.low, arm.rate.lr, arm.rate.high)]
    margin = 2.0**_MARGIN
    rates = (min(edges) / margin, max(edges) * margin) if edges else (1e-4, 1e-2)
    drawn = _with_curves(arms, recipe.lean, rates, values[1])
    return Picture(tuple(drawn), rates, values, _by_rank(recipe), known_rate(recipe, None))


def _arm(recipe: Recipe, rank: int | None, points: tuple[Point, ...]) -> Arm:
    rate = known_rate(recipe, rank)
    return Arm(rank, points, rate, by_base=rate is None and "own_lr" not in recipe.tensors)


def _by_rank(recipe: Recipe) -> tuple[tuple[int, Rate], ...]:
    """Rates at powers of two, two octaves beyond the ranks seen on either side."""
    if not recipe.ranks:
        return ()
    low, high = (round(math.log2(end(recipe.ranks))) for end in (min, max))
    rates = {2**e: known_rate(recipe, 2**e) for e in range(max(0, low - 2), high + 3)}
    known = tuple((rank, rate) for rank, rate in rates.items() if rate is not None)
    return known if len(known) == len(rates) else ()


def _points(recipe: Recipe) -> dict[int | None, tuple[Point, ...]]:
    """The trials by rank, ascending, full finetuning last, each at the rate it ran at."""
    if not {"rank", "lr", "value"} <= recipe.tensors.keys():
        return {}
    ranks, base, values = (recipe.tensors[key].tolist() for key in ("rank", "lr", "value"))
    own = recipe.tensors["own_lr"].tolist() if "own_lr" in recipe.tensors else [math.nan] * len(ranks)
    if any(map(math.isnan, own)):
        own = _moved(recipe, ranks, base)
    seeds = recipe.tensors["seed"].tolist() if "seed" in recipe.tensors else [0] * len(ranks)
    rows = list(zip(ranks, map(Point, own, values, seeds, _fates(recipe, values)), strict=True))
    order = sorted(set(ranks), key=lambda rank: (rank == 0, rank))
    return {rank or None: tuple(point for r, point in rows if r == rank) for rank in order}


def _fates(recipe: Recipe, values: Sequence[float]) -> list[str]:
    lost = recipe.tensors.get("diverged", torch.tensor([not math.isfinite(value) for value in values]))
    cut = recipe.tensors.get("pruned", torch.zeros_like(lost))
    return ["pruned" if p else "diverged" if d else "finished" for d, p in zip(lost, cut, strict=True)]


def _moved(recipe: Recipe, ranks: Sequence[int], base: Sequence[float]) -> list[float]:
    """Base rates moved to each trial's rank by the law the trials ran along: the fitted one would count drift twice."""
    before = replace(recipe.law, exponent=_FORMER_DRIFT[recipe.reference.init], full_factor=1.0)
    along = replace(recipe, law=before if recipe.reference.method == "lora" else recipe.law)
    rates = {rank: known_rate(along, rank or None) for rank in set(ranks)}
    return [lr * (r.lr / along.lr if (r := rates[rank]) else 1.0) for rank, lr in zip(ranks, base, strict=True)]


def _frame(values: Sequence[float]) -> tuple[float, float]:
    """From a little below the best score to twice as far above it as the median is."""
    if not values:
        return 0.0, 1.0
    ordered = sorted(values)
    height = max(2.2 * (ordered[len(ordered) // 2] - ordered[0]), 1e-9 + 1e-6 * abs(ordered[0]))
    return ordered[0] - 0.1 * height, ordered[0] + height


# --- the curve ------------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """Scores that make a curve: which arm, octaves above its optimum, the score, and its weight."""

    arm: npt.NDArray[np.int64]
    u: Array
    y: Array
    weight: Array


def _with_curves(arms: list[Arm], lean: float, rates: tuple[float, float], top: float) -> list[Arm]:
    """Every arm with the curve loss(x) = c + k·(exp(a·u) − a·u − 1), u octaves above the recipe's best rate there.

    k and a are shared and c is each arm's own, by weighted least squares over a grid; without enough scores, no curve.
    """
    seen = _seen(arms, lean)
    if seen is None:
        return arms
    a, k, levels = _shape(seen, len(arms))
    made = []
    for number, arm in enumerate(arms):
        if arm.rate is None or not (seen.arm == number).any():
            made.append(arm)
            continue
        x = np.linspace(math.log2(rates[0]), math.log2(rates[1]), _STEPS)
        y = levels[number] + k * _bowl(a, x - _optimum(arm.rate, lean))
        made.append(replace(arm, curve=tuple((2.0**u, float(v)) for u, v in zip(x, y, strict=True) if v <= top)))
    return made


def _optimum(rate: Rate, lean: float) -> float:
    return math.log2(rate.lr) + lean


def _bowl(a: float | Array, u: Array) -> Array:
    au = a * u
    return np.asarray(np.exp(np.minimum(au, 50.0)) - au - 1.0)


def _seen(arms: Sequence[Arm], lean: float) -> _Seen | None:
    rows = [
        (number, math.log2(p.rate) - _optimum(arm.rate, lean), p.value)
        for number, arm in enumerate(arms)
        if arm.rate is not None
        for p in arm.points
        if math.isfinite(p.value) and p.fate == "finished"
    ]
    if len(rows) < len(arms) + 2:
        return None
    number, u, y = np.array([r[0] for r in rows]), np.array([r[1] for r in rows]), np.array([r[2] for r in rows])
    spread = max(float(np.ptp(y)), 1e-12)
    best = np.array([y[number == n].min() for n in number])
    return _Seen(number, u, y, (_NOISE * spread + _GAP_NOISE * (y - best)) ** -2.0)


def _shape(seen: _Seen, arms: int) -> tuple[float, float, Array]:
    """Steepness a, curvature k and every arm's level c, of the least weighted squared misfit."""
    spread = max(float(np.ptp(seen.y)), 1e-12)
    total = np.maximum(np.bincount(seen.arm, seen.weight, arms), 1e-300)
    best: tuple[float, float, float, Array] | None = None
    for a in _STEEPNESS:
        bowl = _bowl(a, seen.u)
        for k in _CURVATURE * spread:
            rest = seen.y - k * bowl
            levels = np.bincount(seen.arm, seen.weight * rest, arms) / total
            misfit = float(seen.weight @ (rest - levels[seen.arm]) ** 2)
            if best is None or misfit < best[0]:
                best = misfit, float(a), float(k), levels
    assert best is not None
    return best[1:]
