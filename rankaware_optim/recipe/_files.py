"""This module saves recipes to files and loads recipes from files.

A recipe's TOML file contains all values that are needed to compute learning rates. The recipe's
trials are stored in a second file in the same folder. The class `RecipeFile` defines the schema of
the TOML file, and recipes/SCHEMA.md explains each field. (`rankaware_optim/_files.py` has the
functions that read and replace files.)
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

# The largest files that are read or written, in bytes. They are far above what a calibration
# needs: its TOML has about 3 kB, and its trials need 4 bytes for each value of a loss curve.
# The limits protect a program that loads a recipe from a stranger.
_MOST_TEXT, _MOST_TRIALS, _MOST_HEADER = 256_000, 250_000_000, 100_000
_HEADER = """\
# This file contains the learning-rate recipe {!r} of rankaware_optim.
# To print a learning rate, run `rankaware lr FILE --rank 32`.
# To train with the recipe, call RankAwareOptimizer(model, AdamW, recipe=FILE).
# All learning rates are per optimizer step, and an octave is a factor of 2.
# Train with lr, which is fitted_lr (the estimated best learning rate) minus a safety margin.
"""
# The exceptions that reading a file, checking a value or calling a third-party scaling law may
# raise. All of them become a RecipeError with the name of the file.
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
Document = dict[str, Any]  # a TOML file after parsing


class RecipeFile(msgspec.Struct, forbid_unknown_fields=True):
    """This class defines the schema of a recipe's TOML file.

    TOML cannot represent a null value, so the string "none" in a recipe's file means
    None. Every field is required. The fields have no default values, so a missing line
    in the TOML file is an error. Most fields have the same names and meanings as the
    fields of `Recipe`. The fields `schema`, `lr`, `band_low`, `band_high` and
    `trials_sha256` exist only in the file.
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
    # TOML requires that tables come after all plain values.
    reference: Reference
    law: dict[str, object]
    settings: dict[str, Plain | tuple[Plain, ...]]
    other_rates: dict[str, Lr | Literal["base"]]
    layers: dict[str, FanIn]
    versions: dict[str, str]
    source: dict[str, str]


_OF_THE_FILE = {"schema", "lr", "band_low", "band_high", "trials_sha256"}


def to_document(recipe: Recipe, trials_sha256: str = "none") -> Document:
    """Convert a recipe to a dictionary with the values that its TOML file contains."""
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
    """Return a copy of the dictionary with every None replaced by the string "none"."""
    return {name: "none" if value is None else value for name, value in values.items()}


def _with_none(values: Mapping[str, object]) -> Document:
    """Return a copy of the dictionary with every string "none" replaced by None."""
    return {name: None if value == "none" else value for name, value in values.items()}


def _recipe_in(document: Document, kind: type[Recipe]) -> Recipe:
    """Create a recipe from a parsed TOML file, without its trials.

    Raises:
        ValueError: a value is missing or impossible, or two values contradict each other.
    """
    reference = _with_none(document.get("reference", {}))
    file = msgspec.convert({**_with_none(document), "reference": reference}, RecipeFile)
    law = law_from_dict(document["law"])
    if not isinstance(law, Power):
        raise ValueError(
            f"The law of a recipe must be named 'power', but this recipe has the law"
            f" {law.name!r}. Use the law of a recipe that ra.calibrate or ra.sweeps.fit_sweep"
            " returned."
        )
    values = {
        **asdict(file),
        "law": law,
        # msgspec has converted integers in the reference to floats. The recipe's hash depends on
        # how numbers are written (16 or 16.0), so the values of the document are used.
        "reference": Reference(**reference),
        "covariance": np.array(document["covariance"]),
        # Repeated ranks are removed here. The comparison with the document below then finds the
        # difference and rejects the file.
        "ranks": tuple(dict.fromkeys(file.ranks)),
    }
    fields = values.keys() - _OF_THE_FILE
    recipe = kind(**{name: values[name] for name in fields})
    _check_fit(recipe)
    # Convert the recipe back to a document. Some fields of the file are computed from others, such
    # as lr from fitted_lr and margin, so an edit of only one of them shows up as a difference.
    again = to_document(recipe, document["trials_sha256"])
    if contradictions := differences(document, again):
        raise ValueError(
            f"Some values in the recipe's file do not agree with each other: {contradictions}. Each"
            " value after 'not' is the value that follows from the rest of the file. Undo the"
            " changes that were made to the file."
        )
    return recipe


