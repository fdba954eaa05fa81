"""The report: each parameter group's kind, its rate, the reason for it, and what to check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from textwrap import fill

from .._printing import Table
from .._types import NO_LAW, Factor, Rated, Survey, init_text, reason_of_other
from ..inspection import other_kind
from ..laws import get_law, law_title
from ..recipe import BASE
from ._param_groups import Group, Groups, effective_lr, named_params
from ._plan import Label, Plan

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
_FROZEN = "frozen: it does not train until requires_grad is set"
_NOT_GIVEN = "tuned_at not given: nothing is moved"


@dataclass(frozen=True)
class Row:
    """One group of the report, with its current rates: lr = base_lr × multiplier.

    count: number of tensors. family: the optimizer's kind of update there. fan_in, fan_out: (least,
    most).
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
    family: str = "sign-like"
    names: tuple[str, ...] = ()
    fan_in: tuple[float, ...] = ()
    fan_out: tuple[float, ...] = ()

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of the report's headings without the last."""
        return (
            self.role,
            str(self.rank or ""),
            "" if self.scaling is None else f"{self.scaling:g}",
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
        rows: one entry per group, and one for its frozen parameters: role, rank, scaling, init,
            fan-in, fan-out, count, multiplier, rate and reason.
        notes: sentences on the law and the rates.
        title: the table's title.
        audit: sentences on likely mistakes that the groups show.
        unmoved: sentences on weights that a step leaves where they are, and on Adam's epsilon.
        survey: the inspected model.
        per_module: whether the table has one line per tensor. Long names make it wider.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    title: str
    audit: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()
    survey: Survey = field(default_factory=Survey, repr=False)
    per_module: bool = False

    def __str__(self) -> str:
        table = self._table()
        if self.per_module:
            return f"{self.title}\n{replace(table, title='').text(200)}"
        wrapped = [
            fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            for line in table.lines
        ]
        return replace(table, lines=wrapped).text(_WIDTH)

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        if self.per_module:
            table = self.survey._table(per_module=True, rates=_rates_of(self.rows))
            lines = [*table.lines, *(f"check: {text}" for text in self.unmoved)]
            return replace(table, title=self.title, lines=lines)
        reasons = list(dict.fromkeys(row.reason for row in self.rows))
        rows = [(*row.cells(), str(reasons.index(row.reason) + 1)) for row in self.rows]
        lines = [f"why {number}: {reason}" for number, reason in enumerate(reasons, 1)]
        lines += [f"check: {text}" for text in (*self.audit, *self.unmoved)]
        lines += [f"note: {text}" for text in self.notes]
        return Table(_HEADINGS, rows, lines, self.title, left=("role", "init"))


def make_report(
    param_groups: Groups,
    plan: Plan,
    survey: Survey,
    title: str,
    per_module: bool = False,
    unmoved: Iterable[str] = (),
) -> Report:
    """Return the report of built groups at their current rates."""
    notes = list(plan.notes)
    count = len({group.get("user_group") for group in param_groups})
    if 1 < count < len(param_groups):
        notes.append(
            f"Your {count} groups are {len(param_groups)} here: give schedulers that take a list"
            " opt.expand(values)."
        )
    audit = [*survey.audit(), *_left_out(param_groups, survey)]
    # a recipe decides a head's rate
    if plan.method == "lora" and survey.factors and plan.use is None:
        audit += _heads_at_base_rate(param_groups, plan)
    rows = _rows(param_groups, plan, survey)
    return Report(
        rows,
        tuple(notes),
        title,
        audit=tuple(audit),
        unmoved=tuple(filter(None, unmoved)),
        survey=survey,
        per_module=per_module,
    )


def origin(plan: Plan) -> str:
    """Return in words what moves the rates, and from where."""
    words = law_title(get_law(plan.options.law))
    if plan.use is not None:
        words = f"recipe {plan.use.recipe.name!r}"
    given = plan.options.tuned_at is not None
    return f"{words}: moved from {plan.reference}" if given else words


def _rates_of(rows: Iterable[Row]) -> dict[str, Rated]:
    return {name: Rated(row.lr, row.reason) for row in rows for name in row.names}


def _left_out(groups: Groups, survey: Survey) -> Iterator[str]:
    """Yield the adapters none of whose factors is in the groups."""
    names = set(chain(*(group.get("param_names", ()) for group in groups)))
    present = {f.adapter for f in survey.factors if f.name in names}
    for adapter, count in Counter(f.adapter for f in survey.factors).items():
        if names and adapter not in present:
            yield (
                f"None of the {count} factors of {adapter or 'the adapter'} is in this optimizer."
            )


def _heads_at_base_rate(groups: Iterable[Group], plan: Plan) -> Iterator[str]:
    """Yield the matrices that are no adapter's and train at the adapters' base rate."""
    heads = []
    for group in groups:
        if group.get("lora_role") == "other" and not _giver(plan, group):
            for name, p in named_params([group]):
                if p.requires_grad and p.dim() > 1 and other_kind(name) is None:
                    heads.append(name)
    if heads:
        rest = "" if len(heads) == 1 else f" and {len(heads) - 1} more"
        yield (
            f"{heads[0]}{rest} trains at the adapters' base rate, which was not tuned for it."
        )


def _rows(groups: Groups, plan: Plan, survey: Survey) -> tuple[Row, ...]:
    """Return a row for each group, and one for those of its parameters that do not train."""
    factors = {f.name: f for f in survey.factors}
    unmoved = plan.options.tuned_at is None and not any(
        group.get("rank_multiplier", 1.0) != 1.0 and not _giver(plan, group)
        for group in groups
    )
    rows = []
    for group in groups:
        trains = [getattr(p, "requires_grad", True) for p in group["params"]]
        for wanted in sorted(set(trains), reverse=True):
            chosen = [each == wanted for each in trains]
            names = tuple(compress(group.get("param_names", ()), chosen))
            row = _row(group, names, sum(chosen), plan, factors, unmoved)
            frozen = replace(row, role="frozen", reason=_FROZEN)
            rows.append(row if wanted else frozen)
    return tuple(rows)


def _row(
    group: Group,
    names: tuple[str, ...],
    count: int,
    plan: Plan,
    factors: Mapping[str, Factor],
    unmoved: bool,
) -> Row:
    label = Label(**{key: group[key] for key in Label._fields if key in group})
    of_group = [factors[name] for name in names if name in factors]
    is_pair, lr = label.lora_role in ("A", "B"), effective_lr(group)
    return Row(
        role=label.lora_role,
        rank=label.lora_rank,
        scaling=label.lora_scale if is_pair else None,
        init=label.lora_init if is_pair else None,
        count=count,
        base_lr=lr / label.rank_multiplier,
        multiplier=label.rank_multiplier,
        lr=lr,
        reason=_reason(group, names, label, plan, unmoved),
        family=label.rank_family,
        names=names,
        fan_in=_ends({f.fan_in for f in of_group}),
        fan_out=_ends({f.fan_out for f in of_group}),
    )


def _ends(values: set[float]) -> tuple[float, ...]:
    return (min(values), max(values)) if values else ()


# --- why ------------------------------------------------------------------------------------------


def _giver(plan: Plan, group: Group) -> str:
    """Return the argument that gave a group its rate; "" if the plan did."""
    names = group.get("param_names", ())
    if names and plan.options.rate_of(names[0]) is not None:
        return "rates="
    is_other = group.get("lora_role") == "other" and plan.options.other_lr is not None
    return "other_lr=" if is_other else ""


def _reason(
    group: Group, names: tuple[str, ...], label: Label, plan: Plan, unmoved: bool
) -> str:
    """Return why a group has its rate. unmoved: whether no rate of the model is moved."""
    giver, role = _giver(plan, group), label.lora_role
    if giver:
        return f"given by {giver}"
    if role == "other" and plan.method == "lora":
        kinds = sorted(set(filter(None, map(other_kind, names))))
        return reason_of_other(kinds, _rate_of_other(group, names, plan))
    if label.lora_init == "other":
        return NO_LAW
    if unmoved:
        return _NOT_GIVEN
    words = law_title(get_law(plan.options.law)).removeprefix("law ")
    words = words if plan.use is None else "recipe"
    if label.rank_family != "sign-like":
        words += f", {label.rank_family}"
    to_full = "" if role in ("A", "B") else "full finetuning, "
    return f"{words}: {to_full}from {plan.reference}"


def _rate_of_other(group: Group, names: tuple[str, ...], plan: Plan) -> str:
    """Return in words where the rate of parameters that are not factors comes from."""
    if plan.use is None or not names:
        return "the base rate (other_lr= or rates= sets another)"
    tried = plan.use.others.tried(names[0])
    if tried == BASE:
        return "the base rate, as in the recipe's trials"
    if tried is not None:
        return "its rate in the recipe's trials"
    pinned = group.get("pinned_lr") is not None
    return "full finetuning's rate by the recipe" if pinned else "the base rate"
