"""`rankaware bench-law`: score laws on a sweep."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import sweeps
from .._files import replace_bytes
from ..sweeps import COMPARED, DEMO_SWEEP, Move, score_table
from ._echo import echo, echo_json
from ._options import ALPHA, COLUMN, OPTIMIZER, json_option, may_name_module, out_option

_SHAPE = (
    "a list with one object per law, as --out writes to a .json file. Fields: law, median_octaves and worst_octaves "
    "(absolute error of the moved rates), median_loss and worst_loss (loss above the lowest, as a share of it; 'inf' "
    "if runs diverged, null if every move is off the grid), moves and off_grid (counts), each (the moves). A move has "
    "model, from_rank, to_rank, from_alpha, to_alpha, octaves (positive if the moved rate is too high), loss_lost."
)


@click.command("bench-law")
@click.argument("sweep", type=click.Path(path_type=Path), default=DEMO_SWEEP)
@click.option(
    "--law", "laws", callback=may_name_module, multiple=True, help="Law to score, as described above. Repeatable."
)
@click.option(
    "--best",
    type=click.Choice(["parabola", "bowl"]),
    default="parabola",
    show_default=True,
    help="How to find a rank's best rate. parabola: vertex through the best three rates. bowl: fit to all runs.",
)
@ALPHA
@click.option("--fan-in", type=float, help="Fan-in of the adapted layers, for rows without one.")
@OPTIMIZER
@COLUMN
@out_option(help="Write the scores to a .csv file, or to a .json file with every move.")
@json_option(_SHAPE)
def bench_law(sweep: Path, laws: tuple[str, ...], out: Path | None, as_json: bool, **options: Any) -> None:
    """Score laws by how well they move the best rates of SWEEP.

    Each law moves each rank's best rate to every other rank. The moved rate is compared with the best rate there. SWEEP
    is a file as for rankaware fit. Without SWEEP, the package's own sweep is used. Without --law, the usual laws are
    scored.

    A law is a registered name such as mua, or package.module:Class. Parameters follow a question mark: --law
    "power?exponent=-0.5,law=constant". Put an inner law with parameters in brackets.
    """
    if out is not None and out.suffix not in (".json", ".csv"):
        raise click.UsageError("--out must end in .json or .csv.")
    scores = sweeps.bench_law(sweep, laws or COMPARED, **options)
    rows = [score.row() for score in scores]
    documents = [
        {**_plain(row), "each": [_plain(_columns_of(move)) for move in score.moves]}
        for row, score in zip(rows, scores, strict=True)
    ]
    echo_json(documents) if as_json else echo(score_table(scores))
    if out is not None:
        text = _csv(rows) if out.suffix == ".csv" else json.dumps(documents, indent=1) + "\n"
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(out, text.encode())
        except OSError as error:
            raise click.ClickException(f"{out} cannot be written: {error}.") from error


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def _cell(value: Any) -> Any:
    """Return the value, with a quote before a text that a spreadsheet would run as a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _columns_of(move: Move) -> dict[str, Any]:
    ends = {"model": move.model, "from_rank": move.source.rank, "to_rank": move.target.rank}
    alphas = {"from_alpha": move.source.alpha, "to_alpha": move.target.alpha}
    return {**ends, **alphas, "octaves": move.octaves, "loss_lost": move.lost}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with the text "inf" for a diverged loss, since JSON has no infinity."""
    return {key: "inf" if value == math.inf else value for key, value in row.items()}
