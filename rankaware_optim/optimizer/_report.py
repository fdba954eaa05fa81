"""The report: each parameter group's kind, its rate, the reason for it, and what to check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from .._tables import text_table
from .._types import NO_LAW, Factor, Rated, Survey, init_text, reason_of_other
from ..inspection import other_kind
from ._evidence import evidence
from ._param_groups import effective_lr
from ._plan import Assignment, Plan
from ._state_dict import Reset

_PAIR = ("role", "rank", "scaling", "init", "fan-in", "fan-out", "tensors")
_HEADINGS = (*_PAIR, "base lr", "multiplier", "lr", "why")
_WIDTH = 100  # columns
_NOT_GIVEN = "tuned_at not given: nothing is moved"


@dataclass(frozen=True)
class Row:
    """One group of the report, with its current rates: lr = base_lr × multiplier.

    count: number of tensors. fan_in, fan_out: (least, most).
    """

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
        """Return the row as text, in the order of the report's headings without the last."""
        scaling = "" if self.scaling is None else f"{self.scaling:g}"
        shown = (self.role, str(self.rank or ""), scaling, init_text(self.init or ""))
        fans = (
            "–".join(f"{end:g}" for end in dict.fromkeys(ends))
            for ends in (self.fan_in, self.fan_out)
        )
        rates = (f"{self.base_lr:.3g}", f"{self.multiplier:.4g}", f"{self.lr:.3g}")
        return (*shown, *fans, str(self.count), *rates)


@dataclass(frozen=True)
class Report:
    """The parameter groups with their rates and the reasons for them. `str()` makes a table of at
    most 100 columns.

    Args:
        rows: one entry per group: role, rank, scaling, init, fan-in, fan-out, count, multiplier,
            rate and reason.
        notes: sentences on the law and the rates.
        title: the table's title.
        reset: parameters whose moments were dropped when a checkpoint of another rank was loaded.
        audit: sentences on likely mistakes that the groups show.
        survey: the inspected model.
        per_module: whether the table has one line per tensor. Long names make it wider.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    title: str
    reset: tuple[Reset, ...] = ()
    audit: tuple[str, ...] = ()
    survey: Survey = field(default_factory=Survey, repr=False)
    per_module: bool = False

    def __str__(self) -> str:
        if self.per_module:
            rates = {name: Rated(row.lr, row.reason) for row in self.rows for name in row.names}
            return f"{self.title}\n{self.survey.explain(per_module=True, rates=rates)}"
        reasons = list(dict.fromkeys(row.reason for row in self.rows))
        rows = [(*row.cells(), str(reasons.index(row.reason) + 1)) for row in self.rows]
        why = {f"why {number}": reason for number, reason in enumerate(reasons, 1)}
        checks, notes = (
            (("check", text) for text in self.audit),
            (("note", text) for text in self.notes),
        )
        lines = [f"{head}: {text}" for head, text in (*why.items(), *checks, *notes)]
        wrapped = [
            fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines
        ]
        return text_table(
            _HEADINGS, rows, lines=wrapped, title=self.title, left=("role", "init"), width=_WIDTH
        )


def make_report(
    param_groups: Sequence[Mapping[str, Any]],
    plan: Plan,
    title: str,
    survey: Survey,
    reset: tuple[Reset, ...] = (),
    per_module: bool = False,
) -> Report:
    """Return the report of built groups at their current rates."""
    factors = {f.name: f for f in survey.factors}
    asked = (
        group.get("rank_multiplier", 1.0) for group in param_groups if not plan.has_own_rate(group)
    )
    unmoved = plan.options.tuned_at is None and set(asked) <= {1.0}
    rows = tuple(_row(group, plan, factors, unmoved) for group in param_groups)
    audit = (*survey.audit(), *_audit(param_groups, plan, survey))
    notes = (*plan.notes, *_split_note(param_groups), *_reset_notes(reset))
    return Report(rows, notes, title, reset, audit, survey, per_module)


def plan_rates(plan: Plan, survey: Survey, lr: float) -> dict[str, Rated]:
    """Return the rate of every factor of `survey` at the base rate `lr`, for `Survey.explain`."""
    made = {f.name: plan.assign(f.name, f) for f in survey.factors}
    unmoved = plan.options.tuned_at is None and all(a.multiplier == 1.0 for a in made.values())
    rates = {name: lr * a.multiplier if a.rate is None else a.rate for name, a in made.items()}
    return {name: Rated(rates[name], _reason([name], a, plan, unmoved)) for name, a in made.items()}


def _audit(groups: Iterable[Mapping[str, Any]], plan: Plan, survey: Survey) -> Iterator[str]:
    """Yield likely mistakes in the groups: adapters left out, heads at an adapter's rate."""
    held = {name for group in groups for name in group.get("param_names", ())}
    by_adapter: dict[str, set[str]] = {}
    for f in survey.factors:
        by_adapter.setdefault(f.adapter, set()).add(f.name)
    for adapter, names in by_adapter.items():
        if held and held.isdisjoint(names):
            yield (
                f"None of the {len(names)} factors of {adapter or 'the adapter'} is in this"
                " optimizer."
            )
    if (
        plan.method == "full" or not survey.factors or plan.others is not None
    ):  # a recipe decides a head's rate
        return
    alike = [
        group
        for group in groups
        if group.get("lora_role") == "other" and not plan.has_own_rate(group)
    ]
    named = [
        pair
        for group in alike
        for pair in zip(group.get("param_names", ()), group["params"], strict=False)
    ]
    heads = [
        name for name, p in named if p.requires_grad and p.dim() > 1 and other_kind(name) is None
    ]
    if heads:
        rest = "" if len(heads) == 1 else f" and {len(heads) - 1} more"
        yield (
            f"{heads[0]}{rest} trains at the adapters' base rate; a head has its own by other_lr="
            " or rates=."
        )


