"""What a law is, the two simplest laws, and how the package asks a law.

A law has one method, `Law.multiplier(factor, reference)`: the number by which the rate tuned at
`reference` is multiplied for `factor`. The base rate is that of the reference's A factor. Laws are
frozen dataclasses whose arguments all have defaults, so that a recipe's TOML can hold them. They
are plain arithmetic, without torch.
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
    """A scaling law. Subclass it as a frozen dataclass, give every field a default, and write
    `multiplier`.

    An init of "A" means that A is drawn and B starts at zero, as in PEFT. "B",
    printed as A = 0, is the reverse.

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
        """Return the law for an optimizer; by default the law itself.

        Args:
            optimizer_class: the torch optimizer's class.
            settings: its settings other than the learning rate, by name.
        """
        return self

    def batch_multiplier(self, ratio: float) -> float:
        """Return the factor of every rate for a batch of another size; by default 1.

        Args:
            ratio: the batch divided by the reference's batch, dimensionless.
        """
        return 1.0

    @abstractmethod
    def multiplier(self, factor: Factor, reference: Reference) -> float:
        """Return the ratio of `factor`'s rate to the base rate.

        Args:
            factor: the matrix whose rate is wanted.
            reference: the configuration of the base rate, with its `fan_in` known
                (`Reference.resolve`).

        Returns:
            A positive finite number, dimensionless.
        """


@dataclass(frozen=True)
class Constant(Law):
    """One rate for everything: multiplier 1."""

    name: ClassVar[str] = "constant"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return 1.0


@dataclass(frozen=True)
class LoRAPlus(Law):
    """LoRA+: B's rate is `ratio` times A's at every rank. Everything else has the base rate.

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


# --- asking a law, which may be third-party code --------------------------------------------------


def checked_multiplier(law: Law, factor: Factor, reference: Reference) -> float:
    """Return `law.multiplier(factor, reference)`, checked to be a positive finite number.

    A value within rounding error of 1 becomes 1. The reference's own configuration then keeps its
    rate bit for bit.

    Raises:
        LawError: the law failed, or returned something else.
    """
    value = _answer(law, "multiplier", factor, reference)
    return 1.0 if math.isclose(value, 1.0, rel_tol=1e-12) else value


def checked_batch_multiplier(law: Law, ratio: float) -> float:
    """Return `law.batch_multiplier(ratio)`, checked to be a positive finite number.

    A ratio farther from 1 than `BATCH_REACH` counts as that.
    """
    return _answer(law, "batch_multiplier", _within_reach(ratio))


def beyond_batches(ratio: float) -> str:
    """Return in words that a batch is too far for the whole move, "" if it is not.

    Args:
        ratio: the batch divided by the reference's batch, dimensionless.

    >>> beyond_batches(0.5), beyond_batches(16.0)
    ('', ', as for 4 times the batch, where the move stops')
    """
    reach = _within_reach(ratio)
    if ratio == reach:
        return ""
    return f", as for {reach:g} times the batch, where the move stops"


def _within_reach(ratio: float) -> float:
    return min(max(ratio, 1 / BATCH_REACH), BATCH_REACH)


def _answer(law: Law, method: str, *question: Any) -> float:
    """Call a method of a law. Whatever it raises becomes a `LawError`, and so does an answer that
    is no positive finite number.
    """
    try:
        answer = getattr(law, method)(*question)
    except (RankAwareError, Warning):
        raise
    except Exception as error:
        raise LawError(
            f"The law {law!r} failed in {method}(): {error!r}.",
            "Fix the law, or choose another by law=.",
        ) from error
    if not is_positive(answer):
        raise LawError(
            f"The law {law!r} returned {shown(answer)} from {method}{shown(question)}.",
            "Return a positive finite number, or choose another law by law=.",
        )
    return float(answer)


def caution_of(multiplier: float) -> str:
    """Return a warning text for a multiplier outside 1e-4 to 1e4, else "". Usual ranks and alphas
    stay inside.
    """
    if 1 / _FAR <= multiplier <= _FAR:
        return ""
    return (
        f"The law multiplies the rate by {multiplier:.3g}, beyond {1 / _FAR:g} to {_FAR:g}: look at"
        " ranks and alphas."
    )
