"""The numbers that a figure of a recipe shows: each rank's trials, fitted curve, and rate with band
and ceiling.

`_figure` draws them with matplotlib, `_page` as a page.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .._rate import Rate
from ..fitting import (
    Observation,
    arms_of,
    curves_of,
    gain_of,
    height,
    impute,
    noise_of,
    recent,
)
from ..recipe import Recipe, known_rate

# The drift along which trials of recipes without `trial.own_lr` ran, by init: the prior mean at
# that time.
_FORMER_DRIFT = {"A": 0.0, "B": -0.45}
_MARGIN = 2.0**0.5  # left and right of the rates drawn
_STEPS = 400  # of a curve
_MOST = 1e100  # of a score that is drawn
_MOST_FITTED = (
    400  # trials of a rank whose curve is drawn. Its time grows with their cube
)

SCORE = "score, lower is better"  # a recipe does not say whether what the loop returned was a loss
# What marks mean, in the order of the legend.
MARKS = {
    "finished": "trial",
    "above": "above the frame",
    "diverged": "diverged",
    "pruned": "pruned, without a score",
}

Array = npt.NDArray[np.float64]
Span = tuple[float, float]
Trials = Mapping["int | None", Sequence["Point"]]


class Point(NamedTuple):
    """One trial: the rate of its A factors or whole weights, its score, its seed, how it ended, and
    its curve.

    fate: "finished", "diverged", or "pruned" with the score NaN. The curve of a sweep's run is its
    score. Curves are views of the recipe's array, which may be large.
    """

    rate: float
    value: float
    seed: int
    fate: str
    curve: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class PictureArm:
    """The trials at one rank, None for full finetuning. rate: the recipe's, None if it needs an
    alpha.

    curve: (rate, score) along the loss model's mean, with its optimum at the recipe's. by_base:
    whether the points are drawn at their base rates, because their own rates are unknown. values:
    (low, high) of the rank's own frame.
    """

    rank: int | None
    points: tuple[Point, ...]
    rate: Rate | None
    curve: tuple[Span, ...] = ()
    by_base: bool = False
    values: Span = (0.0, 1.0)

    @property
    def label(self) -> str:
        name = "full finetuning" if self.rank is None else f"rank {self.rank}"
        return f"{name}, by base rate" if self.by_base else name

    def marks(self, frame: Span) -> dict[str, list[Span]]:
        """Return the (rate, score) at which to draw the trials in a frame, by their key in `MARKS`.

        A score that is unknown or above the frame is drawn at its upper edge.
        """
        low, high = frame
        edge = high - 0.03 * (high - low)
        marks: dict[str, list[Span]] = {mark: [] for mark in MARKS}
        for point in self.points:
            inside = point.value <= high
            above = point.fate == "finished" and not inside
            place = (point.rate, point.value if inside else edge)
            marks["above" if above else point.fate].append(place)
        return {mark: places for mark, places in marks.items() if places}

    @property
    def title(self) -> str:
        return self.label[0].upper() + self.label[1:]

    @property
    def words(self) -> str:
        """Return a sentence that describes the arm's figure."""
        fates = Counter(point.fate for point in self.points)
        ends = [
            f"{fates[fate]} {fate}" for fate in ("diverged", "pruned") if fates[fate]
        ]
        parts = [", ".join([f"{self.label}: {len(self.points)} trials", *ends])]
        finite = [point for point in self.points if math.isfinite(point.value)]
        if finite:
            best = min(finite, key=lambda point: point.value)
            parts.append(
                f"the lowest score is {best.value:.3g} at rate {best.rate:.3g}"
            )
        if self.rate is not None:
            parts.append(
                f"the recipe's rate is {self.rate.lr:.3g}, 90 % band {self.rate.band}"
            )
        return "; ".join(parts) + "."


@dataclass(frozen=True)
class Picture:
    """Arms by rank, full finetuning last; the frame; and rates by rank, if alpha has a rule: at the
    ranks tried, and eight in each octave.

    rates, values: (low, high) of a frame around all of them.
    """

    arms: tuple[PictureArm, ...]
    rates: Span
    values: Span
    by_rank: tuple[tuple[int, Rate], ...]
    full: Rate | None

    def marks(self, frame: Span | None = None) -> dict[str, str]:
        """Return the part of `MARKS` that is drawn in a frame, or in each arm's own."""
        used = set().union(*(arm.marks(frame or arm.values) for arm in self.arms))
        return {mark: words for mark, words in MARKS.items() if mark in used}


