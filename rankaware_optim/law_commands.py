"""The commands `rankaware fit`, a sweep made into a recipe, and `rankaware bench-law`, the yardstick for laws."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .yardstick import Move, Score

__all__ = ["bench", "fit"]


def _number_or_rank(ctx: click.Context, param: click.Parameter, value: str | None) -> float | str | None:
    if value is None or value == "rank":
        return value
    try:
        return float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor 'rank'.") from error


def _columns(ctx: click.Context, param: click.Parameter, pairs: Sequence[str]) -> dict[str, str]:
    parted = [pair.partition("=") for pair in pairs]
    if not all(equals for _, equals, _ in parted):
        raise click.BadParameter("Write FIELD=COLUMN, such as loss=final_loss.")
    return {field.strip(): column.strip() for field, _, column in parted}


_ALPHA = click.option(
    "--alpha", callback=_number_or_rank, help="For rows that do not say it; 'rank' where it follows the rank."
)
_COLUMN = click.option("--column", "columns", multiple=True, callback=_columns, help="FIELD=COLUMN, repeatable.")
_OPTIMIZER = click.option("--optimizer", default="AdamW", show_default=True, help="A name, or package:Class.")


@click.command()
@click.argument("sweep", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the recipe, a .toml file.")
@click.option("--name", help="The recipe's name; by default the file's.")
@_OPTIMIZER
@click.option("--law", default="mua", show_default=True, help="As for bench-law.")
@click.option("--fit", type=click.Choice(["drift", "tokens"]), default="drift", show_default=True)
@click.option("--model", help="The model to fit, where the sweep holds several.")
@_ALPHA
@click.option("--init", type=click.Choice(["A", "B"]))
@click.option("--fan-in", type=float, help="The model's mean fan-in.")
@click.option("--full-fan-in", type=float, help="Its largest fan-in, for full finetuning.")
@click.option("--batch", type=float)
@click.option("--steps", type=int)
@click.option("--warmup", type=float, help="Share of the steps.")
@_COLUMN
def fit(sweep: Path, out: Path | None, name: str | None, law: str, **options: Any) -> None:
    """Make a recipe of SWEEP, a .csv, .tsv, .json or .jsonl file with columns rank, lr, loss and, if known, alpha."""
    from .sweeps import fit_sweep
    from .yardstick import law_of

    recipe = fit_sweep(sweep, name=name or sweep.stem, law=law_of(law), **options)
    own = recipe.at() if recipe.reference.method == "lora" else recipe.at(method="full")
    click.echo(f"lr        {own.lr:.3g} at {recipe.reference}")
    click.echo(f"90 % band {own.low:.3g} to {own.high:.3g}")
    if own.ceiling is not None:
        click.echo(f"ceiling   {own.ceiling:.3g} (the smallest rate seen to diverge)")
    click.echo(f"law       {recipe.law!r}")
    for note in own.notes:
        click.echo(f"note: {note}")
    if out is not None:
        click.echo(f"Next: rankaware lr {recipe.save(out)} --rank {max(recipe.ranks, default=16)}")


@click.command("bench-law")
@click.argument("sweep", type=click.Path(path_type=Path), required=False)
@click.option("--law", "laws", multiple=True, help="A name, 'mua?tokens=16', or package.module:Class; repeatable.")
@click.option("--best", type=click.Choice(["parabola", "bowl"]), default="parabola", show_default=True)
@_ALPHA
@click.option("--fan-in", type=float, help="The models' width, where rows do not say it.")
@_OPTIMIZER
@_COLUMN
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write .json, every move, or .csv.")
def bench(sweep: Path | None, laws: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Score laws on SWEEP: each rank's best rate moved to every other, against the best one there.

    Without SWEEP it is the package's own, without --law the usual ones. In a name's parameters a law is written in
    brackets: --law "power?exponent=-0.5,law=constant".
    """
    from .yardstick import COMPARED, DEMO_SWEEP, bench_law, score_table

    if out is not None and out.suffix not in (".json", ".csv"):
        raise click.UsageError("--out ends in .json or .csv.")
    sys.path.insert(0, "")  # a law of one's own lies in the folder one stands in, as under python -m
    try:
        scores = bench_law(DEMO_SWEEP if sweep is None else sweep, laws or COMPARED, **options)
    finally:
        sys.path.remove("")
    click.echo(score_table(scores))
    if out is not None:
        out.write_text(_as_json(scores) if out.suffix == ".json" else _as_csv(scores), encoding="utf-8")


def _as_json(scores: Sequence[Score]) -> str:
    """Every law's row with its moves; a loss that diverged is the text "inf"."""
    documents = [{**_plain(score.row()), "each": [_plain(_move(move)) for move in score.moves]} for score in scores]
    return json.dumps(documents, indent=1) + "\n"


def _move(move: Move) -> dict[str, Any]:
    ends = {"model": move.model, "from_rank": move.source.rank, "to_rank": move.target.rank}
    alphas = {"from_alpha": move.source.alpha, "to_alpha": move.target.alpha}
    return {**ends, **alphas, "octaves": move.octaves, "loss_lost": move.lost}


def _as_csv(scores: Sequence[Score]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(scores[0].row()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(score.row() for score in scores)
    return text.getvalue()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: "inf" if value == float("inf") else value for key, value in row.items()}
