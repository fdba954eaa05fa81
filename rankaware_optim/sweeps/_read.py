"""Reading a sweep: from a CSV file, a dataframe or rows of any tool to checked runs.

Tools name their columns in their own way, so the reading has two steps. `_columns` decides once
which column holds which field of `SweepRun`. Then each row is converted by itself, and an error
names its line.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from .._checks import RANGES, limits, plain, shown
from .._files import read_bytes
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import Observation

Row = Mapping[str, object]
Source = str | os.PathLike[str] | Iterable[Row]

_MOST = 100_000_000  # largest file, bytes
_MOST_LOSS = RANGES["loss"][1]  # a run with a larger loss counts as diverged
_EMPTY = ("", "nan", "none", "null", "<na>")  # how tools write a cell without a value
_OF_LORA = ("alpha", "rslora", "init")  # meaningless in full finetuning

# Other names by which a field is recognised. The prefixes of trackers, as in "config.lr" or
# "params.lr", are removed first, and "eval/loss" counts as eval_loss.
ALSO_CALLED: Mapping[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "rank": ("r", "lora_r", "lora_rank"),
    "alpha": ("lora_alpha",),
    "rslora": ("use_rslora",),
    "loss": ("eval_loss", "val_loss", "validation_loss"),
    "seed": ("random_seed",),
    "steps": ("max_steps", "num_steps"),
    "model": ("model_name", "model_name_or_path", "base_model"),
}
# wandb's API has config. and summary., MLflow has params. and metrics.
_PREFIX = re.compile(r"^(config|params|metrics|summary)[./]")
_STATES = ("state", "status")  # columns in which trackers say how a run ended
_ENDED_WELL = ("finished", "completed", "complete", "succeeded", "success")

# What a cell may hold, in the words of an error.
_KINDS = {
    "lr": "a positive number",
    "loss": "a number, 'diverged', or empty for a run without a result",
    "rank": "a whole number from 1, or 'full'",
    "alpha": "a positive number",
    "rslora": "true or false",
    "init": "A or B",
    "fan_in": "a positive number",
    "seed": "a whole number",
    "batch": "a positive number",
    "steps": "a whole number from 1",
    "start": "a finite number",
}


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep. A value that its row does not have is None.

    Args:
        lr: the learning rate, per step.
        loss: the value to minimise, infinite if the run diverged.
        rank: the LoRA rank, None for full finetuning.
        alpha: LoRA's alpha.
        rslora: whether alpha is divided by √rank instead of rank.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        fan_in: the mean fan-in of the adapted layers, or for full finetuning the largest fan-in.
        seed: the random seed.
        model: the model's name.
        batch: examples or tokens per step.
        steps: number of steps.
        start: the loss before training.
    """

    lr: Annotated[float, limits("lr")]
    loss: Annotated[float, Meta(ge=RANGES["loss"][0])]
    rank: Annotated[int, limits("rank")] | None
    alpha: Annotated[float, limits("alpha")] | None = None
    rslora: bool = False
    init: Literal["A", "B"] = "A"
    fan_in: Annotated[float, limits("fan_in")] | None = None
    seed: Annotated[int, limits("seed")] = 0
    model: str | None = None
    batch: Annotated[float, limits("batch")] | None = None
    steps: Annotated[int, limits("steps")] | None = None
    start: Annotated[float, limits("loss")] | None = None

    @property
    def reference(self) -> Reference:
        """The run's configuration."""
        if self.rank is None:
            return Reference(method="full", fan_in=self.fan_in, batch=self.batch)
        return Reference(
            self.rank,
            self.alpha,
            self.rslora,
            self.init,
            self.fan_in,
            batch=self.batch,
        )

    def observed_at(self, x: float) -> Observation:
        """Return the run as an observation at log2 learning rate x.

        A sweep without `start` does not say where the loss began. Then the final loss stands in for
        it, so that the fit sees no improvement and takes its unit from the spread of the losses.
        """
        start = self.start
        if start is None:
            start = self.loss if math.isfinite(self.loss) else 0.0
        return Observation(
            self.rank,
            self.seed,
            x,
            value=self.loss,
            start=start,
            tail=self.loss,
            returned=True,
        )


