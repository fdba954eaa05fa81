"""The nouns every other module speaks of: `Factor`, `Survey`, `Reference`.

A frozen weight W of shape (n_out, n_in) is adapted as W + s·B·A with A of shape (r, n_in) and B of shape (n_out, r).
`scaling` is s, the effective multiplier on B·A: alpha / r in PEFT, alpha / √r with rsLoRA.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ._checks import check_init, is_within, range_of, shown
from ._survey_text import Rated, audit, explain
from .errors import InspectionError, InvalidReferenceError

Role = Literal["A", "B", "full"]
Init = Literal["A", "B", "other", "unknown"]
Method = Literal["lora", "full"]


@dataclass(frozen=True)
class Factor:
    """One trainable matrix whose rate a law may move.

    `role` is "A" (the first, input-side factor), "B" (the second) or "full" (a whole weight under full finetuning).
    `rank` is None for "full". `fan_in` and `fan_out` are those of the adapted layer, not of the factor; a
    convolution's fan-in is channels × kernel. `init` is "A" where A was drawn and B is zero, "B" where B was drawn
    and A is zero, "other" where neither is zero, "unknown" where it cannot be read.
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


@dataclass(frozen=True)
class Survey:
    """What a model trains: its `factors`, and every `other` trainable parameter by name.

    `looked_at` counts the parameters that were looked at, `tried` names the conventions, `notes` are sentences for
    the report. `frozen` names LoRA factors that do not train, `unadapted` frozen expert weights that no pair adapts.
    `unsupported` gives the kind of those of `other` that belong to an adapter without a law: {"q.hada_w1_a": "LoHa"}.
    """

    factors: tuple[Factor, ...] = ()
    other: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    looked_at: int = 0
    tried: tuple[str, ...] = field(default=(), repr=False)
    frozen: tuple[str, ...] = field(default=(), repr=False)
    unadapted: tuple[str, ...] = field(default=(), repr=False)
    unsupported: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    @property
    def width(self) -> float:
        """Mean fan-in of the adapted layers, weighted by their weights' size; embeddings are left out."""
        sizes = {f.layer: (f.fan_in, f.fan_in * f.fan_out) for f in self._dense()}
        total = sum(size for _, size in sizes.values())
        return sum(n * size for n, size in sizes.values()) / total if total else 1.0

    def full_width(self, init: Init = "A") -> float:
        """The width that decides full finetuning, seen from a LoRA rate tuned at `init`.

        The largest fan-in from Init[A], the mean from Init[B], whose own rate falls with the width, by theory, as full
        finetuning's does: with these no further factor is needed (benchmarks/results/full_width.md).
        """
        return self.width if init == "B" else max((f.fan_in for f in self._dense()), default=1.0)

    def dominant(self) -> Reference:
        """This model's own most common (rank, scaling, init), counted by pairs, as an unresolved `Reference`."""
        if any(f.role == "full" for f in self.factors):
            return Reference(method="full")
        pairs = {(f.layer, f.adapter, f.convention): f for f in self.factors}.values()
        keys = [(f.rank, f.scaling, f.init) for f in pairs if f.kind != "embedding"]
        keys = keys or [(f.rank, f.scaling, f.init) for f in pairs]
        if not keys:
            raise InspectionError(
                "The survey holds no LoRA pair, so it has no most common rank.",
                "Inspect a model that has adapters, or say method='full'.",
            )
        (rank, scaling, init), _ = Counter(keys).most_common(1)[0]
        return Reference.from_scaling(rank, scaling, init="B" if init == "B" else "A")

    def explain(self, *, per_module: bool = False, rates: Mapping[str, Rated] | None = None) -> str:
        """A table of what was found and why each is treated so, alike factors on one line, then what to check.

        per_module gives every tensor a line of its own. rates: by parameter name, to fill the columns lr and why.
        """
        return explain(self, per_module, rates or {})

    def audit(self) -> tuple[str, ...]:
        """Known accidents that this survey shows, a sentence each; empty where there is none."""
        return tuple(audit(self))

    def _dense(self) -> Iterable[Factor]:
        return (f for f in self.factors if f.kind != "embedding")


@dataclass(frozen=True)
class Reference:
    """The configuration a learning rate was tuned at.

    `alpha` with `rank` and `rslora` give the effective multiplier `scaling`. `fan_in` is the model's width; left
    out, it is taken from the model the rate is used on. `batch` (examples or tokens a step) is kept for laws that
    know it. Full finetuning is `Reference(method="full")` and needs neither rank nor alpha.

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
        if self.method not in ("lora", "full"):
            raise InvalidReferenceError(
                f"A reference's method is 'lora' or 'full', not {self.method!r}.", "Give one of the two."
            )
        check_init(self.init, "A reference's init is", InvalidReferenceError)
        for name in ("rank", "alpha") if self.method == "lora" else ():
            if getattr(self, name) is None:
                raise InvalidReferenceError(
                    f"Reference lacks {name}: a LoRA rate belongs to a rank and an alpha.",
                    f"Give {name}=..., or method='full' for a rate tuned by full finetuning.",
                )
        for name in ("rank", "alpha", "fan_in", "batch"):
            value = getattr(self, name)
            if value is not None and not is_within(name, value):
                raise InvalidReferenceError(f"Reference got {name}={shown(value)}.", f"Give {range_of(name)}.")

    @classmethod
    def from_scaling(cls, rank: int | None, scaling: float, *, init: Literal["A", "B"] = "A") -> Reference:
        """The LoRA reference whose effective multiplier at `rank` is `scaling`."""
        return cls(rank=rank, alpha=scaling * (rank or 1), init=init)

    @property
    def scaling(self) -> float:
        """The effective multiplier s on B·A, dimensionless; 1 for full finetuning."""
        if self.method == "full" or self.rank is None or self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def as_factor(self) -> Factor:
        """What stands at this configuration, for a law to move a rate to: its A factor, or a whole weight."""
        role: Role = "full" if self.method == "full" else "A"
        width = self.fan_in or 1.0
        return Factor(str(self), role, self.rank, width, width, self.scaling, self.init)

    def resolve(self, survey: Survey) -> Reference:
        """This reference with `fan_in` filled in from the surveyed model, unless it was given.

        A LoRA rate is read at the mean width, a full-finetuning rate at that of `Survey.full_width`.
        """
        if self.fan_in is not None:
            return self
        return replace(self, fan_in=survey.full_width(self.init) if self.method == "full" else survey.width)

    def __str__(self) -> str:
        if self.method == "full":
            return "full finetuning"
        rs = ", rslora" if self.rslora else ""
        return f"rank {self.rank}, alpha {self.alpha:g}{rs}, Init[{self.init}]"
