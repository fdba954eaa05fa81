"""What a recipe's TOML holds: a row for each value, by which it is written, read and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from .._checks import MOST_RANKS, MOST_TRIALS, RANGES, shown
from .._types import Reference, Scaling
from ..errors import InvalidReferenceError, RankAwareError, RecipeError
from ..laws import Power, law_from_dict, law_to_dict
from ._recipe_data import Array, RecipeData
from ._settings import plain_setting, plain_value
from ._uncertainty import own_band

SCHEMA = 3
AnyRecipe = TypeVar("AnyRecipe", bound=RecipeData)


# --- the rows -------------------------------------------------------------------------------------


def _range(name: str) -> Meta:
    low, high = RANGES[name]
    return Meta(ge=low, le=high)


def _whole(name: str) -> Meta:
    low, high = RANGES[name]
    return Meta(ge=math.ceil(low), le=min(int(high), 2**63 - 1))


Lr = Annotated[float, _range("lr")]
Octaves = Annotated[float, _range("octaves")]
Variance = Annotated[
    float, Meta(ge=-1e4, le=1e4)
]  # up to a standard deviation of 100 octaves
ThreeNumbers = tuple[Variance, Variance, Variance]
Rank = Annotated[int, _whole("rank")]
Seed = Annotated[int, _whole("seed")]
# A whole number stays an int, since the recipe's hash depends on it.
FanIn = Annotated[int, _whole("fan_in")] | Annotated[float, _range("fan_in")]
Batch = Annotated[int, _whole("batch")] | Annotated[float, _range("batch")]
Text = Annotated[str, Meta(max_length=10_000)]
Plain = bool | Seed | float | Text
Plains = Annotated[
    list[Plain | Annotated[list[Plain], Meta(max_length=500)]], Meta(max_length=500)
]
Unknown = Literal["unknown"]


class _Row(NamedTuple):
    """One value: its path in the file, its attribute of the recipe, and its type for msgspec.

    A value without a type is written for people, and not read.
    """

    path: str
    attribute: str
    type: Any = None
    required: bool = False


_COVARIANCE = _Row(
    "fit.covariance",
    "covariance",
    tuple[ThreeNumbers, ThreeNumbers, ThreeNumbers],
    required=True,
)
_ROWS = (
    _Row("name", "name", Text, required=True),
    _Row("rate.lr", "lr", Lr, required=True),
    _Row("rate.fitted_lr", "fitted_lr", Lr, required=True),
    _Row("rate.band_low", "band_low"),
    _Row("rate.band_high", "band_high"),
    _Row("rate.ceiling", "ceiling", Lr),
    _Row("rate.lean_octaves", "lean", Octaves),
    _Row("rate.steepness", "steepness", Annotated[float, _range("steepness")]),
    _Row("rate.scatter_octaves", "scatter", Octaves),
    _Row("reference.method", "reference.method", Literal["lora", "full"]),
    _Row("reference.rank", "reference.rank", Rank),
    _Row("reference.alpha", "reference.alpha", Annotated[float, _range("alpha")]),
    _Row("reference.rslora", "reference.rslora", bool),
    _Row("reference.init", "reference.init", Literal["A", "B"]),
    _Row("reference.fan_in", "reference.fan_in", FanIn | Unknown, required=True),
    _Row("reference.full_fan_in", "full_fan_in", FanIn),
    _Row("reference.batch", "reference.batch", Batch),
    _Row("scaling_rule", "scaling_rule", Scaling),
    _Row("law", "law", dict[str, Any], required=True),
    _Row("optimizer.class", "optimizer", Text, required=True),
    _Row(
        "optimizer.settings",
        "settings",
        Annotated[dict[Text, Plain | Plains], Meta(max_length=500)],
    ),
    _Row(
        "horizon.steps",
        "steps",
        Annotated[int, _whole("steps")] | Unknown,
        required=True,
    ),
    _Row("horizon.batch", "batch", Batch),
    _Row("horizon.warmup_share", "warmup", Annotated[float, _range("share")]),
    _Row(
        "seen.ranks", "ranks", Annotated[tuple[Rank, ...], Meta(max_length=MOST_RANKS)]
    ),
    _Row("seen.full", "full_seen", bool),
    _Row("seen.seed", "seed", Seed),
    _Row("seen.notes", "notes", Annotated[tuple[Text, ...], Meta(max_length=100)]),
    _Row(
        "seen.other_rates",
        "other_rates",
        Annotated[dict[Text, Lr | Literal["base"]], Meta(max_length=3000)],
    ),
    _COVARIANCE,
    _Row("spent", "spent"),
    _Row("versions", "versions", Annotated[dict[Text, Text], Meta(max_length=1000)]),
    _Row("source", "source", Annotated[dict[Text, Text], Meta(max_length=20)]),
)
_TRIALS_FILE = (
    _Row("tensors.file", "trials.file", Text, required=True),
    _Row("tensors.sha256", "trials.sha256", Text, required=True),
)
# Until schema 2 a file named the other lengths of its trials. They are not used.
_LENGTHS = _Row("horizon.tried", "lengths", Annotated[list[Any], Meta(max_length=1000)])
_LENGTHS_NOTE = (
    "the trials had several lengths, which are not used any more: the rate is the same at other"
    " steps"
)


# --- writing --------------------------------------------------------------------------------------

_WRITTEN: Mapping[str, Callable[[Any], Any]] = {
    "law": law_to_dict,
    "settings": lambda settings: {
        key: plain_setting(value) for key, value in settings.items()
    },
    "steepness": lambda value: value or None,
    "scatter": lambda value: value or None,
    "reference.fan_in": lambda value: value or "unknown",
    "steps": lambda value: value or "unknown",
}


def header(recipe: RecipeData) -> str:
    """Return three comment lines for the top of the file."""
    return (
        f"# The learning-rate recipe {recipe.name!r} of rankaware_optim.\n"
        "# Read a rate: `rankaware lr FILE --rank 32`."
        " Use it: RankAwareOptimizer(model, AdamW, recipe=FILE).\n"
        "# Rates are per step. An octave is a factor 2."
        " lr is the rate to use, fitted_lr the fitted optimum.\n"
    )


def to_document(recipe: RecipeData) -> dict[str, Any]:
    """Return the contents of the TOML file by section. None means that nothing is written."""
    low, high = own_band(recipe)
    derived = {"band_low": low, "band_high": high, "spent": _spent(recipe.tensors)}
    document: dict[str, Any] = {}
    for row in _ROWS:
        section, _, key = row.path.rpartition(".")
        table = document.setdefault(section, {}) if section else document
        if row.attribute in derived:
            table[key] = derived[row.attribute]
        else:
            write = _WRITTEN.get(row.attribute, plain_value)
            table[key] = write(attrgetter(row.attribute)(recipe))
    return document


def _spent(trials: Mapping[str, Array]) -> dict[str, int] | None:
    """Return the training steps of all trials, and how many were pruned and diverged."""
    if "steps" not in trials:
        return None
    counted = [key for key in ("steps", "pruned", "diverged") if key in trials]
    return {
        "trials": len(trials["steps"]),
        **{key: int(trials[key].sum()) for key in counted},
    }


# --- reading --------------------------------------------------------------------------------------


def checked(document: Mapping[str, Any], target: Path) -> dict[str, Any]:
    """Return the values of a TOML file by attribute. `trials.file` and `trials.sha256` are among
    them if the file names its trials.

    Raises:
        RecipeError: a value is missing or impossible. The message names its path.
    """
    schema = document.get("schema")
    if type(schema) is not int or schema < 1:
        raise RecipeError(
            f"{target} has no schema, so it is not a recipe. @ schema",
            "Give a file made by Recipe.save.",
        )
    if schema > SCHEMA:
        raise RecipeError(
            f"The recipe {target} has schema {shown(schema)}, but this package reads up to"
            f" {SCHEMA}. @ schema",
            "Update rankaware-optim, or name another file.",
        )
    values = {}
    for row in _rows_of(schema, "tensors" in document):
        value = _value_at(document, row, target)
        if value is not None:
            values[row.attribute] = _converted(value, row, target)
    return values


def _rows_of(schema: int, names_trials: bool) -> list[_Row]:
    """Return the rows that are read of a file of this schema."""
    rows = [row for row in (*_ROWS, _LENGTHS) if row.type is not None]
    if schema < 3:
        rows.remove(_COVARIANCE)  # it was among the tensors
    if schema < 3 or names_trials:
        rows += _TRIALS_FILE
    if schema == 1:
        rows = [
            row._replace(path=row.path.replace("fitted_lr", "best_lr")) for row in rows
        ]
    return rows


def _value_at(document: Mapping[str, Any], row: _Row, target: Path) -> Any:
    """Return the value at a row's path, None if there is none."""
    section, _, key = row.path.rpartition(".")
    table = document.get(section, {}) if section else document
    if not isinstance(table, dict):
        raise impossible(
            target, f"expected a table, got {type(table).__name__}", section
        )
    if row.required and key not in table:
        raise impossible(target, "it is missing", row.path)
    return table.get(key)


