"""A recipe's two files: a TOML, which is enough for every learning rate, and the trials beside it.

`RecipeFile` is the TOML's schema. recipes/SCHEMA.md describes each field for a reader of the file.
(Reading and replacing files in general is in `rankaware_optim/_files.py`.)
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
import safetensors.numpy
import tomli
import tomli_w
from msgspec import Meta
from msgspec.structs import asdict
from safetensors import SafetensorError

from .._checks import MOST_RANKS, MOST_TRIALS, limits, shown
from .._files import read_bytes, replace_bytes, replaceable
from .._types import Reference, Scaling
from .._warn import warn
from ..errors import LawError, RankAwareError, RecipeError
from ..laws import Power, law_from_dict, law_to_dict
from ._rates import rate
from ._settings import differences, plain_value

if TYPE_CHECKING:
    from ._recipe import Recipe, Trials

# Largest files, in bytes. The TOML of a calibration has about 3 kB, and its trials have 4 bytes for
# each value of a curve.
_MOST_TEXT, _MOST_TRIALS, _MOST_HEADER = 256_000, 250_000_000, 100_000
_HEADER = """\
# The learning-rate recipe {!r} of rankaware_optim.
# Print a learning rate: `rankaware lr FILE --rank 32`.
# Use it: RankAwareOptimizer(model, AdamW, recipe=FILE).
# All rates are learning rates per step, and an octave is a factor of 2. Use lr; fitted_lr is the
# optimum before a safety margin.
"""
# What reading a file, checking a value or calling a third-party law may raise.
_TROUBLE = (
    ArithmeticError,
    AttributeError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


# --- the TOML -------------------------------------------------------------------------------------

Lr = Annotated[float, limits("lr")]
Octaves = Annotated[float, limits("octaves")]
FanIn = Annotated[float, limits("fan_in")]
Rank = Annotated[int, limits("rank")]
Share = Annotated[float, limits("share")]
Steps = Annotated[int, limits("steps")]
Steepness = Annotated[float, limits("steepness")]
Plain = bool | Annotated[int, limits("seed")] | float | str
Row = tuple[float, float, float]
Document = dict[str, Any]  # a TOML as Python reads it


class RecipeFile(msgspec.Struct, forbid_unknown_fields=True):
    """The TOML, field by field as it is written. "none" is read as None.

    Every field is required: a default would silently stand in for a line that was lost. The first
    four and `trials_sha256` follow from the others or belong to the file. The rest are fields of
    `Recipe`, which explains them, under the same names.
    """

    schema: Literal[1]
    lr: float  # the learning rate to use, and its 90 % interval
    band_low: float
    band_high: float
    name: str
    fitted_lr: Lr
    covariance: tuple[Row, Row, Row]
    margin: Octaves
    ceiling: Lr | None
    scaling_rule: Scaling
    full_fan_in: FanIn | None
    ranks: Annotated[tuple[Rank, ...], Meta(max_length=MOST_RANKS)]
    full_seen: bool
    optimizer: str
    steps: Steps | None
    warmup: Share | None
    notes: tuple[str, ...]
    steepness: Steepness
    scatter: Octaves
    score: Literal["loss", "reward", "own"]
    trials_sha256: str | None
    # The tables of a TOML come last.
    reference: Reference
    law: dict[str, object]
    settings: dict[str, Plain | tuple[Plain, ...]]
    other_rates: dict[str, Lr | Literal["base"]]
    layers: dict[str, FanIn]
    versions: dict[str, str]
    source: dict[str, str]


_OF_THE_FILE = {"schema", "lr", "band_low", "band_high", "trials_sha256"}


def to_document(recipe: Recipe, trials_sha256: str = "none") -> Document:
    """Return the contents of a recipe's TOML as plain values."""
    at = rate(recipe, recipe.reference)
    of_the_file = {
        "schema": 1,
        "lr": recipe.lr,
        "band_low": at.low,
        "band_high": at.high,
        "trials_sha256": trials_sha256,
        "reference": _without_none(vars(recipe.reference)),
        "law": law_to_dict(recipe.law),
    }
    values = _without_none({**vars(recipe), **of_the_file})
    return {name: plain_value(values[name]) for name in RecipeFile.__struct_fields__}


