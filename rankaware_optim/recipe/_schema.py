"""What a recipe's TOML holds: these structs are the file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct, field
from msgspec.structs import asdict

from .._checks import MOST_RANKS, MOST_TRIALS, limits
from .._types import Method, Reference, Scaling
from ..errors import LawError
from ..laws import Power, law_from_dict, law_to_dict
from ._settings import plain_value
from ._uncertainty import own_band

if TYPE_CHECKING:
    from ._recipe import Recipe


Lr = Annotated[float, limits("lr")]
Octaves = Annotated[float, limits("octaves")]
FanIn = Annotated[float, limits("fan_in")]
Seed = Annotated[int, limits("seed")]
Ranks = tuple[Annotated[int, limits("rank")], ...]
# up to a standard deviation of 100 octaves
Variance = Annotated[float, Meta(ge=-1e4, le=1e4)]
ThreeNumbers = tuple[Variance, Variance, Variance]
Plain = bool | Seed | float | str
Count = Annotated[int, Meta(ge=0, le=MOST_TRIALS)]
Array = npt.NDArray[Any]
Trials = Mapping[str, Array]
Unknown = Literal["none"]  # TOML has no None


# --- the file -------------------------------------------------------------------------------------


class Table(Struct, kw_only=True, forbid_unknown_fields=True):
    """A table of the file. Every field is required, since a default would stand for a lost line."""

    def values(self) -> dict[str, Any]:
        """Return the fields' values, with None for "none"."""
        return {
            key: None if value == "none" else value
            for key, value in asdict(self).items()
        }


AnyTable = TypeVar("AnyTable", bound=Table)


class RateTable(Table):
    """The rate to use at the reference and its 90 % band. They follow from the table `fit`."""

    lr: Lr
    band_low: float
    band_high: float


class ReferenceTable(Table):
    """The configuration that the base rate belongs to, see `Reference`."""

    method: Method
    init: Literal["A", "B"]
    rslora: bool
    rank: int | Unknown
    alpha: float | Unknown
    # A whole number stays an int, since the recipe's hash depends on it.
    fan_in: int | float | Unknown
    batch: int | float | Unknown

    def __post_init__(self) -> None:
        Reference(**self.values())


class OptimizerTable(Table):
    optimizer: str = field(name="class")
    settings: dict[str, Plain | tuple[Plain, ...]]


class HorizonTable(Table):
    steps: Annotated[int, limits("steps")] | Unknown
    warmup: Annotated[float, limits("share")] | Unknown = field(name="warmup_share")


class SeenTable(Table):
    """What the trials tried, and what they left open."""

    ranks: Annotated[Ranks, Meta(max_length=MOST_RANKS)]
    full_seen: bool = field(name="full")
    seed: Seed
    notes: tuple[str, ...]
    other_rates: dict[str, Lr | Literal["base"]]
    layers: dict[str, FanIn]

    def __post_init__(self) -> None:
        if len({*self.ranks}) < len(self.ranks):
            raise ValueError(f"The ranks {[*self.ranks]} name one twice")


class FitTable(Table):
    """What the fit found, see `Recipe`."""

    fitted_lr: Lr
    margin: Octaves = field(name="margin_octaves")
    steepness: Annotated[float, limits("steepness")] = field(
        name="steepness_per_octave"
    )
    scatter: Octaves = field(name="scatter_octaves")
    covariance: tuple[ThreeNumbers, ThreeNumbers, ThreeNumbers]
    ceiling: Lr | Unknown

    def __post_init__(self) -> None:
        if self.ceiling != "none" and self.ceiling <= self.fitted_lr:
            raise ValueError(
                f"The ceiling {self.ceiling:g} is not above fitted_lr, {self.fitted_lr:g}"
            )
        matrix = np.array(self.covariance)
        largest = float(np.abs(matrix).max())
        if not math.isfinite(largest) or not np.allclose(
            matrix, matrix.T, rtol=1e-6, atol=1e-6 * largest
        ):
            raise ValueError("The covariance is not symmetric")
        spectrum = np.linalg.eigvalsh(matrix + matrix.T)
        if spectrum[0] < -1e-6 * abs(spectrum[-1]):
            raise ValueError("A variance of the covariance is negative")


