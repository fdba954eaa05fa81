"""A sweep's runs: read from a CSV file or the rows of any tool, and set against a law."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from .._checks import is_within, limits, plain, range_of, shown
from .._files import read_bytes
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import Observation

DEMO_SWEEP = Path(__file__).with_name("demo_sweep.csv")  # EfficientNet-lite0 on digits
# The names that a field's column has in common tools. Case, blanks, "-", "/" and Optuna's and W&B's
# prefixes are ignored.
_NAMES = {
    "rank": "r lora_r lora_rank",
    "lr": "learning_rate",
    "loss": "eval_loss val_loss validation_loss test_loss test_nll value",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "fan_in": "hidden_size",
    "model": "model_name model_name_or_path base_model",
    "batch": "batch_size",
    "steps": "max_steps",
    "start": "start_loss untrained_loss",
}
ALIASES = {name: field for field, names in _NAMES.items() for name in names.split()}
_PREFIX = r"^(params_|config[._])"
_ABSENT = ("", "nan", "none", "null")
_DIVERGED = ("diverged", "nan", "inf", "infinity", "+inf")
_OF_LORA = ("rank", "alpha", "rslora")
_MOST = 100_000_000  # largest file, bytes

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
_Loss = Annotated[float, limits("loss")]


@dataclass(frozen=True)
class SweepRun:
    """One row of a sweep. Missing values are None.

    Args:
        lr: the learning rate, per step.
        loss: the value to minimise, infinite if the run diverged.
        rank: the LoRA rank, None for full finetuning.
        alpha: LoRA's alpha.
        rslora: whether alpha is divided by √rank instead of rank.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        fan_in: the mean fan-in of the adapted layers.
        method: "lora" or "full".
        seed: the random seed.
        model: the model's name.
        batch: examples or tokens per step.
        steps: number of steps.
        start: the loss before training.
    """

    lr: Annotated[float, limits("lr")]
    loss: _Loss
    rank: Annotated[int, limits("rank")] | None = None
    alpha: Annotated[float, limits("alpha")] | None = None
    rslora: bool = False
    init: Literal["A", "B"] | None = None
    fan_in: Annotated[float, limits("fan_in")] | None = None
    method: Literal["lora", "full"] | None = None
    seed: Annotated[int, limits("seed")] = 0
    model: str | None = None
    batch: Annotated[float, limits("batch")] | None = None
    steps: Annotated[int, limits("steps")] | None = None
    start: _Loss | None = None


Runs = Sequence[SweepRun]


class Sweep(NamedTuple):
    """The runs of a sweep, and notes on rows that were left out."""

    runs: tuple[SweepRun, ...]
    notes: tuple[str, ...] = ()


def read_sweep(source: Source) -> Sweep:
    """Read and check a sweep.

    The columns lr and loss are required, and rank if there is no method ("lora", "full"). The
    other fields of `SweepRun` are optional. `ALIASES` lists other names for them. A row is of
    full finetuning if its rank or its method is "full". A loss of nan, inf or "diverged" means that
    the run diverged. A row without a loss is left out, with a note. A row that repeats another one
    in every cell counts once.

    Args:
        source: rows, such as df.to_dict('records') of a dataframe, or a CSV file.

    Raises:
        CalibrationError: the file cannot be read, a column is missing or ambiguous, or a cell is
            impossible. The message names row and field.
    """
    is_file = isinstance(source, (str, os.PathLike))
    rows = _csv_rows(Path(source)) if is_file else _listed(source)  # type: ignore[arg-type]
    if not rows:
        raise CalibrationError(
            "The sweep has no rows.", "Give at least two rates of one rank."
        )
    present: dict[str, None] = {}
    for _, row in rows:
        present |= dict.fromkeys(row)
    names = _columns(list(present))
    runs = []
    for place, row in rows:
        cells = {field: row.get(column) for field, column in names.items()}
        runs.append(_run_of(place, cells))
    notes = []
    if missing := runs.count(None):
        notes.append(
            f"{missing} of {len(rows)} rows have no loss and were left out; write 'diverged' if a"
            " run diverged"
        )
    return Sweep(tuple(dict.fromkeys(run for run in runs if run)), tuple(notes))


_Row = tuple[str, Mapping[str, Any]]  # with its place in words


def _listed(source: object) -> list[_Row]:
    cure = "Give rows such as {'rank': 16, 'lr': 1e-4, 'loss': 0.5}, or df.to_dict('records')."
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise CalibrationError(
            f"A sweep is a list of rows, not a {type(source).__name__}.", cure
        )
    rows = []
    for number, row in enumerate(source, 1):
        if not isinstance(row, Mapping):
            raise CalibrationError(
                f"row {number} is a {type(row).__name__}, not a dict.", cure
            )
        rows.append((f"row {number}", row))
    return rows


def _csv_rows(path: Path) -> list[_Row]:
    try:
        text = read_bytes(path, _MOST).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows: list[_Row] = [
            (f"{path.name}, line {reader.line_num}", row) for row in reader
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise CalibrationError(
            f"The sweep {path} cannot be read: {error}.", "Check the path and the file."
        ) from error
    header = list(reader.fieldnames or ())
    if len(set(header)) < len(header):
        twice = max(header, key=header.count)
        raise CalibrationError(
            f"{path.name} has two columns {twice!r}.", "Name each column once."
        )
    for place, row in rows:
        if None in row or None in row.values():
            raise CalibrationError(
                f"{place} does not have as many cells as the header.",
                "Quote cells that contain a comma.",
            )
    return rows


def _columns(present: Sequence[str]) -> dict[str, str]:
    """Return {field: column}: a field's own name, else one of its aliases."""
    names: dict[str, str] = {}
    for each in fields(SweepRun):
        names |= _column_of(each.name, present)
    for field in ("lr", "loss") if "method" in names else ("lr", "loss", "rank"):
        if field not in names:
            raise CalibrationError(
                f"The sweep has no column for {field}. It has {', '.join(map(str, present))}.",
                f"Call its column {field}.",
            )
    return names


