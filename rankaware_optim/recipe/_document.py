"""The schema of a recipe's TOML file: sections, fields and allowed values. msgspec checks a file
against it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from .._checks import MOST_RANKS, RANGES, shown
from .._types import Scaling
from ..errors import RecipeError
from ._horizon import SLOPE_SD

SCHEMA = 3


def _of(name: str, kind: type = float) -> Meta:
    low, high = RANGES[name]
    return (
        Meta(ge=low, le=high)
        if kind is float
        else Meta(ge=math.ceil(low), le=min(int(high), 2**63 - 1))
    )


Lr = Annotated[float, _of("lr")]
Octaves = Annotated[float, _of("octaves")]
Variance = Annotated[float, Meta(ge=-1e4, le=1e4)]
Row = tuple[Variance, Variance, Variance]
Rank = Annotated[int, _of("rank", int)]
Steps = Annotated[int, _of("steps", int)]
Seed = Annotated[int, _of("seed", int)]
# A whole number stays an int, since the recipe's hash depends on it.
FanIn = Annotated[int, _of("fan_in", int)] | Annotated[float, _of("fan_in")]
Batch = Annotated[int, _of("batch", int)] | Annotated[float, _of("batch")]
Text = Annotated[str, Meta(max_length=10_000)]
Plain = bool | Seed | float | Text
Values = Annotated[list[Plain | Annotated[list[Plain], Meta(max_length=500)]], Meta(max_length=500)]
Unknown = Literal["unknown"]


class RateSection(Struct, frozen=True):
    lr: Lr
    fitted_lr: Lr
    ceiling: Lr | None = None
    lean_octaves: Octaves = 0.0
    steepness: Annotated[float, _of("steepness")] = 0.0
    scatter_octaves: Octaves = 0.0


class RateSection1(RateSection, frozen=True, rename={"fitted_lr": "best_lr"}):
    """The section in schema 1, which had another name for `fitted_lr`."""

    fitted_lr: Lr


class ReferenceSection(Struct, frozen=True):
    fan_in: FanIn | Unknown
    method: Literal["lora", "full"] = "lora"
    rank: Rank | None = None
    alpha: Annotated[float, _of("alpha")] | None = None
    rslora: bool = False
    init: Literal["A", "B"] = "A"
    full_fan_in: FanIn | None = None
    batch: Batch | None = None


class OptimizerSection(Struct, frozen=True, rename={"name": "class"}):
    name: Text
    settings: Annotated[dict[Text, Plain | Values], Meta(max_length=500)] = {}


class HorizonSection(Struct, frozen=True):
    steps: Steps | Unknown
    batch: Batch | None = None
    warmup_share: Annotated[float, _of("share")] | None = None
    slope: Annotated[float, _of("slope")] = 0.0
    slope_sd: Octaves = SLOPE_SD
    tried: Annotated[
        list[Any], Meta(max_length=1000)
    ] = []  # until schema 2: the other lengths of trials, not used


class SeenSection(Struct, frozen=True):
    ranks: Annotated[tuple[Rank, ...], Meta(max_length=MOST_RANKS)] = ()
    full: bool = False
    seed: Seed = 0
    notes: Annotated[tuple[Text, ...], Meta(max_length=100)] = ()
    other_rates: Annotated[dict[Text, Lr | Literal["base"]], Meta(max_length=3000)] = {}


class TensorsSection(Struct, frozen=True):
    file: Text
    sha256: Text


class FitSection(Struct, frozen=True):
    covariance: tuple[Row, Row, Row]


class Document(Struct, frozen=True, kw_only=True):
    """The fields that are read. Fields written only for people, such as `band_low`, are not among
    them.
    """

    name: Text
    rate: RateSection
    reference: ReferenceSection
    law: dict[str, Any]
    optimizer: OptimizerSection
    horizon: HorizonSection
    fit: FitSection | None  # None for a former schema
    tensors: TensorsSection | None = None
    scaling_rule: Scaling = "unknown"
    seen: SeenSection = SeenSection()
    versions: Annotated[dict[Text, Text], Meta(max_length=1000)] = {}
    source: Annotated[dict[Text, Text], Meta(max_length=20)] = {}


class Document2(Document, frozen=True, kw_only=True):
    """A file of schema 2. Its covariance is among its tensors."""

    tensors: TensorsSection
    fit: FitSection | None = None


class Document1(Document2, frozen=True, kw_only=True):
    """A file of schema 1."""

    rate: RateSection1


def checked(data: Mapping[str, Any], target: Path) -> Document:
    """Return the document in nested plain values. A RecipeError names the path of a missing or
    impossible value.
    """
    schema = data.get("schema")
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
    try:
        former: dict[int, type[Document]] = {1: Document1, 2: Document2}
        return msgspec.convert(data, former.get(schema, Document))
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at `$.")
        path = path.removesuffix("`")
        lacking = re.search("missing required field `([^`]+)", what)
        path = ".".join(filter(None, (path, lacking and lacking[1])))
        raise impossible(target, what, path) from error


def impossible(
    target: Path, what: str, path: str, cure: str = "Restore or remake the file."
) -> RecipeError:
    """Return the error for an impossible value, with its path."""
    return RecipeError(f"The recipe {target} has an impossible value: {what}. @ {path}", cure)
