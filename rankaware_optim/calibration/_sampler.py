"""An Optuna sampler that brackets the optimum of one rank, then measures around it at all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..fitting import Fit, Observation, Prior, below_cliff, diverged, gain_of, none_learned
from ._trials import TrialRecord, Trials

_STRIDE = 2.0  # octaves between the trials that bracket
_UPWARDS = 3  # runs before the search turns downwards if none of them learned
_CLEARLY = 0.25  # share of the gain by which a rate above the best is clearly worse
# Offsets from the estimated optimum, octaves, in order. The low side is safer, since the loss rises
# faster above.
_OFFSETS = ((0.5, -1.0, 1.25, -2.0), (0.0, -0.5, -1.5, 0.85))
_CLEARANCE = 0.5  # octaves to stay below the lowest rate that diverged
_TAKEN = 0.25  # octaves to stay away from rates that another worker is running or this rank has run
_FULL_STEP = 1.0  # octaves between runs of full finetuning after the search


class BracketSampler(BaseSampler):
    """Moves outwards from `start` until it has seen the cliff above and a rate below the best, then
    refines.

    Rates are bracketed at the rank of the first run, since losses of different ranks cannot be
    compared. Refinement uses eight offsets from the fitted optimum and takes the one that is
    farthest from the rates tried at the rank. A rate that another worker is running counts as
    tried. The state is read from the study, so a resumed study continues in the same way.

    Args:
        start: log2 of the first base rate.
        prior: the fit's prior.
        fit: returns the fit of a study's trials.
        full_follows: whether runs of full finetuning follow the search. They start at the predicted
            rate and move from there in fixed steps.
    """

    def __init__(
        self,
        start: float,
        prior: Prior,
        fit: Callable[[Trials], Fit | None],
        full_follows: bool = False,
    ) -> None:
        self._start, self._prior, self._fit, self._full_follows = start, prior, fit, full_follows

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> float:
        low, high = param_distribution.low, param_distribution.high  # type: ignore[attr-defined]
        proposed = self._propose(
            Trials.read(study.get_trials(deepcopy=False)), TrialRecord.read(trial), low, high
        )
        return float(min(max(proposed, low), high))

    def _propose(self, trials: Trials, trial: TrialRecord, low: float, high: float) -> float:
        rank, seen, stopped = trial.rank, trials.observations(), trials.pruned()
        others = [(t.rank, t.x) for t in trials.running(but=trial.number) if t.x is not None]
        fit = self._fit(trials)
        centre = None if fit is None else estimate_at(fit, rank, self._prior)
        own, lost = (
            [o for o in seen if o.rank == rank],
            [x for other, x in stopped if other == rank],
        )
        mine = [*lost, *(x for other, x in others if other == rank)]
        if self._full_follows and rank is None and centre is not None:
            good = [
                o for o, bad in zip(seen, diverged(seen), strict=True) if o.rank is None and not bad
            ]
            return next_few(good, [*(o.x for o in own), *mine], centre)
        taken = [*(x for _, x in others), *mine, *(o.x for o in own)]
        anchor = seen[0].rank if seen else rank
        if rank == anchor or fit is None:
            of_anchor = [o for o in seen if o.rank == anchor]
            proposed = next_bracket(
                of_anchor, self._start, low, high, [x for other, x in stopped if other == anchor]
            )
            if proposed is not None:
                return _beside(proposed, taken, low, high)
        if fit is None or centre is None:
            return _beside(min(o.x for o in seen) - _STRIDE, taken, low, high)
        bottom, top = between(own, lost)
        return next_refinement(
            own, centre, (max(low, bottom), min(high, under(fit.ceiling), top)), mine
        )


def estimate_at(fit: Fit, rank: int | None, prior: Prior) -> float:
    """Return log2 of the base rate that is estimated to be best at a rank."""
    return float(prior.row(rank) @ fit.mean)


def _beside(proposed: float, taken: Sequence[float], low: float, high: float) -> float:
    """Return `proposed`, or the nearest free rate in strides below or above it, or in half strides.

    If all of them are taken by other workers, return the middle of the widest gap between taken
    rates.
    """
    sizes = (_STRIDE, _STRIDE / 2)
    strides = [
        sign * n * size for size in sizes for sign in (-1, 1) for n in range(1, len(taken) + 2)
    ]
    options = [
        x for x in (proposed + stride for stride in (0.0, *strides)) if low <= x <= high
    ] or [proposed]
    free = next((x for x in options if all(abs(x - t) > _TAKEN for t in taken)), None)
    if free is not None:
        return free
    marks = sorted({low, high, *(t for t in taken if low < t < high)})
    return max((b - a, (a + b) / 2) for a, b in pairwise(marks))[1]


def next_bracket(
    seen: Sequence[Observation], start: float, low: float, high: float, pruned: Sequence[float] = ()
) -> float | None:
    """Return the next rate of the outward search.

    None means that the optimum is bracketed: a clearly worse rate was seen above the best, and any
    rate below it. The search continues upwards until the cliff is seen, since the loss is flat
    below it. If three runs show no learning beyond their noise, it continues downwards, to the end
    of the range.
    """
    if not seen:
        return start
    bad, good = diverged(seen), below_cliff(seen)
    below = min(o.x for o in seen) - _STRIDE
    if not good or (len(seen) >= _UPWARDS and below >= low and none_learned(good)):
        return below
    best = min(good, key=lambda o: o.value)
    margin = _CLEARLY * gain_of(good)
    worse = [
        o.x
        for o, b in zip(seen, bad, strict=True)
        if o.x > best.x and (b or o.value > best.value + margin)
    ]
    worse += [x for x in pruned if x > best.x]
    if not worse:
        target = max(o.x for o in seen) + _STRIDE
        return target if target <= high else None
    lower = any(x < best.x - _STRIDE / 4 for x in (*(o.x for o in seen), *pruned))
    return None if lower or best.x - _STRIDE < low else best.x - _STRIDE


def between(seen: Sequence[Observation], pruned: Sequence[float]) -> tuple[float, float]:
    """Return the nearest pruned rates below and above a rank's best. Rates beyond them are worse."""
    if not seen:
        return -math.inf, math.inf
    best = min(seen, key=lambda o: o.value).x
    lower, upper = [x for x in pruned if x < best], [x for x in pruned if x > best]
    return max(lower, default=-math.inf), min(upper, default=math.inf)