def _column_of(field: str, present: Sequence[str]) -> dict[str, str]:
    """Return {field: column}, empty if there is no such column."""
    own = [column for column in present if _plain_name(column) == field]
    others = [c for c in present if ALIASES.get(_plain_name(c)) == field]
    columns = own or others
    if len(columns) > 1:
        raise CalibrationError(
            f"The columns {' and '.join(map(str, columns))} may all be {field}.",
            f"Call the one to use {field}.",
        )
    return dict.fromkeys([field], columns[0]) if columns else {}


def _plain_name(column: object) -> str:
    return re.sub("[-/ ]", "_", re.sub(_PREFIX, "", str(column).strip().lower()))


def _run_of(place: str, row: Mapping[str, Any]) -> SweepRun | None:
    """Return a row as a run, or None if it has no loss."""
    cells = _cells(row)
    if "loss" not in cells:
        return None
    if "full" in (cells.get("rank", "").lower(), cells.get("method")):
        cells = {f: cell for f, cell in cells.items() if f not in _OF_LORA}
    elif "rank" not in cells:
        raise CalibrationError(
            f"{place} has no rank.", "Give one, or 'full' for full finetuning."
        )
    has_diverged = cells["loss"] == _DIVERGED[0]
    if has_diverged:
        cells["loss"] = "0"
    try:
        run: SweepRun = msgspec.convert(cells, SweepRun, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        field = path.rstrip("`")
        cell = f", {field} {shown(cells[field])}" if field else ""
        raise CalibrationError(f"{place}{cell}: {message}.", "Correct it.") from error
    return replace(run, loss=math.inf) if has_diverged else run


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the cells that have a value, as texts."""
    cells = {}
    for field, value in row.items():
        text = "" if value is None else str(plain(value)).strip()
        if field == "loss" and text.lower() in _DIVERGED:
            text = _DIVERGED[0]
        if text.lower() not in _ABSENT:
            cells[field] = text
    if cells.get("steps") in ("-1", "-1.0"):  # Trainer's max_steps, by default
        del cells["steps"]
    return cells


# --- runs of one model ----------------------------------------------------------------------------


def with_alpha(runs: Runs, alpha: float | str | None) -> list[SweepRun]:
    """Return the runs with `alpha` filled in for LoRA rows without one. "rank" means the row's
    rank.

    Raises:
        CalibrationError: `alpha` is impossible, or a row still has none.
    """
    if alpha not in (None, "rank") and not is_within("alpha", alpha):
        raise CalibrationError(
            f"alpha is {shown(alpha)}.",
            f"Give {range_of('alpha')}, or 'rank' if it follows it.",
        )
    filled = []
    for run in runs:
        if run.rank is not None and run.alpha is None:
            if alpha is None:
                raise CalibrationError(
                    "The sweep has LoRA rows without an alpha, which a rate belongs to.",
                    "Give alpha= (--alpha): a number, or 'rank' if alpha followed the rank.",
                )
            run = replace(run, alpha=float(run.rank if alpha == "rank" else alpha))
        filled.append(run)
    return filled


def only_value(runs: Runs, name: str, given: Any = None, missing: Any = None) -> Any:
    """Return the only value of a column and an argument, None if there is none.

    Args:
        runs: the runs.
        name: the field.
        given: the argument.
        missing: the value of rows without one.
    """
    values = {getattr(run, name) or missing for run in runs} | {given}
    several = sorted(values - {None})
    if len(several) > 1:
        raise CalibrationError(
            f"The sweep mixes {len(several)} values of {name}: {', '.join(map(str, several))}.",
            "A recipe is for one of them: keep its rows.",
        )
    return several[0] if several else None


def place_of(run: SweepRun) -> Reference:
    """Return the configuration of a run."""
    if run.rank is None:
        return Reference(method="full", fan_in=run.fan_in, batch=run.batch)
    init = run.init or "A"
    return Reference(run.rank, run.alpha, run.rslora, init, run.fan_in, batch=run.batch)


def observation_of(run: SweepRun, x: float) -> Observation:
    """Return a run as an observation at log2 rate x. Without a start loss its score is used as the
    start.
    """
    start = run.start
    if start is None:
        start = run.loss if math.isfinite(run.loss) else 0.0
    return Observation(run.rank, run.seed, x, run.loss, start, run.loss, returned=True)


def mean_losses(points: Iterable[tuple[float, float]]) -> dict[float, float]:
    """Return {log2 rate: mean loss} from (log2 rate, loss), by ascending rate; infinite if a run
    diverged.
    """
    by_rate: dict[float, list[float]] = {}
    for x, loss in points:
        by_rate.setdefault(x, []).append(loss)
    return {x: math.fsum(losses) / len(losses) for x, losses in sorted(by_rate.items())}


class GridEnd(NamedTuple):
    """A best rate at an end of its grid: log2 of the rate, and whether it is the "lowest" or the
    "highest".
    """

    x: float
    end: str


def ends_of(observations: Sequence[Observation]) -> dict[int | None, GridEnd]:
    """Return, by rank, the best rates at an end of the grid. A tie with a rate inside the grid does
    not count.
    """
    points: dict[int | None, list[tuple[float, float]]] = {}
    for o in observations:
        points.setdefault(o.rank, []).append((round(o.x, 6), o.value))
    ends: dict[int | None, GridEnd] = {}
    for rank, of_rank in points.items():
        losses = mean_losses(of_rank)
        rates, least = list(losses), min(losses.values())
        best = [x for x, loss in losses.items() if loss == least]
        if len(rates) == 1 or len(best) > 1 or not math.isfinite(least):
            continue
        if best[0] == rates[0]:
            ends[rank] = GridEnd(best[0], "lowest")
        elif best[0] == rates[-1]:
            ends[rank] = GridEnd(best[0], "highest")
    return ends