def _converted(value: Any, row: _Row, target: Path) -> Any:
    try:
        return msgspec.convert(value, row.type)
    except msgspec.ValidationError as error:
        what, _, inside = str(error).partition(" - at `$")
        raise impossible(target, what, row.path + inside.removesuffix("`")) from error


def recipe_from(
    cls: type[AnyRecipe],
    values: Mapping[str, Any],
    tensors: Mapping[str, Array],
    missing: str,
    target: Path,
) -> AnyRecipe:
    """Return the recipe of the values that `checked` returned and of the tensors beside them.

    Raises:
        RecipeError: the law, the covariance or a tensor is impossible, or values disagree.
    """
    fields = {key: value for key, value in values.items() if "." not in key}
    lr, lengths = fields.pop("lr"), fields.pop("lengths", None)
    if fields["steps"] == "unknown":
        fields["steps"] = None
    if lengths:
        fields["notes"] = (*fields.get("notes", ()), _LENGTHS_NOTE)
    if "covariance" not in fields:
        former = tensors.get("fit.covariance", np.empty(0))
        fields["covariance"] = _converted(former.tolist(), _COVARIANCE, target)
    fields["covariance"] = _covariance(
        np.array(fields["covariance"], np.float64), target
    )
    fields["law"] = _law(fields["law"], target)
    recipe = cls(
        **fields,
        reference=_reference(_part(values, "reference"), target),
        tensors=_trials(tensors, target),
        missing=missing,
    )
    try:
        own_band(recipe)
    except OverflowError as error:
        raise impossible(target, "its band has no bounds", _COVARIANCE.path) from error
    if not math.isclose(lr, recipe.lr, rel_tol=1e-6):
        raise impossible(
            target, "it does not follow from fitted_lr and lean_octaves", "rate.lr"
        )
    return recipe


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the values of a recipe's attribute, by its own attributes."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): values[key]
        for key in values
        if key.startswith(prefix)
    }


