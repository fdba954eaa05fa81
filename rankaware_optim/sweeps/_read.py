"""This module reads a sweep from a CSV file, a dataframe or a list of rows, and checks every run.

Different tools use different column names, so a sweep is read in two steps. First,
`_columns` finds the column for each field of `SweepRun`. Then each row is converted to
a `SweepRun`. If a row of the sweep is invalid, the error message names the line of this
row.
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
_EMPTY = ("", "nan", "none", "null", "<na>")  # tools write these for a missing value
_OF_LORA = ("alpha", "rslora", "init")  # fields without a meaning in full finetuning

# Alternative column names for each field. Before the comparison, prefixes of trackers are removed,
# such as "config." in "config.lr", and "eval/loss" becomes "eval_loss".
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
_STATES = ("state", "status")  # trackers record in these columns how a run ended
_ENDED_WELL = ("finished", "completed", "complete", "succeeded", "success")

# The allowed values of each field, as error messages describe them.
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
    """One run of a sweep. If a value is missing in the sweep, its field is None.

    Args:
        lr: the learning rate, per step.
        loss: the value to minimise, or infinity if the run diverged.
        rank: the LoRA rank, or None for full finetuning.
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
        """The configuration of the run as a `Reference`."""
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
        """Convert the run to an observation that the fit can use.

        If the loss before training is unknown, the final loss is used instead. If it is unknown how
        much training improved the loss, the fit divides the losses by their spread.

        x: log2 of the learning rate that the observation gets.
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
    """The runs of a sweep, and the columns from which they were read.

    Args:
        runs: the runs that have a loss, without repetitions.
        columns: the column from which each field was read.
        notes: sentences about runs that were left out or may not have finished.
    """

    runs: tuple[SweepRun, ...]
    columns: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def lora(self) -> list[SweepRun]:
        """The runs that trained LoRA matrices."""
        return [run for run in self.runs if run.rank is not None]

    @property
    def full(self) -> list[SweepRun]:
        """The runs of full finetuning."""
        return [run for run in self.runs if run.rank is None]

    @property
    def ranks(self) -> list[int]:
        """The LoRA ranks of the sweep in ascending order."""
        return sorted({run.rank for run in self.runs if run.rank is not None})

    @property
    def renamed(self) -> dict[str, str]:
        """The columns of the sweep whose names differ from their fields' names."""
        pairs = self.columns.items()
        return {field: column for field, column in pairs if field != column}


@dataclass(frozen=True)
class _Line:
    """One row of a sweep, before the row is converted to a `SweepRun`.

    Args:
        place: the name of the row in error messages, such as "Line 3 of runs.csv".
        cells: the cells as strings by column, or "" for a missing value.
    """

    place: str
    cells: Mapping[str, str]


def read_sweep(
    source: Source,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
) -> Sweep:
    """Read the runs of a sweep and check them. Identical rows of a sweep are counted only once.

    Args:
        source: a CSV file, a dataframe, or rows such as df.to_dict('records').
        columns: the column for each field, such as {"loss": "eval/loss"}. Other fields are found by
            their names or common alternatives (`ALSO_CALLED`).
        where: only rows with these values are read, such as {"State": "finished"}.

    Raises:
        CalibrationError: the file cannot be read, a column does not exist, `where` excludes all
            rows, or a cell has an impossible value. The message names the line and the column.
    """
    lines = [_Line(place, _texts(row)) for place, row in _rows(source)]
    if not lines:
        raise CalibrationError(
            "The sweep is empty, but a fit needs at least two runs.",
            "Pass one row per run with the columns rank, lr and loss. LoRA runs also need"
            " the column alpha.",
        )
    header = list(dict.fromkeys(name for line in lines for name in line.cells))
    column_of = _columns(header, columns or {})
    chosen = _chosen(lines, header, where or {})
    # A run without a loss has crashed or was stopped. Its learning rate may be good or bad, so the
    # run is left out and does not count as diverged.
    with_loss = [line for line in chosen if line.cells.get(column_of["loss"])]
    if not with_loss:
        count, column = len(chosen), column_of["loss"]
        raise CalibrationError(
            f"None of the {count} runs of the sweep has a loss, because the column {column!r} is"
            " empty.",
            "Write the final loss of each run into this column, or 'diverged' if the run diverged."
            " If another column contains the loss, pass columns={'loss': NAME} (in a shell:"
            " --columns loss=NAME).",
        )
    runs = [_run_of(line, column_of) for line in with_loss]
    notes = [*_left_out(len(chosen), len(runs))]
    for name in header:
        if _usual_form(name) in _STATES and name not in (where or {}):
            notes += _unfinished(name, [line.cells.get(name, "") for line in with_loss])
    # Exports may contain the same run twice, so identical runs are counted once. dict.fromkeys
    # keeps their order.
    return Sweep(tuple(dict.fromkeys(runs)), column_of, tuple(notes))