_HINTS = get_type_hints(SweepRun, include_extras=True)
_REQUIRED = ("rank", "lr", "loss")


@dataclass(frozen=True)
class Sweep:
    """A sweep that was read.

    Args:
        runs: the runs with a result, each once.
        columns: the column that each field was read from.
        notes: sentences on runs that were left out, and on runs that may not have finished.
    """

    runs: tuple[SweepRun, ...]
    columns: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def lora(self) -> list[SweepRun]:
        """The runs of LoRA."""
        return [run for run in self.runs if run.rank is not None]

    @property
    def full(self) -> list[SweepRun]:
        """The runs of full finetuning."""
        return [run for run in self.runs if run.rank is None]

    @property
    def ranks(self) -> list[int]:
        """The LoRA ranks, from the lowest on."""
        return sorted({run.rank for run in self.runs if run.rank is not None})

    @property
    def renamed(self) -> dict[str, str]:
        """The columns that have another name than their field."""
        pairs = self.columns.items()
        return {field: column for field, column in pairs if field != column}


@dataclass(frozen=True)
class _Line:
    """A row of a sweep.

    Args:
        place: the words by which an error names it, such as "Line 3 of runs.csv".
        cells: its cells as strings by column, "" for a cell without a value.
    """

    place: str
    cells: Mapping[str, str]


def read_sweep(
    source: Source,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
) -> Sweep:
    """Read and check a sweep. A row that repeats another one in every cell counts once.

    Args:
        source: a CSV file, a dataframe, or rows such as df.to_dict('records').
        columns: the column of each field, such as {"loss": "eval/loss"}. Other fields are found by
            their own name or a usual one (`ALSO_CALLED`).
        where: only rows with these values are read, such as {"State": "finished"}.

    Raises:
        CalibrationError: the file cannot be read, a column does not exist, `where` leaves no row,
            or a cell is impossible. The message names line and column.
    """
    lines = [_Line(place, _texts(row)) for place, row in _rows(source)]
    if not lines:
        raise CalibrationError(
            "The sweep is empty.",
            "Pass one row per run, with its rank, lr and loss, and alpha for LoRA.",
        )
    header = list(dict.fromkeys(name for line in lines for name in line.cells))
    column_of = _columns(header, columns or {})
    chosen = _chosen(lines, header, where or {})
    # A run that crashed has no loss. Its learning rate may have been good or bad, so it must not
    # count as diverged either.
    with_loss = [line for line in chosen if line.cells.get(column_of["loss"])]
    if not with_loss:
        raise CalibrationError(
            f"None of the sweep's {len(chosen)} runs has a result: the column"
            f" {column_of['loss']!r} is empty.",
            "Write each run's final loss there, or 'diverged' for a run that diverged. If another"
            " column holds the loss, pass columns={'loss': NAME} (in a shell, --columns"
            " loss=NAME).",
        )
    runs = [_run_of(line, column_of) for line in with_loss]
    notes = [*_left_out(len(chosen), len(runs))]
    for name in header:
        if _usual_form(name) in _STATES and name not in (where or {}):
            notes += _unfinished(name, [line.cells.get(name, "") for line in with_loss])
    # An export may list a run twice. Two runs that agree in every cell cannot be told apart.
    return Sweep(tuple(dict.fromkeys(runs)), column_of, tuple(notes))


# --- rows -----------------------------------------------------------------------------------------


def _rows(source: Source) -> Iterator[tuple[str, Row]]:
    """Yield each row with the words by which an error names it."""
    if isinstance(source, (str, os.PathLike)):
        yield from _rows_of_file(Path(source))
        return
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a dataframe
        source = source.to_dict("records")
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise CalibrationError(
            f"The sweep is {shown(source)}.",
            "Pass the path of a CSV file, a dataframe, or a list with one dict per run, such as"
            " [{'rank': 8, 'alpha': 16, 'lr': 1e-4, 'loss': 1.2}, ...].",
        )
    for number, row in enumerate(source, 1):
        if not isinstance(row, Mapping):
            raise CalibrationError(
                f"Row {number} of the sweep is {shown(row)}.",
                "Pass one dict per run, such as {'rank': 8, 'alpha': 16, 'lr': 1e-4, 'loss': 1.2}.",
            )
        yield f"Row {number} of the sweep", row


