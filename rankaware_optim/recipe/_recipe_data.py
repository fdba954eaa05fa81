"""The values of a recipe, one field for each, and what follows from them alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .._types import Reference, Scaling
from ..errors import RecipeError
from ..laws import Power

Array = npt.NDArray[Any]  # of whole numbers, floats or truth values
BASE: Literal["base"] = (
    "base"  # in a table of rates: the parameter had each trial's base rate
)
TableOfRates = Mapping[str, "float | Literal['base']"]


@dataclass(frozen=True, eq=False)
class RecipeData:
    """The values of a recipe. `Recipe` documents them."""

    name: str
    fitted_lr: float
    reference: Reference
    law: Power
    covariance: Array
    lean: float = 0.0
    ceiling: float | None = None
    scaling_rule: Scaling = "unknown"
    full_fan_in: float | None = None
    ranks: tuple[int, ...] = ()
    full_seen: bool = False
    optimizer: str = "torch.optim.AdamW"
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = 1
    batch: float | None = None
    warmup: float | None = None
    seed: int = 0
    other_rates: TableOfRates = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, Array] = field(default_factory=dict, repr=False)
    steepness: float = 0.0
    scatter: float = 0.0
    missing: str = ""

    def __eq__(self, other: object) -> bool:
        """Return whether all values and trials are equal. NaN equals NaN."""
        if not isinstance(other, RecipeData):
            return NotImplemented
        for field_ in fields(self):
            if field_.name in ("covariance", "tensors"):
                continue
            if getattr(self, field_.name) != getattr(other, field_.name):
                return False
        own = {**self.arrays(), "fit.covariance": self.covariance}
        others = {**other.arrays(), "fit.covariance": other.covariance}
        if own.keys() != others.keys():
            return False
        return all(np.array_equal(own[key], others[key], equal_nan=True) for key in own)

    def __hash__(self) -> int:
        return hash((self.name, self.fitted_lr, self.lean, self.reference))

    @property
    def lr(self) -> float:
        """The base rate to use, per step: `lean` octaves below `fitted_lr`."""
        return float(self.fitted_lr * 2.0**-self.lean)

    @property
    def full_factor(self) -> float:
        """The factor by which the law's rate for full finetuning is multiplied."""
        return self.law.full_factor

    @property
    def tag(self) -> str:
        """The recipe in a line, "hash name", as stored in an optimizer's state_dict.

        The hash covers what decides the rates: base rate, reference, law and scaling rule. It does
        not depend on the name or on the version of this package.
        """
        r = self.reference
        at = (r.method, r.rank, r.scaling, r.init, r.fan_in, r.batch)
        decisive = (self.lr, at, self.scaling_rule, self.law)
        text = json.dumps(decisive, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{digest[:12]} {self.name}"

    def arrays(self) -> dict[str, Array]:
        """Return the contents of the safetensors file, by name."""
        return {f"trial.{key}": value for key, value in self.tensors.items()}


def name_pattern(name: str) -> str:
    """Return a parameter's name with "*" for numbers, so that all layers share one pattern.

    >>> name_pattern("layers.11.norm1.weight")
    'layers.*.norm1.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


@dataclass(frozen=True)
class OtherRates:
    """A recipe's rates for the other parameters of a model.

    Args:
        recipe: the recipe's name.
        tried: the rates of its LoRA trials, by name pattern.
        base: the recipe's base rate.
        full: the rate of full finetuning on this model, None if the recipe's trials did not include
            it.
    """

    recipe: str
    tried: TableOfRates
    base: float
    full: float | None

    def rate(self, name: str, trains: bool = True) -> float | None:
        """Return the rate of a parameter: that of the trials, else that of full finetuning.

        Args:
            name: the parameter's name.
            trains: whether it has a gradient.

        Returns:
            The rate, or None if neither was tried and the parameter does not train.

        Raises:
            RecipeError: neither was tried, and the parameter trains.
        """
        rate = self.tried.get(name_pattern(name), self.full)
        if rate is None and not trains:
            return None
        if rate is None:
            raise RecipeError(
                f"The trials of recipe {self.recipe!r} trained neither {name} nor the full model,"
                " so it has no rate.",
                "Give other_lr=, or rates= for its name.",
            )
        return self.base if rate == BASE else float(rate)

    def knows(self, name: str) -> bool:
        """Return whether the trials trained the parameter `name`."""
        return name_pattern(name) in self.tried

    def reason(self, name: str) -> str:
        """Return where the parameter's rate comes from, in words."""
        rate = self.tried.get(name_pattern(name))
        if rate is None:
            return "full finetuning's rate by the recipe"
        return (
            "the base rate, as in the recipe's trials"
            if rate == BASE
            else "its rate in the recipe's trials"
        )
