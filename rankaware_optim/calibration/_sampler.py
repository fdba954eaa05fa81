"""Where to try next: an Optuna sampler that brackets the optimum of one rank, then measures around it at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from ._trials import TrialRecord, Trials
from .fit import Fit, Observation, Place, Prior, below_cliff, diverged, gain_of

_STRIDE = 2.0  # octaves between the trials that bracket
_CLEARLY = 0.25  # share of the gain that makes a rate above the best clearly worse
# Octaves around the estimated optimum; a cliff above makes the low side safer. Then what lies between them.
_OFFSETS = ((0.5, -1.0, 1.25, -2.0), (0.0, -0.5, -1.5, 0.85))
_CLEARANCE = 0.5  # octaves that are kept below the lowest rate that diverged
_TAKEN = 0.25  # octaves around a rate that another worker is running, or this rank has run, kept free of a second run
_FEW_STEP = {"full": 1.0, "confirm": 0.5}  # octaves between the few runs of full finetuning, and those that confirm


class BracketSampler(BaseSampler):
    """Strides outwards from `start` until the cliff above and a rate below the best were seen, then refines.

    Rates are bracketed at one place, that of the first run: losses of different ranks or lengths do not compare.
    Refinement puts each trial where its own place has been measured least: at one of eight offsets from the fitted
    optimum. A rate that another worker is running counts as tried. Everything is read from the study, so a resumed
    study goes on as it would have.

    fit: of a study's trials. kind: what a run is for; those of "full" and "confirm" are few, begin at the rate that is
    predicted for them and step from there.
    """

    def __init__(
        self,
        start: float,
        prior: Prior,
        fit: Callable[[Trials], Fit | None],
        kind: Callable[[Place], str] = lambda place: "search",
    ) -> None:
        self._start, self._prior, self._fit, self._kind = start, prior, fit, kind

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> float:
        low, high = param_distribution.low, param_distribution.high  # type: ignore[attr-defined]
        proposed = self._propose(Trials.read(study.get_trials(deepcopy=False)), TrialRecord.read(trial), low, high)
        return float(min(max(proposed, low), high))

    def _propose(self, trials: Trials, trial: TrialRecord, low: float, high: float) -> float:
        place, seen, stopped = trial.place, trials.observations(), trials.pruned()
        others = [(t.place, t.x) for t in trials.running(but=trial.number) if t.x is not None]
        fit = self._fit(trials)
        centre = None if fit is None else estimate_at(fit, place, self._prior)
        own, lost = [o for o in seen if o.place == place], [x for other, x in stopped if other == place]
        mine = [*lost, *(x for other, x in others if other == place)]
        step = _FEW_STEP.get(self._kind(place))
        if step is not None and centre is not None:
            good = [o for o, bad in zip(seen, diverged(seen), strict=True) if o.place == place and not bad]
            return next_few(good, [*(o.x for o in own), *mine], centre, step)
        taken = [*(x for _, x in others), *mine, *(o.x for o in own)]
        anchor = seen[0].place if seen else place
        if place == anchor or fit is None:
            of_anchor = [o for o in seen if o.place == anchor]
            proposed = next_bracket(of_anchor, self._start, low, high, [x for other, x in stopped if other == anchor])
            if proposed is not None:
                return _beside(proposed, taken, low, high)
        if fit is None or centre is None:
            return _beside(min(o.x for o in seen) - _STRIDE, taken, low, high)
        bottom, top = between(own, lost)
        ceiling = None if fit.ceiling is None else fit.ceiling + float(self._prior.row(place)[3:] @ fit.mean[3:])
        return next_refinement(own, centre, (max(low, bottom), min(high, under(ceiling), top)), mine)


def estimate_at(fit: Fit, place: Place, prior: Prior) -> float:
    """log2 of the base rate at which a place is estimated to be best."""
    return float(prior.row(place) @ fit.mean)


def _beside(proposed: float, taken: Sequence[float], low: float, high: float) -> float:
    """`proposed`, or the first stride below it, then above, that is not taken; half strides where all are.

    Where those are taken too, by as many workers, the middle of the widest gap between rates that are.
    """
    sizes = (_STRIDE, _STRIDE / 2)
    strides = [sign * n * size for size in sizes for sign in (-1, 1) for n in range(1, len(taken) + 2)]
    options = [x for x in (proposed + stride for stride in (0.0, *strides)) if low <= x <= high] or [proposed]
    free = next((x for x in options if all(abs(x - t) > _TAKEN for t in taken)), None)
    if free is not None:
        return free
    marks = sorted({low, high, *(t for t in taken if low < t < high)})
    return max((b - a, (a + b) / 2) for a, b in pairwise(marks))[1]


def next_bracket(
    seen: Sequence[Observation], start: float, low: float, high: float, pruned: Sequence[float] = ()
) -> float | None:
    """The next rate of the search outwards; None once a clearly worse rate lies above the best, and any below it.

    Upwards it goes on until the cliff is seen: loss is flat below it, so nothing else says as much of where it is.
    """
    if not seen:
        return start
    bad, good = diverged(seen), below_cliff(seen)
    if not good:
        return min(o.x for o in seen) - _STRIDE
    best = min(good, key=lambda o: o.value)
    margin = _CLEARLY * gain_of(good)
    worse = [o.x for o, b in zip(seen, bad, strict=True) if o.x > best.x and (b or o.value > best.value + margin)]
    worse += [x for x in pruned if x > best.x]
    if not worse:
        target = max(o.x for o in seen) + _STRIDE
        return target if target <= high else None
    lower = any(x < best.x - _STRIDE / 4 for x in (*(o.x for o in seen), *pruned))
    return None if lower or best.x - _STRIDE < low else best.x - _STRIDE


def between(seen: Sequence[Observation], pruned: Sequence[float]) -> tuple[float, float]:
    """The nearest rates below and above a rank's best that were pruned: beyond them it is worse still."""
    if not seen:
        return -math.inf, math.inf
    best = min(seen, key=lambda o: o.value).x
    lower, upper = [x for x in pruned if x < best], [x for x in pruned if x > best]
    return max(lower, default=-math.inf), min(upper, default=math.inf)


def under(ceiling: float | None) -> float:
    """The highest rate to refine at."""
    return math.inf if ceiling is None else ceiling - _CLEARANCE


def next_refinement(
    own: Sequence[Observation], centre: float, within: tuple[float, float], others: Sequence[float] = ()
) -> float:
    """The offset from a place's estimated optimum, kept `within` bounds, that is farthest from what it has tried."""
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


def next_few(good: Sequence[Observation], tried: Sequence[float], centre: float, step: float) -> float:
    """The predicted rate first, then a step below the best run, then above it, then between its neighbours.

    Below comes first, since too high costs more; three runs bracket an optimum that was predicted within a step.
    good: of the place's runs at the rates `tried`, those that did not diverge.
    """
    if not good:
        return min(tried) - step if tried else centre
    best = min(good, key=lambda o: o.value).x
    below, above = [x for x in tried if x < best], [x for x in tried if x > best]
    if not below:
        return best - step
    if not above:
        return best + step
    return (best + max(below)) / 2 if best - max(below) > min(above) - best else (best + min(above)) / 2
