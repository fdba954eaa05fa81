"""The report: each parameter group's kind, its rate, the reason for it, and what to check."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from textwrap import fill

from .._printing import Table
from .._types import (
    GAMMA,
    NO_LAW,
    Factor,
    Rated,
    Survey,
    init_text,
    reason_of_other,
    scaling_factor,
)
from ..inspection import other_kind
from ..laws import Constant, Falling, LoRAPlus, MuA, get_law, law_title
from ..recipe import Recipe
from ._param_groups import Group, Groups, effective_lr, named_params, settings_in
from ._plan import Assignment, Plan

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
# What the reports' words on evidence mean.
_LEGEND = {
    "theory": "from the law's equations",
    "measured": "our sweeps show it",
    "as tuned": "not moved",
}


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
        rows: one entry per group, and one for its frozen parameters: role, rank, scaling, init,
            fan-in, fan-out, count, multiplier, rate and reason.
        notes: sentences on the law and the rates.
        title: the table's title.
        audit: sentences on likely mistakes that the groups show.
        survey: the inspected model.
        per_module: whether the table has one line per tensor. Long names make it wider.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    title: str
    audit: tuple[str, ...] = ()
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
            return replace(table, title=self.title)
        reasons = list(dict.fromkeys(row.reason for row in self.rows))
        rows = [(*row.cells(), str(reasons.index(row.reason) + 1)) for row in self.rows]
        lines = [f"why {number}: {reason}" for number, reason in enumerate(reasons, 1)]
        meanings = [
            f"{word}: {meaning}"
            for word, meaning in _LEGEND.items()
            if any(word in reason for reason in reasons)
        ]
        lines += [f"words: {'; '.join(meanings)}"] if meanings else []
        lines += [f"check: {text}" for text in self.audit]
        lines += [f"note: {text}" for text in self.notes]
        return Table(_HEADINGS, rows, lines, self.title, left=("role", "init"))


def make_report(
    param_groups: Groups,
    plan: Plan,
    title: str,
    per_module: bool = False,
) -> Report:
    """Return the report of built groups at their current rates."""
    survey = plan.survey
    audit = [*survey.audit(), *_left_out(param_groups, survey)]
    # a recipe decides a head's rate
    if plan.method == "lora" and survey.factors and plan.use is None:
        audit += _heads_at_base_rate(_by_plan(param_groups, plan))
    return Report(
        _rows(param_groups, plan),
        (*plan.notes, *_notes(param_groups)),
        title,
        tuple(audit),
        survey,
        per_module,
    )


def origin(plan: Plan) -> str:
    """Return in words what moves the rates, and from where."""
    words = law_title(get_law(plan.options.law))
    if plan.use is not None:
        words = f"recipe {plan.use.recipe.name!r}"
    given = plan.options.tuned_at is not None
    return f"{words}: moved from {plan.reference}" if given else words


def plan_rates(plan: Plan, lr: float) -> dict[str, Rated]:
    """Return the rate of every factor of a plan at the base rate `lr`, for `Survey.explain`."""
    groups = []
    for f in plan.survey.factors:
        decision = plan.assign(f.name, f)
        base = lr if decision.pinned_lr is None else decision.pinned_lr
        names = {"params": [f], "param_names": [f.name]}
        groups.append({"lr": base, **names, **decision._asdict()})
    return _rates_of(_rows(groups, plan))


def _rates_of(rows: Iterable[Row]) -> dict[str, Rated]:
    return {name: Rated(row.lr, row.reason) for row in rows for name in row.names}


def _left_out(groups: Groups, survey: Survey) -> Iterator[str]:
    """Yield the adapters none of whose factors is in the groups."""
    names = {name for group in groups for name in group.get("param_names", ())}
    present = {f.adapter for f in survey.factors if f.name in names}
    for adapter, count in Counter(f.adapter for f in survey.factors).items():
        if names and adapter not in present:
            yield (
                f"None of the {count} factors of {adapter or 'the adapter'} is in this optimizer."
            )


def _heads_at_base_rate(groups: Iterable[Group]) -> Iterator[str]:
    """Yield the matrices that are no adapter's and train at the adapters' base rate."""
    heads = []
    for name, param in named_params(g for g in groups if g.get("lora_role") == "other"):
        if param.requires_grad and param.dim() > 1 and other_kind(name) is None:
            heads.append(name)
    if heads:
        rest = "" if len(heads) == 1 else f" and {len(heads) - 1} more"
        yield (
            f"{heads[0]}{rest} trains at the adapters' base rate, which was not tuned for it."
        )


def _notes(groups: Groups) -> Iterator[str]:
    """Yield a note on schedulers that take a list, if the user has several groups and one was
    split.
    """
    count = len({group.get("user_group") for group in groups})
    if 1 < count < len(groups):
        yield (
            f"Your {count} groups are {len(groups)} here: give schedulers that take a list"
            " opt.expand(values)."
        )


def _rows(groups: Groups, plan: Plan) -> tuple[Row, ...]:
    factors = {f.name: f for f in plan.survey.factors}
    moved = any(g.get("rank_multiplier", 1.0) != 1.0 for g in _by_plan(groups, plan))
    unmoved = plan.options.tuned_at is None and not moved
    rows = []
    for group in groups:
        for part, trains in _by_training(group):
            row = _row(part, plan, factors, unmoved)
            rows.append(row if trains else replace(row, role="frozen", reason=_FROZEN))
    return tuple(rows)


def _by_training(group: Group) -> Iterator[tuple[Group, bool]]:
    """Yield a group's parameters that train, then those that do not, each as a group."""
    names, params = group.get("param_names", ()), group["params"]
    trains = [getattr(param, "requires_grad", True) for param in params]
    for wanted in (True, False):
        chosen = [each == wanted for each in trains]
        part = {
            "params": list(compress(params, chosen)),
            "param_names": list(compress(names, chosen)),
        }
        if any(chosen):
            yield {**group, **part}, wanted


