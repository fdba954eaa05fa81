"""Convert a recipe to the sections of its TOML file and back, checking what is read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .._checks import MOST_RANKS, MOST_TRIALS, RANGES
from .._types import Reference
from ..errors import InvalidReferenceError, RankAwareError
from ..laws import Power, law_from_dict, law_to_dict
from ._document import Document, impossible
from ._horizon import Horizon
from ._io import Array
from ._settings import plain_setting
from ._uncertainty import own_band

if TYPE_CHECKING:
    from ._recipe import Recipe

_MOST_VARIANCE = 1e4  # octaves²: a standard deviation of 100 octaves
_WHOLE, _FLOAT, _BOOL = ("int64",), ("float32", "float64"), ("bool",)
_LENGTHS = (
    "the trials had several lengths, which are not used any more: the slope alone moves the rate to"
    " other steps"
)
_ANY = (*_WHOLE, *_FLOAT, *_BOOL)


def _within(name: str) -> Callable[[Array], npt.NDArray[np.bool_]]:
    low, high = RANGES[name]

    def check(value: Array) -> npt.NDArray[np.bool_]:
        exact = value.astype(
            np.float64
        )  # float32 cannot hold the ends, and NumPy 1 would round them
        return (exact >= low) & (exact <= high)

    return check


# Tensors of trials: dtypes, number of axes, and a check of the numbers.
_TRIAL: Mapping[
    str, tuple[tuple[str, ...], int, Callable[[Array], npt.NDArray[np.bool_]] | None]
] = {
    "rank": (_WHOLE, 1, lambda value: (value == 0) | _within("rank")(value)),
    "seed": (_WHOLE, 1, None),
    "lr": (_FLOAT, 1, _within("trial_lr")),
    "own_lr": (_FLOAT, 1, lambda value: np.isnan(value) | _within("trial_lr")(value)),
    "value": (_FLOAT, 1, None),
    "diverged": (_BOOL, 1, None),
    "pruned": (_BOOL, 1, None),
    "steps": (_WHOLE, 1, lambda value: (value == 0) | _within("steps")(value)),
    "curve": (_FLOAT, 2, None),
    "planned_steps": (_WHOLE, 1, lambda value: (value == 0) | _within("steps")(value)),
    "planned_batch": (_FLOAT, 1, lambda value: (value == 0) | _within("batch")(value)),
}


def header(recipe: Recipe) -> str:
    """Return three comment lines for the top of the file."""
    return (
        f"# The learning-rate recipe {recipe.name!r} of rankaware_optim.\n# Read a rate: `rankaware"
        " lr FILE --rank 32`. Use it: RankAwareOptimizer(model, AdamW, recipe=FILE).\n# Rates are"
        " per step. An octave is a factor 2. lr is the rate to use, fitted_lr the fitted"
        " optimum.\n"
    )


def to_document(recipe: Recipe) -> dict[str, Any]:
    """Return the contents of the TOML file by section. None means that nothing is written."""
    r, trials = recipe.reference, recipe.tensors
    low, high = own_band(recipe)
    # Training steps of all trials, and the pruned and diverged ones among them.
    counted = [
        key for key in ("steps", "pruned", "diverged") if key in trials and "steps" in trials
    ]
    spent = {key: int(trials[key].sum()) for key in counted}
    return {
        "name": recipe.name,
        "rate": {
            "lr": recipe.lr,
            "fitted_lr": recipe.fitted_lr,
            "band_low": low,
            "band_high": high,
            "ceiling": recipe.ceiling,
            "lean_octaves": recipe.lean,
            "steepness": recipe.steepness or None,
            "scatter_octaves": recipe.scatter or None,
        },
        "reference": {
            "method": r.method,
            "rank": r.rank,
            "alpha": r.alpha,
            "rslora": r.rslora,
            "init": r.init,
            "fan_in": r.fan_in or "unknown",
            "full_fan_in": recipe.full_fan_in,
            "batch": r.batch,
        },
        "scaling_rule": recipe.scaling_rule,
        "law": law_to_dict(recipe.law),
        "optimizer": {
            "class": recipe.optimizer,
            "settings": {k: plain_setting(v) for k, v in recipe.settings.items()},
        },
        "horizon": {
            "steps": recipe.steps or "unknown",
            "batch": recipe.batch,
            "warmup_share": recipe.warmup,
            "slope": recipe.horizon.slope,
            "slope_sd": recipe.horizon.slope_sd,
        },
        "seen": {
            "ranks": list(recipe.ranks),
            "full": recipe.full_seen,
            "seed": recipe.seed,
            "notes": list(recipe.notes),
            "other_rates": dict(recipe.other_rates),
        },
        "fit": {"covariance": np.asarray(recipe.covariance).tolist()},
        "spent": None if "steps" not in trials else {"trials": len(trials["steps"]), **spent},
        "versions": dict(recipe.versions),
        "source": dict(recipe.source),
    }


def from_document(
    cls: type[Recipe],
    found: Document,
    tensors: Mapping[str, Array],
    missing: str,
    target: str | os.PathLike[str],
) -> Recipe:
    """Return the recipe in its files. Checks that the schema cannot express are made here."""
    path, at, seen, horizon = Path(target), found.reference, found.seen, found.horizon
    try:
        law = law_from_dict(found.law)
    except RankAwareError as error:
        raise impossible(path, error.cause.removesuffix("."), "law", error.cure) from error
    except Exception as error:  # a third-party law may raise anything
        raise impossible(path, f"{type(error).__name__}: {error}", "law") from error
    try:
        width = None if at.fan_in == "unknown" else at.fan_in
        reference = Reference(at.rank, at.alpha, at.rslora, at.init, width, at.method, at.batch)
    except InvalidReferenceError as error:
        raise impossible(path, error.cause.removesuffix("."), "reference") from error
    covariance = (
        tensors.get("fit.covariance")
        if found.fit is None
        else np.array(found.fit.covariance, np.float64)
    )
    made = cls(
        name=found.name,
        fitted_lr=found.rate.fitted_lr,
        lean=found.rate.lean_octaves,
        steepness=found.rate.steepness,
        scatter=found.rate.scatter_octaves,
        ceiling=found.rate.ceiling,
        reference=reference,
        law=law if isinstance(law, Power) else Power(law=law),
        covariance=_covariance(covariance, path),
        scaling_rule=found.scaling_rule,
        full_fan_in=at.full_fan_in,
        ranks=seen.ranks,
        full_seen=seen.full,
        optimizer=found.optimizer.name,
        settings=found.optimizer.settings,
        steps=None if horizon.steps == "unknown" else horizon.steps,
        batch=horizon.batch,
        warmup=horizon.warmup_share,
        horizon=Horizon(horizon.slope, horizon.slope_sd),
        seed=seen.seed,
        other_rates=seen.other_rates,
        versions=found.versions,
        source=found.source,
        notes=(*seen.notes, _LENGTHS) if horizon.tried else seen.notes,
        tensors=_trials(tensors, path),
        missing=missing,
    )
    try:
        own_band(made)
    except OverflowError as error:
        raise impossible(path, "its band has no bounds", "fit.covariance") from error
    if not math.isclose(found.rate.lr, made.lr, rel_tol=1e-6):
        raise impossible(path, "it does not follow from fitted_lr and lean_octaves", "rate.lr")
    return made


def _covariance(tensor: Array | None, target: Path) -> Array:
    """Return the covariance, checked to be one. It is symmetric up to rounding."""
    where = "fit.covariance"
    if tensor is None or tensor.shape != (3, 3) or tensor.dtype.name not in _FLOAT:
        raise impossible(target, "there is no 3 × 3 covariance of floats", where)
    if not bool((np.abs(tensor) <= _MOST_VARIANCE).all()):
        raise impossible(target, f"it is not finite, or above {_MOST_VARIANCE:g}", where)
    if not np.allclose(tensor, tensor.T, rtol=1e-6, atol=1e-6 * float(np.abs(tensor).max())):
        raise impossible(target, "it is not symmetric", where)
    spectrum = np.linalg.eigvalsh((tensor + tensor.T).astype(np.float64))
    if spectrum[0] < -1e-6 * abs(spectrum[-1]):
        raise impossible(target, "a variance is negative", where)
    return tensor


def _trials(tensors: Mapping[str, Array], target: Path) -> dict[str, Array]:
    trials = {
        key.removeprefix("trial."): value
        for key, value in tensors.items()
        if key.startswith("trial.")
    }
    for key, value in trials.items():
        kinds, axes, good = _TRIAL.get(key, (_ANY, value.ndim or 1, None))
        if value.dtype.name not in kinds or value.ndim != axes:
            raise impossible(target, f"it has {value.dtype} and {value.ndim} axes", f"trial.{key}")
        if good is not None and not bool(good(value).all()):
            raise impossible(target, "a trial has a value out of range", f"trial.{key}")
    if (
        len(counts := {len(value) for value in trials.values()}) > 1
        or max(counts, default=0) > MOST_TRIALS
    ):
        raise impossible(
            target, f"tensors have different numbers of trials, or more than {MOST_TRIALS}", "trial"
        )
    if len(np.unique(trials.get("rank", ()))) > MOST_RANKS + 1:
        raise impossible(target, f"there are more than {MOST_RANKS} ranks", "trial.rank")
    return trials
