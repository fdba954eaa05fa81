"""The report: each part of the groups, its rate, the reason for it, and what to check."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from textwrap import fill
from typing import Any

from .._printing import Table
from .._types import Factor, Rated, Survey, init_text
from ..inspection import other_kind
from ._prepare import Prepared
from ._rates import RateGroup
from ._unmoved import epsilon, rounding, trained_parts

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
_CLASSIFIER = re.compile(r"(^|\.)(score|classifier|classification_head)(\.|$)")
_NEW_HEAD = " A new text classifier often wants 4 times the base rate: other_lr= or rates= sets it."


@dataclass(frozen=True)
class Report:
    """The parts of the groups with their rates and the reasons for them. `str()` makes a table of
    at most 100 columns.

    Args:
        rows: one entry per part, and one for its frozen parameters, whose role is "frozen".
        notes: sentences on the law and the rates.
        title: the table's title.
        audit: sentences on likely mistakes that the groups show.
        unmoved: sentences on weights that a step leaves where they are, and on Adam's epsilon.
        survey: the inspected model.
        per_module: whether the table has one line per tensor. Long names make it wider.
    """

    rows: tuple[RateGroup, ...]
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
            rates = {
                name: Rated(row.lr, row.why) for row in self.rows for name in row.names
            }
            table = self.survey._table(per_module=True, rates=rates)
            lines = [*table.lines, *(f"check: {text}" for text in self.unmoved)]
            return replace(table, title=self.title, lines=lines)
        factors = {f.name: f for f in self.survey.factors}
        reasons = list(dict.fromkeys(row.why for row in self.rows))
        rows = [
            (*_cells(row, factors), str(reasons.index(row.why) + 1))
            for row in self.rows
        ]
        lines = [f"why {number}: {reason}" for number, reason in enumerate(reasons, 1)]
        lines += [f"check: {text}" for text in (*self.audit, *self.unmoved)]
        lines += [f"note: {text}" for text in self.notes]
        return Table(_HEADINGS, rows, lines, self.title, left=("role", "init"))


def _cells(row: RateGroup, factors: Mapping[str, Factor]) -> tuple[str, ...]:
    """Return a row as text, in the order of the headings without the last."""
    of_row = [factors[name] for name in row.names if name in factors]
    return (
        row.role,
        str(row.rank or ""),
        "" if row.scaling is None else f"{row.scaling:g}",
        init_text(row.init or ""),
        _range(f.fan_in for f in of_row),
        _range(f.fan_out for f in of_row),
        str(len(row.names)),
        f"{row.base_lr:.3g}",
        f"{row.multiplier:.4g}",
        f"{row.lr:.3g}",
    )


def _range(values: Iterable[float]) -> str:
    """Return the least and the most in words."""
    ordered = sorted(set(values))
    return "–".join(f"{end:g}" for end in dict.fromkeys((*ordered[:1], *ordered[-1:])))


def make_report(opt: Any, prepared: Prepared, per_module: bool = False) -> Report:
    """Return the report of an optimizer at its current rates."""
    assigner, survey, groups = prepared.assigner, prepared.survey, opt.rates.groups
    title = f"RankAwareOptimizer({type(opt).__name__}), {assigner.source.title}"
    if assigner.source.reference is not None:
        title += f": moved from {assigner.reference}"
    audit = [*survey.audit(), *_left_out(groups, survey)]
    # a recipe decides a head's rate
    if assigner.method == "lora" and assigner.source.recipe is None:
        audit += _heads_at_base_rate(groups)
    trained = trained_parts(opt)
    return Report(
        rows=tuple(row for group in groups for row in _rows(group)),
        notes=prepared.notes,
        title=title,
        audit=tuple(audit),
        unmoved=tuple(filter(None, (rounding(trained), epsilon(trained)))),
        survey=survey,
        per_module=per_module,
    )


def _rows(group: RateGroup) -> Iterator[RateGroup]:
    """Yield a part's parameters that train, and those that do not."""
    trains = [param.requires_grad for param in group.params]
    for wanted in sorted(set(trains), reverse=True):
        chosen = [each == wanted for each in trains]
        names = tuple(compress(group.names, chosen))
        params = tuple(compress(group.params, chosen))
        row = replace(group, names=names, params=params)
        yield row if wanted else replace(row, role="frozen", why=_FROZEN)


def _left_out(groups: Iterable[RateGroup], survey: Survey) -> Iterator[str]:
    """Yield the adapters none of whose factors is in the groups."""
    names = {name for group in groups for name in group.names}
    present = {f.adapter for f in survey.factors if f.name in names}
    for adapter, count in Counter(f.adapter for f in survey.factors).items():
        if names and adapter not in present:
            yield (
                f"None of the {count} factors of {adapter or 'the adapter'} is in this optimizer."
            )


def _heads_at_base_rate(groups: Sequence[RateGroup]) -> Iterator[str]:
    """Yield the matrices that are no adapter's and train at the adapters' base rate."""
    heads = [
        name
        for group in groups
        if group.role == "other" and not group.is_given
        for name, p in zip(group.names, group.params, strict=False)
        if p.requires_grad and p.dim() > 1 and other_kind(name) is None
    ]
    if heads:
        rest = "" if len(heads) == 1 else f" and {len(heads) - 1} more"
        new = _NEW_HEAD if any(map(_CLASSIFIER.search, heads)) else ""
        yield (
            f"{heads[0]}{rest} trains at the adapters' base rate, which was not tuned for"
            f" it.{new}"
        )