def _split_note(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a note on schedulers that take a list, if the user has several groups and one was
    split.
    """
    own = {group.get("user_group") for group in groups}
    if 1 < len(own) < len(groups):
        yield (
            f"Your {len(own)} groups are {len(groups)} here: give schedulers that take a list"
            " opt.expand(values)."
        )


def _reset_notes(reset: tuple[Reset, ...]) -> list[str]:
    """Return one line for each change of rank, with the number of parameters."""
    changes = Counter((each.saved_rank, each.rank) for each in reset)
    return [
        f"{count} parameters came from a checkpoint of rank {saved}, now {rank}: their moments were"
        " reset."
        for (saved, rank), count in changes.items()
    ]


def _row(group: Mapping[str, Any], plan: Plan, factors: Mapping[str, Factor], unmoved: bool) -> Row:
    role = group.get("lora_role", "other")
    names = tuple(group.get("param_names", ()))
    scaling, multiplier = group.get("lora_scale", 1.0), group.get("rank_multiplier", 1.0)
    made = Assignment(role, group.get("lora_rank"), scaling, group.get("lora_init"), multiplier)
    own = [factors[name] for name in names if name in factors]
    return Row(
        role=role,
        rank=group.get("lora_rank"),
        scaling=group.get("lora_scale") if role in ("A", "B") else None,
        init=group.get("lora_init") if role in ("A", "B") else None,
        count=len(group["params"]),
        base_lr=effective_lr(group) / multiplier,
        multiplier=multiplier,
        lr=effective_lr(group),
        reason=_reason(names, made, plan, unmoved),
        names=names,
        convention=", ".join(dict.fromkeys(f.convention for f in own)),
        fan_in=_ends(f.fan_in for f in own),
        fan_out=_ends(f.fan_out for f in own),
    )


def _ends(values: Iterable[float]) -> tuple[float, ...]:
    found = set(values)
    return (min(found), max(found)) if found else ()


def _reason(names: Sequence[str], made: Assignment, plan: Plan, unmoved: bool) -> str:
    """Return why parameters of one assignment have their rate. unmoved: whether no rate of the
    model is moved.
    """
    named = {"lora_role": made.role, "param_names": names}
    if plan.has_own_rate(named):
        return f"given by {'rates=' if plan.is_named(named) else 'other_lr='}"
    if made.role == "other" and plan.method != "full":
        rate = plan.reason_of_other(names, made.multiplier)
        return reason_of_other(sorted({kind for kind in map(other_kind, names) if kind}), rate)
    if made.init == "other":
        return NO_LAW
    if unmoved:
        return _NOT_GIVEN
    whole = made.role in ("full", "other")
    sure = evidence(plan, made._replace(role="full") if whole else made)
    return f"{plan.law.name}: {'full finetuning, ' if whole else ''}from {plan.reference} ({sure})"
