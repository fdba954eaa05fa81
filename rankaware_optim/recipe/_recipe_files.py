"""A recipe's two files: a TOML, which gives every rate, and the trials beside it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import safetensors.numpy
import tomli
import tomli_w
from safetensors import SafetensorError

from .._checks import MOST_RANKS, MOST_TRIALS, RANGES
from .._files import read_bytes, replace_bytes, replaceable
from .._warn import warn
from ..errors import RecipeError
from ._schema import RecipeFile, Trials, to_document, values_in

if TYPE_CHECKING:
    from ._recipe import Recipe

# Bytes. A calibration's TOML has some 3 kB, and its trials 4 bytes for each value of a curve.
_MOST_TEXT, _MOST_TRIALS, _MOST_HEADER = 256_000, 250_000_000, 100_000
_HEADER = """\
# The learning-rate recipe {!r} of rankaware_optim.
# Read a rate: `rankaware lr FILE --rank 32`. Use it: RankAwareOptimizer(model, AdamW, recipe=FILE).
# Rates are per step, an octave is a factor 2. rate.lr is the one to use, fit.fitted_lr the optimum.
"""
_RESTORE = "Check its path, restore it or remake it."
# What a file, a value or a third-party law may raise.
_TROUBLE = (ArithmeticError, OSError, RecursionError, TypeError, ValueError)


def save(recipe: Recipe, path: str | os.PathLike[str]) -> Path:
    """Write the trials, then the TOML with their hash. Nothing is written that `load` would refuse.

    A reader between the two finds the former TOML, which gives its rates without trials.
    """
    target = _toml_path(path)
    try:
        _check_trials(recipe.tensors)
        arrays = {k: np.ascontiguousarray(v) for k, v in recipe.tensors.items()}
        trials = safetensors.numpy.save(arrays) if arrays else b""
        document = to_document(recipe, hashlib.sha256(trials).hexdigest())
        text = (_HEADER.format(recipe.name) + tomli_w.dumps(document)).encode()
        if len(text) > _MOST_TEXT or len(trials) > _MOST_TRIALS:
            raise ValueError(
                f"it has {len(text):,} bytes and its trials {len(trials):,}, more than"
                f" {_MOST_TEXT:,} and {_MOST_TRIALS:,}"
            )
        values_in(_decoded(text))
        target.parent.mkdir(parents=True, exist_ok=True)
        real = replaceable(target)
        if trials:
            replace_bytes(_trials_beside(real), trials)
        replace_bytes(target, text)
    except _TROUBLE as error:
        cure = "Choose a writable folder, and settings that are numbers or strings."
        raise _error(target, "written", error, cure) from error
    return target


def load(kind: type[Recipe], path: str | os.PathLike[str]) -> Recipe:
    """Return the recipe, of its class, in a TOML file, with its trials if they lie beside it."""
    target = _toml_path(path)
    try:
        file = _decoded(read_bytes(target, _MOST_TEXT))
        recipe = kind(**values_in(file))
        file.check_band(recipe)
    except _TROUBLE as error:
        raise _error(target, "read", error, _RESTORE) from error
    table = file.trials
    if table == "none":
        return recipe
    beside = _trials_beside(target)
    if not os.path.lexists(beside):
        beside = _trials_beside(Path(os.path.realpath(target)))
    try:
        tensors = _trials(beside, table.sha256)
    except FileNotFoundError:
        return replace(recipe, missing=beside.name)
    except (*_TROUBLE, SafetensorError) as error:
        warn(
            f"The trials {beside} of recipe {file.name!r} cannot be used: {error}. The recipe"
            " gives its rates without them. Copy both of its files."
        )
        return replace(recipe, missing=beside.name)
    try:
        table.check(tensors)
    except ValueError as error:
        raise _error(target, "read", error, _RESTORE) from error
    return replace(recipe, tensors=tensors)


def _error(target: Path, verb: str, error: BaseException, cure: str) -> RecipeError:
    cause = getattr(error, "cause", str(error)).removesuffix(".")
    return RecipeError(
        f"The recipe {target} cannot be {verb}: {cause}.", getattr(error, "cure", cure)
    )


def _toml_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".toml":
        raise RecipeError(
            f"{str(target)!r} is no recipe, whose file is a .toml.",
            "Give its path, such as recipes/digits.toml.",
        )
    return target


def _trials_beside(toml: Path) -> Path:
    return toml.with_suffix(".trials.safetensors")


def _decoded(text: bytes) -> RecipeFile:
    # Windows' editors put a mark first. Python's own tomllib takes minutes for a key of many dots.
    return msgspec.convert(tomli.loads(text.decode("utf-8-sig")), RecipeFile)


# --- the trials -----------------------------------------------------------------------------------

# By name: the kind of its dtype, and its number of axes.
_TRIAL = {
    "rank": ("i", 1),
    "seed": ("i", 1),
    "lr": ("f", 1),
    "own_lr": ("f", 1),
    "value": ("f", 1),
    "diverged": ("b", 1),
    "pruned": ("b", 1),
    "steps": ("i", 1),
    "curve": ("f", 2),
}


def _trials(path: Path, sha256: str) -> dict[str, Any]:
    """Return the trials in a file of this hash."""
    data = read_bytes(path, _MOST_TRIALS)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError("they are of another save")
    if int.from_bytes(data[:8], "little") > _MOST_HEADER:
        raise ValueError("their header is too long")
    trials = safetensors.numpy.load(data)
    _check_trials(trials)
    return trials


def _check_trials(trials: Trials) -> None:
    """Raise a ValueError if an array of trials is none that a calibration makes."""
    for name, array in trials.items():
        if (array.dtype.kind, array.ndim) != _TRIAL.get(name):
            what = f"{array.dtype} and {array.ndim} axes"
            raise ValueError(f"the array of trials {name!r} cannot have {what}")
    counts = {len(array) for array in trials.values()}
    if len(counts) > 1 or max(counts, default=0) > MOST_TRIALS:
        raise ValueError(
            f"arrays of trials differ in length, or have more than {MOST_TRIALS} trials"
        )
    ranks = np.unique(trials.get("rank", np.zeros(0, int)))
    if len(ranks) > MOST_RANKS + 1 or (ranks < 0).any():
        raise ValueError(f"there are more than {MOST_RANKS} ranks, or one below 0")
    low, high = RANGES["trial_lr"]
    for name in {"lr", "own_lr"} & trials.keys():
        rates = trials[name]
        unknown = np.isnan(rates) & (name == "own_lr")
        if not (unknown | ((rates >= low) & (rates <= high))).all():
            raise ValueError(f"a rate of the trials is impossible, in {name!r}")
