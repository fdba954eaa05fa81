"""Rates of the parameters that are not factors, such as heads and norms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError

BASE: Literal["base"] = (
    "base"  # in a table of rates: the parameter had each trial's base rate
)
TableOfRates = Mapping[str, "float | Literal['base']"]


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