def picture_of(recipe: Recipe) -> Picture:
    """Return the data of a recipe's figure. It has no arms if the recipe has no trials."""
    trials = _trials(recipe)
    rates = {rank: known_rate(recipe, rank) for rank in trials}
    points = [point for of_rank in trials.values() for point in of_rank]
    across = _rates_drawn(points, [rate for rate in rates.values() if rate])
    values = _frame([point.value for point in points if math.isfinite(point.value)])
    x = np.linspace(math.log2(across[0]), math.log2(across[1]), _STEPS)
    curves = _curves(trials, rates, x)
    arms = []
    for rank, of_rank in trials.items():
        rate, curve = rates[rank], curves.get(rank, np.empty(0))
        frame = _own_frame(of_rank, curve, values)
        line = tuple(zip((2.0**x).tolist(), curve.tolist(), strict=False))
        by_base = rate is None and "own_lr" not in recipe.tensors
        arms.append(PictureArm(rank, tuple(of_rank), rate, line, by_base, frame))
    full = known_rate(recipe, None)
    return Picture(tuple(arms), across, values, _by_rank(recipe), full)


def _rates_drawn(points: Sequence[Point], rates: Sequence[Rate]) -> Span:
    """Return the ends of an axis that holds all trials and bands."""
    edges = [point.rate for point in points] + edges_of(rates)
    return (min(edges) / _MARGIN, max(edges) * _MARGIN) if edges else (1e-4, 1e-2)


def edges_of(rates: Iterable[Rate]) -> list[float]:
    """Return what a frame holds of rates: themselves and the ends of their bands."""
    edges: list[float] = []
    for rate in rates:
        edges += (rate.low, rate.lr, rate.high)
    return edges


def _by_rank(recipe: Recipe) -> tuple[tuple[int, Rate], ...]:
    """Return rates by rank, up to two octaves beyond the ranks tried on either side. There are none
    where one is unknown.
    """
    if not recipe.ranks:
        return ()
    low, high = (round(math.log2(end(recipe.ranks))) for end in (min, max))
    eighths = range(8 * max(0, low - 2), 8 * (high + 2) + 1)
    ranks = sorted({*recipe.ranks, *(round(2 ** (e / 8)) for e in eighths)})
    rates = {rank: known_rate(recipe, rank) for rank in ranks}
    known = tuple((rank, rate) for rank, rate in rates.items() if rate is not None)
    return known if len(known) == len(rates) else ()