# --- rows -----------------------------------------------------------------------------------------


def _rows(source: Source) -> Iterator[tuple[str, Row]]:
    """Yield each row of the sweep together with a name that error messages can use."""
    if isinstance(source, (str, os.PathLike)):
        yield from _rows_of_file(Path(source))
        return
    # A dataframe is recognised by its methods, so that pandas need not be imported.
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        source = source.to_dict("records")
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        value = shown(source)
        raise CalibrationError(
            f"A sweep cannot be read from {value}.",
            "Pass the path of a CSV file, a dataframe, or a list with one dict per run, such as"
            " [{'rank': 8, 'alpha': 16, 'lr': 1e-4, 'loss': 1.2}, ...].",
        )
    for number, row in enumerate(source, 1):
        if not isinstance(row, Mapping):
            value = shown(row)
            raise CalibrationError(
                f"Row {number} of the sweep must be a dict, but it is {value}.",
                "Pass one dict per run, such as {'rank': 8, 'alpha': 16, 'lr': 1e-4, 'loss': 1.2}.",
            )
        yield f"Row {number} of the sweep", row


def _rows_of_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a CSV file with their line numbers."""
    try:
        # utf-8-sig, because spreadsheets write a byte-order mark at the start of a file. With
        # strict=True, a stray quote inside a cell is an error. Otherwise Python's reader would make
        # it a part of the value.
        text = read_bytes(path, _MOST).decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            line = f"Line {reader.line_num} of {path.name}"
            count, columns = len(cells), len(header)
            if count != columns:
                raise CalibrationError(
                    f"{line} has {count} cells, but the header of the file has {columns} columns.",
                    "Correct this line. If a cell contains a comma, put the cell in double quotes.",
                )
            yield line, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        number, file = reader.line_num, path.name
        raise CalibrationError(
            f"Line {number} of {file} is not valid CSV: {error}.",
            "Correct this line. If a cell contains a comma, put the cell in double quotes.",
        ) from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"The sweep {path} cannot be read, because the file is not UTF-8 text.",
            "Save the sweep as a CSV file with UTF-8 encoding.",
        ) from error
    except OSError as error:
        raise CalibrationError(
            f"The sweep {path} cannot be read: {error}.",
            "Pass the path of an existing CSV file.",
        ) from error


def _texts(row: Row) -> dict[str, str]:
    """Convert the cells of a row to strings, and missing values to empty strings."""
    return {str(name): _text(cell) for name, cell in row.items()}


def _text(cell: object) -> str:
    # All cells become strings first, so that a dataframe and a CSV file are read in the same way.
    # `plain` converts scalars of numpy and torch.
    text = "" if cell is None else str(plain(cell)).strip()
    return "" if text.lower() in _EMPTY else text


def _chosen(
    lines: Sequence[_Line], header: Sequence[str], where: Mapping[str, object]
) -> list[_Line]:
    """Return the rows of the sweep that satisfy all conditions in `where`."""
    wanted = _texts(where)
    for name in wanted:
        if name not in header:
            raise _no_such_column(f"where= contains the column {name!r}", name, header)

    def is_wanted(line: _Line) -> bool:
        cells = line.cells
        return all(_is_same(cells.get(name, ""), wanted[name]) for name in wanted)

    chosen = [line for line in lines if is_wanted(line)]
    if not chosen:
        raise _nothing_chosen(lines, wanted)
    return chosen


def _is_same(cell: str, value: str) -> bool:
    """Return whether a cell equals a value, as numbers or as case-insensitive strings."""
    try:
        return float(cell) == float(
            value
        )  # so that where={"rank": 8} finds the cell "8.0"
    except ValueError:
        return cell.casefold() == value.casefold()


def _nothing_chosen(
    lines: Sequence[_Line], wanted: Mapping[str, str]
) -> CalibrationError:
    """Create the error for conditions that match no rows, with a list of the existing values."""
    asked = ", ".join(f"{name}={value}" for name, value in wanted.items())
    found = []
    for name in wanted:
        counts = Counter(line.cells.get(name) for line in lines).most_common(5)
        values = ", ".join(f"{value or 'empty'} ({count})" for value, count in counts)
        found.append(f"the column {name} contains {values}")
    return CalibrationError(
        f"None of the {len(lines)} rows of the sweep meets the condition where {asked}:"
        f" {'; '.join(found)}.",
        "Use a value that the column contains, or remove the condition.",
    )


# --- columns --------------------------------------------------------------------------------------


def _columns(header: Sequence[str], asked: Mapping[str, str]) -> dict[str, str]:
    """Find the column for each field of `SweepRun`.

    If the user has not chosen a column for a field, the function looks for a column with the name
    of the field, and then for a column with a common alternative name.
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
            names, example = _listed(header), {field: "NAME"}
            raise CalibrationError(
                f"The sweep has no column for the {field}. Its columns are {names}.",
                f"If a column with a different name contains the {field}, pass columns={example}"
                f" (in a shell: --columns {field}=NAME). Otherwise, add a column {field}.",
            )
    return found


