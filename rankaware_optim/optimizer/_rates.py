"""This module reports the current learning rates of an optimizer.

The report contains a table of learning rates with the reasons for them, warnings about
likely mistakes, and notes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from textwrap import fill
from typing import TYPE_CHECKING

import torch

from .._optimizers import kept_dtypes, known_optimizer
from .._printing import Table
from .._types import Factor
from .._warn import warn
from ..inspection import Survey, other_kind
from ._assign import Assigned
from ._parts import peak_lr, split_groups
from ._unmoved import SameRate, epsilon, rounding

if TYPE_CHECKING:
    from ._wrapper import RankAwareOptimizer

_HEADINGS = (
    *("role", "rank", "scaling", "init", "fan-in", "fan-out", "tensors"),
    *("base lr", "multiplier", "lr", "why"),
)
_WIDTH = 100  # columns
# Adam's epsilon is checked once, after this many steps. An earlier check would mislead:
# while B is still close to zero, the gradients of A are close to zero as well.
EPSILON_AT = 100
_FROZEN = "frozen: it does not train until requires_grad is set"
# These patterns recognise the part of a model that a parameter belongs to. The first
# pattern that matches the parameter's name is used, so the order matters.
_BY_NAME = {
    "biases": r"(^|\.)bias$",
    "norms": r"norm|(^|[._])ln(_|\d|\.|$)",
    "embeddings": r"embed|(^|\.)w[tp]e\.",
    "head": r"(^|\.)(\w*head|classifier|score|qa_outputs)(\.|$)",
}
_WHOLE_COPY = "modules_to_save"


@dataclass(frozen=True, kw_only=True)
class RateGroup(Assigned):
    """Parameters of one parameter group that are trained with the same learning rate.

    The learning rate of these parameters is lr = base_lr × multiplier.

    Args:
        role, rank, scaling, init, family, multiplier, given, why: a description of the
            parameters and the reason for their learning rate, as in `Assigned`.
        base_lr: the learning rate of the user's parameter group, which schedulers
            change.
        lr: the learning rate of the next step.
        initial_lr: the learning rate at the start of the schedule. Without a scheduler,
            it is equal to `lr`.
        names: the names of the parameters in the model.
        params: the parameters.
        user_group: the number of the user's parameter group.
    """

    base_lr: float
    lr: float
    initial_lr: float
    names: tuple[str, ...]
    params: tuple[torch.Tensor, ...] = field(repr=False, compare=False)
    user_group: int


class Rates(Mapping[str, RateGroup]):
    """A mapping from parameter names to their current learning rates.

    Each value of the mapping is a `RateGroup`, which contains the learning rate. After a
    scheduler has changed the learning rates, the mapping returns the new learning rates.
    """

    def __init__(self, opt: RankAwareOptimizer) -> None:
        self._opt = opt

    @property
    def groups(self) -> tuple[RateGroup, ...]:
        """The user's parameter groups, divided by learning rate.

        The order of the groups is the same as in the optimizer.
        """
        groups = []
        for number, split in enumerate(split_groups(self._opt)):
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
            rank = "" if group.rank is None else f", rank {group.rank}"
            role = _role_in_words(group)
            count = len(group.names)
            tensors = "1 tensor" if count == 1 else f"{count} tensors"
            lines.append(f"  {role}{rank}: {tensors}, lr {rate}")
        return "\n".join(lines)

    def _by_name(self) -> dict[str, RateGroup]:
        return {name: group for group in self.groups for name in group.names}


@dataclass(frozen=True)
class Report:
    """A report on the learning rates of an optimizer and the reasons for them.

    `str(report)` is a table with a width of at most 100 columns.

    Args:
        rows: one entry for each set of parameters with the same learning rate. Frozen
            parameters have a separate entry with the role "frozen".
        notes: notes about the scaling law and the learning rates.
        title: the title of the table.
        audit: warnings about likely mistakes, such as an adapter that is missing.
        unmoved: warnings about weights that do not change in a step, and about Adam's
            epsilon.
        survey: a survey of the model.
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
        # The reasons are long, and many rows have the same one. The rows therefore
        # contain only a number, and the reasons are listed below the table.
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
    """Return all cells of a row of the report's table except the last cell, which
    explains the learning rate.
    """
    of_row = [factors[name] for name in row.names if name in factors]
    return (
        _role_in_words(row),
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


def _role_in_words(row: RateGroup) -> str:
    """Return a description of a row's parameters, such as "A", "B" or "biases, norms".

    For parameters with the role "other", the parts of the model are listed, because
    there can be several rows with this role.
    """
    if row.role != "other":
        return row.role
    pairs = zip(row.names, row.params, strict=False)
    kinds = sorted({_part_of_model(name, param) for name, param in pairs})
    return ", ".join(kinds) or "other"


def _part_of_model(name: str, param: torch.Tensor) -> str:
    """Return the part of the model that a parameter belongs to, such as "norms" or "head"."""
    adapter = other_kind(name)
    if adapter is not None and _WHOLE_COPY not in name:
        return adapter
    for part, pattern in _BY_NAME.items():
        if re.search(pattern, name):
            return part
    return "weights" if param.dim() > 1 else "vectors"


def _range(values: Iterable[float]) -> str:
    """Format the smallest and the largest value as a string such as "64–256"."""
    ordered = sorted(set(values))
    return "–".join(f"{end:g}" for end in dict.fromkeys((*ordered[:1], *ordered[-1:])))


def make_report(opt: RankAwareOptimizer) -> Report:
    """Create a report on an optimizer with its current learning rates."""
    wrapper = opt._rankaware
    groups = opt.rates.groups
    assigner = wrapper.assigner
    survey = wrapper.survey
    title = f"RankAwareOptimizer({type(opt).__name__}), {assigner.source.title}"
    if assigner.source.reference is not None:
        title += f": lr tuned at {assigner.reference}"
    rows = [row for group in groups for row in _frozen_apart(group)]
    audit = [*survey.audit(), *_missing_adapters(rows, survey)]
    # With a recipe, the recipe decides the learning rate of a head.
    if assigner.method == "lora" and assigner.source.recipe is None:
        audit += _heads_at_base_rate(rows)
    trained = sign_like_groups(opt)
    return Report(
        rows=tuple(rows),
        notes=wrapper.notes,
        title=title,
        audit=tuple(audit),
        unmoved=tuple(filter(None, (rounding(trained), epsilon(trained)))),
        survey=survey,
    )


def _frozen_apart(group: RateGroup) -> Iterator[RateGroup]:
    """Yield one table row for the trainable parameters of a group, and one for its
    frozen parameters.
    """
    # A framework such as FSDP1 may have flattened the parameters. Then there are fewer
    # parameters than names, so `strict` must be False.
    named = list(zip(group.names, group.params, strict=False))
    for is_frozen in (False, True):
        kept = [pair for pair in named if pair[1].requires_grad != is_frozen]
        if kept:
            names, params = zip(*kept, strict=True)
            row = replace(group, names=names, params=params)
            yield replace(row, role="frozen", why=_FROZEN) if is_frozen else row


def _missing_adapters(rows: Iterable[RateGroup], survey: Survey) -> Iterator[str]:
    """Yield a warning for each adapter whose LoRA matrices are not in the optimizer."""
    names = {name for row in rows for name in row.names}
    held = {f.adapter for f in survey.factors if f.name in names}
    for adapter in sorted({f.adapter for f in survey.factors} - held):
        name = f"the adapter {adapter!r}" if adapter else "the adapter"
        yield (
            f"The LoRA matrices of {name} are not in this optimizer, so it does not train them."
        )


def _heads_at_base_rate(rows: Iterable[RateGroup]) -> Iterator[str]:
    """Yield a warning about weight matrices that train at the adapters' base learning
    rate.

    A typical example is a classification head.
    """
    heads = []
    for row in rows:
        if row.role != "other" or row.given is not None:
            continue
        for name, param in zip(row.names, row.params, strict=False):
            if param.dim() > 1 and other_kind(name) is None:
                heads.append(name)
    if heads:
        trains = f"and {len(heads) - 1} more train" if heads[1:] else "trains"
        yield (
            f"{heads[0]} {trains} at the base learning rate of the adapters, which was not tuned"
            " for such weights. Set a separate learning rate with other_lr= or rates=."
        )


def sign_like_groups(opt: RankAwareOptimizer) -> list[SameRate]:
    """Return the parameters that train with sign-like updates, such as Adam's, in sets
    with the same learning rate.

    During a warm-up, the current learning rate is still small. Each set therefore
    contains the highest known learning rate of its parameters. The highest known
    learning rate is stored in the parameter group, or it is the learning rate with
    which the optimizer was built.
    """
    trained = []
    splits = split_groups(opt)
    none_trains = not any(float(split.group["lr"]) for split in splits)
    is_adam = known_optimizer(type(opt))[1].relation == "as AdamW"
    for row in chain.from_iterable(map(_frozen_apart, opt.rates.groups)):
        # Only in sign-like updates is the change of a weight about equal to the
        # learning rate, which makes it possible to predict rounding.
        if row.role == "frozen" or row.family != "sign-like":
            continue
        split = splits[row.user_group]
        rates = [row.base_lr, peak_lr(split.group)]
        # If only some groups have a learning rate of 0, the user has frozen them. If
        # all groups have a learning rate of 0, this is the start of a warm-up.
        if "initial_lr" not in split.group and (row.base_lr or none_trains):
            rates.append(float(split.snapshot["lr"]))
        params = dict(zip(row.names, row.params, strict=False))
        at = max(rates) * row.multiplier
        kept = kept_dtypes(opt, split.group)
        trained.append(
            SameRate(params, at, kept, opt.state if is_adam else {}, split.group)
        )
    return trained


@torch.compiler.disable  # type: ignore[untyped-decorator]
def warn_of_unmoved(opt: RankAwareOptimizer) -> None:
    """Warn about weights that do not change in a step, and about a large epsilon of
    Adam.

    The weights are checked at the first step, and epsilon after `EPSILON_AT` steps.
    """
    wrapper = opt._rankaware
    text = ""
    if wrapper.steps >= EPSILON_AT:
        return
    wrapper.steps += 1
    if wrapper.steps == 1:
        text = rounding(sign_like_groups(opt))
    elif wrapper.steps == EPSILON_AT:
        text = epsilon(sign_like_groups(opt))
    if text:
        warn(text)
