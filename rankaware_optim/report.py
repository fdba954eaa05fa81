"""The report: what every parameter group is, what rate it has, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .checkpoints import Carried
from .groups import Plan

__all__ = ["Report", "Row"]


@dataclass(frozen=True)
class Row:
    """One group of the report. `count` is of tensors, `lr` the present rate."""

    role: str
    rank: int | None
    scaling: float | None
    init: str | None
    count: int
    multiplier: float
    lr: float
    reason: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """Per group: role, rank, scaling, init, count, multiplier, rate, and why. `str()` draws it as a table.

    carried: per parameter, what the last checkpoint of another rank left of its moments.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    title: str
    carried: tuple[Carried, ...] = ()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, no_color=True, highlight=False, markup=False)
        with console.capture() as capture:
            console.print(self.table())
            for note in self.notes:
                console.print(f"note: {note}", soft_wrap=True)
        return capture.get().rstrip()

    def table(self) -> Any:
        """The rows as a rich table."""
        from rich import box
        from rich.table import Table

        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for heading in ("role", "rank", "scaling", "init", "tensors", "multiplier", "lr", "why"):
            table.add_column(heading, justify="left" if heading in ("role", "init", "why") else "right")
        for r in self.rows:
            scaling = "" if r.scaling is None else f"{r.scaling:g}"
            numbers = (str(r.count), f"{r.multiplier:.4g}", f"{r.lr:.3g}")
            table.add_row(r.role, str(r.rank or ""), scaling, r.init or "", *numbers, r.reason)
        return table


def make_report(
    param_groups: Iterable[Mapping[str, Any]], plan: Plan, title: str, carried: tuple[Carried, ...] = ()
) -> Report:
    """A report of built groups at their present rates."""
    rows = tuple(_row(group, plan) for group in param_groups)
    return Report(rows, (*plan.notes, *_carried_notes(carried)), title, carried)


def _carried_notes(carried: tuple[Carried, ...]) -> list[str]:
    """One line for each change of rank: how many parameters, and how many directions of each were kept."""
    changes = Counter((c.saved_rank, c.rank, c.kept, c.state) for c in carried)
    return [
        f"{count} parameters came from a checkpoint of rank {saved}, now {rank}: "
        + (f"{kept} directions kept in {', '.join(state)}." if kept else "their moments start anew.")
        for (saved, rank, kept, state), count in changes.items()
    ]


def _row(group: Mapping[str, Any], plan: Plan) -> Row:
    role = group.get("lora_role", "other")
    return Row(
        role=role,
        rank=group.get("lora_rank"),
        scaling=group.get("lora_scale") if role in ("A", "B") else None,
        init=group.get("lora_init") if role in ("A", "B") else None,
        count=len(group["params"]),
        multiplier=group.get("lr_multiplier", 1.0),
        lr=float(group["lr"]),
        reason=_reason(group, plan),
        names=tuple(group.get("param_names", ())),
    )


def _reason(group: Mapping[str, Any], plan: Plan) -> str:
    role = group.get("lora_role", "other")
    if plan.has_own_rate(group):
        return f"a rate of its own, by {'rates=' if plan.is_named(group) else 'other_lr='}"
    if role == "full" or (role == "other" and plan.method == "full"):
        return f"{plan.law.name}: full finetuning, from {plan.reference}"
    if role == "other":
        return "no LoRA factor: the base rate"
    if group.get("lora_init") == "other":
        return "neither factor was zero, so no law covers it: the base rate"
    return f"{plan.law.name}: from {plan.reference}"
