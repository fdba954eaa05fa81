"""Parameters that are no factors, such as heads, norms and biases: the rates that a recipe has for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError

BASE: Literal["base"] = "base"  # in a recipe's table: a parameter had the base rate of every trial
Seen = Mapping[str, "float | Literal['base']"]


def name_pattern(name: str) -> str:
    """A parameter's name as a recipe keeps it: with "*" for numbers, so that layers share one.

    >>> name_pattern("layers.11.norm1.weight")
    'layers.*.norm1.weight'
    """
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


@dataclass(frozen=True)
class OtherRates:
    """What a recipe says of other parameters on a model.

    seen: the rates of its LoRA trials, by name pattern. base: the recipe's base rate. full: full finetuning's rate on
    this model, None where the recipe saw none.
    """

    recipe: str
    seen: Seen
    base: float
    full: float | None

    def rate(self, name: str, trains: bool = True) -> float | None:
        """The rate of the parameter `name`: as the trials trained it, else full finetuning's.

        Raises:
            RecipeError: neither was tried, and the parameter trains; None where it does not.
        """
        found = self.seen.get(name_pattern(name), self.full)
        if found is None and not trains:
            return None
        if found is None:
            raise RecipeError(
                f"Recipe {self.recipe!r} saw neither {name} train nor full finetuning, so nothing says its rate.",
                "Give other_lr=, or rates= for its name.",
            )
        return self.base if found == BASE else float(found)

    def knows(self, name: str) -> bool:
        """Whether the trials trained the parameter `name`."""
        return name_pattern(name) in self.seen

    def reason(self, name: str) -> str:
        """Where that rate is from, in words."""
        found = self.seen.get(name_pattern(name))
        if found is None:
            return "full finetuning's rate by the recipe"
        return "the base rate, as in the recipe's trials" if found == BASE else "its rate in the recipe's trials"
