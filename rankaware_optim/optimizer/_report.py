"""The report: each parameter group's kind, its rate, the reason for it, and what to check."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any

from .._printing import text_table
from .._types import NO_LAW, Factor, Rated, Survey, init_text, reason_of_other
from ..inspection import other_kind
from ..laws import Constant, Falling, LoRAPlus, MuA
from ._param_groups import effective_lr, named_params
from ._plan import Assignment, Plan
from ._state_dict import Reset

_HEADINGS = (
    "role",
    "rank",
    "scaling",
    "init",
    "fan-in",
    "fan-out",
    "tensors",
    "base lr",
    "multiplier",
    "lr",
    "why",
)
_WIDTH = 100  # columns
_NOT_GIVEN = "tuned_at not given: nothing is moved"
_SMALL_RUNS = "measured, small runs"
_GUESS = "a guess, as for sign-like optimizers"
_THUMB = "a rule of thumb"
# From the most to the least certain. A move in several steps has the phrase of its least certain
# step.
_CERTAINTY = (
    "theory, measured",
    _SMALL_RUNS,
    "theory",
    "theory, against small runs",
    "untested",
    _GUESS,
    _THUMB,
)


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
        return (
            self.role,
            str(self.rank or ""),
            scaling,
            init_text(self.init or ""),
            _range(self.fan_in),
            _range(self.fan_out),
            str(self.count),
            f"{self.base_lr:.3g}",
            f"{self.multiplier:.4g}",
            f"{self.lr:.3g}",
        )


def _range(ends: tuple[float, ...]) -> str:
    return "–".join(f"{end:g}" for end in dict.fromkeys(ends))


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
            rates: dict[str, Rated] = {}
            for row in self.rows:
                rates |= dict.fromkeys(row.names, Rated(row.lr, row.reason))
            return f"{self.title}\n{self.survey.explain(per_module=True, rates=rates)}"
        reasons = list(dict.fromkeys(row.reason for row in self.rows))
        rows = [(*row.cells(), str(reasons.index(row.reason) + 1)) for row in self.rows]
        lines = [f"why {number}: {reason}" for number, reason in enumerate(reasons, 1)]
        lines += [f"check: {text}" for text in self.audit]
        lines += [f"note: {text}" for text in self.notes]
        wrapped = [
            fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            for line in lines
        ]
        return text_table(
            _HEADINGS,
            rows,
            lines=wrapped,
            title=self.title,
            left=("role", "init"),
            width=_WIDTH,
        )


def make_report(
    param_groups: Sequence[Mapping[str, Any]],
    plan: Plan,
    title: str,
    reset: tuple[Reset, ...] = (),
    per_module: bool = False,
) -> Report:
    """Return the report of built groups at their current rates."""
    survey = plan.survey
    by_plan = [group for group in param_groups if not _giver(plan, group)]
    unmoved = plan.options.tuned_at is None and all(
        group.get("rank_multiplier", 1.0) == 1.0 for group in by_plan
    )
    factors = {f.name: f for f in survey.factors}
    rows = tuple(_row(group, plan, factors, unmoved) for group in param_groups)
    audit = [*survey.audit(), *_left_out(param_groups, survey)]
    if (
        plan.method == "lora" and survey.factors and plan.use is None
    ):  # it decides a head's rate
        audit += _heads_at_base_rate(by_plan)
    notes = (*plan.notes, *_split_note(param_groups), *_reset_notes(reset))
    return Report(rows, notes, title, reset, tuple(audit), survey, per_module)


def plan_rates(plan: Plan, lr: float) -> dict[str, Rated]:
    """Return the rate of every factor of a plan at the base rate `lr`, for `Survey.explain`."""
    decisions = {f.name: plan.assign(f.name, f) for f in plan.survey.factors}
    unmoved = plan.options.tuned_at is None and all(
        decision.rank_multiplier == 1.0 for decision in decisions.values()
    )
    rates: dict[str, Rated] = {}
    for name, decision in decisions.items():
        rate = decision.pinned_lr
        rate = lr * decision.rank_multiplier if rate is None else rate
        rates[name] = Rated(rate, _reason([name], decision, plan, unmoved))
    return rates


def _left_out(groups: Iterable[Mapping[str, Any]], survey: Survey) -> Iterator[str]:
    """Yield the adapters none of whose factors is in the groups."""
    names: set[str] = set()
    for group in groups:
        names.update(group.get("param_names", ()))
    by_adapter: dict[str, set[str]] = {}
    for f in survey.factors:
        by_adapter.setdefault(f.adapter, set()).add(f.name)
    for adapter, factors in by_adapter.items():
        if names and names.isdisjoint(factors):
            yield (
                f"None of the {len(factors)} factors of {adapter or 'the adapter'} is in this"
                " optimizer."
            )


def _heads_at_base_rate(groups: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the matrices that are no adapter's and train at the adapters' base rate."""
    heads = []
    for name, param in named_params(g for g in groups if g.get("lora_role") == "other"):
        if param.requires_grad and param.dim() > 1 and other_kind(name) is None:
            heads.append(name)
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
    count = len({group.get("user_group") for group in groups})
    if 1 < count < len(groups):
        yield (
            f"Your {count} groups are {len(groups)} here: give schedulers that take a list"
            " opt.expand(values)."
        )


def _reset_notes(reset: tuple[Reset, ...]) -> Iterator[str]:
    """Yield one line for each change of rank, with the number of parameters."""
    changes = Counter((each.saved_rank, each.rank) for each in reset)
    for (saved, rank), count in changes.items():
        yield (
            f"{count} parameters came from a checkpoint of rank {saved}, now {rank}: their moments"
            " were reset."
        )


