"""What the trials of a calibration tell: its fit and its best rate so far. Nothing here is stored.

The only parameter is log2 of the base rate in *reference coordinates*. A rate at any rank is mapped
back by the law at its prior means, so that trials at several ranks enter one fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._optimizers import optimizer_family
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import Fit, at_target, centred_law, fit_observations, prior_of
from ..laws import Law, Power, bound_law, checked_multiplier
from ._constants import STRIDE, TOGETHER, USUAL_AT, USUAL_LR
from ._schedule import Options
from ._trials import Trials


@dataclass(frozen=True)
class Settled:
    """What the first model of a calibration settles for all trials.

    Args:
        reference: its configuration, to which rates are moved.
        full_fan_in: the fan-in that decides full finetuning.
        layers: the mean fan-in of the adapted layers, by name pattern.
    """

    reference: Reference
    full_fan_in: float
    layers: Mapping[str, float]


class Calibration:
    """One calibration, as far as its trials have come.

    Args:
        options: what it tries.
        trials: returns the trials so far.
    """

    def __init__(self, options: Options, trials: Callable[[], Trials]) -> None:
        self.options = options
        self.trials = trials
        self.settled: Settled | None = None
        self.settings: Mapping[str, Any] = {}  # of the optimizer
        # the number of observations, and their fit
        self._fit: tuple[int, Fit | None] = (-1, None)

    def settle(self, settled: Settled) -> None:
        """Set the reference, the prior for its init, and log2 of a first guess, which is the upper
        end of the family's usual rates.
        """
        self.settled = settled
        reference = settled.reference
        self.prior = prior_of(reference, self.options.ranks, settled.full_fan_in)
        family = optimizer_family(self.options.optimizer)
        law = bound_law(self.options.law, self.options.optimizer, {})
        multiplier = checked_multiplier(law, reference.as_factor(), USUAL_AT)
        usual = USUAL_LR.get(family, USUAL_LR["sign-like"]) * multiplier
        low, high = self.options.octaves or (-math.inf, math.inf)
        self.start = min(max(STRIDE + math.log2(usual), low), high)

    def known(self) -> Settled:
        """Return what the first model has settled."""
        if self.settled is None:
            raise CalibrationError(
                "No trial has built its model yet.", "Run at least one trial."
            )
        return self.settled

    @property
    def bound_law(self) -> Law:
        """The law, bound to the optimizer."""
        return bound_law(self.options.law, self.options.optimizer, self.settings)

    def centred_law(self) -> Power:
        """Return the law, bound to the optimizer, at its prior means."""
        return centred_law(self.bound_law, self.known().reference, self.prior.pivot)

    def fit(self) -> Fit | None:
        """Return the fit of the trials so far, at their steps, or None if every run diverged.

        It is computed once for each number of observations, since a study only adds to them. With
        hundreds of trials, up to a fiftieth of them wait for a common fit.
        """
        if self.settled is None:
            return None
        ended = self.trials().counted()
        waiting = len(ended) % max(1, len(ended) // TOGETHER)
        evidence = Trials(ended[: len(ended) - waiting]).evidence()
        if len(evidence) != self._fit[0]:
            self._fit = len(evidence), fit_observations(evidence, self.prior)
        return self._fit[1]

    def best(self) -> float | None:
        """Return the target's best base rate so far. None before any fit."""
        fit = self.fit()
        if fit is None:
            return None
        mean = at_target(fit, self.options.octaves_to_target).mean
        return float(2.0 ** mean[0])