def under(ceiling: float | None) -> float:
    """Return the highest rate for refinement."""
    return math.inf if ceiling is None else ceiling - _CLEARANCE


def next_refinement(
    own: Sequence[Observation],
    centre: float,
    within: tuple[float, float],
    others: Sequence[float] = (),
) -> float:
    """Return the offset rate, clipped to `within`, that is farthest from the rates tried at the
    rank.
    """
    tried = [*(o.x for o in own), *others]
    low, high = within
    centre = max(min(centre, high), low)
    for offsets in _OFFSETS:
        options = [max(min(centre + offset, high), low) for offset in offsets]
        apart = {x: min((abs(x - t) for t in tried), default=math.inf) for x in options}
        best = max(options, key=lambda x: apart[x])
        if apart[best] > _TAKEN:
            break
    return float(best)


def next_few(good: Sequence[Observation], tried: Sequence[float], centre: float) -> float:
    """Return the predicted rate first, then an octave below the best run, then above it, then
    between its neighbours.

    Lower rates come first, since too high costs more. Three runs bracket an optimum predicted
    within an octave.

    Args:
        good: the full runs that did not diverge.
        tried: log2 of all rates tried in full finetuning.
        centre: log2 of the predicted rate.
    """
    if not good:
        return min(tried) - _FULL_STEP if tried else centre
    best = min(good, key=lambda o: o.value).x
    below, above = [x for x in tried if x < best], [x for x in tried if x > best]
    if not below:
        return best - _FULL_STEP
    if not above:
        return best + _FULL_STEP
    return (
        (best + max(below)) / 2
        if best - max(below) > min(above) - best
        else (best + min(above)) / 2
    )
