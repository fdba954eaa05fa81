"""The rates of an optimizer: every part of the user's groups, with its rate now and the reason, and
the report, with what to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from textwrap import fill
from typing import Any

import torch

from .._optimizers import kept_dtypes, known_optimizer
from .._printing import Table
from .._types import Factor
from .._warn import warn
from ..inspection import Survey, other_kind
from ._assign import Assigned
from ._parts import peak_of, splits_of
from ._unmoved import SameRate, epsilon, rounding

_HEADINGS = (
    *("role", "rank", "scaling", "init", "fan-in", "fan-out", "tensors"),
    *("base lr", "multiplier", "lr", "why"),
)
_WIDTH = 100  # columns
# The step at which epsilon is looked at once. Where B starts at zero, A's first gradients are zero,
# and grow with B.
EPSILON_AT = 100
_FROZEN = "frozen: it does not train until requires_grad is set"


@dataclass(frozen=True, kw_only=True)
class RateGroup(Assigned):
    """Parameters of one of the user's groups that train at one rate: lr = base_lr × multiplier.

    Beside what was assigned to them (role, rank, scaling, init, family, multiplier, given, why):

    Args:
        base_lr: the rate in the user's group, which a scheduler sets.
        lr: the rate of the next step.
        initial_lr: the rate from which the schedule starts, or `lr`.
        names: the parameters' names in the model.
        params: the parameters.
        user_group: the number of the user's group.
    """

    base_lr: float
    lr: float
    initial_lr: float
    names: tuple[str, ...]
    params: tuple[torch.Tensor, ...] = field(repr=False, compare=False)
    user_group: int


class Rates(Mapping[str, RateGroup]):
    """The rates of an optimizer by parameter name: each name's `RateGroup`, as it is now.

    It follows the optimizer: a look after a scheduler's step gives the new rate.
    """

    def __init__(self, opt: Any) -> None:
        self._opt = opt

    @property
    def groups(self) -> tuple[RateGroup, ...]:
        """The parts of the user's groups, in the user's order."""
        groups = []
        for number, split in enumerate(splits_of(self._opt)):
            base = float(split.group["lr"])
            start = float(split.group.get("initial_lr", base))
            for part in split.parts:
                assigned = {**vars(part.assigned), "multiplier": part.multiplier}
                groups.append(
                    RateGroup(
                        **assigned,
                        base_lr=base,
                        lr=base * part.multiplier,
                        initial_lr=start * part.multiplier,
                        names=tuple(split.names_of(part)),
                        params=tuple(split.params_of(part)),
                        user_group=number,
                    )
                )
        return tuple(groups)

    def __getitem__(self, name: str) -> RateGroup:
        return self._by_name()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name())

    def __len__(self) -> int:
        return len(self._by_name())

    def __repr__(self) -> str:
        lines = [f"Rates of {len(self)} parameters"]
        for group in self.groups:
            rate = f"{group.base_lr:.3g} × {group.multiplier:.3g}"
            what = f"{group.role}, rank {group.rank}"
            lines.append(f"  {what}: {len(group.names)} tensors, lr {rate}")
        return "\n".join(lines)

    def _by_name(self) -> dict[str, RateGroup]:
        return {name: group for group in self.groups for name in group.names}


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
    """

    rows: tuple[RateGroup, ...]
    notes: tuple[str, ...]
    title: str
    audit: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()
    survey: Survey = field(default_factory=Survey, repr=False)

    def __str__(self) -> str:
        table = self._table()
        wrapped = [
            fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
            for line in table.lines
        ]
        return replace(table, lines=wrapped).text(_WIDTH)

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        factors = {f.name: f for f in self.survey.factors}
        reasons = list(dict.fromkeys(row.why for row in self.rows))
        cells = []
        for row in self.rows:
            number = str(reasons.index(row.why) + 1)
            cells.append((*_cells(row, factors), number))
        lines = [f"why {number}: {reason}" for number, reason in enumerate(reasons, 1)]
        lines += [f"check: {text}" for text in (*self.audit, *self.unmoved)]
        lines += [f"note: {text}" for text in self.notes]
        return Table(_HEADINGS, cells, lines, self.title, left=("role", "init"))


