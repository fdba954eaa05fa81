"""This module defines the base class of all scaling laws and the two simplest laws.

Every scaling law implements the method `Law.multiplier(factor, reference)`. The
learning rate of the matrix `factor` is the result of `multiplier` times the learning
rate that was tuned at `reference`. Laws are frozen dataclasses, and every field has a
default, so a recipe can store a law in its TOML file. A scaling law only does
arithmetic and does not import torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .._checks import check_range, is_positive, shown
from .._types import Factor, Reference
from ..errors import LawError, RankAwareError

# A multiplier above this limit, or below its inverse, adds a warning. Chosen by judgement.
_FAR = 1e4
# The rule for the batch size was tested on four tasks, at a quarter of their batch size
# and at four times their batch size, and on a fifth task at a sixteenth
# (benchmarks/answers.md, "Steps, batch and precision"). Larger changes of the batch size
# are treated as a factor of 4.
BATCH_REACH = 4.0


class Law(ABC):
    """The base class of all scaling laws.

    A scaling law predicts how the best learning rate changes with the rank, alpha, the
    init and the width, and between LoRA and full finetuning. To write a law, define a
    frozen dataclass that inherits from `Law`, give every field a default, and implement
    `multiplier`. The init "A" means that A is random and B starts at zero, as in PEFT.
    The init "B" means that B is random and A starts at zero.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class InverseRank(Law):
    ...     name = "inverse-rank"
    ...     def multiplier(self, factor, reference):
    ...         return (reference.rank or 1) / (factor.rank or 1)
    >>> at = Reference(rank=16, alpha=16, fan_in=64)
    >>> InverseRank().multiplier(Factor("w", "A", 32, 64, 64), at)
    0.5
    """

    name: ClassVar[str] = ""

    @property
    def family(self) -> str | None:
        """The optimizer family that the law is evaluated for, such as "sign-like", or
        None if the law is the same for all optimizers.
        """
        return None

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        """Return the version of this law that applies to an optimizer.

        By default, a scaling law does not depend on the optimizer, so this method
        returns the scaling law itself.

        Args:
            optimizer_class: the class of the torch optimizer.
            settings: the optimizer's settings except the learning rate, by name.
        """
        return self

    def batch_multiplier(self, ratio: float) -> float:
        """Return the factor that adapts all learning rates to the batch size.

        By default, the batch size does not change the learning rate and the factor is 1.

        Args:
            ratio: the batch size divided by the reference's batch size, dimensionless.
        """
        return 1.0

    @abstractmethod
    def multiplier(self, factor: Factor, reference: Reference) -> float:
        """Return the learning rate of `factor` divided by the base learning rate.

        The base learning rate is the learning rate of the matrix A at the reference, or of
        a whole weight if the reference was tuned by full finetuning.

        Args:
            factor: the LoRA matrix or the whole weight that trains.
            reference: the configuration that the base learning rate was tuned for. Its
                `fan_in` must be set (see `Reference.resolve`).

        Returns:
            A positive finite number, dimensionless.
        """


@dataclass(frozen=True)
class Constant(Law):
    """A law that uses the same learning rate for all ranks and for full finetuning."""

    name: ClassVar[str] = "constant"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return 1.0


@dataclass(frozen=True)
class LoRAPlus(Law):
    """The LoRA+ law, which multiplies the learning rate of B by `ratio`.

    The ratio is the same at every rank, and all other parameters train at the base
    learning rate: η_A = η, η_B = ratio·η. The law was published by Hayou, Ghosh and Yu in
    "LoRA+" (ICML 2024), where the authors recommend a ratio of 16.

    Args:
        ratio: η_B / η_A, dimensionless.
    """

    ratio: float = 16.0
    name: ClassVar[str] = "loraplus"

    def __post_init__(self) -> None:
        check_ranges(self, "ratio")

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return self.ratio if factor.role == "B" else 1.0


def check_ranges(law: Law, *names: str) -> None:
    """Raise a `LawError` if any of the named parameters of a law is out of range."""
    for name in names:
        argument = f"In the law {law.name!r}, the parameter {name}"
        check_range(name, getattr(law, name), argument, LawError)


# --- calling a law, which may be third-party code -------------------------------------------------


def checked_multiplier(law: Law, factor: Factor, reference: Reference) -> float:
    """Return `law.multiplier(factor, reference)` after checking the result.

    If the multiplier differs from 1 only by rounding, the function returns exactly 1. The
    learning rate at the reference configuration therefore does not change by a single bit.

    Raises:
        LawError: the law raised an exception, or its result is not a positive finite
            number.
    """
    value = _answer(law, "multiplier", factor, reference)
    return 1.0 if math.isclose(value, 1.0, rel_tol=1e-12) else value


def checked_batch_multiplier(law: Law, ratio: float) -> float:
    """Return `law.batch_multiplier(ratio)` after checking the result.

    The rule for the batch size was only tested up to a factor of `BATCH_REACH`, so the
    ratio is first limited to that factor.
    """
    return _answer(law, "batch_multiplier", _within_reach(ratio))


def beyond_batches(ratio: float) -> str:
    """Return a phrase for a note if the batch size changed by more than the factors that
    were tested, or "" otherwise.

    Args:
        ratio: the batch size divided by the reference's batch size, dimensionless.

    >>> beyond_batches(0.5), beyond_batches(16.0)
    ('', ', as for 4 times the batch, the largest change that the rule covers')
    """
    reach = _within_reach(ratio)
    if ratio == reach:
        return ""
    return (
        f", as for {reach:g} times the batch, the largest change that the rule covers"
    )


def _within_reach(ratio: float) -> float:
    return min(max(ratio, 1 / BATCH_REACH), BATCH_REACH)


def _answer(law: Law, method: str, *question: Any) -> float:
    """Call a method of a law and return its result as a float.

    Raises:
        LawError: the method raised an exception, or its result is not a positive finite
            number.
    """
    try:
        answer = getattr(law, method)(*question)
    except (RankAwareError, Warning):
        # Our errors already explain what to do. A warning arrives as an exception if the
        # user's filters turn warnings into errors, and then the user wants to see it.
        raise
    except Exception as error:
        raise LawError(
            f"The law {law!r} raised an exception in its {method}() method: {error!r}.",
            f"Fix {method}() in the law's class, or choose another law, such as"
            " law='falling'.",
        ) from error
    if not is_positive(answer):
        result, arguments = shown(answer), shown(question)
        raise LawError(
            f"The {method}() method of the law {law!r} must return a positive finite number, but it"
            f" returned {result} for the arguments {arguments}.",
            f"Fix {method}() in the law's class, or choose another law, such as"
            " law='falling'.",
        )
    return float(answer)


def caution_of(multiplier: float) -> str:
    """Return a warning if a learning rate's multiplier is below 1e-4 or above 1e4, or "" otherwise.

    With common LoRA ranks and alphas, the multiplier of a learning rate is always
    between 1e-4 and 1e4.
    """
    if 1 / _FAR <= multiplier <= _FAR:
        return ""
    return (
        f"The scaling law multiplies the learning rate by {multiplier:.3g}, but usual"
        f" multipliers are between {1 / _FAR:g} and {_FAR:g}. Check that the ranks and"
        " alphas are correct."
    )
