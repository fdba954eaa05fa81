"""This module defines the commands `rankaware lr`, `show`, `plot` and `report`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import recipe as recipes
from .. import reports
from .._files import replace_bytes
from .._types import Method
from ..errors import RankAwareWarning
from ..laws import layers_of
from ._options import (
    FILE,
    FORCE,
    INIT_HELP,
    OWN_LAW,
    RATE_FIELDS,
    RSLORA,
    echo,
    echo_result,
    flag,
    number_or_rank,
    option,
    out_option,
    rate_document,
    refuse_existing,
)

if TYPE_CHECKING:
    from ..laws import Law

_RECIPE = click.argument("recipe", type=FILE)


def _load(path: Path, law: Law | str | None) -> recipes.Recipe:
    """Read a recipe from the file that the user passed.

    law: the law of the recipe, if the user passed --law.

    Raises:
        click.UsageError: the recipe has another law.
    """
    recipe = recipes.Recipe.load(path)
    if law is None:
        return recipe
    typed = law if isinstance(law, str) else law.name
    names = [each.name for each in layers_of(recipe.law)]
    if typed in names:
        return recipe
    stored = names[-1]
    raise click.UsageError(
        f"The law {typed!r} was passed as --law, but the recipe contains the law {stored!r}. Remove"
        " --law to use the law of the recipe."
    )


@click.command()
@_RECIPE
@option("--rank", int, "LoRA rank. By default the recipe's own.")
@option(
    "--alpha",
    number_or_rank,
    "LoRA alpha: a number, or the word rank for alpha = rank. By default it follows the recipe's"
    " rule, which rankaware show prints.",
)
@RSLORA
@option("--init", click.Choice(("A", "B")), f"{INIT_HELP} By default the recipe's.")
@flag("--full", "Print the learning rate for full finetuning.")
@option(
    "--fan-in",
    float,
    "Width of the model: the mean fan-in of the adapted layers, or with --full the largest fan-in."
    " At most twice, and at least half, the recipe's.",
)
@option(
    "--steps",
    int,
    "Optimizer steps, if they differ from the recipe's. The interval becomes wider.",
)
@option(
    "--batch",
    float,
    "Batch size in the recipe's unit, if it differs from the recipe's. The interval becomes wider.",
)
@option("--judge", float, "Compare this learning rate too, such as the one you use.")
@OWN_LAW
@flag(
    "--json as_json",
    f"Print JSON: an object. Fields: {RATE_FIELDS}. With --judge also judged: an object with lr,"
    " factor (lr over the best), inside (whether it lies in the interval) and lost (share of the"
    " possible improvement, or null).",
)
def lr(
    recipe: Path,
    judge: float | None,
    law: Law | str | None,
    full: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Print a recipe's learning rate for a rank or for full finetuning.

    The command also prints the 90 % interval, the lowest learning rate that diverged
    (the ceiling) and the configuration.
    """
    loaded = _load(recipe, law)
    if options["alpha"] == "rank":
        options["alpha"] = options["rank"] or loaded.reference.rank
    with warnings.catch_warnings():
        # the notes of the learning rate repeat this warning
        warnings.filterwarnings("ignore", "Recipe .* extrapolates", RankAwareWarning)
        method: Method = "full" if full else "lora"
        rate = loaded.at(method=method, **options)
    document = rate_document(rate)
    judged = None
    if judge is not None:
        judged = loaded.judge(judge, method=method, **options)
        names = ("lr", "factor", "inside", "lost")
        document["judged"] = {name: getattr(judged, name) for name in names}
    text = f"{rate!s}" if judged is None else f"{rate!s}\n{judged}"
    echo_result(as_json, text, document)


@click.command()
@_RECIPE
@OWN_LAW
def show(recipe: Path, law: Law | str | None) -> None:
    """Print a recipe with its learning rate, interval, law and provenance."""
    echo(_load(recipe, law))


@click.command()
@_RECIPE
@out_option("The figure to write, a .png, .svg or .pdf file.", required=True)
@FORCE
@option("--judge", float, "Draw this learning rate too, such as the one you used.")
@OWN_LAW
def plot(
    recipe: Path, out: Path, force: bool, judge: float | None, law: Law | str | None
) -> None:
    """Draw a figure of a recipe's trials and of its learning rate at each rank."""
    refuse_existing(out, force)
    figure = _load(recipe, law).plot(judge)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(out, format=out.suffix[1:], dpi=130)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    echo(out)


@click.command()
@_RECIPE
@out_option("The HTML page to write.", required=True)
@FORCE
@OWN_LAW
def report(recipe: Path, out: Path, force: bool, law: Law | str | None) -> None:
    """Write an HTML page that shows the contents of a recipe.

    The page shows the recipe's learning rate at each rank, its figure, its trials and its
    provenance.
    """
    refuse_existing(out, force)
    page = reports.report_html(_load(recipe, law))
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(out, page.encode())
    echo(out)
