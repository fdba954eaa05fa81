"""The report: what every parameter group is, what rate it has, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

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
    """Per group: role, rank, scaling, init, count, multiplier, rate, and why. `str()` draws it as a table."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    title: str

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


def make_report(param_groups: Iterable[Mapping[str, Any]], plan: Plan, title: str) -> Report:
    """A report of built groups at their present rates."""
    return Report(tuple(_row(group, plan) for group in param_groups), plan.notes, title)


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
    role, names = group.get("lora_role", "other"), group.get("param_names", ())
    if any(fnmatchcase(name, pattern) for name in names[:1] for pattern, _ in plan.rates):
        return "a rate of its own, by rates="
    if role == "other" and plan.other_lr is not None:
        return "a rate of its own, by other_lr="
    if role == "full" or (role == "other" and plan.method == "full"):
        return f"{plan.law.name}: full finetuning, from {plan.reference}"
    if role == "other":
        return "no LoRA factor: the base rate"
    if group.get("lora_init") == "other":
        return "neither factor was zero, so no law covers it: the base rate"
    return f"{plan.law.name}: from {plan.reference}"