def _check_columns(asked: object, header: Sequence[str]) -> None:
    """Raise an error if `columns` contains a field or a column that does not exist."""
    if not isinstance(asked, Mapping):
        value = shown(asked)
        raise CalibrationError(
            f"columns= must be a dict, but it is {value}.",
            "Pass a dict with the column of each field, such as columns={'loss': 'eval/loss'}.",
        )
    for field, column in asked.items():
        if field not in _HINTS:
            unknown, known = shown(field), ", ".join(_HINTS)
            raise CalibrationError(
                f"columns= contains the unknown field {unknown}.",
                f"Use only the fields {known}.",
            )
        if column not in header:
            raise _no_such_column(f"columns= contains {field}={column}", column, header)


def _column_of(field: str, header: Sequence[str]) -> str | None:
    """Return the column that contains a field, or None if no column name is known for the field."""
    if field in header:
        return field
    usual = (field, *ALSO_CALLED.get(field, ()))
    # If there are two candidates, a guess could silently use the wrong one. The user must decide.
    found = [column for column in header if _usual_form(column) in usual]
    if len(found) > 1:
        names, first = _listed(found), found[0]
        example = {field: first}
        raise CalibrationError(
            f"The sweep has several columns that may contain the {field}: {names}.",
            f"Choose one of these columns. For example, pass columns={example} (in a shell:"
            f" --columns {field}={first}).",
        )
    return found[0] if found else None


def _usual_form(column: str) -> str:
    """Remove a tracker's prefix from a column name, and convert the name to snake case.

    >>> _usual_form("config.Learning-Rate"), _usual_form("eval/loss")
    ('learning_rate', 'eval_loss')
    """
    bare = _PREFIX.sub("", str(column).strip())
    return re.sub(r"[\s/.-]+", "_", bare).lower()


