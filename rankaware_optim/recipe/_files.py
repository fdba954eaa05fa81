"""A recipe's two files: a TOML, which gives every rate, and the trials beside it. The TOML has the
fields of `Record` by their names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec
import numpy as np
import safetensors.numpy
import tomli
import tomli_w
from msgspec.structs import asdict
from safetensors import SafetensorError

from .._checks import MOST_RANKS, MOST_TRIALS
from .._files import read_bytes, replace_bytes, replaceable
from .._types import Reference
from .._warn import warn
from ..errors import RecipeError
from ..laws import Power, law_from_dict, law_to_dict
from ._rates import rate
from ._record import Record, Trials
from ._settings import differences, plain_value

# Bytes. A calibration's TOML has some 3 kB, and its trials 4 bytes for each value of a curve.
_MOST_TEXT, _MOST_TRIALS, _MOST_HEADER = 256_000, 250_000_000, 100_000
_HEADER = """\
# The learning-rate recipe {!r} of rankaware_optim.
# Read a rate: `rankaware lr FILE --rank 32`. Use it: RankAwareOptimizer(model, AdamW, recipe=FILE).
# Rates are per step, an octave is a factor 2. lr is the one to use, fitted_lr the optimum.
"""
# What a file, a value or a third-party law may raise.
_TROUBLE = (
    ArithmeticError,
    AttributeError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


# --- what the TOML holds --------------------------------------------------------------------------

Row = tuple[float, float, float]
# The fields of `Record`, but with values of TOML, and what follows from them. All are required,
# since a default would stand for a lost line.
_FIELDS = {
    "schema": Literal[1],
    "lr": float,  # the rate to use, and its band
    "band_low": float,
    "band_high": float,
    **get_type_hints(Record, include_extras=True),
    "trials_sha256": str | None,
    "law": dict[str, Any],
    "covariance": tuple[Row, Row, Row],
}
del _FIELDS["tensors"], _FIELDS["missing"]
RecipeFile = msgspec.defstruct(
    "RecipeFile", _FIELDS.items(), forbid_unknown_fields=True
)


def _check_fit(recipe: Record) -> None:
    """Raise a ValueError if no fit has these values."""
    covariance = recipe.covariance
    if not np.allclose(covariance, covariance.T):
        raise ValueError("the covariance is not symmetric")
    spectrum = np.linalg.eigvalsh(covariance)
    if not spectrum[0] >= -1e-6 * abs(spectrum[-1]):
        raise ValueError("a variance of the covariance is negative")
    if recipe.ceiling is not None and recipe.ceiling <= recipe.fitted_lr:
        raise ValueError("the ceiling is not above fitted_lr")


def to_document(recipe: Record, trials_sha256: str = "none") -> dict[str, Any]:
    """Return the contents of a recipe's TOML as plain values."""
    at = rate(recipe, recipe.reference)
    document = {
        "schema": 1,
        "lr": recipe.lr,
        "band_low": at.low,
        "band_high": at.high,
        **_written(vars(recipe)),
        "trials_sha256": trials_sha256,
        "reference": _written(vars(recipe.reference)),
        "law": law_to_dict(recipe.law),
    }
    del document["tensors"], document["missing"]
    return {name: plain_value(value) for name, value in document.items()}


