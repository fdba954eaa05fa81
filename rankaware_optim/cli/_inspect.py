"""`rankaware inspect`: what adapters a file or folder holds."""

from __future__ import annotations

from pathlib import Path

import click

from ..inspection import inspect_file
from ..laws import DEFAULT_LAW
from ..transfer import survey_report
from ._echo import echo


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--lr", type=float, help="Base rate: adds a column of rates.")
@click.option("--law", default=DEFAULT_LAW, show_default=True)
@click.option("--tuned-at", help="Where the base rate was tuned: r=16,alpha=32, or an adapter.")
@click.option("--per-module", is_flag=True, help="A line for every tensor.")
def inspect(path: Path, lr: float | None, law: str, tuned_at: str | None, per_module: bool) -> None:
    """Say what adapters PATH holds: a PEFT folder or a .safetensors file, read without the model."""
    survey = inspect_file(path)
    echo(survey_report(survey, lr=lr, law=law, tuned_at=tuned_at, per_module=per_module))