def _no_such_column(
    where: str, column: object, header: Sequence[str]
) -> CalibrationError:
    """Create the error for a column that does not exist, and suggest the most similar name."""
    close = get_close_matches(str(column), map(str, header), 1)
    cure = f"Did you mean {close[0]!r}?" if close else "Choose one of these columns."
    return CalibrationError(
        f"{where}, but the sweep does not have this column. Its columns are {_listed(header)}.",
        cure,
    )


def _listed(names: Sequence[str]) -> str:
    most = 20
    words = ", ".join(map(str, names[:most]))
    return f"{words} and {len(names) - most} more" if len(names) > most else words


# --- one run --------------------------------------------------------------------------------------


def _run_of(line: _Line, columns: Mapping[str, str]) -> SweepRun:
    """Convert one row of a learning-rate sweep to a run.

    Raises:
        CalibrationError: a required cell is empty, or a cell has an impossible value.
    """
    texts = {field: line.cells.get(column, "") for field, column in columns.items()}
    # Trackers may export a default alpha even for runs without LoRA, so it is ignored there.
    is_full = texts["rank"].lower() == "full"
    ignored = ("rank", *_OF_LORA) if is_full else ()
    needed = ("lr",) if is_full else ("rank", "lr", "alpha")
    values: dict[str, Any] = {"rank": None}
    for field, text in texts.items():
        if text and field not in ignored:
            values[field] = _value(line, field, text, columns[field])
    for field in needed:
        if values.get(field) is None:
            place = line.place
            if is_full:
                raise CalibrationError(
                    f"{place} has no lr, but a run of full finetuning needs a learning rate.",
                    "Write the learning rate of the run into this line.",
                )
            raise CalibrationError(
                f"{place} has no {field}. A LoRA run needs rank, alpha, lr and loss.",
                f"Write the {field} of the run into this line. For a run of full finetuning, set"
                " rank to 'full'.",
            )
    return SweepRun(**values)


def _value(line: _Line, field: str, text: str, column: str) -> object:
    """Convert the string in a cell of a sweep to the type of the cell's field.

    Raises:
        CalibrationError: the text is not a possible value of the field.
    """
    if field == "loss" and text.lower() == "diverged":
        return math.inf
    try:
        # strict=False converts strings, and accepts "4.0" for an integer and "True" for a bool.
        value = msgspec.convert(text, _HINTS[field], strict=False)
    except msgspec.ValidationError as error:
        name = field if column == field else f"{field} (column {column!r})"
        place, valid = line.place, _KINDS[field]
        raise CalibrationError(
            f"{place} has an invalid {name}: {text!r}.",
            f"Change the value to {valid}.",
        ) from error
    # A loss this large means that the run diverged, even if the value is finite.
    return math.inf if field == "loss" and value > _MOST_LOSS else value


# --- notes ----------------------------------------------------------------------------------------


def _left_out(rows: int, runs: int) -> Iterator[str]:
    """If the loss of some runs is missing, yield a note that says how many."""
    missing = rows - runs
    if missing:
        were = "1 run was" if missing == 1 else f"{missing} runs were"
        yield (
            f"{were} left out of {rows}, because a run without a loss cannot be used. If a run"
            " diverged, write 'diverged' as its loss, so that the recipe gets a ceiling"
        )


def _unfinished(column: str, states: Sequence[str]) -> Iterator[str]:
    """Yield a note if a tracker's state column lists runs that have a loss but did not finish."""
    counts = Counter(filter(None, states))
    well = [state for state in counts if state.casefold() in _ENDED_WELL]
    others = [state for state in counts if state not in well]
    if not others:
        return
    number = sum(counts[state] for state in others)
    finished = well[0] if well else "finished"
    yield (
        f"{number} of {len(states)} runs did not finish ({column}: {', '.join(others)}), but were"
        f" used because they have a loss. To leave them out, pass where={{{column!r}:"
        f" {finished!r}}} (in a shell: --where {column}={finished})"
    )