def _by_plan(groups: Groups, plan: Plan) -> list[Group]:
    """Return the groups whose rate was not given by an argument."""
    return [group for group in groups if not _giver(plan, group)]


def _row(group: Group, plan: Plan, factors: Mapping[str, Factor], unmoved: bool) -> Row:
    tags = {key: group[key] for key in Assignment._fields if key in group}
    decision = Assignment(**tags)
    names = tuple(group.get("param_names", ()))
    of_group = [factors[name] for name in names if name in factors]
    paired = decision.lora_role in ("A", "B")
    lr = effective_lr(group)
    in_adam = decision.rank_family == "sign-like"
    plan = plan.for_group(settings_in(group), in_adam)
    return Row(
        role=decision.lora_role,
        rank=decision.lora_rank,
        scaling=decision.lora_scale if paired else None,
        init=decision.lora_init if paired else None,
        count=len(group["params"]),
        base_lr=lr / decision.rank_multiplier,
        multiplier=decision.rank_multiplier,
        lr=lr,
        reason=_reason(group, decision, plan, unmoved),
        family=decision.rank_family,
        names=names,
        convention=", ".join(dict.fromkeys(f.convention for f in of_group)),
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


def _reason(group: Group, decision: Assignment, plan: Plan, unmoved: bool) -> str:
    """Return why a group has its rate. unmoved: whether no rate of the model is moved."""
    giver, role = _giver(plan, group), decision.lora_role
    if giver:
        return f"given by {giver}"
    if role == "other" and plan.method == "lora":
        names = group.get("param_names", ())
        kinds = {kind for kind in map(other_kind, names) if kind is not None}
        return reason_of_other(sorted(kinds), _rate_of_other(names, decision, plan))
    if decision.lora_init == "other":
        return NO_LAW
    if unmoved:
        return _NOT_GIVEN
    law = law_title(get_law(plan.options.law)).removeprefix("law ")
    law = law if plan.use is None else "recipe"
    if plan.family != "sign-like":
        law += f", {plan.family}"
    if role in ("A", "B"):
        return f"{law}: from {plan.reference} ({_evidence(plan, decision)})"
    evidence = _evidence(plan, decision._replace(lora_role="full"))
    return f"{law}: full finetuning, from {plan.reference} ({evidence})"


def _rate_of_other(names: Sequence[str], decision: Assignment, plan: Plan) -> str:
    """Return in words where the rate of parameters that are not factors comes from."""
    if plan.use is None or not names:
        return "the base rate (other_lr= or rates= sets another)"
    others = plan.use.others
    if decision.rank_multiplier == plan.run_multiplier and not others.knows(names[0]):
        return "the base rate"
    return others.reason(names[0])


def _evidence(plan: Plan, decision: Assignment) -> str:
    """Return the evidence for a moved rate. Only the default law and µA were tested."""
    law, kept = plan.law, decision.rank_multiplier == 1.0
    if plan.use is not None:
        tried = _was_tried(plan.use.recipe, plan.width, decision)
        words = "calibrated" if tried else "by its law"
        return f"{words}, see its band"
    if isinstance(law, (Constant, LoRAPlus)):
        return "not moved" if kept else "its authors' advice"
    phrases = list(_steps(plan, decision))
    if not phrases and kept:
        return "as tuned"
    inner = law.law if isinstance(law, Falling) else law
    if phrases and isinstance(inner, MuA) and inner.ratio == 1.0:
        return max(phrases, key=_CERTAINTY.index)
    return "as that law says"


def _was_tried(recipe: Recipe, width: float, decision: Assignment) -> bool:
    """Return whether the recipe's trials ran a configuration: rank, scaling, init and width."""
    at, full, rank = recipe.reference, decision.lora_role == "full", decision.lora_rank
    own_width = (recipe.full_fan_in if full else at.fan_in) or width
    if not math.isclose(width, own_width, rel_tol=0.01):
        return False
    if full or rank not in recipe.ranks or at.rank is None:
        return full and recipe.full_seen
    scaling = at.scaling
    if recipe.scaling_rule in GAMMA:
        scaling *= scaling_factor(recipe.scaling_rule, at.rank, rank)
    return decision.lora_init == at.init and math.isclose(decision.lora_scale, scaling)


def _steps(plan: Plan, decision: Assignment) -> Iterator[str]:
    """Yield a phrase for each step from the reference: if the method differs, or else rank or
    scaling do, if the width does, and if the batch does.
    """
    at, full = plan.reference, decision.lora_role == "full"
    if full != (at.method == "full"):
        yield _THUMB
    elif not full:
        yield from _of_rank(plan, decision)
    moves_width = not math.isclose(plan.width, at.fan_in or plan.width)
    if moves_width:
        falls = isinstance(plan.law, Falling) and decision.lora_init == "B"
        of_family = _GUESS if plan.family == "unknown" else "theory"
        yield "untested" if falls else of_family
    if plan.batch_multiplier != 1.0:
        yield _THUMB


def _of_rank(plan: Plan, decision: Assignment) -> Iterator[str]:
    at, scaling = plan.reference, decision.lora_scale
    in_b = decision.lora_init == "B"
    ranks = (decision.lora_rank or 1) / (at.rank or 1)
    if ranks == 1.0 and math.isclose(scaling, at.scaling):
        return
    if plan.family == "unknown":
        yield _GUESS
    elif plan.family != "sign-like":  # benchmarks/results/laws.md, at Init[A]
        yield "theory" if in_b else _SMALL_RUNS
    elif ranks == 1.0:
        yield "theory"
    elif in_b:
        falls = isinstance(plan.law, Falling)
        yield _SMALL_RUNS if falls else "theory, against small runs"
    else:
        fall = -math.log(scaling / at.scaling) / math.log(ranks)
        # alpha follows the rank, or is kept
        follows = min(abs(fall), abs(fall - 1.0)) < 0.05
        yield "theory, measured" if follows else "theory"
