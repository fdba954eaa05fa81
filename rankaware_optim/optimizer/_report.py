"""The report: what every parameter group is, what rate it has, why, and what to check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .._survey_text import NO_LAW, Rated, noted_table, reason_of_other
from .._types import Factor, Survey
from ..inspection import other_kind
from ._param_groups import effective_lr
from ._plan import Plan
from ._state_dict import Carried

_PAIR = ("convention", "role", "rank", "scaling", "init", "fan-in", "fan-out", "tensors")
_HEADINGS = (*_PAIR, "base lr", "multiplier", "lr", "why")


@dataclass(frozen=True)
class Row:
    """One group of the report: base_lr × multiplier = lr, at present. `count` is of tensors, fans are (least, most)."""

    role: str
    rank: int | None
    scaling: float | None
    init: str | None
    count: int
    base_lr: float
    multiplier: float
    lr: float
    reason: str
    names: tuple[str, ...] = ()
    convention: str = ""
    fan_in: tuple[float, ...] = ()
    fan_out: tuple[float, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of the report's headings."""
        scaling = "" if self.scaling is None else f"{self.scaling:g}"
        shown = (self.convention, self.role, str(self.rank or ""), scaling, self.init or "")
        fans = ("–".join(f"{end:g}" for end in dict.fromkeys(ends)) for ends in (self.fan_in, self.fan_out))
        rates = (f"{self.base_lr:.3g}", f"{self.multiplier:.4g}", f"{self.lr:.3g}")
        return (*shown, *fans, str(self.count), *rates, self.reason)


@dataclass(frozen=True)
class Report:
    """Per group: convention, role, rank, scaling, init, fans, count, multiplier, rate, and why. `str()` draws it.

    audit: known accidents that the groups show, a sentence each. carried: per parameter, what the last checkpoint of
    another rank left of its moments. survey: what was inspected; per_module draws a line for each of its tensors.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    title: str
    carried: tuple[Carried, ...] = ()
    audit: tuple[str, ...] = ()
    survey: Survey = field(default_factory=Survey, repr=False)
    per_module: bool = False

    def __str__(self) -> str:
        if self.per_module:
            rates = {name: Rated(row.lr, row.reason) for row in self.rows for name in row.names}
            return f"{self.title}\n{self.survey.explain(per_module=True, rates=rates)}"
        rows = [row.cells() for row in self.rows]
        return noted_table(_HEADINGS, rows, self.audit, self.notes, width=150, title=self.title)


def make_report(
    param_groups: Sequence[Mapping[str, Any]],
    plan: Plan,
    title: str,
    survey: Survey,
    carried: tuple[Carried, ...] = (),
    per_module: bool = False,
) -> Report:
    """A report of built groups at their present rates."""
    factors = {f.name: f for f in survey.factors}
    rows = tuple(_row(group, plan, factors) for group in param_groups)
    audit = (*survey.audit(), *_audit(param_groups, plan, survey))
    notes = (*plan.notes, *_split_note(param_groups), *_carried_notes(carried))
    return Report(rows, notes, title, carried, audit, survey, per_module)


def plan_rates(plan: Plan, survey: Survey, lr: float) -> dict[str, Rated]:
    """What `plan` gives every factor of `survey` at the base rate `lr`, for `Survey.explain`."""
    rates = {}
    for f in survey.factors:
        a = plan.assign(f.name, f)
        reason = _reason({"lora_role": a.role, "lora_init": a.init, "param_names": [f.name]}, plan)
        rates[f.name] = Rated(lr * a.multiplier if a.rate is None else a.rate, reason)
    return rates


def _audit(groups: Iterable[Mapping[str, Any]], plan: Plan, survey: Survey) -> Iterator[str]:
    """Accidents between the survey and the groups: adapters left out, heads at an adapter's rate."""
    held = {name for group in groups for name in group.get("param_names", ())}
    by_adapter: dict[str, set[str]] = {}
    for f in survey.factors:
        by_adapter.setdefault(f.adapter, set()).add(f.name)
    for adapter, names in by_adapter.items():
        if held and held.isdisjoint(names):
            yield f"None of the {len(names)} factors of {adapter or 'the adapter'} is in this optimizer."
    if plan.method == "full" or not survey.factors or plan.others is not None:  # a recipe decides a head's rate
        return
    alike = [group for group in groups if group.get("lora_role") == "other" and not plan.has_own_rate(group)]
    named = [pair for group in alike for pair in zip(group.get("param_names", ()), group["params"], strict=False)]
    heads = [name for name, param in named if param.dim() > 1 and other_kind(name) is None]
    if heads:
        rest = "" if len(heads) == 1 else f" and {len(heads) - 1} more"
        yield f"{heads[0]}{rest} trains at the adapters' base rate; a head has its own by other_lr= or rates=."


def _split_note(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What to give a scheduler that takes a list, where the user has several groups and one was split."""
    own = {group.get("user_group") for group in groups}
    if 1 < len(own) < len(groups):
        yield f"Your {len(own)} groups are {len(groups)} here: give schedulers that take a list opt.expand(values)."


def _carried_notes(carried: tuple[Carried, ...]) -> list[str]:
    """One line for each change of rank: how many parameters, and how many directions of each were kept."""
    changes = Counter((c.saved_rank, c.rank, c.kept, c.state) for c in carried)
    return [
        f"{count} parameters came from a checkpoint of rank {saved}, now {rank}: "
        + (f"{kept} directions kept in {', '.join(state)}." if kept else "their moments start anew.")
        for (saved, rank, kept, state), count in changes.items()
    ]


def _row(group: Mapping[str, Any], plan: Plan, factors: Mapping[str, Factor]) -> Row:
    role = group.get("lora_role", "other")
    names = tuple(group.get("param_names", ()))
    own = [factors[name] for name in names if name in factors]
    return Row(
        role=role,
        rank=group.get("lora_rank"),
        scaling=group.get("lora_scale") if role in ("A", "B") else None,
        init=group.get("lora_init") if role in ("A", "B") else None,
        count=len(group["params"]),
        base_lr=effective_lr(group) / group.get("rank_multiplier", 1.0),
        multiplier=group.get("rank_multiplier", 1.0),
        lr=effective_lr(group),
        reason=_reason(group, plan),
        names=names,
        convention=", ".join(dict.fromkeys(f.convention for f in own)),
        fan_in=_ends(f.fan_in for f in own),
        fan_out=_ends(f.fan_out for f in own),
    )


def _ends(values: Iterable[float]) -> tuple[float, ...]:
    found = set(values)
    return (min(found), max(found)) if found else ()


def _reason(group: Mapping[str, Any], plan: Plan) -> str:
    role = group.get("lora_role", "other")
    if plan.has_own_rate(group):
        return f"a rate of its own, by {'rates=' if plan.is_named(group) else 'other_lr='}"
    if role == "full" or (role == "other" and plan.method == "full"):
        return f"{plan.law.name}: full finetuning, from {plan.reference}"
    if role == "other":
        names = group.get("param_names", ())
        rate = plan.reason_of_other(names, group.get("rank_multiplier", 1.0))
        return reason_of_other(sorted({kind for kind in map(other_kind, names) if kind}), rate)
    if group.get("lora_init") == "other":
        return NO_LAW
    return f"{plan.law.name}: from {plan.reference}"
