"""This module compares a learning rate with the best learning rate that a recipe predicts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .._checks import is_positive, plain, shown
from .._rate import Rate
from .._types import Method, Reference
from ..errors import RankAwareError, RecipeError
from ._rates import configuration, rate
from ._trials import knows_improvement, loss_curves

if TYPE_CHECKING:
    from ._recipe import Recipe

_SAME = (
    1.15  # learning rates within this factor of each other count as equal: judgement
)
# A fraction of the possible improvement. If the fitted curve predicts a larger loss than this at
# the recipe's own learning rate, the recipe does not follow its trials. For example, it may
# contain the suggested learning rate because the trials were too short. The curve then cannot
# judge other learning rates either: judgement
_MOST_AT_BEST = 0.1


@dataclass(frozen=True)
class Judgement:
    """This class stores how a learning rate compares with the estimated best learning rate.

    `print(judgement)` shows the result as a sentence.

    Args:
        lr: the learning rate that was compared.
        best: the learning rate to use instead, with its 90 % interval.
        factor: lr / best. A factor of 0.02 means that lr is 50 times too low.
        inside: whether lr is inside the 90 % interval of the best learning rate, or None if the
            interval is unknown.
        lost: the estimated fraction of the possible improvement that is lost at lr, from 0 to 1.
            The possible improvement is the difference between the loss before training and the
            loss of the best trial. None if the trials cannot tell, because lr is far outside the
            learning rates tried, or because the trials were scored by rewards or by a value that
            the user's code returned.

    >>> print(Judgement(2e-5, Rate(1e-3), lost=0.6))
    A learning rate of 2e-05 is about 50 times too low: an estimated 60 % of the possible \
improvement would be lost. The best estimate is 0.001.
    """

    lr: float
    best: Rate
    lost: float | None = None

    @property
    def factor(self) -> float:
        return self.lr / float(self.best)

    @property
    def inside(self) -> bool | None:
        low, high = self.best.low, self.best.high
        if low is None or high is None:
            return None
        return low <= self.lr <= high

    def __str__(self) -> str:
        verdict = self.verdict(f"A learning rate of {self.lr:.3g}")
        best = f"The best estimate is {float(self.best):.3g}"
        if self.inside is None:
            return f"{verdict} {best}."
        return f"{verdict} {best} (90 % interval {self.best.band})."

    def verdict(self, subject: str) -> str:
        """Return a sentence that compares this learning rate with the estimated best one.

        subject: the subject of the sentence, such as "Your learning_rate=2e-05".
        """
        times = _rounded(max(self.factor, 1 / self.factor))
        is_high = self.factor > 1
        if 1 / _SAME <= self.factor <= _SAME:
            return f"{subject} is as good as the best estimate."
        if self.inside:
            way = "higher" if is_high else "lower"
            comparison = f"is {times} times {way} than the best estimate, but in its 90 % interval"
        else:
            comparison = f"is about {times} times too {'high' if is_high else 'low'}"
        return f"{subject} {comparison}{self._cost()}."

    def _cost(self) -> str:
        """Return a phrase that states how much of the possible improvement a run would lose."""
        # The ceiling is checked before the fitted curve, because the curve does not know whether
        # a run diverges. At the ceiling a trial did diverge.
        ceiling = self.best.ceiling
        if ceiling is not None and self.lr >= ceiling:
            return f": a run may diverge, as one did at {ceiling:.3g}"
        if self.lost is None:
            return ""
        if self.lost < 0.01:
            return (
                ": less than an estimated 1 % of the possible improvement would be lost"
            )
        return f": an estimated {100 * self.lost:.0f} % of the possible improvement would be lost"


def _rounded(factor: float) -> str:
    """Write a factor as a string with two significant digits, such as 1.5, 48 or 150.

    >>> [_rounded(factor) for factor in (1.52, 48.4, 151.0)]
    ['1.5', '48', '150']
    """
    return f"{float(f'{factor:.2g}'):,g}"


def checked_lr(lr: object) -> float:
    """Convert a learning rate that a user passed to a float.

    Raises:
        RecipeError: the learning rate is not a positive finite number.
    """
    number = plain(lr)
    if not is_positive(number):
        given = shown(lr)
        raise RecipeError(
            f"The learning rate to judge must be a positive finite number, but {given} was"
            " passed.",
            "Pass a number such as 2e-4.",
        )
    return float(number)


def judge(recipe: Recipe, lr: float, at: Reference, steps: int | None) -> Judgement:
    """Compare a learning rate with the recipe's best learning rate for a configuration."""
    best = rate(recipe, at, steps)
    return Judgement(lr, best, _lost(recipe, lr, best, at))


def _lost(recipe: Recipe, lr: float, best: Rate, at: Reference) -> float | None:
    """Estimate which fraction of the possible improvement a run with `lr` would lose.

    The function uses the fitted loss curve of the tried rank that is closest to the target rank. If
    `lr` is two octaves above the best learning rate of the target rank, the function evaluates the
    curve two octaves above the best learning rate of the tried rank.
    """
    if not knows_improvement(recipe):
        return None
    curves = loss_curves(recipe)
    rank = _nearest_tried(curves, at)
    own = known_rate(recipe, rank)
    if rank not in curves or own is None:
        return None
    curve = curves[rank]
    at_best = curve.lost_at(math.log2(float(own)))
    # If the curve's optimum is far from the recipe's, the curve cannot judge other learning rates.
    if at_best is None or at_best > _MOST_AT_BEST:
        return None
    octaves = math.log2(lr / float(best))
    return curve.lost_at(math.log2(float(own)) + octaves)


def _nearest_tried(curves: Iterable[int | None], at: Reference) -> int | None:
    """Return the tried rank that is closest to the target rank, or None for full finetuning."""
    rank = at.rank
    if rank is None:
        return None
    # Distances between ranks are measured in octaves, because scaling laws are powers of the rank.
    ranks = [tried for tried in curves if tried is not None]
    return min(ranks, key=lambda tried: abs(math.log2(tried / rank)), default=None)


def known_rate(recipe: Recipe, rank: int | None) -> Rate | None:
    """Return the recipe's learning rate for a rank, or None if the learning rate also depends on
    values that are unknown, such as alpha.

    Pass None as the rank for full finetuning.
    """
    method: Method = "lora" if rank else "full"
    try:
        return rate(recipe, configuration(recipe, rank, method=method))
    except RankAwareError:
        return None
