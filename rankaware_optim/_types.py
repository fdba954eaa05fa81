"""The common types: `Factor`, `Survey`, `Reference`, and their words in reports.

A frozen weight W of shape (n_out, n_in) is adapted as W + s·B·A with A of shape (r, n_in) and B of
shape (n_out, r). `scaling` is s, the factor of B·A: alpha / r in PEFT, alpha / √r
with rsLoRA.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from ._checks import check_init, is_within, plain, range_of, shown
from ._printing import Table
from .errors import InspectionError, InvalidReferenceError

Role = Literal["A", "B", "full"]
Init = Literal["A", "B", "other", "unknown"]
Method = Literal["lora", "full"]
Task = Literal["chat", "other", "rl"]  # of a suggestion
Scaling = Literal["fixed", "rslora", "alpha", "unknown"]


class Rated(NamedTuple):
    """A parameter's learning rate, and the reason for it in words."""

    lr: float
    reason: str


_HEADINGS = ("kind", "role", "rank", "scaling", "init", "fan-in", "fan-out", "tensors")
_LEFT_ALIGNED = ("module", "convention", "kind", "role", "init", "why")
# By hand: usual scalings, and what is odd beside the least one of the same adapter.
_LEAST_SCALING, _MOST_SCALING, _FAR_SCALING = 1 / 64, 8.0, 8.0
NO_LAW = "neither factor started at zero, so no law covers it: the base rate"
# Pairs that add more than s·B·A, which is what the laws are derived for, by their factors' kind.
LAWLESS = {"adalora": "AdaLoRA", "kasa": "KaSA", "xlora": "X-LoRA"}


def init_text(init: str) -> str:
    """Return an init in the words of a report: by the factor that starts at zero.

    >>> init_text("A"), init_text("B")
    ('B = 0', 'A = 0')
    """
    return {"A": "B = 0", "B": "A = 0"}.get(init, init)


def reason_of_other(kind: str | None, rate: str = "the base rate") -> str:
    """Return why a parameter that is no factor has its rate. kind: its adapter's, if no law covers
    it.
    """
    return f"{kind}: no law, {rate}" if kind else f"no LoRA factor: {rate}"


def reason_without_law(factor: Factor) -> str:
    """Return why a factor of init "other" keeps the base rate."""
    name = LAWLESS.get(factor.kind)
    return NO_LAW if name is None else reason_of_other(name)


@dataclass(frozen=True)
class Factor:
    """One trainable matrix whose rate a law may move.

    Args:
        name: the parameter's name.
        role: "A" (the first, input-side factor), "B" (the second) or "full" (a whole weight in full
            finetuning).
        rank: the LoRA rank, None for "full".
        fan_in: number of inputs of the adapted layer, not of the factor. For a convolution it is
            channels × kernel size.
        fan_out: number of outputs of the adapted layer.
        scaling: s, the factor of B·A, dimensionless.
        init: "A" if A was drawn and B starts at zero, as in PEFT. "B" if B was drawn and A starts
            at zero. "other" if neither is zero, "unknown" if it cannot be read.
        kind: the layer's kind, such as "linear" or "embedding".
        layer: the layer's name.
        adapter: the adapter's name.
        convention: the name of the convention by which it was found.
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


def dense(factors: Iterable[Factor]) -> list[Factor]:
    """Return the factors of layers whose input is not one-hot, as an embedding's is."""
    return [f for f in factors if f.kind != "embedding"]


# What is odd about a LoRA factor: whether it is so, and in words what the factor is not.
_ODD_FACTORS: tuple[tuple[Callable[[Factor], bool], str], ...] = (
    (
        lambda f: f.init == "other" and f.kind not in LAWLESS,
        "covered by a law's derivation: neither factor zero at the start",
    ),
    *(
        (lambda f, kind=kind: f.kind == kind, f"covered by a law: {name}")
        for kind, name in LAWLESS.items()
    ),
    (
        lambda f: f.init == "unknown",
        "covered by a law's derivation: an init that cannot be read",
    ),
    (
        lambda f: f.kind != "embedding" and (f.rank or 0) > f.fan_in,
        "low-rank: the rank is above the fan-in",
    ),
    (
        lambda f: not _LEAST_SCALING <= f.scaling <= _MOST_SCALING,
        "scaled as usual: alpha / rank is above 8 or below 1/64",
    ),
)