def _check_fit(recipe: Recipe) -> None:
    """Raise a ValueError if a recipe contains values that cannot be the result of a fit."""
    covariance = recipe.covariance
    if not np.allclose(covariance, covariance.T):
        raise ValueError(
            "The covariance matrix of the recipe is not symmetric. Use the covariance matrix that"
            " ra.calibrate or ra.sweeps.fit_sweep computed."
        )
    spectrum = np.linalg.eigvalsh(covariance)
    # Rounding may make the smallest variance slightly negative.
    if not spectrum[0] >= -1e-6 * abs(spectrum[-1]):
        raise ValueError(
            "The covariance matrix of the recipe has a negative eigenvalue, which is impossible."
            " Use the covariance matrix that ra.calibrate or ra.sweeps.fit_sweep computed."
        )
    # recipe_of leaves the ceiling out if a run diverged below the optimum.
    ceiling, fitted_lr = recipe.ceiling, recipe.fitted_lr
    if ceiling is not None and ceiling <= fitted_lr:
        raise ValueError(
            f"The recipe has ceiling={ceiling:g}, but the ceiling must be higher than"
            f" fitted_lr={fitted_lr:g}. Set a higher ceiling, or set the ceiling to 'none' if no"
            " trial diverged."
        )


# --- files ----------------------------------------------------------------------------------------