def _rows_of_file(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        # Spreadsheets put a byte-order mark first, hence utf-8-sig. strict raises an error for
        # quotes inside a cell, which Python's reader would otherwise take as part of the value.
        text = read_bytes(path, _MOST).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            line = f"Line {reader.line_num} of {path.name}"
            if len(cells) != len(header):
                raise CalibrationError(
                    f"{line} has {len(cells)} cells, but the first line names"
                    f" {len(header)} columns.",
                    "Correct the line. Put a cell that contains a comma in double quotes.",
                )
            yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise CalibrationError(
            f"Line {reader.line_num} of {path.name} is not CSV: {error}.",
            "Correct the line. Put a cell that contains a comma in double quotes.",
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"The sweep {path} cannot be read: it is not text in UTF-8.",
            "Export it as CSV.",
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"The sweep {path} cannot be read: {error}.", "Check the path."
        ) from error


def _texts(row: Row) -> dict[str, str]:
    """Return the cells of a row as strings, "" for a cell without a value."""
    return {str(name): _text(cell) for name, cell in row.items()}


def _text(cell: object) -> str:
    text = "" if cell is None else str(plain(cell)).strip()
    return "" if text.lower() in _EMPTY else text


def _chosen(
    lines: Sequence[_Line], header: Sequence[str], where: Mapping[str, object]
) -> list[_Line]:
    """Return the lines that have the values of `where`."""
    wanted = _texts(where)
    for name in wanted:
        if name not in header:
            raise _no_such_column(f"where names the column {name!r}", name, header)

    def is_wanted(line: _Line) -> bool:
        cells = line.cells
        return all(_is_same(cells.get(name, ""), wanted[name]) for name in wanted)

    chosen = [line for line in lines if is_wanted(line)]
    if not chosen:
        raise _nothing_chosen(lines, wanted)
    return chosen


def _is_same(cell: str, value: str) -> bool:
    """Return whether a cell has a value: as a number, or as a string in upper or lower case."""
    try:
        return float(cell) == float(value)
    except ValueError:
        return cell.casefold() == value.casefold()


def _nothing_chosen(
    lines: Sequence[_Line], wanted: Mapping[str, str]
) -> CalibrationError:
    asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
    found = []
    for name in wanted:
        counts = Counter(line.cells.get(name) for line in lines).most_common(5)
        values = ", ".join(f"{value or 'empty'} ({count})" for value, count in counts)
        found.append(f"{name} has {values}")
    return CalibrationError(
        f"where {asked} leaves none of the sweep's {len(lines)} rows: {'; '.join(found)}.",
        "Use a value that the column has, or remove the condition.",
    )


# --- columns --------------------------------------------------------------------------------------


def _columns(header: Sequence[str], asked: Mapping[str, str]) -> dict[str, str]:
    """Return the column of each field that the sweep has.

    A column that was asked for comes first, then one with the field's own name, then one with a
    usual name.
    """
    _check_columns(asked, header)
    found = dict(asked)
    for field in _HINTS:
        if field in found:
            continue
        column = _column_of(field, header)
        if column is not None:
            found[field] = column
        elif field in _REQUIRED:
            raise CalibrationError(
                f"The sweep has no column {field}. Its columns are {_listed(header)}.",
                f"Pass columns={{{field!r}: NAME}} (in a shell, --columns {field}=NAME) with the"
                f" name of the column that holds the {field}, or add one.",
            )
    return found


def _check_columns(asked: object, header: Sequence[str]) -> None:
    """Raise an error if columns= names a field or a column that does not exist."""
    if not isinstance(asked, Mapping):
        raise CalibrationError(
            f"columns is {shown(asked)}.",
            "Pass a dict from fields to columns, such as columns={'loss': 'eval/loss'}.",
        )
    for field, column in asked.items():
        if field not in _HINTS:
            raise CalibrationError(
                f"columns names the field {shown(field)}, which a sweep does not have.",
                f"The fields are {', '.join(_HINTS)}.",
            )
        if column not in header:
            raise _no_such_column(f"columns has {field}={column}", column, header)


def _column_of(field: str, header: Sequence[str]) -> str | None:
    """Return the column with a field's name or a usual name for it."""
    if field in header:
        return field
    usual = (field, *ALSO_CALLED.get(field, ()))
    # With two candidates a guess would fit one of them in silence, so the user decides.
    found = [column for column in header if _usual_form(column) in usual]
    if len(found) > 1:
        raise CalibrationError(
            f"Several columns of the sweep may hold the {field}: {_listed(found)}.",
            f"Pass columns={{{field!r}: {found[0]!r}}} (in a shell, --columns"
            f" {field}={found[0]}), or another one of them.",
        )
    return found[0] if found else None


def _usual_form(column: str) -> str:
    """Return a column's name without the prefix of a tracker, in lower case, with underscores.

    >>> _usual_form("config.Learning-Rate"), _usual_form("eval/loss")
    ('learning_rate', 'eval_loss')
    """
    bare = _PREFIX.sub("", str(column).strip())
    return re.sub(r"[\s/.-]+", "_", bare).lower()


def _no_such_column(
    where: str, column: object, header: Sequence[str]
) -> CalibrationError:
    close = get_close_matches(str(column), map(str, header), 1)
    cure = f"Did you mean {close[0]!r}?" if close else "Use one of its columns."
    return CalibrationError(
        f"{where}, but the sweep has no such column. Its columns are {_listed(header)}.",
        cure,
    )


def _listed(names: Sequence[str]) -> str:
    most = 20
    words = ", ".join(map(str, names[:most]))
    return f"{words} and {len(names) - most} more" if len(names) > most else words


# --- one run --------------------------------------------------------------------------------------


def _run_of(line: _Line, columns: Mapping[str, str]) -> SweepRun:
    """Return the run of a line.

    Raises:
        CalibrationError: a cell that is needed is empty, or a cell is impossible.
    """
    texts = {field: line.cells.get(column, "") for field, column in columns.items()}
    # A tracker fills in a default alpha also where no LoRA was trained.
    is_full = texts["rank"].lower() == "full"
    ignored = ("rank", *_OF_LORA) if is_full else ()
    needed = ("lr",) if is_full else ("rank", "lr", "alpha")
    values: dict[str, Any] = {"rank": None}
    for field, text in texts.items():
        if text and field not in ignored:
            values[field] = _value(line, field, text, columns[field])
    for field in needed:
        if values.get(field) is None:
            raise CalibrationError(
                f"{line.place}: the {field} is missing.",
                "Every run needs a rank, an alpha, an lr and a loss, except that full finetuning"
                " (rank 'full') needs no alpha.",
            )
    return SweepRun(**values)


def _value(line: _Line, field: str, text: str, column: str) -> object:
    """Return a cell's value."""
    if field == "loss" and text.lower() == "diverged":
        return math.inf
    try:
        # Not strict: it reads "4.0" as the rank 4 and "True" as true.
        value = msgspec.convert(text, _HINTS[field], strict=False)
    except msgspec.ValidationError as error:
        name = field if column == field else f"{field} (column {column!r})"
        raise CalibrationError(
            f"{line.place}: the {name} is {text!r}.", f"It must be {_KINDS[field]}."
        ) from error
    return math.inf if field == "loss" and value > _MOST_LOSS else value


# --- notes ----------------------------------------------------------------------------------------


def _left_out(rows: int, runs: int) -> Iterator[str]:
    """Yield how many runs of a sweep had no result."""
    missing = rows - runs
    if missing:
        were = "1 run was" if missing == 1 else f"{missing} runs were"
        yield (
            f"{were} left out of {rows}, because they have no loss. If a run diverged, write"
            " 'diverged' as its loss: runs that diverged set the ceiling"
        )


def _unfinished(column: str, states: Sequence[str]) -> Iterator[str]:
    """Yield a note if runs have a loss but did not finish, by a tracker's own column."""
    counts = Counter(filter(None, states))
    well = [state for state in counts if state.casefold() in _ENDED_WELL]
    others = [state for state in counts if state not in well]
    if not others:
        return
    number = sum(counts[state] for state in others)
    finished = well[0] if well else "finished"
    yield (
        f"runs that did not finish count if they have a loss: {number} of {len(states)} runs"
        f" ({column}: {', '.join(others)}). To leave them out, pass where={{{column!r}:"
        f" {finished!r}}} (in a shell, --where {column}={finished})"
    )
