"""The common types: `Factor`, a matrix that trains, and `Reference`, a configuration.

A frozen weight W of shape (n_out, n_in) is adapted as W + s·B·A, with A of shape (r, n_in) and B of
shape (n_out, r). `scaling` is s, the number that multiplies B·A: alpha / r in PEFT, and alpha / √r
with rsLoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ._checks import check_choice, check_init, check_range, plain
from ._near_misses import explain_near_misses
from .errors import InvalidReferenceError

if TYPE_CHECKING:
    from .inspection import Survey

Role = Literal["A", "B", "full"]
Init = Literal["A", "B", "other", "unknown"]
Method = Literal["lora", "full"]
Task = Literal["chat", "other", "rl", "dpo"]  # of a suggestion
Scaling = Literal["fixed", "rslora", "alpha", "unknown"]


@dataclass(frozen=True)
class Factor:
    """One matrix that trains: A or B of a LoRA pair, or a whole weight.

    Args:
        name: the parameter's name.
        role: "A" (the matrix at the layer's input), "B" (the one at its output) or "full" (a whole
            weight in full finetuning).
        rank: the LoRA rank, None for "full".
        fan_in: number of inputs of the adapted layer, also for B. For a convolution it is channels
            × kernel size.
        fan_out: number of outputs of the adapted layer.
        scaling: s, the number that multiplies B·A, dimensionless.
        init: "A" if A was drawn and B starts at zero, as in PEFT. "B" if B was drawn and A starts
            at zero. "other" if neither is zero, "unknown" if it cannot be read.
        kind: the layer's kind, such as "linear" or "embedding".
        layer: the layer's name.
        adapter: the adapter's name.
        convention: the name of the adapter convention that it follows.
        dtype: the name of the dtype in which a whole weight trains, such as "bfloat16". "" if it is
            unknown, as for LoRA matrices.
    """

    name: str
    role: Role
    rank: int | None
    fan_in: float
    fan_out: float
    scaling: float = 1.0
    init: Init = "A"
    kind: str = "linear"
    layer: str = ""
    adapter: str = ""
    convention: str = ""
    dtype: str = ""


def width_for(survey: Survey, method: Method, init: Init) -> float:
    """Return the width that a model's learning rate depends on, as a number of inputs of a layer.

    Args:
        survey: the model's survey.
        method: "lora" or "full": how the model trains.
        init: the init at which LoRA was tuned, if its learning rate is converted to full
            finetuning.
    """
    return survey.full_width(init) if method == "full" else survey.width


@dataclass(frozen=True)
class Reference:
    """The configuration at which a learning rate was tuned.

    Full finetuning is `Reference(method="full")` and needs neither rank nor alpha.

    Args:
        rank: the LoRA rank.
        alpha: LoRA's alpha.
        rslora: whether alpha is divided by √rank instead of rank.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        fan_in: the width on which the learning rate depends, in inputs of a layer: for LoRA the
            mean fan-in of the adapted layers, for full finetuning the largest fan-in. By default it
            is read from the model on which the learning rate is used.
        method: "lora" or "full".
        batch: examples or tokens per step. With it, a learning rate is also converted to another
            batch size.

    Raises:
        InvalidReferenceError: a value is missing or impossible.

    >>> Reference(rank=16, alpha=32).scaling
    2.0
    >>> Reference(rank=16, alpha=32, rslora=True).scaling
    8.0
    """

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    init: Literal["A", "B"] = "A"
    fan_in: float | None = None
    method: Method = "lora"
    batch: float | None = None

    def __post_init__(self) -> None:
        error = InvalidReferenceError
        methods = ("lora", "full")
        check_choice(self.method, methods, "The method of a reference must be", error)
        check_init(self.init, "The init of a reference must be", error)
        object.__setattr__(self, "rslora", plain(self.rslora))
        check_choice(self.rslora, (True, False), "rslora of a reference must be", error)
        if self.method == "lora" and None in (self.rank, self.alpha):
            raise error(
                f"A reference for LoRA needs rank and alpha, but got rank={self.rank} and"
                f" alpha={self.alpha}.",
                "Pass both, as in Reference(rank=16, alpha=32), or method='full' for full"
                " finetuning.",
            )
        for name in ("rank", "alpha", "fan_in", "batch"):
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None:
                check_range(name, value, f"A reference's {name}", error)

    @property
    def scaling(self) -> float:
        """s, the number that multiplies B·A, dimensionless. It is 1 for full finetuning."""
        if self.method == "full" or self.rank is None or self.alpha is None:
            return 1.0
        divisor = math.sqrt(self.rank) if self.rslora else self.rank
        return self.alpha / divisor

    def as_factor(self) -> Factor:
        """Return the matrix A at this configuration, or a whole weight for full finetuning. It is
        the argument of a scaling law.
        """
        role: Role = "full" if self.method == "full" else "A"
        width = self.fan_in or 1.0
        return Factor(str(self), role, self.rank, width, width, self.scaling, self.init)

    def resolve(self, survey: Survey) -> Reference:
        """Return this reference with the `fan_in` of a model, unless it has its own.

        The model's is `Survey.width` for LoRA and `Survey.full_width` for full finetuning.

        Args:
            survey: the model's survey.
        """
        if self.fan_in is not None:
            return self
        return replace(self, fan_in=width_for(survey, self.method, self.init))

    def __str__(self) -> str:
        if self.method == "full":
            return "full finetuning"
        rs = ", rslora" if self.rslora else ""
        return f"rank {self.rank}, alpha {self.alpha:g}{rs}, init {self.init}"


Reference.__init__ = explain_near_misses(Reference.__init__)  # type: ignore[method-assign]