class TrialsTable(Table):
    """The file of trials: its hash, and how many trials and training steps there are."""

    sha256: str
    count: Count
    steps: Annotated[int, Meta(ge=0)] | Unknown
    pruned: Count | Unknown
    diverged: Count | Unknown

    @classmethod
    def of(cls, trials: Trials, sha256: str) -> TrialsTable | Unknown:
        """Return the table of trials whose file has this hash, "none" if there are none."""
        if not trials:
            return "none"
        sums: dict[str, Any] = {}
        for name in ("steps", "pruned", "diverged"):
            sums[name] = int(trials[name].sum()) if name in trials else "none"
        return cls(sha256=sha256, count=len(next(iter(trials.values()))), **sums)

    def check(self, trials: Trials) -> None:
        """Raise a ValueError if these are not the numbers of its trials."""
        counted = self.of(trials, self.sha256)
        if self != counted:
            raise ValueError(
                f"The trials are counted as {self}, but their file makes {counted} - at `$.trials`"
            )


class RecipeFile(Table):
    schema: Literal[1]
    name: str
    scaling_rule: Scaling
    rate: RateTable
    reference: ReferenceTable
    law: dict[str, Any]
    optimizer: OptimizerTable
    horizon: HorizonTable
    seen: SeenTable
    fit: FitTable
    source: dict[str, str]
    versions: dict[str, str]
    full_fan_in: FanIn | Unknown
    trials: TrialsTable | Unknown

    def __post_init__(self) -> None:
        lr = self.fit.fitted_lr * 2.0**-self.fit.margin
        if not math.isclose(self.rate.lr, lr, rel_tol=1e-6):
            raise ValueError(
                f"rate.lr is {self.rate.lr:g}, but fit.fitted_lr and fit.margin_octaves make {lr:g}"
            )

    def check_band(self, recipe: Recipe) -> None:
        """Raise a ValueError if the band is not that of the recipe, which this file holds."""
        for name, end in zip(("band_low", "band_high"), own_band(recipe), strict=True):
            written = getattr(self.rate, name)
            if not math.isclose(written, end, rel_tol=1e-6):
                raise ValueError(
                    f"rate.{name} is {written:g}, but the table fit makes {end:g}"
                )


# --- from a recipe and back -----------------------------------------------------------------------


def file_of(recipe: Recipe, sha256: str = "") -> RecipeFile:
    """Return what a recipe's file holds. sha256: the hash of the file of its trials."""
    low, high = own_band(recipe)
    return RecipeFile(
        schema=1,
        name=recipe.name,
        scaling_rule=recipe.scaling_rule,
        rate=RateTable(lr=recipe.lr, band_low=low, band_high=high),
        reference=_table(ReferenceTable, recipe.reference),
        law=law_to_dict(recipe.law),
        optimizer=_table(OptimizerTable, recipe),
        horizon=_table(HorizonTable, recipe),
        seen=_table(SeenTable, recipe),
        fit=_table(FitTable, recipe),
        source=dict(recipe.source),
        versions=dict(recipe.versions),
        full_fan_in="none" if recipe.full_fan_in is None else recipe.full_fan_in,
        trials=TrialsTable.of(recipe.tensors, sha256),
    )


def _table(kind: type[AnyTable], source: object) -> AnyTable:
    """Return the table whose fields are attributes of a recipe or of its reference."""
    values = {name: getattr(source, name) for name in kind.__struct_fields__}
    return kind(**{k: "none" if v is None else v for k, v in values.items()})


def to_document(recipe: Recipe, sha256: str = "") -> dict[str, Any]:
    """Return the contents of a recipe's TOML as plain values, by table."""
    plain: dict[str, Any] = msgspec.to_builtins(
        file_of(recipe, sha256), enc_hook=plain_value
    )
    return plain


def values_in(file: RecipeFile) -> dict[str, Any]:
    """Return the arguments of the recipe that a file holds, without its trials.

    Raises:
        ValueError: the law is unknown, or a parameter of it is impossible or missing.
    """
    try:
        law = law_from_dict(file.law)
    except LawError as error:
        raise LawError(f"{error.cause} - at `$.law`", error.cure) from error
    if not isinstance(law, Power):
        raise ValueError(f"The law is {law.name!r}, not 'power' - at `$.law`")
    _check_whole(file.law, law_to_dict(law), "$.law")
    return {
        **asdict(file.optimizer),
        **file.horizon.values(),
        **file.seen.values(),
        **file.fit.values(),
        "name": file.name,
        "scaling_rule": file.scaling_rule,
        "reference": Reference(**file.reference.values()),
        "law": law,
        "covariance": np.array(file.fit.covariance),
        "source": file.source,
        "versions": file.versions,
        "full_fan_in": None if file.full_fan_in == "none" else file.full_fan_in,
    }


def _check_whole(table: Mapping[str, Any], whole: Mapping[str, Any], path: str) -> None:
    """Raise a ValueError if a table lacks a parameter of its law, which would take its default."""
    for key, value in whole.items():
        if key not in table:
            raise ValueError(f"Object missing required field `{key}` - at `{path}`")
        if isinstance(value, Mapping):
            _check_whole(table[key], value, f"{path}.{key}")
