"""This module defines `Factor`, a matrix that trains, and `Reference`, a configuration.

LoRA adapts a frozen weight W of shape (n_out, n_in) as W + s·B·A, where A has the shape
(r, n_in) and B has the shape (n_out, r). The scaling s is alpha / r in PEFT, and alpha / √r
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
    """A matrix that trains: A or B of a LoRA pair, or a whole weight.

    Args:
        name: the parameter's name.
        role: "A" (the LoRA matrix that receives the layer's input), "B" (the LoRA matrix
            that produces the output) or "full" (a whole weight in full finetuning).
        rank: the LoRA rank, or None for a whole weight.
        fan_in: the number of inputs of the adapted layer, for both A and B. For a
            convolution, it is the number of input channels times the kernel size.
        fan_out: the number of outputs of the adapted layer.
        scaling: s, the number that multiplies B·A, dimensionless.
        init: "A" if A is random and B starts at zero, as in PEFT. "B" if B is random and A
            starts at zero. "other" if neither starts at zero, and "unknown" if the init
            cannot be determined.
        kind: the type of the layer, such as "linear" or "embedding".
        layer: the name of the layer.
        adapter: the name of the adapter.
        convention: the name of the adapter convention that describes the layer.
        dtype: the name of the dtype of a whole weight during training, such as "bfloat16". It is
            "" if the dtype is unknown, and for LoRA matrices.
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
    """Return the fan-in that determines a model's best learning rate.

    Args:
        survey: the survey of the model.
        method: "lora" or "full", depending on how the model trains.
        init: the init with which LoRA was tuned. It only matters for full finetuning, if the
            learning rate is converted from LoRA.
    """
    return survey.full_width(init) if method == "full" else survey.width


@dataclass(frozen=True)
class Reference:
    """The configuration that a learning rate was tuned for.

    For full finetuning, use `Reference(method="full")`, which needs no rank and no alpha.

    Args:
        rank: the LoRA rank.
        alpha: the LoRA alpha.
        rslora: whether alpha is divided by √rank instead of rank.
        init: "A" if B starts at zero, as in PEFT, or "B" if A starts at zero.
        fan_in: the width that determines the learning rate, in inputs of a layer. For LoRA
            it is the mean fan-in of the adapted layers, and for full finetuning the largest
            fan-in. By default, it is read from the model that uses the learning rate.
        method: "lora" or "full".
        batch: the batch size, as examples or tokens per step. If it is set, learning rates
            are also converted to other batch sizes.

    Raises:
        InvalidReferenceError: a required value is missing, or a value is out of range.

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
        check_choice(self.method, methods, "The method of a reference", error)
        check_init(self.init, "The init of a reference", error)
        object.__setattr__(self, "rslora", plain(self.rslora))
        check_choice(self.rslora, (True, False), "rslora of a reference", error)
        if self.method == "lora" and None in (self.rank, self.alpha):
            rank, alpha = self.rank, self.alpha
            raise error(
                f"A reference for LoRA needs both rank and alpha, but it has rank={rank} and"
                f" alpha={alpha}.",
                "Pass both values, as in Reference(rank=16, alpha=32). For full finetuning, pass"
                " Reference(method='full').",
            )
        # The dataclass is frozen, so the converted values are set with object.__setattr__.
        for name in ("rank", "alpha", "fan_in", "batch"):
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None:
                check_range(name, value, f"A reference's {name}", error)

    @property
    def scaling(self) -> float:
        """The factor that multiplies B·A. For full finetuning, the scaling factor is 1."""
        if self.method == "full" or self.rank is None or self.alpha is None:
            return 1.0
        divisor = math.sqrt(self.rank) if self.rslora else self.rank
        return self.alpha / divisor

    def as_factor(self) -> Factor:
        """Return a matrix with this configuration, for use as the argument of a scaling law.

        For LoRA, the result describes the matrix A. For full finetuning, the result
        describes a whole weight.
        """
        role: Role = "full" if self.method == "full" else "A"
        width = self.fan_in or 1.0
        return Factor(str(self), role, self.rank, width, width, self.scaling, self.init)

    def resolve(self, survey: Survey) -> Reference:
        """Return this reference with the fan-in of a model. If the reference already has a
        fan-in, it does not change.

        The fan-in is `Survey.width` for LoRA and `Survey.full_width` for full finetuning.

        Args:
            survey: the survey of the model.
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