@dataclass(frozen=True)
class Survey:
    """The trainable parameters of a model, as found by `inspect_model` or `inspect_file`.

    Args:
        factors: LoRA factors and whole weights.
        other: names of the other trainable parameters.
        notes: sentences for the report.
        looked_at: number of parameters examined.
        frozen: names of LoRA factors that do not train.
        unsupported: the adapter's kind for those of `other` that no law covers, such as
            {"q.hada_w1_a": "LoHa"}.
    """

    factors: tuple[Factor, ...] = ()
    other: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    looked_at: int = 0
    frozen: tuple[str, ...] = field(default=(), repr=False)
    unsupported: Mapping[str, str] = field(default_factory=dict, repr=False, hash=False)

    @property
    def width(self) -> float:
        """Mean fan-in of the adapted layers, weighted by the size of their weights. Embeddings are
        left out.
        """
        layers = {f.layer: f for f in dense(self.factors)}.values()
        total = sum(f.fan_in * f.fan_out for f in layers)
        weighted = sum(f.fan_in * (f.fan_in * f.fan_out) for f in layers)
        return weighted / total if total else 1.0

    def full_width(self, init: Init = "A") -> float:
        """Return the width on which the rate of full finetuning depends, relative to a LoRA rate.

        It is the largest fan-in from B = 0 and the mean fan-in from A = 0. With these widths the
        law needs no further factor (benchmarks/README.md, frozen answers).

        Args:
            init: the init of the LoRA rate: "A" (B starts at zero) or "B" (A starts at zero).
        """
        if init == "B":
            return self.width
        return max((f.fan_in for f in dense(self.factors)), default=1.0)

    def dominant(self) -> Reference:
        """Return this model's most common (rank, scaling, init), counted by pairs, as an unresolved
        `Reference`. Pairs of embeddings, and those that no law covers, count where there are no
        others.

        Raises:
            InspectionError: there is no LoRA pair.
        """
        if any(f.role == "full" for f in self.factors):
            return Reference(method="full")
        pairs = {(f.layer, f.adapter, f.convention): f for f in self.factors}.values()
        covered = [f for f in pairs if f.kind not in LAWLESS]
        usual = dense(covered) or covered or pairs
        keys = [(f.rank, f.scaling, f.init) for f in usual]
        if not keys:
            raise InspectionError(
                "The survey has no LoRA pair, so it has no most common rank.",
                "Inspect a model that has adapters, or give method='full'.",
            )
        (rank, scaling, init), _ = Counter(keys).most_common(1)[0]
        return Reference.from_scaling(rank, scaling, init="B" if init == "B" else "A")

    def explain(self, *, per_module: bool = False) -> str:
        """Return a table of the factors, and sentences on what to check.

        Args:
            per_module: whether every tensor has its own line. Otherwise equal factors share one.
        """
        return self._table(per_module).text(200 if per_module else 140)

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self, per_module: bool = False) -> Table:
        lines = Counter[tuple[str, ...]]()
        for name, convention, *cells in self._lines():
            lines[(name if per_module else convention, *cells)] += 1
        rows = [(*line[:8], str(count), *line[8:]) for line, count in lines.items()]
        headings = ["module" if per_module else "convention", *_HEADINGS, "why"]
        remarks = [f"check: {check}" for check in self.audit()]
        remarks += [f"note: {note}" for note in self.notes]
        return Table(headings, rows, remarks, left=_LEFT_ALIGNED)

    def _lines(self) -> Iterator[tuple[str, ...]]:
        """Yield each tensor's name, convention, cells from kind to fan-out, and reason."""
        blank = [""] * 5
        for f in self.factors:
            how, why = [f"{f.scaling:g}", init_text(f.init)], "a LoRA pair"
            if f.role == "full":
                how, why = ["", ""], "a whole weight"
            elif f.init == "other":
                why = reason_without_law(f)
            cells = (f.kind, f.role, str(f.rank or ""), *how)
            fans = (f"{f.fan_in:g}", f"{f.fan_out:g}")
            yield f.name, f.convention, *cells, *fans, why
        for name in self.other:
            kind = self.unsupported.get(name, "")
            why = reason_of_other(kind)
            yield name, "", kind, "other", *blank, why
        for name in self.frozen:
            yield name, "", "", "frozen", *blank, "a LoRA factor that does not train"

    def audit(self) -> tuple[str, ...]:
        """Return sentences on likely mistakes that this survey shows."""
        idle = "trained: an inactive adapter, or one frozen by mistake"
        checks = [*_sentences(self.frozen, "LoRA factor", idle)]
        if not self.factors:
            kinds = ", ".join(sorted(set(self.unsupported.values()))) or "none"
            checks.insert(
                0,
                f"0 LoRA pairs matched (trainable adapters: {kinds}), so the rank moves no rate.",
            )
        for is_odd, problem in _ODD_FACTORS:
            odd = [f.name for f in self.factors if is_odd(f)]
            checks += _sentences(odd, "factor", problem)
        for adapter in dict.fromkeys(f.adapter for f in self.factors):
            checks += _far_scaled([f for f in self.factors if f.adapter == adapter])
        return tuple(checks)


def _sentences(names: Sequence[str], what: str, problem: str) -> Iterator[str]:
    """Yield the sentence that these parameters are not what they should be, if there are any."""
    if len(names) == 1:
        yield f"1 {what} ({names[0]}) is not {problem}."
    elif names:
        yield f"{len(names)} {what}s ({names[0]}, …) are not {problem}."