def _reference(values: dict[str, Any], target: Path) -> Reference:
    if values["fan_in"] == "unknown":
        values["fan_in"] = None
    try:
        return Reference(**values)
    except InvalidReferenceError as error:
        raise impossible(target, error.cause.removesuffix("."), "reference") from error


def _law(table: Mapping[str, Any], target: Path) -> Power:
    try:
        law = law_from_dict(table)
    except RankAwareError as error:
        raise impossible(
            target, error.cause.removesuffix("."), "law", error.cure
        ) from error
    except Exception as error:  # a third-party law may raise anything
        raise impossible(target, f"{type(error).__name__}: {error}", "law") from error
    return law if isinstance(law, Power) else Power(law=law)


def _covariance(matrix: Array, target: Path) -> Array:
    """Return the matrix, checked to be a covariance. It is symmetric up to rounding."""
    largest = float(np.abs(matrix).max())
    if not np.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-6 * largest):
        raise impossible(target, "it is not symmetric", _COVARIANCE.path)
    spectrum = np.linalg.eigvalsh(matrix + matrix.T)
    if spectrum[0] < -1e-6 * abs(spectrum[-1]):
        raise impossible(target, "a variance is negative", _COVARIANCE.path)
    return matrix


# --- the trials -----------------------------------------------------------------------------------

_WHOLE, _FLOAT, _BOOL = ("int64",), ("float32", "float64"), ("bool",)


class _Tensor(NamedTuple):
    """What a tensor of trials may be: dtypes, number of axes, and the range of its numbers.

    A number may also be `none`, where a trial has none.
    """

    dtypes: tuple[str, ...]
    axes: int = 1
    range: str = ""
    none: float | None = None


_TRIAL = {
    "rank": _Tensor(_WHOLE, range="rank", none=0),
    "seed": _Tensor(_WHOLE),
    "lr": _Tensor(_FLOAT, range="trial_lr"),
    "own_lr": _Tensor(_FLOAT, range="trial_lr", none=math.nan),
    "value": _Tensor(_FLOAT),
    "diverged": _Tensor(_BOOL),
    "pruned": _Tensor(_BOOL),
    "steps": _Tensor(_WHOLE, range="steps", none=0),
    "curve": _Tensor(_FLOAT, axes=2),
    "planned_steps": _Tensor(_WHOLE, range="steps", none=0),
    "planned_batch": _Tensor(_FLOAT, range="batch", none=0),
}


def _trials(tensors: Mapping[str, Array], target: Path) -> dict[str, Array]:
    """Return the tensors of trials, checked, by name."""
    trials = _part(tensors, "trial")
    for key, value in trials.items():
        path = f"trial.{key}"
        kind = _TRIAL.get(key, _Tensor((*_WHOLE, *_FLOAT, *_BOOL), value.ndim or 1))
        if value.dtype.name not in kind.dtypes or value.ndim != kind.axes:
            what = f"it has {value.dtype} and {value.ndim} axes"
            raise impossible(target, what, path)
        if kind.range and not _all_within(value, kind):
            raise impossible(target, "a trial has a value out of range", path)
    counts = {len(value) for value in trials.values()}
    if len(counts) > 1 or max(counts, default=0) > MOST_TRIALS:
        what = f"tensors have different numbers of trials, or more than {MOST_TRIALS}"
        raise impossible(target, what, "trial")
    if len(np.unique(trials.get("rank", ()))) > MOST_RANKS + 1:
        raise impossible(
            target, f"there are more than {MOST_RANKS} ranks", "trial.rank"
        )
    return trials


def _all_within(value: Array, kind: _Tensor) -> bool:
    low, high = RANGES[kind.range]
    exact = value.astype(
        np.float64
    )  # float32 cannot hold the ends, and NumPy 1 would round them
    good = (exact >= low) & (exact <= high)
    if kind.none is not None:
        good |= np.isnan(exact) if math.isnan(kind.none) else exact == kind.none
    return bool(good.all())


def impossible(
    target: Path, what: str, path: str, cure: str = "Restore or remake the file."
) -> RecipeError:
    """Return the error for an impossible value, with its path."""
    return RecipeError(
        f"The recipe {target} has an impossible value: {what}. @ {path}", cure
    )
