"""An Optuna sampler that brackets the optimum of one rank, then measures around it at all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from ..fitting import (
    Fit,
    Observation,
    all_rose,
    below_cliff,
    diverged,
    gain_of,
    none_learned,
)
from ._trials import TrialRecord, Trials

_STRIDE = 2.0  # octaves between the trials that bracket
_UPWARDS = 3  # runs before the search turns downwards if none of them learned
_CLEARLY = 0.25  # share of the gain by which a rate above the best is clearly worse
# Offsets from the estimated optimum, octaves, in order. The low side is safer, since the loss rises
# faster above.
_OFFSETS = ((0.5, -1.0, 1.25, -2.0), (0.0, -0.5, -1.5, 0.85))
_CLEARANCE = 0.5  # octaves to stay below the lowest rate that diverged
_TAKEN = 0.25  # octaves to stay away from rates that another worker is running or this rank has run
_WIDEN = 2.0  # octaves by which an edge moves if the best rate is there
_EDGE = 1.0  # octaves from an edge that count as being there
_FULL_STEP = 1.0  # octaves between runs of full finetuning after the search


class Search(Protocol):
    """What the sampler asks of a calibration, once its reference is settled.

    start: log2 of the first base rate. full_follows: whether runs of full finetuning follow the
    search. They start at the predicted rate and move from there in fixed steps.
    """

    start: float

    @property
    def full_follows(self) -> bool: ...

    def fitted(self, trials: Trials) -> Fit | None: ...


class BracketSampler(BaseSampler):
    """Moves outwards from the first rate until it has seen the cliff above and a rate below the
    best, then refines.

    Rates are bracketed at the rank of the first run, since losses of different ranks cannot be
    compared. Refinement uses eight offsets from the fitted optimum and takes the one that is
    farthest from the rates tried at the rank. A rate that another worker is running counts as
    tried. The state is read from the study, so a resumed study continues in the same way.
    """

    def __init__(self, search: Search) -> None:
        self._search = search

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self,
        study: Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> float:
        trials = Trials.read(study.get_trials(deepcopy=False))
        within = param_distribution.low, param_distribution.high  # type: ignore[attr-defined]
        return self.propose(trials, TrialRecord.read(trial), within)

    def propose(
        self, trials: Trials, trial: TrialRecord, within: tuple[float, float]
    ) -> float:
        """Return log2 of the rate of a trial, given all trials so far."""
        low, high = within
        return float(min(max(self._propose(trials, trial, low, high), low), high))

    def _propose(
        self, trials: Trials, trial: TrialRecord, low: float, high: float
    ) -> float:
        rank = trial.rank
        search = self._search
        observations = trials.observations()
        running = trials.running(but=trial.number)
        tried = Trials((*trials.counted(), *running)).at(rank).rates()
        taken = [*running.rates(), *tried]
        fit = search.fitted(trials)
        if search.full_follows and rank is None and fit is not None:
            lost = trials.diverged()
            scored = trials.at(None).scored()
            good = [run for trial, run in scored if trial.number not in lost]
            return next_few(good, tried, fit.best(rank))
        anchor = observations[0].rank if observations else rank
        if rank == anchor or fit is None:
            of_anchor = trials.at(anchor)
            proposed = next_bracket(
                of_anchor.observations(), search.start, low, high, of_anchor.pruned()
            )
            if proposed is not None:
                return _beside(proposed, taken, low, high)
        if fit is None:
            return _beside(
                min(run.x for run in observations) - _STRIDE, taken, low, high
            )
        bottom, top = between(trials.at(rank).observations(), trials.at(rank).pruned())
        within = max(low, bottom), min(high, under(fit.ceiling), top)
        return next_refinement(tried, fit.best(rank), within)


def search_range(trials: Trials, low: float, high: float) -> tuple[float, float]:
    """Return the range of log2 rates, widened while a best rate is at an edge.

    Best rates are those of each rank, below the rates that diverged there. Where all runs rose, the
    lowest rate counts as the best.
    """
    diverged = trials.diverged()
    scored = [trial for trial, _ in trials.scored()]
    for count, trial in enumerate(scored, start=1):
        ran = Trials(scored[:count])
        tried = ran.rates()
        below = _below_cliff(ran.at(trial.rank), diverged)
        best = min(below, key=lambda run: run.value).x if below else min(tried)
        if (min(tried) if all_rose(below) else best) < low + _EDGE:
            low -= _WIDEN
        if below and best > high - _EDGE and best >= max(tried):
            high += _WIDEN
    return low, high


def _below_cliff(trials: Trials, diverged: set[int]) -> list[Observation]:
    """Return the runs below every rate that diverged."""
    lost = Trials(trial for trial in trials if trial.number in diverged)
    cliff = min(lost.rates(), default=math.inf)
    return [run for run in trials.observations() if run.x < cliff]


def _beside(proposed: float, taken: Sequence[float], low: float, high: float) -> float:
    """Return `proposed`, or the nearest free rate in strides below or above it, or in half strides.

    If all of them are taken by other workers, return the middle of the widest gap between taken
    rates.
    """
    options = [proposed + stride for stride in _strides(len(taken) + 1)]
    for x in [x for x in options if low <= x <= high] or [proposed]:
        if _distance(x, taken) > _TAKEN:
            return x
    marks = sorted({low, high, *(x for x in taken if low < x < high)})
    _, middle = max((b - a, (a + b) / 2) for a, b in pairwise(marks))
    return middle


def _strides(most: int) -> Iterator[float]:
    """Yield no stride, then strides downwards and upwards, then half strides."""
    yield 0.0
    for stride in (-_STRIDE, _STRIDE, -_STRIDE / 2, _STRIDE / 2):
        yield from (count * stride for count in range(1, most + 1))


def _distance(x: float, rates: Sequence[float]) -> float:
    return min((abs(x - rate) for rate in rates), default=math.inf)


def next_bracket(
    runs: Sequence[Observation],
    start: float,
    low: float,
    high: float,
    pruned: Sequence[float] = (),
) -> float | None:
    """Return the next rate of the outward search.

    None means that the optimum is bracketed: a clearly worse rate was seen above the best, and any
    rate below it. The search continues upwards until the cliff is seen, since the loss is flat
    below it. If three runs show no learning beyond their noise, it continues downwards, to the end
    of the range.
    """
    if not runs:
        return start
    tried = [run.x for run in runs]
    good = below_cliff(runs)
    below = min(tried) - _STRIDE
    above = max(tried) + _STRIDE
    if not good or (len(runs) >= _UPWARDS and below >= low and none_learned(good)):
        return below
    best = min(good, key=lambda run: run.value)
    if not _worse_above(best, runs, best.value + _CLEARLY * gain_of(good), pruned):
        return above if above <= high else None
    lower = best.x - _STRIDE
    is_lower = best.x - _STRIDE / 4
    if lower < low or any(x < is_lower for x in (*tried, *pruned)):
        return None
    return lower


def _worse_above(
    best: Observation,
    runs: Sequence[Observation],
    limit: float,
    pruned: Sequence[float],
) -> bool:
    """Return whether a run above the best rate diverged, was pruned or scored above a limit."""
    if any(x > best.x for x in pruned):
        return True
    for run, bad in zip(runs, diverged(runs), strict=True):
        if run.x > best.x and (bad or run.value > limit):
            return True
    return False


def between(
    runs: Sequence[Observation], pruned: Sequence[float]
) -> tuple[float, float]:
    """Return the nearest pruned rates below and above a rank's best. Those beyond are worse."""
    if not runs:
        return -math.inf, math.inf
    best = min(runs, key=lambda run: run.value).x
    lower = max((x for x in pruned if x < best), default=-math.inf)
    upper = min((x for x in pruned if x > best), default=math.inf)
    return lower, upper


def under(ceiling: float | None) -> float:
    """Return the highest rate for refinement."""
    return math.inf if ceiling is None else ceiling - _CLEARANCE


def next_refinement(
    tried: Sequence[float], centre: float, within: tuple[float, float]
) -> float:
    """Return the offset rate, clipped to `within`, that is farthest from the rates tried at the
    rank.
    """
    low, high = within
    centre = max(min(centre, high), low)
    for offsets in _OFFSETS:
        options = [max(min(centre + offset, high), low) for offset in offsets]
        best = max(options, key=lambda x: _distance(x, tried))
        if _distance(best, tried) > _TAKEN:
            break
    return float(best)


def next_few(
    good: Sequence[Observation], tried: Sequence[float], centre: float
) -> float:
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
    best = min(good, key=lambda run: run.value).x
    below = [x for x in tried if x < best]
    above = [x for x in tried if x > best]
    if not below:
        return best - _FULL_STEP
    if not above:
        return best + _FULL_STEP
    lower = max(below)
    upper = min(above)
    return (best + lower) / 2 if best - lower > upper - best else (best + upper) / 2
