"""Where to try next: an Optuna sampler that brackets the optimum in reference coordinates, then measures around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from .fitting import Observation, Prior, diverged, fit_observations, gain_of

__all__ = ["BracketSampler", "observations_of"]

PARAMETER = "log2_lr"
_STRIDE = 2.0  # octaves between the trials that bracket
_CLEARLY = 0.25  # share of the gain that makes a rate above the best clearly worse
_OFFSETS = (0.5, -1.0, 1.25, -2.0)  # octaves around the estimated optimum; a cliff above makes the low side safer
_CLEARANCE = 0.5  # octaves that are kept below the lowest rate that diverged


class BracketSampler(BaseSampler):
    """Strides outwards from `start` until the cliff above and a rate below the best were seen, then refines.

    Refinement puts each trial where its rank has been measured least: at one of four offsets from the fitted
    optimum. Everything is read from the study, so a resumed study goes on as it would have.
    """

    def __init__(self, start: float, prior: Prior) -> None:
        self._start = start
        self._prior = prior

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
        seen, pruned = observations_of(study), pruned_of(study)
        proposed = next_bracket(seen, self._start, low, high, [x for _, x in pruned])
        if proposed is None:
            rank = trial.user_attrs.get("rank")
            proposed = next_refinement(seen, rank, self._prior, [x for other, x in pruned if other == rank])
        return float(min(max(proposed, low), high))


def observations_of(study: Study) -> list[Observation]:
    """All trials of a study that ran to their end or diverged."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False, states=states)
    return [Observation(**t.user_attrs["observation"]) for t in trials if "observation" in t.user_attrs]


def pruned_of(study: Study) -> list[tuple[int | None, float]]:
    """(rank, log2 rate) of the trials that the pruner stopped: worse than others, by how much is not known.

    A run that ran out of memory says nothing of its rate.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    judged = [t for t in trials if "observation" not in t.user_attrs and t.user_attrs.get("stopped") != "memory"]
    return [(t.user_attrs["rank"], t.params[PARAMETER]) for t in judged if PARAMETER in t.params]


def next_bracket(
    seen: Sequence[Observation], start: float, low: float, high: float, pruned: Sequence[float] = ()
) -> float | None:
    """The next rate of the search outwards; None once a clearly worse rate lies above the best, and any below it.

    Upwards it goes on until the cliff is seen: loss is flat below it, so nothing else says as much of where it is.
    """
    if not seen:
        return start
    bad = diverged(seen)
    good = [o for o, b in zip(seen, bad, strict=True) if not b]
    if not good:
        return min(o.x for o in seen) - _STRIDE
    best = min(good, key=lambda o: o.value)
    margin = _CLEARLY * gain_of(good)
    worse = [o.x for o, b in zip(seen, bad, strict=True) if o.x > best.x and (b or o.value > best.value + margin)]
    worse += [x for x in pruned if x > best.x]
    if not worse:
        target = max(o.x for o in seen) + _STRIDE
        return target if target <= high else None
    below = any(x < best.x - _STRIDE / 4 for x in (*(o.x for o in seen), *pruned))
    return None if below or best.x - _STRIDE < low else best.x - _STRIDE


def next_refinement(seen: Sequence[Observation], rank: int | None, prior: Prior, pruned: Sequence[float] = ()) -> float:
    """The offset from this rank's fitted optimum that is farthest from what this rank has tried."""
    fit = fit_observations(seen, prior)
    if fit is None:
        return min(o.x for o in seen) - _STRIDE
    reach = prior.full_reach if rank is None else math.log2(rank / prior.pivot)
    centre = fit.mean[0] + reach * fit.mean[1] + (fit.mean[2] if rank is None else 0.0)
    tried = [*(o.x for o in seen if o.rank == rank), *pruned]
    top = math.inf if fit.ceiling is None else fit.ceiling - _CLEARANCE
    options = [min(centre + offset, top) for offset in _OFFSETS]
    return float(max(options, key=lambda x: min((abs(x - t) for t in tried), default=math.inf)))
