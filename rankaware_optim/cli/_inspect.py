"""`rankaware inspect`: list the adapters in a file or folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .._survey_text import Rated
from .._types import Survey
from ..inspection import inspect_file
from ..laws import DEFAULT_LAW
from ..transfer import survey_rates
from ._echo import echo, echo_json
from ._options import json_option


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--lr", type=float, help="Base rate; adds a column of rates.")
@click.option("--law", default=DEFAULT_LAW, show_default=True)
@click.option("--tuned-at", help="Configuration of the base rate: r=16,alpha=32, or an adapter.")
@click.option("--per-module", is_flag=True, help="Print one line per tensor.")
@json_option("factors, each with its lr and reason, null without --lr; other parameters; checks; notes.")
def inspect(path: Path, lr: float | None, law: str, tuned_at: str | None, per_module: bool, as_json: bool) -> None:
    """List the adapters in PATH, a PEFT folder or a .safetensors file. The model is not needed."""
    survey, rates = survey_rates(inspect_file(path), lr=lr, law=law, tuned_at=tuned_at)
    if as_json:
        echo_json(_document(survey, rates))
    else:
        echo(survey.explain(per_module=per_module, rates=rates))


def _document(survey: Survey, rates: Mapping[str, Rated]) -> dict[str, Any]:
    unrated = {"lr": None, "reason": None}
    rated = {name: rate._asdict() for name, rate in rates.items()}
    return {
        "factors": [{**asdict(factor), **rated.get(factor.name, unrated)} for factor in survey.factors],
        "others": [{"name": name, "kind": survey.unsupported.get(name)} for name in survey.other],
        "checks": survey.audit(),
        "notes": survey.notes,
    }