def _cells(row: RateGroup, factors: Mapping[str, Factor]) -> tuple[str, ...]:
    """Return a row as text, in the order of the headings without the last."""
    of_row = [factors[name] for name in row.names if name in factors]
    return (
        row.role,
        str(row.rank or ""),
        "" if row.scaling is None else f"{row.scaling:g}",
        row.init or "",
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


def make_report(opt: Any) -> Report:
    """Return the report of an optimizer at its current rates."""
    hidden = opt._rankaware
    groups = opt.rates.groups
    assigner = hidden.assigner
    survey = hidden.survey
    title = f"RankAwareOptimizer({type(opt).__name__}), {assigner.source.title}"
    if assigner.source.reference is not None:
        title += f": moved from {assigner.reference}"
    rows = [row for group in groups for row in _by_training(group)]
    audit = [*survey.audit(), *_left_out(rows, survey)]
    # a recipe decides a head's rate
    if assigner.method == "lora" and assigner.source.recipe is None:
        audit += _heads_at_base_rate(rows)
    trained = trained_parts(opt)
    return Report(
        rows=tuple(rows),
        notes=hidden.notes,
        title=title,
        audit=tuple(audit),
        unmoved=tuple(filter(None, (rounding(trained), epsilon(trained)))),
        survey=survey,
    )


def _by_training(group: RateGroup) -> Iterator[RateGroup]:
    """Yield a part's parameters that train, and those that do not."""
    named = list(zip(group.names, group.params, strict=False))
    for is_frozen in (False, True):
        kept = [pair for pair in named if pair[1].requires_grad != is_frozen]
        if kept:
            names, params = zip(*kept, strict=True)
            row = replace(group, names=names, params=params)
            yield replace(row, role="frozen", why=_FROZEN) if is_frozen else row


def _left_out(rows: Iterable[RateGroup], survey: Survey) -> Iterator[str]:
    """Yield the adapters none of whose factors is in the groups."""
    names = {name for row in rows for name in row.names}
    held = {f.adapter for f in survey.factors if f.name in names}
    for adapter in sorted({f.adapter for f in survey.factors} - held):
        yield f"None of the factors of {adapter or 'the adapter'} is in this optimizer."


def _heads_at_base_rate(rows: Iterable[RateGroup]) -> Iterator[str]:
    """Yield the matrices that are no adapter's and train at the adapters' base rate."""
    heads = []
    for row in rows:
        if row.role != "other" or row.given is not None:
            continue
        for name, param in zip(row.names, row.params, strict=False):
            if param.dim() > 1 and other_kind(name) is None:
                heads.append(name)
    if heads:
        rest = "" if len(heads) == 1 else f" and {len(heads) - 1} more"
        yield (
            f"{heads[0]}{rest} trains at the adapters' base rate, which was not tuned for it:"
            " other_lr= or rates= sets another."
        )


def trained_parts(opt: Any) -> list[SameRate]:
    """Return what a `RankAwareOptimizer` of a sign-like family trains, at its highest rates: the
    first steps of a warm-up are small. If no scheduler noted others, the rates of the last step
    count, or those with which it was built.
    """
    trained = []
    splits = splits_of(opt)
    none_trains = not any(float(split.group["lr"]) for split in splits)
    is_adam = known_optimizer(type(opt))[1].relation == "as AdamW"
    for row in chain.from_iterable(map(_by_training, opt.rates.groups)):
        if row.role == "frozen" or row.family != "sign-like":
            continue
        split = splits[row.user_group]
        rates = [row.base_lr, peak_of(split.group)]
        # a rate of 0 freezes a group beside others, and begins a warm-up of all
        if "initial_lr" not in split.group and (row.base_lr or none_trains):
            rates.append(float(split.seen["lr"]))
        params = dict(zip(row.names, row.params, strict=False))
        at = max(rates) * row.multiplier
        kept = kept_dtypes(opt, split.group)
        trained.append(
            SameRate(params, at, kept, opt.state if is_adam else {}, split.group)
        )
    return trained


@torch.compiler.disable  # type: ignore[untyped-decorator]
def warn_of_unmoved(opt: Any) -> None:
    """Warn of weights that do not move at the first step, and later of Adam's epsilon."""
    hidden = opt._rankaware
    text = ""
    if hidden.steps >= EPSILON_AT:
        return
    hidden.steps += 1
    if hidden.steps == 1:
        text = rounding(trained_parts(opt))
    elif hidden.steps == EPSILON_AT:
        text = epsilon(trained_parts(opt))
    if text:
        warn(text)
