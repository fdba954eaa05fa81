"""The trials in a recipe, as the fit saw them. (`calibration/_trials.py` reads the trials of a
study.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..fitting import (
    LossCurve,
    Observation,
    curves_of,
    end_of,
    improvement_is_known,
    impute,
    loss_at_start,
    noise_of,
    recent_mean,
)

if TYPE_CHECKING:
    from ._recipe import Recipe

_SAME = (
    1e-4  # curves are kept in float32, so a mean of them differs this much from a score
)


def loss_curves(recipe: Recipe) -> dict[int | None, LossCurve]:
    """Return the fitted curve of every rank tried, None for full finetuning.

    Their x is log2 of the learning rates at which the rank's A matrices, or whole weights, trained.
    They are empty if the recipe has no trials.
    """
    return curves_of(observations_of(recipe))


def knows_improvement(recipe: Recipe) -> bool:
    """Return whether the trials' scores are losses that training improved, so that a share of the
    possible improvement means something. Rewards and scores of the user's own are not.
    """
    return recipe.score == "loss" and improvement_is_known(observations_of(recipe))


def end_of_tried(recipe: Recipe, rank: int | None) -> str:
    """Return "lowest" or "highest" if a rank's best learning rate is the lowest or highest one that
    was tried there, else "". rank: None for full finetuning.
    """
    return end_of(observations_of(recipe), rank)


def observations_of(recipe: Recipe) -> list[Observation]:
    """Return the trials as the input of a fit, at their own learning rates."""
    tensors = recipe.tensors
    if not {"rank", "seed", "own_lr", "value"} <= tensors.keys():
        return []
    values = tensors["value"]
    lost = tensors.get("diverged", ~np.isfinite(values))
    pruned = tensors.get("pruned", np.zeros(len(values), bool))
    whole: list[tuple[Observation, npt.NDArray[np.float64]]] = []
    stopped: list[int] = []
    for i in range(len(values)):
        # A trial that ended before its optimizer was built has no learning rate.
        if not 0 < tensors["own_lr"][i] < math.inf:
            continue
        if pruned[i]:
            stopped.append(i)
        else:
            whole.append((_observation(recipe, i, bool(lost[i])), _curve(recipe, i)))
    imputed = (_imputed(recipe, i, whole) for i in stopped)
    return [o for o, _ in whole] + [o for o in imputed if o is not None]


def _curve(recipe: Recipe, i: int) -> npt.NDArray[np.float64]:
    """Return the values that a trial yielded, none for a sweep's run."""
    curves = recipe.tensors.get("curve")
    if curves is None:
        return np.zeros(0)
    curve = np.asarray(curves[i], dtype=np.float64)
    return np.asarray(curve[np.isfinite(curve)])


def _observation(recipe: Recipe, i: int, lost: bool) -> Observation:
    tensors = recipe.tensors
    value = math.inf if lost else float(tensors["value"][i])
    rank = int(tensors["rank"][i]) or None
    seed = int(tensors["seed"][i])
    x = math.log2(tensors["own_lr"][i])
    curve = _curve(recipe, i)
    if not len(curve):
        # A sweep has final losses only. Without `start` the run shows no improvement.
        start = float(tensors["start"][i]) if "start" in tensors else value
        start = start if math.isfinite(start) else 0.0
        return Observation(rank, seed, x, value, start, tail=value, returned=True)
    tail = recent_mean(curve)
    # The file does not say whether a score was returned. One that was not is the curve's end.
    return Observation(
        rank,
        seed,
        x,
        value,
        loss_at_start(curve),
        tail,
        returned=not math.isclose(value, tail, rel_tol=_SAME),
        first=float(curve[0]),
        noise=noise_of(curve),
    )


def _imputed(
    recipe: Recipe,
    i: int,
    whole: list[tuple[Observation, npt.NDArray[np.float64]]],
) -> Observation | None:
    """Return a run that was stopped early with the score that it would have had, or None."""
    setting = int(recipe.tensors["rank"][i]) or None, int(recipe.tensors["seed"][i])
    paired = [pair for pair in whole if (pair[0].rank, pair[0].seed) == setting]
    finite = [pair for pair in paired if math.isfinite(pair[0].value)]
    if not finite:
        return None
    best, beside = min(finite, key=lambda pair: pair[0].value)
    x = math.log2(recipe.tensors["own_lr"][i])
    return impute(x, _curve(recipe, i), best, beside)
