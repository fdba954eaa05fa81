"""A survey: what was found in a model or a file, and how a report says it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .._printing import Table
from .._types import Factor, Init, Reference
from ..errors import InspectionError

_HEADINGS = ("kind", "role", "rank", "scaling", "init", "fan-in", "fan-out", "tensors")
_LEFT_ALIGNED = ("module", "convention", "kind", "role", "init", "why")
# By hand: usual scalings, and what is odd beside the least one of the same adapter.
_LEAST_SCALING, _MOST_SCALING, _FAR_SCALING = 1 / 64, 8.0, 8.0
_NO_LAW = "neither factor started at zero, so no law covers it: the base rate"
# Pairs that add more than s·B·A, which is what the laws are derived for, by their factors' kind.
LAWLESS = {"adalora": "AdaLoRA", "kasa": "KaSA", "xlora": "X-LoRA"}


class Rated(NamedTuple):
    """A parameter's learning rate, and the reason for it in words."""

    lr: float
    reason: str


def reason_of_other(kind: str | None, rate: str = "the base rate") -> str:
    """Return why a parameter that is no factor has its rate. kind: its adapter's, if no law covers
    it.
    """
    return f"{kind}: no law, {rate}" if kind else f"no LoRA factor: {rate}"


def reason_without_law(factor: Factor) -> str:
    """Return why a factor of init "other" keeps the base rate."""
    name = LAWLESS.get(factor.kind)
    return _NO_LAW if name is None else reason_of_other(name)


def dense(factors: Iterable[Factor]) -> list[Factor]:
    """Return the factors of layers whose input is not one-hot, as an embedding's is."""
    return [f for f in factors if f.kind != "embedding"]


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
        usual = dense(covered) or pairs
        keys = [(f.rank, f.scaling, f.init) for f in usual]
        if not keys:
            raise InspectionError(
                "There is no LoRA pair, so there is no most common rank.",
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
            how, why = [f"{f.scaling:g}", f.init], "a LoRA pair"
            if f.role == "full":
                how, why = ["", ""], "a whole weight"
            elif f.init == "other":
                why = reason_without_law(f)
            cells = (f.kind, f.role, str(f.rank or ""), *how)
            yield f.name, f.convention, *cells, f"{f.fan_in:g}", f"{f.fan_out:g}", why
        for name in self.other:
            kind = self.unsupported.get(name, "")
            yield name, "", kind, "other", *blank, reason_of_other(kind)
        for name in self.frozen:
            yield name, "", "", "frozen", *blank, "a LoRA factor that does not train"

    def audit(self) -> tuple[str, ...]:
        """Return sentences on likely mistakes that this survey shows."""
        checks = []
        if not self.factors:
            kinds = ", ".join(sorted(set(self.unsupported.values()))) or "none"
            checks.append(
                f"0 LoRA pairs matched (trainable adapters: {kinds}), so the rank moves no rate."
            )
        checks += _odd_sentences(self)
        for adapter in dict.fromkeys(f.adapter for f in self.factors):
            checks += _far_scaled([f for f in self.factors if f.adapter == adapter])
        return tuple(checks)


def _odd_sentences(survey: Survey) -> Iterator[str]:
    odd = defaultdict[str, list[str]](list)
    odd["trained: an inactive adapter, or one frozen by mistake"] += survey.frozen
    for f in survey.factors:
        odd[_oddity(f)].append(f.name)
    odd[""] = []  # the others are as usual
    for problem, names in odd.items():
        if len(names) == 1:
            yield f"1 factor ({names[0]}) is not {problem}."
        elif names:
            yield f"{len(names)} factors ({names[0]}, …) are not {problem}."


def _oddity(factor: Factor) -> str:
    """Return in words what a factor is not and should be, "" if it is as usual."""
    if factor.kind in LAWLESS:
        return f"covered by a law: {LAWLESS[factor.kind]}"
    if factor.init == "other":
        return "covered by a law's derivation: neither factor zero at the start"
    if factor.init == "unknown":
        return "covered by a law's derivation: an init that cannot be read"
    if factor.kind != "embedding" and (factor.rank or 0) > factor.fan_in:
        return "low-rank: the rank is above the fan-in"
    if not _LEAST_SCALING <= factor.scaling <= _MOST_SCALING:
        return "scaled as usual: alpha / rank is above 8 or below 1/64"
    return ""


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
