"""µA, the law of stable feature updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from .._checks import check_init
from .._types import Factor, Reference
from ..errors import LawError
from ._base import Law, check_choice, check_parameters
from ._updates import FORMS, SHAPE_FACTORS, Site, Updates, update_settings


@dataclass(frozen=True)
class MuA(Law):
    """µA with finitely many effective tokens, in the form of the optimizer's family.

    The best rate is the largest at which a layer's output still moves by Θ(1). With τ = T·η over T steps, s the
    effective multiplier, r the rank, n the fan-in, b = `tokens` and λ = `ratio` = η_B / η_A, a sign-like optimizer
    (Adam and its variants) has

        Init[A]   s·κ(r)·λ·τ·(1 + κ(n)·τ) = 1
        Init[B]   hypot(s·κ(n)·τ, s·κ(n)·κ(r)·λ·τ²) = 1
        full      κ(n)·τ = 1
        κ(m) = √(m + (2/π)·m²/b);  κ(m) = m for tokens=None, the paper's law

    κ(m) is the size of a sum of m sign terms that serves b independent tokens at once. Only ratios of τ are used, so
    neither T nor the right-hand side matters. tokens: effective and far below the tokens in a batch; published
    language-model sweeps ask for 8 to 16, small image models for 1 to 3.

    The other families' conditions stand in families.py, at `spectral_terms`, `gradient_rate`, `relative_rate` and
    `first_step_rate`; there a layer counts as square, since a reference states one width, and tokens=None as one
    token. `bind` sets `family`, `shape_factor` (Muon's) and `floor` (Adafactor's) by the optimizer; an unknown one is
    taken as sign-like. `steps` = T matters only where growth compounds (gradient-like, relative-scale): None is many
    small steps, as in training; the check takes four.

    split=True gives the two factors the rates at which each one's own share of the change is Θ(1): for sign-like
    updates η_A = σ/n and η_B = λ·σ/(s·r) under Init[A], η_A = σ/(s·n) and η_B = λ·σ/r under Init[B]. The base rate is
    that of the reference's A factor, and σ solves the condition above, in which s then cancels: a change of s is
    undone exactly, as it is in training.

    Source: Chen, Villar, Hayou, "Learning Rate Scaling across LoRA Ranks and Transfer to Full Finetuning" (ICML
    2026, arXiv 2602.06204); the finite-token κ, the families and the split are this project's extension, confirmed by
    `coordinate_check` (benchmarks/results/exponents.md).

    >>> paper, ours = MuA(tokens=None), MuA()
    >>> at = Reference(rank=16, alpha=16, fan_in=4096)
    >>> round(paper.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=1.0), at), 2)  # about r^(-1/2)
    0.48
    >>> round(ours.multiplier(Factor("w", "A", 64, 4096, 4096, scaling=0.25), at), 2)  # alpha kept: the rate rises
    1.11
    """

    tokens: float | None = 8.0
    ratio: float = 1.0
    split: bool = False
    family: str = "sign-like"
    shape_factor: str = "original"
    floor: float | None = None
    steps: int | None = None
    name: ClassVar[str] = "mua"

    def __post_init__(self) -> None:
        given = [name for name in ("tokens", "floor", "steps") if getattr(self, name) is not None]
        check_parameters(self, "ratio", *given)
        for name, choices in (("split", (False, True)), ("family", FORMS), ("shape_factor", SHAPE_FACTORS)):
            check_choice(self, name, choices)
        if self.split and FORMS[self.family].units is None:
            raise LawError(f"Two rates are not derived for {self.family} optimizers.", "Leave split=True out.")

    def bind(self, optimizer_class: type, settings: Mapping[str, Any]) -> Law:
        return replace(self, **update_settings(optimizer_class, settings))

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        init = "full" if factor.role == "full" else "B" if factor.init == "B" else "A"
        rate_a, rate_b = self._rates(init, factor.rank, factor.scaling, factor.fan_in)
        origin = "full" if reference.method == "full" else reference.init
        base, _ = self._rates(origin, reference.rank, reference.scaling, reference.fan_in)
        return (rate_b if factor.role == "B" else rate_a) / base

    def batch_multiplier(self, ratio: float) -> float:
        return float(ratio ** FORMS[self.family].batch)

    def sigma(self, init: str, rank: int, scaling: float, fan_in: float) -> float:
        """σ, the shared rate, that meets the family's condition at T = 1, in absolute terms: rough, a first guess."""
        check_init(init, "A law's init is", LawError, known=("A", "B", "full"))
        return self._rates(init, rank, scaling, fan_in)[0]

    def _rates(self, init: str, rank: int | None, scaling: float, fan_in: float | None) -> tuple[float, float]:
        """η_A and η_B that meet the family's condition at T = 1; a whole weight's rate stands for both."""
        if fan_in is None or (rank is None and init != "full"):
            raise LawError(
                "The reference was not resolved: it lacks its fan-in or its rank.",
                "Call reference.resolve(survey), or give fan_in=.",
            )
        site, form = Site(init, rank or 1, scaling, fan_in), FORMS[self.family]
        of = Updates(self.tokens, self.shape_factor, self.floor, self.steps)
        unit_a, unit_b = form.units(of, site) if self.split and form.units and init != "full" else (1.0, 1.0)
        sigma = form.rate(of, site, unit_a, unit_b * self.ratio)
        return unit_a * sigma, unit_b * sigma * self.ratio


def paper() -> MuA:
    """The paper's own law: no tokens interfere."""
    return MuA(tokens=None)
