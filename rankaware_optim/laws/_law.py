"""The interface of a scaling law, the two simplest laws, and how the package calls a law.

A law has one method, `Law.multiplier(factor, reference)`. It returns the number that multiplies the
learning rate tuned at `reference` for the LoRA matrix or weight `factor`. The base learning rate is
that of A at the reference. Laws are frozen dataclasses whose fields all have defaults, so that a
recipe's TOML can record them. They are plain arithmetic and need no torch.
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

# A multiplier above this, or below its inverse, gets a warning: chosen by judgement.
_FAR = 1e4
# The rule for the batch was tested on four tasks at a quarter and at four times their own batch,
# and on a fifth task at a sixteenth (benchmarks/answers.md, "Steps, batch and precision"). A larger
# change counts as this one.
BATCH_REACH = 4.0


class Law(ABC):
    """A scaling law: how the best learning rate changes with rank, alpha, init, width and method.

    To write one, subclass it as a frozen dataclass, give every field a default, and define
    `multiplier`. An init of "A" means that A is drawn and B starts at zero, as in PEFT. With "B" it
    is the reverse.

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
        """The family of optimizers in whose form the law is evaluated, None for a law that has the
        same form for all optimizers.
        """
        return None

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        """Return the law in the form for an optimizer, by default the law itself.

        Args:
            optimizer_class: the torch optimizer's class.
            settings: its settings other than the learning rate, by name.
        """
        return self

    def batch_multiplier(self, ratio: float) -> float:
        """Return the number that multiplies every learning rate for another batch size, by default
        1.

        Args:
            ratio: the batch divided by the reference's batch, dimensionless.
        """
        return 1.0

    @abstractmethod
    def multiplier(self, factor: Factor, reference: Reference) -> float:
        """Return the learning rate of `factor` divided by the base learning rate.

        Args:
            factor: the LoRA matrix, or the weight, that trains.
            reference: the configuration of the base learning rate. Its `fan_in` is known
                (`Reference.resolve`).

        Returns:
            A positive finite number, dimensionless.
        """


@dataclass(frozen=True)
class Constant(Law):
    """One learning rate for all ranks and methods: the multiplier is 1."""

    name: ClassVar[str] = "constant"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return 1.0


@dataclass(frozen=True)
class LoRAPlus(Law):
    """LoRA+: B trains at `ratio` times the learning rate of A, at every rank. Everything else
    trains at the base learning rate.

    η_A = η, η_B = ratio·η. Source: Hayou, Ghosh, Yu, "LoRA+" (ICML 2024), which recommends 16.

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
    """Raise a `LawError` if one of these parameters is outside the range for its name."""
    for name in names:
        what = f"In the law {law.name!r} {name}"
        check_range(name, getattr(law, name), what, LawError)


# --- calling a law, which may be third-party code -------------------------------------------------


def checked_multiplier(law: Law, factor: Factor, reference: Reference) -> float:
    """Return `law.multiplier(factor, reference)`, checked to be a positive finite number.

    A value within rounding error of 1 becomes 1, so that the learning rate stays the same bit for
    bit at the reference's own configuration.

    Raises:
        LawError: the law failed, or returned something else.
    """
    value = _answer(law, "multiplier", factor, reference)
    return 1.0 if math.isclose(value, 1.0, rel_tol=1e-12) else value


def checked_batch_multiplier(law: Law, ratio: float) -> float:
    """Return `law.batch_multiplier(ratio)`, checked to be a positive finite number.

    A ratio beyond a factor of `BATCH_REACH` counts as that factor.
    """
    return _answer(law, "batch_multiplier", _within_reach(ratio))


def beyond_batches(ratio: float) -> str:
    """Return the end of a sentence for a batch that is outside the reach of the rule, "" for one
    that is inside.

    Args:
        ratio: the batch divided by the reference's batch, dimensionless.

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
    """Call a method of a law. An exception of the law becomes a `LawError`, and so does a result
    that is not a positive finite number.
    """
    try:
        answer = getattr(law, method)(*question)
    except (RankAwareError, Warning):
        raise
    except Exception as error:
        raise LawError(
            f"The law {law!r} failed in {method}(): {error!r}.",
            "Fix the law's code, or choose another law with law=.",
        ) from error
    if not is_positive(answer):
        raise LawError(
            f"The law {law!r} returned {shown(answer)} from {method}{shown(question)}, which is not"
            " a positive finite number.",
            "Fix the law's code, or choose another law with law=.",
        )
    return float(answer)


def caution_of(multiplier: float) -> str:
    """Return a warning for a multiplier outside 1e-4 to 1e4, else "". Usual ranks and alphas stay
    inside.
    """
    if 1 / _FAR <= multiplier <= _FAR:
        return ""
    return (
        f"The scaling law multiplies the learning rate by {multiplier:.3g}, which is far outside"
        f" the usual range of {1 / _FAR:g} to {_FAR:g}. Check the ranks and alphas."
    )
