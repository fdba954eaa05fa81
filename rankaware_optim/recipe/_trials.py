"""This module converts the trials in a recipe to the observations that a fit needs.

(`calibration/_trials.py` reads the trials of a study.)
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

# The relative tolerance between a score and the mean of a curve's end. Files store curves in
# float32, but scores in float64.
_SAME = 1e-4


def loss_curves(recipe: Recipe) -> dict[int | None, LossCurve]:
    """Return a dictionary with a fitted loss curve for every rank that was tried.

    In this dictionary, the key None stands for full finetuning. The x axis of a loss curve is log2
    of the learning rate of the LoRA A matrices, or of the weights in full finetuning. If the
    recipe's trials are missing, the dictionary is empty.
    """
    return curves_of(observations_of(recipe))


def knows_improvement(recipe: Recipe) -> bool:
    """Return whether the recipe's trials show how far training can improve the loss.

    The possible improvement is unknown if the trials were scored by rewards or by values from the
    user's code, or if training did not improve the loss.
    """
    return recipe.score == "loss" and improvement_is_known(observations_of(recipe))


def end_of_tried(recipe: Recipe, rank: int | None) -> str:
    """Return "lowest" or "highest" if a rank's best learning rate is the lowest or highest one
    tried.

    Return an empty string if learning rates below and above the best one were also
    tried. Pass None as the rank for full finetuning.
    """
    return end_of(observations_of(recipe), rank)


def observations_of(recipe: Recipe) -> list[Observation]:
    """Convert the recipe's trials to observations, from which a loss curve is fitted.

    Trials without a learning rate are left out. If a trial was stopped early, its final score is
    estimated by comparing the trial with a finished trial of the same rank and seed.
    """
    tensors = recipe.tensors
    if not {"rank", "seed", "own_lr", "value"} <= tensors.keys():
        return []
    values = tensors["value"]
    lost = tensors.get("diverged", ~np.isfinite(values))
    pruned = tensors.get("pruned", np.zeros(len(values), bool))
    whole: list[tuple[Observation, npt.NDArray[np.float64]]] = []
    stopped: list[int] = []
    for i in range(len(values)):
        # If a trial failed before its optimizer was built, its learning rate is unknown.
        if not 0 < tensors["own_lr"][i] < math.inf:
            continue
        if pruned[i]:
            stopped.append(i)
        else:
            whole.append((_observation(recipe, i, bool(lost[i])), _curve(recipe, i)))
    imputed = (_imputed(recipe, i, whole) for i in stopped)
    return [o for o, _ in whole] + [o for o in imputed if o is not None]


def _curve(recipe: Recipe, i: int) -> npt.NDArray[np.float64]:
    """Return the training losses of a trial, or an empty array for a run of a sweep."""
    curves = recipe.tensors.get("curve")
    if curves is None:
        return np.zeros(0)
    curve = np.asarray(curves[i], dtype=np.float64)
    return np.asarray(curve[np.isfinite(curve)])


def _observation(recipe: Recipe, i: int, lost: bool) -> Observation:
    """Convert trial `i` to an observation. A trial that diverged gets an infinite score."""
    tensors = recipe.tensors
    value = math.inf if lost else float(tensors["value"][i])
    rank = int(tensors["rank"][i]) or None
    seed = int(tensors["seed"][i])
    x = math.log2(tensors["own_lr"][i])
    curve = _curve(recipe, i)
    if not len(curve):
        # A sweep only has final losses. If it has no losses before training either, the run is
        # treated as if the loss had not improved.
        start = float(tensors["start"][i]) if "start" in tensors else value
        start = start if math.isfinite(start) else 0.0
        return Observation(rank, seed, x, value, start, tail=value, returned=True)
    tail = recent_mean(curve)
    # The file does not record whether the training function returned the score. If it did not,
    # the score is the mean of the last values of the curve.
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
    """Return an observation with the estimated final score of a trial that was stopped early.

    Return None if the recipe does not contain a finished trial with the same rank and seed.
    """
    setting = int(recipe.tensors["rank"][i]) or None, int(recipe.tensors["seed"][i])
    paired = [pair for pair in whole if (pair[0].rank, pair[0].seed) == setting]
    finite = [pair for pair in paired if math.isfinite(pair[0].value)]
    if not finite:
        return None
    best, beside = min(finite, key=lambda pair: pair[0].value)
    x = math.log2(recipe.tensors["own_lr"][i])
    return impute(x, _curve(recipe, i), best, beside)