def _frame(values: Sequence[float]) -> Span:
    """Return a frame from below the best score to twice as far above it as the median."""
    if not values:
        return 0.0, 1.0
    ordered = sorted(values)
    size = max(
        2.2 * (ordered[len(ordered) // 2] - ordered[0]), 1e-9 + 1e-6 * abs(ordered[0])
    )
    return ordered[0] - 0.1 * size, ordered[0] + size


def _own_frame(points: Sequence[Point], curve: Array, whole: Span) -> Span:
    """A rank's own frame: its lowest point, the better half of its scores, and all within the
    height of the `whole` frame above its best.

    It is at least a fifth as high as that frame, so that noise alone does not look like a bowl.
    """
    height = whole[1] - whole[0]
    finite = sorted(point.value for point in points if math.isfinite(point.value))
    if not finite:
        return whole
    bottom = min([*finite, *curve.tolist()])
    most = max(finite[0] + height, finite[len(finite) // 2])
    top = max(value for value in finite if value <= most)
    size = max(top - bottom, height / 5)
    return bottom - 0.1 * size, bottom + 1.1 * size


# --- the trials -----------------------------------------------------------------------------------


def _trials(recipe: Recipe) -> dict[int | None, list[Point]]:
    """Return the trials by rank, ascending, full finetuning last, each at its own rate."""
    tensors = recipe.tensors
    if not {"rank", "lr", "value"} <= tensors.keys():
        return {}
    ranks, values = tensors["rank"].tolist(), tensors["value"].tolist()
    values = [math.inf if abs(value) > _MOST else value for value in values]
    seeds = tensors["seed"].tolist() if "seed" in tensors else [0] * len(ranks)
    columns = (
        _own_rates(recipe),
        values,
        seeds,
        _fates(tensors, values),
        _scores(tensors, values),
    )
    points = list(map(Point, *columns))
    trials: dict[int | None, list[Point]] = {}
    for rank in sorted(set(ranks), key=lambda rank: (rank == 0, rank)):
        of_rank = [point for r, point in zip(ranks, points, strict=True) if r == rank]
        trials[rank or None] = of_rank
    return trials


def _own_rates(recipe: Recipe) -> list[float]:
    """Return the rate at which each trial ran."""
    if "own_lr" in recipe.tensors:
        own: list[float] = recipe.tensors["own_lr"].tolist()
        if not any(map(math.isnan, own)):
            return own
    return _moved(
        recipe, recipe.tensors["rank"].tolist(), recipe.tensors["lr"].tolist()
    )


def _fates(
    tensors: Mapping[str, npt.NDArray[Any]], values: Sequence[float]
) -> list[str]:
    """Return how each trial ended."""
    lost = tensors.get(
        "diverged", np.array([not math.isfinite(value) for value in values])
    )
    cut = tensors.get("pruned", np.zeros_like(lost))
    fates = np.where(cut, "pruned", np.where(lost, "diverged", "finished"))
    names: list[str] = fates.tolist()
    return names


def _scores(
    tensors: Mapping[str, npt.NDArray[Any]], values: Sequence[float]
) -> list[npt.NDArray[Any]]:
    """Return each trial's curve, or its score alone where it has none that can be drawn."""
    curves = [np.array([value] if math.isfinite(value) else []) for value in values]
    if not {"curve", "steps"} <= tensors.keys():
        return curves
    rows = zip(tensors["curve"], tensors["steps"].tolist(), strict=True)
    for number, (row, steps) in enumerate(rows):
        ran = row[:steps]
        if len(ran) and bool((np.abs(ran.astype(np.float64)) <= _MOST).all()):
            curves[number] = ran
    return curves


def _moved(recipe: Recipe, ranks: Sequence[int], base: Sequence[float]) -> list[float]:
    """Move base rates to each trial's rank by the law of the trials. The fitted law would count the
    drift twice.
    """
    law = recipe.law
    if recipe.reference.method == "lora":
        law = replace(
            law, exponent=_FORMER_DRIFT[recipe.reference.init], full_factor=1.0
        )
    along = replace(recipe, law=law)
    rates = {rank: known_rate(along, rank or None) for rank in set(ranks)}
    ratios = {rank: rate.lr / along.lr if rate else 1.0 for rank, rate in rates.items()}
    return [lr * ratios[rank] for rank, lr in zip(ranks, base, strict=True)]


# --- the curve ------------------------------------------------------------------------------------


def _curves(
    trials: Trials, rates: Mapping[int | None, Rate | None], x: Array
) -> dict[int | None, Array]:
    """Return scores at log2 rates x along the loss model's mean curve of every rank, with its
    optimum in the middle of the band.

    Ranks without a rate, without a finite score or with more than `_MOST_FITTED` trials are left
    out.
    """
    best: dict[int | None, float] = {}
    ended: list[Observation] = []
    lost: list[Observation] = []
    for rank, rate in rates.items():
        if rate is None or len(trials[rank]) > _MOST_FITTED:
            continue
        best[rank] = (math.log2(rate.low) + math.log2(rate.high)) / 2
        for observation, is_lost in _observations(rank, trials[rank], best[rank]):
            (lost if is_lost else ended).append(observation)
    if not ended:
        return {}
    floors = {o.rank: o.value for o in sorted(ended, key=lambda o: -o.value)}
    gain = gain_of(ended)
    arms = arms_of(ended, lost, gain)
    gaps = curves_of(arms, {rank: x - best[rank] for rank in arms})
    return {rank: floor + gain * gaps[rank] for rank, floor in floors.items()}


def _observations(
    rank: int | None, points: Sequence[Point], best: float
) -> Iterator[tuple[Observation, bool]]:
    """Yield a rank's trials as observations, in octaves above its best rate, and whether they
    diverged.

    The score of a pruned trial is imputed, see `impute`.
    """
    ended: list[tuple[Observation, Point]] = []
    for point in sorted(points, key=lambda point: point.fate == "pruned"):
        x, curve = math.log2(point.rate) - best, point.curve.astype(np.float64)
        if point.fate == "pruned":
            rivals = [pair for pair in ended if pair[0].seed == point.seed]
            rival = min(rivals, key=lambda pair: pair[0].value, default=None)
            carried = rival and impute(
                x, curve, rival[0], rival[1].curve.astype(np.float64)
            )
            if carried:
                yield carried, False
        elif math.isfinite(point.value):
            tail, noise = recent(curve), noise_of(curve)
            start = height(curve)
            scored = Observation(
                rank, point.seed, x, point.value, start, tail, noise=noise
            )
            ended.append((scored, point))
            yield scored, point.fate == "diverged"
        else:
            yield Observation(rank, point.seed, x, math.inf, math.inf, math.inf), True