def save(recipe: Recipe, path: str | os.PathLike[str]) -> Path:
    """Save the trials of a recipe first, and then its TOML file with the hash of the trials.

    Before it writes a file, the function checks in memory that `load` would accept the recipe.

    If another process loads the recipe after the trials are saved and before the TOML
    file is saved, the hash in the old TOML file does not match the new trials. The
    other process therefore uses the old learning rates without any trials, and never
    mixes an old recipe with new trials.
    """
    target = _path(path)
    try:
        _check_trials(recipe.tensors)
        arrays = {k: np.ascontiguousarray(v) for k, v in recipe.tensors.items()}
        trials = safetensors.numpy.save(arrays) if arrays else b""
        document = to_document(recipe, _sha256(trials) if trials else "none")
        text = (_HEADER.format(recipe.name) + tomli_w.dumps(document)).encode()
        _recipe_in(_document(text), type(recipe))
        if (size := len(text)) > _MOST_TEXT:
            raise ValueError(
                f"The recipe's TOML file would have {size:,} bytes, but at most {_MOST_TEXT:,}"
                " bytes are allowed. Shorten the notes of the recipe."
            )
        if (size := len(trials)) > _MOST_TRIALS:
            raise ValueError(
                f"The file with the recipe's trials would have {size:,} bytes, but at most"
                f" {_MOST_TRIALS:,} bytes are allowed. Remove some of the trials from the recipe."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        # If the path is a symbolic link, the trials go next to the file that the link points to.
        # They are written first, because the TOML file contains their hash.
        real = replaceable(target)
        if trials:
            replace_bytes(_trials_beside(real), trials)
        replace_bytes(target, text)
    except OSError as error:
        cure = "Choose a folder in which you can write files."
        raise _error(target, "written", error, cure) from error
    except _TROUBLE as error:
        cure = (
            "Use the values that ra.calibrate or ra.sweeps.fit_sweep returned, and only numbers"
            " and strings as settings of the recipe."
        )
        raise _error(target, "written", error, cure) from error
    return target


def load(path: str | os.PathLike[str], kind: type[Recipe]) -> Recipe:
    """Load a recipe from a TOML file, and load its trials if they are in the same folder.

    kind: the class of the recipe that is returned.
    """
    target = _path(path)
    try:
        document = _document(read_bytes(target, _MOST_TEXT))
        recipe = _recipe_in(document, kind)
    except LawError as error:
        # The file is intact, but this process does not know its scaling law. The error's advice
        # explains how to register the law.
        raise _error(target, "read", error, error.cure) from error
    except OSError as error:
        raise _error(target, "read", error, "Check the path.") from error
    except _TROUBLE as error:
        cure = "Check the path, restore the file from a copy, or run the calibration again."
        raise _error(target, "read", error, cure) from error
    digest = document["trials_sha256"]
    if digest == "none":
        return recipe
    trials_file = _trials_beside(target)
    if not os.path.lexists(trials_file):
        # In the Hugging Face cache the TOML file is a symbolic link, and the trials may only be
        # next to the file that the link points to.
        trials_file = _trials_beside(Path(os.path.realpath(target)))
    try:
        return replace(recipe, tensors=_read_trials(trials_file, digest))
    except FileNotFoundError:
        pass
    except (*_TROUBLE, SafetensorError) as error:
        name, reason = recipe.name, str(error).removesuffix(".")
        warn(
            f"The trials of recipe {name!r} cannot be read from {trials_file}: {reason}. The recipe"
            " was loaded without its trials, and it can still compute every learning rate. To load"
            " the trials too, copy the .toml file and the .trials.safetensors file of the recipe"
            " again."
        )
    return replace(recipe, missing=trials_file.name)


def _path(path: str | os.PathLike[str]) -> Path:
    if isinstance(path, (str, os.PathLike)):
        return Path(path)
    value = shown(path)
    raise RecipeError(
        f"The path of a recipe must be a string or a Path, but {value} was passed.",
        "Pass the path of the recipe's TOML file, such as 'recipe.toml'.",
    )


def _read_trials(path: Path, digest: str) -> Trials:
    """Load the trials from a file, and check that the SHA-256 hash of the file is `digest`."""
    data = read_bytes(path, _MOST_TRIALS)
    if _sha256(data) != digest:
        raise ValueError(
            f"The trials in {path} belong to a different recipe or are damaged, because the hash of"
            " the file differs from the hash in the recipe. Copy the file that was saved together"
            " with the recipe."
        )
    # The first eight bytes of a safetensors file are the length of its header.
    if int.from_bytes(data[:8], "little") > _MOST_HEADER:
        raise ValueError(
            f"The trials file {path} is damaged, because its header is longer than"
            f" {_MOST_HEADER:,} bytes. Copy the file again."
        )
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
    # utf-8-sig, because editors on Windows write a byte-order mark at the start of a file. tomli
    # instead of Python's tomllib, which takes minutes to parse a key with many dots.
    return tomli.loads(text.decode("utf-8-sig"))


_KINDS = {"i": "integers", "f": "floats", "b": "booleans"}
# The name of every array of trials, with the kind of its dtype (i, f or b) and its number of axes.
TRIAL = {
    "rank": ("i", 1),
    "seed": ("i", 1),
    "lr": ("f", 1),
    "own_lr": ("f", 1),
    "value": ("f", 1),
    "diverged": ("b", 1),
    "pruned": ("b", 1),
    "start": ("f", 1),
    "steps": ("i", 1),
    "curve": ("f", 2),
}


def _check_trials(trials: Trials) -> None:
    """Raise a ValueError if the trials contain an array that a calibration cannot produce."""
    for name, array in trials.items():
        known = ", ".join(TRIAL)
        if name not in TRIAL:
            raise ValueError(
                f"The recipe's trials contain an unknown array {name!r}. Remove this array. The"
                f" allowed arrays are {known}."
            )
        kind, axes = TRIAL[name]
        kinds, dtype, shape = _KINDS[kind], array.dtype, array.shape
        if (dtype.kind, array.ndim) != (kind, axes):
            raise ValueError(
                f"The array {name!r} of the recipe's trials has dtype {dtype} and shape {shape},"
                f" but it must contain {kinds} and have {axes} dimension(s). Use the array of a"
                " recipe that ra.calibrate returned."
            )
    lengths = sorted({len(array) for array in trials.values()})
    if len(lengths) > 1:
        raise ValueError(
            f"The arrays of the recipe's trials have different lengths: {lengths}. Each array must"
            " have one entry per trial. Use the arrays of a recipe that ra.calibrate returned."
        )
    ranks = np.unique(trials.get("rank", ()))
    # + 1, because full finetuning is stored as rank 0
    if sum(lengths) > MOST_TRIALS or len(ranks) > MOST_RANKS + 1:
        raise ValueError(
            f"The recipe has too many trials or LoRA ranks. At most {MOST_TRIALS:,} trials and"
            f" {MOST_RANKS} LoRA ranks are allowed. Remove some of the trials from the recipe."
        )