def _without_none(values: Mapping[str, object]) -> Document:
    """Return values with "none" in place of None, which TOML does not have."""
    return {name: "none" if value is None else value for name, value in values.items()}


def _with_none(values: Mapping[str, object]) -> Document:
    """Return values with None in place of "none"."""
    return {name: None if value == "none" else value for name, value in values.items()}


def _recipe_in(document: Document, kind: type[Recipe]) -> Recipe:
    """Return the recipe in a document, without its trials.

    Raises:
        ValueError: a value is missing or impossible, or the values contradict one another.
    """
    reference = _with_none(document.get("reference", {}))
    file = msgspec.convert({**_with_none(document), "reference": reference}, RecipeFile)
    law = law_from_dict(document["law"])
    if not isinstance(law, Power):
        raise ValueError("the law is not 'power'")
    values = {
        **asdict(file),
        "law": law,
        # msgspec turned whole numbers of the reference into floats, and the recipe's hash depends
        # on how they are written.
        "reference": Reference(**reference),
        "covariance": np.array(document["covariance"]),
        # Without repetitions, so that a rank that stands twice counts as a contradiction below.
        "ranks": tuple(dict.fromkeys(file.ranks)),
    }
    fields = values.keys() - _OF_THE_FILE
    recipe = kind(**{name: values[name] for name in fields})
    _check_fit(recipe)
    again = to_document(recipe, document["trials_sha256"])
    if contradictions := differences(document, again):
        raise ValueError(f"its values contradict one another: {contradictions}")
    return recipe


def _check_fit(recipe: Recipe) -> None:
    """Raise a ValueError if no fit has these values."""
    covariance = recipe.covariance
    if not np.allclose(covariance, covariance.T):
        raise ValueError("the covariance is not symmetric")
    spectrum = np.linalg.eigvalsh(covariance)
    # Rounding may make the smallest variance slightly negative.
    if not spectrum[0] >= -1e-6 * abs(spectrum[-1]):
        raise ValueError("a variance of the covariance is negative")
    if recipe.ceiling is not None and recipe.ceiling <= recipe.fitted_lr:
        raise ValueError("the ceiling is not above fitted_lr")


# --- files ----------------------------------------------------------------------------------------


