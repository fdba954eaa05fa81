"""`rankaware bench-law`: laws scored on a sweep."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import sweeps
from ..sweeps import COMPARED, DEMO_SWEEP, LawScore, score_table
from ._options import ALPHA, COLUMN, OPTIMIZER

__all__ = ["bench_law"]


@click.command("bench-law")
@click.argument("sweep", type=click.Path(path_type=Path), default=DEMO_SWEEP)
@click.option("--law", "laws", multiple=True, help="A name, 'mua?tokens=16', or package.module:Class; repeatable.")
@click.option("--best", type=click.Choice(["parabola", "bowl"]), default="parabola", show_default=True)
@ALPHA
@click.option("--fan-in", type=float, help="The models' width, where rows do not say it.")
@OPTIMIZER
@COLUMN
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write .json, every move, or .csv.")
def bench_law(sweep: Path, laws: tuple[str, ...], out: Path | None, **options: Any) -> None:
    """Score laws on SWEEP: each rank's best rate moved to every other, against the best one there.

    Without SWEEP it is the package's own, without --law the usual ones. In a name's parameters a law is written in
    brackets: --law "power?exponent=-0.5,law=constant".
    """
    if out is not None and out.suffix not in (".json", ".csv"):
        raise click.UsageError("--out ends in .json or .csv.")
    scores = sweeps.bench_law(sweep, laws or COMPARED, **options)
    click.echo(score_table(scores))
    if out is not None:
        out.write_text(_as_json(scores) if out.suffix == ".json" else _as_csv(scores), encoding="utf-8")


def _as_json(scores: Sequence[LawScore]) -> str:
    """Every law's row with its moves; a loss that diverged is the text "inf"."""
    documents = []
    for score in scores:
        moves = [
            {
                "model": move.model,
                "from_rank": move.source.rank,
                "to_rank": move.target.rank,
                "from_alpha": move.source.alpha,
                "to_alpha": move.target.alpha,
                "octaves": move.octaves,
                "loss_lost": move.lost,
            }
            for move in score.moves
        ]
        documents.append({**_plain(score.row()), "each": [_plain(move) for move in moves]})
    return json.dumps(documents, indent=1) + "\n"


def _as_csv(scores: Sequence[LawScore]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(scores[0].row()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(score.row() for score in scores)
    return text.getvalue()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: "inf" if value == math.inf else value for key, value in row.items()}