def width_for(survey: Survey, method: Method, init: Init) -> float:
    """Return the width on which a model's rate depends, in inputs of a layer.

    Args:
        survey: the model's survey.
        method: "lora" or "full": how the model trains.
        init: the init of the LoRA rate from which full finetuning's rate is moved.
    """
    return survey.full_width(init) if method == "full" else survey.width


def _far_scaled(factors: Sequence[Factor]) -> Iterator[str]:
    """Yield a sentence if some factors of an adapter are scaled far more than the rest, as where
    PEFT's rank_pattern gives experts a small rank and they keep alpha.
    """
    least, most = (end(f.scaling for f in factors) for end in (min, max))
    far = [f for f in factors if f.scaling >= _FAR_SCALING * least]
    if far:
        yield (
            f"{len(far)} factors ({far[0].name}, …) are scaled up to {most / least:.3g} times as"
            " strongly as the rest. If their rank was divided and alpha kept, give alpha_pattern"
            " too, or know that the law gives them a lower rate."
        )


@dataclass(frozen=True)
class Reference:
    """The configuration at which a learning rate was tuned.

    Full finetuning is `Reference(method="full")` and needs neither rank nor alpha.

    Args:
        rank: the LoRA rank.
        alpha: LoRA's alpha.
        rslora: whether alpha is divided by √rank instead of rank.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        fan_in: the model's width. By default that of the model on which the rate is used.
        method: "lora" or "full".
        batch: examples or tokens per step, for the law's rule for the batch.

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
        if self.method not in ("lora", "full"):
            raise InvalidReferenceError(
                f"A reference's method is 'lora' or 'full', not {self.method!r}.",
                "Give one of them.",
            )
        check_init(self.init, "A reference's init is", InvalidReferenceError)
        for name in ("rank", "alpha") if self.method == "lora" else ():
            if getattr(self, name) is None:
                full = ", or method='full' for a rate tuned by full finetuning"
                is_lora = self.rank is not None or self.alpha is not None
                raise InvalidReferenceError(
                    f"Reference lacks {name}. A LoRA rate belongs to a rank and an alpha.",
                    f"Give {name}=... too." if is_lora else f"Give {name}=...{full}.",
                )
        for name in ("rank", "alpha", "fan_in", "batch"):
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None and not is_within(name, value):
                raise InvalidReferenceError(
                    f"{name}={shown(value)} in a reference is impossible.",
                    f"Give {range_of(name)}.",
                    name,
                )

    @classmethod
    def from_scaling(
        cls, rank: int | None, scaling: float, *, init: Literal["A", "B"] = "A"
    ) -> Reference:
        """Return the LoRA reference whose scaling at `rank` is `scaling`.

        Args:
            rank: the LoRA rank.
            scaling: s, dimensionless.
            init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        """
        return cls(rank=rank, alpha=scaling * (rank or 1), init=init)

    @property
    def scaling(self) -> float:
        """s, the factor of B·A, dimensionless. It is 1 for full finetuning."""
        if self.method == "full" or self.rank is None or self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def as_factor(self) -> Factor:
        """Return the A factor at this configuration, or a whole weight for full finetuning, as
        argument of a law.
        """
        role: Role = "full" if self.method == "full" else "A"
        width = self.fan_in or 1.0
        return Factor(str(self), role, self.rank, width, width, self.scaling, self.init)

    def resolve(self, survey: Survey) -> Reference:
        """Return this reference with the `fan_in` of a model, unless it has one.

        It is `Survey.width` for LoRA and `Survey.full_width` for full finetuning.

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
        return f"rank {self.rank}, alpha {self.alpha:g}{rs}, {init_text(self.init)}"


# --- the rule by which s follows the rank: s = c·r^(−γ) -------------------------------------------

# γ of every rule
GAMMA: dict[Scaling, float] = {"fixed": 0.0, "rslora": 0.5, "alpha": 1.0}


def scaling_factor(rule: Scaling, at: float, rank: float) -> float:
    """Return the factor of s for a change of the rank from `at` to `rank`, by a rule of known γ.

    >>> scaling_factor("alpha", 4, 8), scaling_factor("fixed", 4, 8)
    (0.5, 1.0)
    """
    return float((at / rank) ** GAMMA[rule])


def infer_scaling(scalings: Mapping[int, float]) -> Scaling:
    """Return the rule by which the scaling follows the rank, from {rank: scaling};
    "unknown" for one rank.

    >>> infer_scaling({4: 1.0, 64: 1.0}), infer_scaling({4: 4.0, 64: 0.25}), infer_scaling({8: 2.0})
    ('fixed', 'alpha', 'unknown')
    """
    if len(scalings) < 2:
        return "unknown"
    for rule, gamma in GAMMA.items():
        constants = [math.log2(s) + gamma * math.log2(r) for r, s in scalings.items()]
        if max(constants) - min(constants) < 1e-3:
            return rule
    return "unknown"