def save(recipe: Recipe, path: str | os.PathLike[str]) -> Path:
    """Write the trials, then the TOML with their hash. A recipe that `load` would reject is not
    written.

    A reader that comes between the two writes finds the former TOML and the new trials. Their hash
    does not match, so it gets the former learning rates without trials, never a mixture.
    """
    target = _path(path)
    try:
        _check_trials(recipe.tensors)
        arrays = {k: np.ascontiguousarray(v) for k, v in recipe.tensors.items()}
        trials = safetensors.numpy.save(arrays) if arrays else b""
        document = to_document(recipe, _sha256(trials) if trials else "none")
        text = (_HEADER.format(recipe.name) + tomli_w.dumps(document)).encode()
        _recipe_in(_document(text), type(recipe))
        if len(text) > _MOST_TEXT or len(trials) > _MOST_TRIALS:
            raise ValueError(
                f"it is longer than {_MOST_TEXT:,} bytes, or its trials are longer than"
                f" {_MOST_TRIALS:,}"
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        # The trials go beside the file that a link points to, and are written first, because the
        # TOML has their hash.
        real = replaceable(target)
        if trials:
            replace_bytes(_trials_beside(real), trials)
        replace_bytes(target, text)
    except _TROUBLE as error:
        cure = "Choose a writable folder, and settings that are numbers or strings."
        raise _error(target, "written", error, cure) from error
    return target


def load(path: str | os.PathLike[str], kind: type[Recipe]) -> Recipe:
    """Return the recipe in a TOML file, with its trials if they are beside it.

    kind: the class of the recipe.
    """
    target = _path(path)
    try:
        document = _document(read_bytes(target, _MOST_TEXT))
        recipe = _recipe_in(document, kind)
    except LawError as error:
        # The file is fine: this process does not know its law.
        raise _error(target, "read", error, error.cure) from error
    except OSError as error:
        raise _error(target, "read", error, "Check the path.") from error
    except _TROUBLE as error:
        cure = "Check the path, restore the file from a copy, or make it again."
        raise _error(target, "read", error, cure) from error
    digest = document["trials_sha256"]
    if digest == "none":
        return recipe
    trials_file = _trials_beside(target)
    if not os.path.lexists(trials_file):
        # In the Hub's cache the TOML is a link, and the trials are beside its target.
        trials_file = _trials_beside(Path(os.path.realpath(target)))
    try:
        return replace(recipe, tensors=_read_trials(trials_file, digest))
    except FileNotFoundError:
        pass
    except (*_TROUBLE, SafetensorError) as error:
        warn(
            f"The trials {trials_file} of recipe {recipe.name!r} cannot be used: {error}. The"
            " recipe's learning rates do not need them. Copy both of its files to have the trials"
            " too."
        )
    return replace(recipe, missing=trials_file.name)


def _path(path: str | os.PathLike[str]) -> Path:
    if isinstance(path, (str, os.PathLike)):
        return Path(path)
    raise RecipeError(
        f"A recipe's path is {shown(path)}.", "Pass the path of its TOML file."
    )


def _read_trials(path: Path, digest: str) -> Trials:
    """Return the arrays in a file of trials. Its SHA-256 must be `digest`."""
    data = read_bytes(path, _MOST_TRIALS)
    if _sha256(data) != digest:
        raise ValueError("they were saved with another recipe")
    # The first eight bytes of a safetensors file are the length of its header.
    if int.from_bytes(data[:8], "little") > _MOST_HEADER:
        raise ValueError("their header is too long")
    trials = safetensors.numpy.load(data)
    _check_trials(trials)
    return trials


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _error(target: Path, verb: str, error: BaseException, cure: str) -> RecipeError:
    cause = str(error).removesuffix(".")
    if isinstance(error, RankAwareError):
        cause = error.cause.removesuffix(".")
    return RecipeError(f"The recipe {target} cannot be {verb}: {cause}.", cure)


def _trials_beside(toml: Path) -> Path:
    return toml.with_suffix(".trials.safetensors")


def _document(text: bytes) -> Document:
    # Editors on Windows put a byte-order mark first, hence utf-8-sig. Python's own tomllib takes
    # minutes for a key with many dots.
    return tomli.loads(text.decode("utf-8-sig"))


# The arrays of trials by name: the kind of dtype, and the number of axes.
TRIAL = {
    "rank": "i1",
    "seed": "i1",
    "lr": "f1",
    "own_lr": "f1",
    "value": "f1",
    "diverged": "b1",
    "pruned": "b1",
    "start": "f1",
    "steps": "i1",
    "curve": "f2",
}


def _check_trials(trials: Trials) -> None:
    """Raise a ValueError if no calibration makes such arrays of trials."""
    for name, array in trials.items():
        if f"{array.dtype.kind}{array.ndim}" != TRIAL.get(name):
            raise ValueError(f"the array of trials {name!r} is impossible")
    counts = {len(array) for array in trials.values()}
    ranks = np.unique(trials.get("rank", ()))
    is_long = max(counts, default=0) > MOST_TRIALS
    # full finetuning counts as one more rank
    if len(counts) > 1 or is_long or len(ranks) > MOST_RANKS + 1:
        raise ValueError(
            f"the arrays of trials differ in length, or have more than {MOST_TRIALS:,} trials or"
            f" {MOST_RANKS} ranks"
        )
