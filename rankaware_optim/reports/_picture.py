"""The numbers that a figure of a recipe shows: each rank's trials, and rates with their bands and
ceilings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from .._rate import Rate
from ..recipe import Recipe, known_rate

# The frames of a picture, by hand.
_MARGIN = 2.0**0.5  # left and right of the rates drawn
_MOST = 1e100  # of a score that is drawn
_FAR = 3.0  # times the median of a rank: scores farther off are not in its frame
_OCTAVES = 2  # beyond the ranks tried, in which rates by rank are drawn

SCORE = "score, lower is better"  # a recipe does not say whether what the loop returned was a loss
# What marks mean, in the order of the legend.
MARKS = {
    "finished": "trial",
    "above": "above the frame",
    "diverged": "diverged",
    "pruned": "pruned, without a score",
}

Span = tuple[float, float]


class Point(NamedTuple):
    """One trial: the rate of its A factors or whole weights, its score, its seed, and how it ended.

    fate: "finished", "diverged", or "pruned" with the score NaN.
    """

    rate: float
    value: float
    seed: int
    fate: str


class RankRate(NamedTuple):
    """The recipe's rate at a rank. tried: whether trials had this rank."""

    rank: int
    rate: Rate
    tried: bool


@dataclass(frozen=True)
class PictureArm:
    """The trials at one rank, None for full finetuning. rate: the recipe's, None if it needs an
    alpha. scores: (low, high) of a frame for the scores.
    """

    rank: int | None
    points: tuple[Point, ...]
    rate: Rate | None
    scores: Span

    @property
    def title(self) -> str:
        return "Full finetuning" if self.rank is None else f"Rank {self.rank}"

    def marks(self) -> dict[str, list[Span]]:
        """Return the (rate, score) at which to draw the trials, by their key in `MARKS`.

        A score that is unknown or above the frame is drawn at its upper edge.
        """
        low, high = self.scores
        edge = high - 0.03 * (high - low)
        marks: dict[str, list[Span]] = {mark: [] for mark in MARKS}
        for point in self.points:
            inside = point.value <= high
            above = point.fate == "finished" and not inside
            place = (point.rate, point.value if inside else edge)
            marks["above" if above else point.fate].append(place)
        return {mark: places for mark, places in marks.items() if places}

    @property
    def words(self) -> str:
        """Return a sentence that describes the arm's figure."""
        trials = f"{self.title}: {len(self.points)} trials"
        if self.rate is None:
            return f"{trials}."
        rate = f"the recipe's rate is {self.rate.lr:.3g}"
        return f"{trials}, {rate}, with a 90 % band from {self.rate.band}."


@dataclass(frozen=True)
class Picture:
    """Arms by rank, full finetuning last; and rates at the ranks tried and at powers of two, if
    alpha has a rule. rates: (low, high) of a frame that holds all trials and bands.
    """

    arms: tuple[PictureArm, ...]
    rates: Span
    by_rank: tuple[RankRate, ...]
    full: Rate | None
    full_tried: bool

    def marks(self) -> dict[str, str]:
        """Return the part of `MARKS` that is drawn."""
        used = set().union(*(arm.marks() for arm in self.arms))
        return {mark: words for mark, words in MARKS.items() if mark in used}


def picture_of(recipe: Recipe) -> Picture:
    """Return the data of a recipe's figure. It has no arms if the recipe has no trials."""
    trials = _trials(recipe)
    least = _height(*trials.values()) / 4
    arms = []
    for rank, points in trials.items():
        # noise alone must not look like a bowl
        best = _best(points)
        height = max(least, _height(points), 1e-6 * abs(best))
        scores = (best - 0.1 * height, best + height)
        arms.append(PictureArm(rank, points, known_rate(recipe, rank), scores))
    across = [point.rate for arm in arms for point in arm.points]
    for arm in arms:
        if arm.rate is not None:
            across += (arm.rate.low, arm.rate.high)
    rates = (min(across) / _MARGIN, max(across) * _MARGIN) if across else (1e-4, 1e-2)
    full = known_rate(recipe, None)
    return Picture(tuple(arms), rates, _by_rank(recipe), full, recipe.full_seen)


def _by_rank(recipe: Recipe) -> tuple[RankRate, ...]:
    """Return rates by rank, none where one is unknown."""
    if not recipe.ranks:
        return ()
    low, high = (round(math.log2(end(recipe.ranks))) for end in (min, max))
    powers = range(max(0, low - _OCTAVES), high + _OCTAVES + 1)
    rates = []
    for rank in sorted({*recipe.ranks, *(2**power for power in powers)}):
        rate = known_rate(recipe, rank)
        if rate is None:
            return ()
        rates.append(RankRate(rank, rate, rank in recipe.ranks))
    return tuple(rates)


def _trials(recipe: Recipe) -> dict[int | None, tuple[Point, ...]]:
    """Return the trials by rank, ascending, full finetuning last."""
    tensors = recipe.tensors
    if not {"rank", "own_lr", "value"} <= tensors.keys():
        return {}
    values = tensors["value"].astype(float)
    values[np.abs(values) > _MOST] = math.inf
    none = np.zeros(len(values), int)
    lost = tensors.get("diverged", ~np.isfinite(values))
    fates = np.where(lost, "diverged", "finished")
    fates = np.where(tensors.get("pruned", none), "pruned", fates)
    columns = (
        tensors["rank"],
        tensors["own_lr"],
        values,
        tensors.get("seed", none),
        fates,
    )
    points: dict[int, list[Point]] = {}
    for rank, *of_trial in zip(*(column.tolist() for column in columns), strict=True):
        if not math.isnan(of_trial[0]):  # it ended before it had a rate
            points.setdefault(rank, []).append(Point(*of_trial))
    full_last = sorted(points, key=lambda rank: (rank == 0, rank))
    return {rank or None: tuple(points[rank]) for rank in full_last}


def _best(points: Sequence[Point]) -> float:
    """Return the lowest score, 0 if there is none."""
    return min((p.value for p in points if math.isfinite(p.value)), default=0.0)


def _height(*arms: Sequence[Point]) -> float:
    """Return the height of a frame above the best score of each rank.

    It holds the scores that lie above it by up to `_FAR` times their median. Those farther off
    would flatten the others.
    """
    above = [point.value - _best(points) for points in arms for point in points]
    finite = [distance for distance in above if 0 < distance < math.inf]
    if not finite:
        return 1e-9
    return 1.1 * max(d for d in finite if d <= _FAR * median(finite))