def _written(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with "none" for None, which TOML has not."""
    return {name: "none" if value is None else value for name, value in values.items()}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value == "none" else value for name, value in values.items()}


def _recipe_in(document: dict[str, Any]) -> Record:
    """Return the recipe in a document, without its trials. Raise a ValueError if a value is missing
    or impossible, or if the values do not follow from one another.
    """
    reference = _read(document.get("reference", {}))
    file: Any = msgspec.convert({**_read(document), "reference": reference}, RecipeFile)
    values = {
        **asdict(file),
        "law": law_from_dict(document["law"]),
        # whole numbers stay ints there, since the recipe's hash depends on it
        "reference": Reference(**reference),
        "covariance": np.array(document["covariance"]),
        "ranks": tuple(dict.fromkeys(file.ranks)),  # so that one twice contradicts
    }
    if not isinstance(values["law"], Power):
        raise ValueError("the law is not 'power'")
    recorded = Record.__dataclass_fields__.keys() & values.keys()
    recipe = Record(**{name: values[name] for name in recorded})
    _check_fit(recipe)
    own = to_document(recipe, document["trials_sha256"])
    if contradictions := differences(document, own):
        raise ValueError(f"its values contradict one another: {contradictions}")
    return recipe


# --- files ----------------------------------------------------------------------------------------


def save(recipe: Record, path: str | os.PathLike[str]) -> Path:
    """Write the trials, then the TOML with their hash. Nothing is written that `load` would refuse.

    A reader between the two finds the former TOML, which gives its rates without trials.
    """
    target = Path(path)
    try:
        _check_trials(recipe.tensors)
        arrays = {k: np.ascontiguousarray(v) for k, v in recipe.tensors.items()}
        trials = safetensors.numpy.save(arrays) if arrays else b""
        document = to_document(recipe, _sha256(trials) if trials else "none")
        text = (_HEADER.format(recipe.name) + tomli_w.dumps(document)).encode()
        _recipe_in(_document(text))
        if len(text) > _MOST_TEXT or len(trials) > _MOST_TRIALS:
            raise ValueError(f"it is longer than {_MOST_TEXT:,} bytes, or its trials")
        target.parent.mkdir(parents=True, exist_ok=True)
        real = replaceable(target)
        if trials:
            replace_bytes(_trials_beside(real), trials)
        replace_bytes(target, text)
    except _TROUBLE as error:
        cure = "Choose a writable folder, and settings that are numbers or strings."
        raise _error(target, "written", error, cure) from error
    return target


def load(path: str | os.PathLike[str]) -> Record:
    """Return the recipe in a TOML file, with its trials if they lie beside it."""
    target = Path(path)
    try:
        document = _document(read_bytes(target, _MOST_TEXT))
        recipe = _recipe_in(document)
    except _TROUBLE as error:
        cure = "Check its path, restore it or remake it."
        raise _error(target, "read", error, cure) from error
    digest = document["trials_sha256"]
    if digest == "none":
        return recipe
    beside = _trials_beside(target)
    if not os.path.lexists(beside):
        beside = _trials_beside(Path(os.path.realpath(target)))
    try:
        data = read_bytes(beside, _MOST_TRIALS)
        if _sha256(data) != digest:
            raise ValueError("they are of another save")
        if int.from_bytes(data[:8], "little") > _MOST_HEADER:
            raise ValueError("their header is too long")
        trials = safetensors.numpy.load(data)
        _check_trials(trials)
    except (*_TROUBLE, SafetensorError) as error:
        if not isinstance(error, FileNotFoundError):
            warn(
                f"The trials {beside} of recipe {recipe.name!r} cannot be used: {error}. The recipe"
                " gives its rates without them. Copy both of its files."
            )
        return replace(recipe, missing=beside.name)
    return replace(recipe, tensors=trials)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _error(target: Path, verb: str, error: BaseException, cure: str) -> RecipeError:
    cause = str(error).removesuffix(".")
    return RecipeError(f"The recipe {target} cannot be {verb}: {cause}.", cure)


def _trials_beside(toml: Path) -> Path:
    return toml.with_suffix(".trials.safetensors")


def _document(text: bytes) -> dict[str, Any]:
    # Windows' editors put a mark first. Python's own tomllib takes minutes for a key of many dots.
    return tomli.loads(text.decode("utf-8-sig"))


# The arrays of trials, by name: the kind of dtype, and the number of axes.
TRIAL = {
    "rank": "i1",
    "seed": "i1",
    "lr": "f1",
    "own_lr": "f1",
    "value": "f1",
    "diverged": "b1",
    "pruned": "b1",
    "steps": "i1",
    "curve": "f2",
}


def _check_trials(trials: Trials) -> None:
    """Raise a ValueError if an array of trials is none that a calibration makes."""
    for name, array in trials.items():
        if f"{array.dtype.kind}{array.ndim}" != TRIAL.get(name):
            raise ValueError(f"the array of trials {name!r} is impossible")
    counts = {len(array) for array in trials.values()}
    ranks = np.unique(trials.get("rank", ()))
    is_long = max(counts, default=0) > MOST_TRIALS
    if len(counts) > 1 or is_long or len(ranks) > MOST_RANKS + 1:
        raise ValueError(
            f"arrays of trials differ in length, or have more than {MOST_TRIALS} trials or"
            f" {MOST_RANKS} ranks"
        )
