"""This module defines `rankaware fit`, which fits a recipe to a sweep.

The command `rankaware fit` calls the Python function in `sweeps/_fit.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import sweeps
from ..laws import PRIOR_LAW
from ._options import (
    FILE,
    FORCE,
    OPTIMIZER,
    echo,
    law_option,
    may_name_module,
    option,
    out_option,
    refuse_existing,
    typed_law,
)

if TYPE_CHECKING:
    from ..laws import Law


@click.command()
@click.argument("sweep", type=FILE)
@out_option("Write the recipe to a .toml file.")
@FORCE
@option("--name", str, "Name of the recipe. By default the name of SWEEP's file.")
@option(
    "--columns",
    str,
    "The columns in which the fields are stored, as in lr=config.lr,loss=eval/loss. For all other"
    " fields, a column with the name of the field or a usual name is read. Can be repeated.",
    multiple=True,
    metavar="FIELD=COLUMN,...",
)
@option(
    "--where",
    str,
    "Use only rows with this value, as in State=finished. Can be repeated.",
    multiple=True,
    metavar="COLUMN=VALUE",
)
@option(
    "--compare",
    str,
    "Print how well these laws predict the best learning rates of the sweep: names, or"
    " package.module:Class, separated by commas. If -o is passed, a recipe is fitted too.",
    callback=may_name_module,
    metavar="LAW,...",
)
@OPTIMIZER
@law_option("Scaling law between ranks.", PRIOR_LAW)
@option("--full-fan-in", float, "Largest fan-in, for full finetuning.")
def fit(
    sweep: Path,
    out: Path | None,
    force: bool,
    name: str | None,
    columns: tuple[str, ...],
    where: tuple[str, ...],
    compare: str | None,
    law: str | Law,
    optimizer: str,
    full_fan_in: float | None,
) -> None:
    """Fit a recipe to a sweep of learning rates from any tool.

    SWEEP is a .csv file with one row per run, such as an export of wandb or MLflow. The
    .csv file must have the columns rank, lr (per step) and loss, and for LoRA also the
    column alpha. The columns rslora, init, fan_in, seed, model, batch, steps and start
    (the loss before training) are optional. Other usual names of these columns, such as
    learning_rate, lora_alpha, r or eval_loss, are recognised.

    For full finetuning, write the word full in the column rank. For a run that
    diverged, write the word diverged in the column loss. Runs without a loss are left
    out of the fit.
    """
    refuse_existing(out, force)
    reading: dict[str, Any] = {
        "optimizer": optimizer,
        "columns": _columns(columns),
        "where": dict(_pair(text, "--where") for text in where),
    }
    if compare is not None:
        laws = [typed_law(text) for text in compare.split(",")]
        echo(sweeps.compare_laws(sweep, laws, **reading))
        if out is None:
            return
    recipe = sweeps.fit_sweep(
        sweep,
        name=name or sweep.stem,
        law=law,
        full_fan_in=full_fan_in,
        **reading,
    )
    if out is not None:
        recipe.save(out)
    echo(recipe)


def _columns(texts: tuple[str, ...]) -> dict[str, str]:
    """Parse strings such as "lr=config.lr,loss=eval/loss" to a dict from the fields of
    a run to the columns of the .csv file.
    """
    parts = [part for text in texts for part in text.split(",")]
    return dict(_pair(part, "--columns") for part in parts)


def _pair(text: str, option: str) -> tuple[str, str]:
    """Split a string such as "State=finished" at its equals sign into a name and a
    value.
    """
    name, equals, value = text.partition("=")
    if not name.strip() or not equals:
        example = "loss=eval/loss" if option == "--columns" else "State=finished"
        raise click.UsageError(
            f"{option} must be of the form name=value, but it is {text!r}. Write for example"
            f" {option} {example}."
        )
    return name.strip(), value.strip()
