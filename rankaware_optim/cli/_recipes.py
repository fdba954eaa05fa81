"""The commands that read a recipe: `rankaware lr`, `show`, `plot` and `report`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click

from .. import recipe as recipes
from .. import reports
from .._files import replace_bytes
from ..errors import RankAwareWarning
from ._options import (
    FILE,
    INIT_HELP,
    RATE_FIELDS,
    RSLORA,
    echo,
    echo_result,
    flag,
    number_or_rank,
    option,
    out_option,
    rate_document,
)

_RECIPE = click.argument("recipe", type=FILE)


@click.command()
@_RECIPE
@option("--rank", int, "LoRA rank. By default the recipe's own.")
@option(
    "--alpha",
    number_or_rank,
    "LoRA alpha, a number or 'rank'. By default by the recipe's rule, which rankaware show prints.",
)
@RSLORA
@option("--init", click.Choice(("A", "B")), f"{INIT_HELP} By default the recipe's.")
@flag("--full", "Print the rate for full finetuning.")
@option("--fan-in", float, "Width of the model, up to twice or half the recipe's.")
@option(
    "--steps",
    int,
    "Training steps, if they differ from the recipe's. This extrapolates.",
)
@option(
    "--batch",
    float,
    "Batch size in the recipe's unit, if it differs. This extrapolates.",
)
@flag("--json as_json", f"Print JSON: an object. Fields: {RATE_FIELDS}.")
def lr(recipe: Path, full: bool, as_json: bool, **options: Any) -> None:
    """Print a recipe's rate at a rank or for full finetuning.

    The 90 % band, the ceiling and what the rate holds for are printed with it.
    """
    loaded = recipes.Recipe.load(recipe)
    if options["alpha"] == "rank":
        options["alpha"] = options["rank"] or loaded.reference.rank
    with warnings.catch_warnings():
        # the rate's notes say it
        warnings.filterwarnings("ignore", "Recipe .* extrapolates", RankAwareWarning)
        rate = loaded.at(method="full" if full else "lora", **options)
    echo_result(as_json, rate, rate_document(rate))


@click.command()
@_RECIPE
def show(recipe: Path) -> None:
    """Print a recipe: its rate, band, law and provenance."""
    echo(recipes.Recipe.load(recipe))


@click.command()
@_RECIPE
@out_option("Figure to write, a .png, .svg or .pdf file.", required=True)
def plot(recipe: Path, out: Path) -> None:
    """Draw a recipe's trials, and its rates by rank."""
    figure = recipes.Recipe.load(recipe).plot()
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out, format=out.suffix[1:], dpi=130)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    echo(out)


@click.command()
@_RECIPE
@out_option("HTML page to write.", required=True)
def report(recipe: Path, out: Path) -> None:
    """Write a recipe as an HTML page.

    The page has the recipe's rates by rank, its figure, its trials and its provenance.
    """
    page = reports.report_html(recipes.Recipe.load(recipe))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(out, page.encode())
    echo(out)