def _row(
    group: Mapping[str, Any], plan: Plan, factors: Mapping[str, Factor], unmoved: bool
) -> Row:
    tags = {key: group[key] for key in Assignment._fields if key in group}
    decision = Assignment(**tags)
    names = tuple(group.get("param_names", ()))
    of_group = [factors[name] for name in names if name in factors]
    paired = decision.lora_role in ("A", "B")
    return Row(
        role=decision.lora_role,
        rank=decision.lora_rank,
        scaling=decision.lora_scale if paired else None,
        init=decision.lora_init if paired else None,
        count=len(group["params"]),
        base_lr=effective_lr(group) / decision.rank_multiplier,
        multiplier=decision.rank_multiplier,
        lr=effective_lr(group),
        reason=_reason(names, decision, plan, unmoved),
        names=names,
        convention=", ".join(dict.fromkeys(f.convention for f in of_group)),
        fan_in=_ends({f.fan_in for f in of_group}),
        fan_out=_ends({f.fan_out for f in of_group}),
    )


def _ends(values: set[float]) -> tuple[float, ...]:
    return (min(values), max(values)) if values else ()


# --- why ------------------------------------------------------------------------------------------


def _giver(plan: Plan, group: Mapping[str, Any]) -> str:
    """Return the argument that gave a group its rate; "" if the plan did."""
    names = group.get("param_names", ())
    if names and plan.options.rate_of(names[0]) is not None:
        return "rates="
    is_other = group.get("lora_role") == "other" and plan.options.other_lr is not None
    return "other_lr=" if is_other else ""


def _reason(
    names: Sequence[str], decision: Assignment, plan: Plan, unmoved: bool
) -> str:
    """Return why parameters of one assignment have their rate. unmoved: whether no rate of the
    model is moved.
    """
    giver = _giver(plan, {"lora_role": decision.lora_role, "param_names": names})
    if giver:
        return f"given by {giver}"
    if decision.lora_role == "other" and plan.method != "full":
        kinds = {other_kind(name) for name in names} - {None}
        return reason_of_other(
            sorted(map(str, kinds)), _rate_of_other(names, decision, plan)
        )
    if decision.lora_init == "other":
        return NO_LAW
    if unmoved:
        return _NOT_GIVEN
    if decision.lora_role in ("A", "B"):
        return f"{plan.law.name}: from {plan.reference} ({_evidence(plan, decision)})"
    evidence = _evidence(plan, decision._replace(lora_role="full"))
    return f"{plan.law.name}: full finetuning, from {plan.reference} ({evidence})"


def _rate_of_other(names: Sequence[str], decision: Assignment, plan: Plan) -> str:
    """Return in words where the rate of parameters that are not factors comes from."""
    if plan.use is None or not names:
        return "the base rate"
    others = plan.use.others
    if decision.rank_multiplier == plan.run_multiplier and not others.knows(names[0]):
        return "the base rate"
    return others.reason(names[0])


def _evidence(plan: Plan, decision: Assignment) -> str:
    """Return the evidence for a moved rate. Only the default law and µA were tested."""
    law, kept = plan.law, decision.rank_multiplier == 1.0
    if plan.use is not None:
        return "calibrated, see its band"
    if isinstance(law, (Constant, LoRAPlus)):
        return "not moved" if kept else "its authors' advice"
    phrases = [*_of_method(plan, decision), *_of_width_and_batch(plan, decision)]
    if not phrases and kept:
        return "as tuned"
    inner = law.law if isinstance(law, Falling) else law
    if phrases and isinstance(inner, MuA) and inner.ratio == 1.0:
        return max(phrases, key=_CERTAINTY.index)
    return "as that law says"


def _of_method(plan: Plan, decision: Assignment) -> Iterator[str]:
    """Yield a phrase if the method differs from the reference's, or else rank or scaling do."""
    full = decision.lora_role == "full", plan.reference.method == "full"
    if not any(full):
        yield from _of_rank(plan, decision)
    elif not all(full):
        yield _THUMB


def _of_rank(plan: Plan, decision: Assignment) -> Iterator[str]:
    at, scaling = plan.reference, decision.lora_scale
    ranks = (decision.lora_rank or 1) / (at.rank or 1)
    if ranks == 1.0 and math.isclose(scaling, at.scaling):
        return
    in_b = decision.lora_init == "B"
    if plan.family == "unknown":
        yield _GUESS
    elif plan.family != "sign-like":  # benchmarks/results/law_check.md, at Init[A]
        yield "theory" if in_b else _SMALL_RUNS
    elif ranks == 1.0:
        yield "theory"
    elif in_b:
        yield (
            _SMALL_RUNS
            if isinstance(plan.law, Falling)
            else "theory, against small runs"
        )
    else:
        fall = -math.log(scaling / at.scaling) / math.log(ranks)
        follows = (
            min(abs(fall), abs(fall - 1.0)) < 0.05
        )  # alpha follows the rank, or is kept
        yield "theory, measured" if follows else "theory"


def _of_width_and_batch(plan: Plan, decision: Assignment) -> Iterator[str]:
    """Yield a phrase if the width differs from the reference's, and one if the batch does."""
    if plan.options.per_layer_width or not math.isclose(
        plan.width, plan.reference.fan_in or plan.width
    ):
        untested = isinstance(plan.law, Falling) and decision.lora_init == "B"
        if untested and decision.lora_role != "full":
            yield "untested"
        else:
            yield _GUESS if plan.family == "unknown" else "theory"
    if plan.batch_multiplier != 1.0:
        yield _THUMB
