"""`rankaware bench-law`: laws scored on a sweep."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import sweeps
from ..sweeps import COMPARED, DEMO_SWEEP, LawScore, Move, score_table
from ._options import ALPHA, COLUMN, OPTIMIZER

__all__ = ["bench_law"]


@click.command("bench-law")
@click.argument("sweep", type=click.Path(path_type=Path), required=False)
@click.option("--law", "laws", multiple=True, help="A name, 'mua?tokens=16', or package.module:Class; repeatable.")
@click.option("--best", type=click.Choice(["parabola", "bowl"]), default="parabola", show_default=True)
@ALPHA
@click.option("--fan-in", type=float, help="The models' width, where rows do not say it.")
@OPTIMIZER
@COLUMN
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write .json, every move, or .csv.")
def bench_law(sweep: Path | None, laws: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Score laws on SWEEP: each rank's best rate moved to every other, against the best one there.

    Without SWEEP it is the package's own, without --law the usual ones. In a name's parameters a law is written in
    brackets: --law "power?exponent=-0.5,law=constant".
    """
    if out is not None and out.suffix not in (".json", ".csv"):
        raise click.UsageError("--out ends in .json or .csv.")
    sys.path.insert(0, "")  # a law of one's own lies in the folder one stands in, as under python -m
    try:
        scores = sweeps.bench_law(DEMO_SWEEP if sweep is None else sweep, laws or COMPARED, **options)
    finally:
        sys.path.remove("")
    click.echo(score_table(scores))
    if out is not None:
        out.write_text(_as_json(scores) if out.suffix == ".json" else _as_csv(scores), encoding="utf-8")


def _as_json(scores: Sequence[LawScore]) -> str:
    """Every law's row with its moves; a loss that diverged is the text "inf"."""
    documents = [{**_plain(score.row()), "each": [_plain(_move(move)) for move in score.moves]} for score in scores]
    return json.dumps(documents, indent=1) + "\n"


def _move(move: Move) -> dict[str, Any]:
    ends = {"model": move.model, "from_rank": move.source.rank, "to_rank": move.target.rank}
    alphas = {"from_alpha": move.source.alpha, "to_alpha": move.target.alpha}
    return {**ends, **alphas, "octaves": move.octaves, "loss_lost": move.lost}


def _as_csv(scores: Sequence[LawScore]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(scores[0].row()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(score.row() for score in scores)
    return text.getvalue()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: "inf" if value == float("inf") else value for key, value in row.items()}
