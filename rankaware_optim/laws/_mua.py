"""µA, the law of stable feature updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from .._checks import check_init
from .._optimizers import optimizer_family
from .._types import Factor, Reference
from ..errors import LawError
from ._base import FIRST, Law, check_choice, check_parameters
from ._constant import Constant
from ._updates import FORMS, SHAPE_FACTORS, Site, Updates

_ONE_RANK = 16

_TOKENS = 1.0  # chosen for sign-like optimizers by benchmarks/laws/default_law.py
_OTHER_TOKENS = 8.0  # of the other families, whose forms were judged with this number


@dataclass(frozen=True)
class MuA(Law):
    """µA with a finite number of effective tokens, in the form of the optimizer's family.

    The best rate is the largest at which a layer's output still moves by Θ(1). Let τ = T·η over T
    steps, s be the effective multiplier, r the rank, n the fan-in, b = `tokens` and λ = `ratio` =
    η_B / η_A. Under Init[A], A is drawn and B starts at zero, as in PEFT. Under Init[B], B is drawn
    and A starts at zero. For a sign-like optimizer (Adam and its variants)::

        Init[A]   s·κ(r)·λ·τ·(1 + κ(n)·τ) = 1
        Init[B]   hypot(s·κ(n)·τ, s·κ(n)·κ(r)·λ·τ²) = 1
        full      κ(n)·τ = 1
        κ(m) = √(m + (2/π)·m²/b);  κ(m) = m for tokens=None, the paper's law

    κ(m) is the size of a sum of m sign terms that serves b independent tokens at once. Only ratios
    of τ are used, so neither T nor the right-hand side matters.

    The conditions of Muon, SGD and LAMB are in laws/_updates.py: `spectral_terms`, `gradient_rate`
    and `relative_rate`. For them a layer is square, since a reference states one width, and
    tokens=None means one token. Those of Muon and SGD are evaluated at rank 16 for every pair:
    alpha, init, width and method move the rate, the rank does not. Bound to Adafactor or LARS, for
    which no form is known to hold, the law becomes `Constant`.

    Source: Chen, Villar, Hayou, "Learning Rate Scaling across LoRA Ranks and Transfer to Full
    Finetuning" (ICML 2026, arXiv 2602.06204). The finite-token κ and the other families are
    extensions by this project.

    Args:
        tokens: b, the effective number of independent tokens, far below the tokens in a batch; None
            for the paper's law. The default, 1, was chosen for Adam. Bound to an optimizer of
            another family it becomes 8, the number with which these forms were tried.
        ratio: λ = η_B / η_A, dimensionless.
        family: the optimizer's family, set by `bind`. An unknown optimizer counts as sign-like.
        shape_factor: Muon's `adjust_lr_fn`, set by `bind`.

    >>> paper, ours = MuA(tokens=None), MuA()
    >>> at = Reference(rank=16, alpha=16, fan_in=4096)
    >>> round(paper.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0), at), 2)  # about r^(-1/2)
    0.48
    >>> round(ours.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=0.25), at), 2)  # alpha kept: it hardly moves
    1.02
    """

    tokens: float | None = field(default=_TOKENS, metadata={FIRST: 8.0})
    ratio: float = 1.0
    family: str = "sign-like"
    shape_factor: str = "original"
    name: ClassVar[str] = "mua"

    def __post_init__(self) -> None:
        check_parameters(self, "ratio", *(() if self.tokens is None else ("tokens",)))
        check_choice(self, "family", FORMS)
        check_choice(self, "shape_factor", SHAPE_FACTORS)

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        family = optimizer_family(optimizer_class, settings)
        if family not in FORMS:
            return Constant()
        bound = replace(
            self, family=family, shape_factor=settings.get("adjust_lr_fn") or "original"
        )
        if self.tokens == _TOKENS and family not in ("sign-like", "unknown"):
            return replace(bound, tokens=_OTHER_TOKENS)
        return bound

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        init = "full" if factor.role == "full" else "B" if factor.init == "B" else "A"
        origin = "full" if reference.method == "full" else reference.init
        rate = self._rate(init, factor.rank, factor.scaling, factor.fan_in)
        base = self._rate(origin, reference.rank, reference.scaling, reference.fan_in)
        return (rate * self.ratio if factor.role == "B" else rate) / base

    def batch_multiplier(self, ratio: float) -> float:
        return float(ratio ** FORMS[self.family].batch)

    def sigma(self, init: str, rank: int, scaling: float, fan_in: float) -> float:
        """Return η_A that meets the family's condition at T = 1. As an absolute rate it is only a
        first guess.

        Args:
            init: "A", "B" or "full".
            rank: r.
            scaling: s, the effective multiplier.
            fan_in: n.
        """
        check_init(init, "A law's init is", LawError, known=("A", "B", "full"))
        return self._rate(init, rank, scaling, fan_in)

    def _rate(self, init: str, rank: int | None, scaling: float, fan_in: float | None) -> float:
        """Return η_A that meets the family's condition at T = 1, or a whole weight's rate. η_B is λ
        times as large.
        """
        if fan_in is None or (rank is None and init != "full"):
            raise LawError(
                "The reference was not resolved: it lacks its fan-in or its rank.",
                "Call reference.resolve(survey), or give fan_in=.",
            )
        form = FORMS[self.family]
        seen = _ONE_RANK if form.one_rank else rank or 1
        updates = Updates(self.tokens, self.ratio, self.shape_factor)
        return form.rate(updates, Site(init, seen, scaling, fan_in))


def paper() -> MuA:
    """Return the paper's law, in which tokens do not interfere."""
    return MuA(tokens=None)
