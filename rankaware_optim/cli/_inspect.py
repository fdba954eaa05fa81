"""`rankaware inspect`: list the adapters in a file or folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .._types import Rated, Survey
from ..inspection import inspect_file
from ..laws import DEFAULT_LAW
from ..transfer import survey_rates
from ._echo import echo, echo_json
from ._options import init_option, json_option, may_name_module

_SHAPE = (
    "an object. Fields: factors (one object per LoRA factor), others (name and adapter kind of the"
    " other tensors), checks (sentences on likely mistakes), notes (sentences). A factor has name,"
    " role (A or B), rank, fan_in and fan_out (of the adapted layer), scaling (effective"
    " multiplier), init, kind, layer, adapter, convention, lr (per step) and reason (of lr). lr and"
    " reason are null without --lr."
)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--lr", type=float, help="Base rate, per step. Adds a column of rates.")
@click.option(
    "--law",
    callback=may_name_module,
    default=DEFAULT_LAW,
    show_default=True,
    help="Law that moves --lr.",
)
@click.option(
    "--tuned-at",
    help="Configuration at which --lr was tuned: r=16,alpha=32,init=B, or an adapter's path.",
)
@init_option("By default as the files declare it.")
@click.option("--per-module", is_flag=True, help="Print one line per tensor.")
@json_option(_SHAPE)
def inspect(
    path: Path,
    lr: float | None,
    law: str,
    tuned_at: str | None,
    init: Any,
    per_module: bool,
    as_json: bool,
) -> None:
    """List the LoRA factors in an adapter's files.

    PATH is a PEFT folder or a .safetensors file. The model is not needed.
    """
    if lr is None and (tuned_at is not None or law != DEFAULT_LAW):
        raise click.UsageError("--tuned-at and --law move a rate, so give --lr too.")
    survey, rates = survey_rates(inspect_file(path, init=init), lr=lr, law=law, tuned_at=tuned_at)
    if as_json:
        echo_json(_document(survey, rates))
    else:
        echo(survey.explain(per_module=per_module, rates=rates))


def _document(survey: Survey, rates: Mapping[str, Rated]) -> dict[str, Any]:
    unrated = {"lr": None, "reason": None}
    rated = {name: rate._asdict() for name, rate in rates.items()}
    return {
        "factors": [
            {**asdict(factor), **rated.get(factor.name, unrated)} for factor in survey.factors
        ],
        "others": [{"name": name, "kind": survey.unsupported.get(name)} for name in survey.other],
        "checks": survey.audit(),
        "notes": survey.notes,
    }
