"""A sweep's runs: read from other tools' rows of rank, rate and loss, in dicts, CSV or JSON, then
selected, completed and set against a law.

Each cell is checked when it is read.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .._checks import is_within, range_of, shown
from .._files import read_bytes
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import Observation
from ..recipe import ANY_WIDTH

DEMO_SWEEP = Path(__file__).with_name("demo_sweep.csv")  # EfficientNet-lite0 on digits
# Every field, and the names of its column in common tools. Case, blanks, "-", "/" and the prefixes
# below are ignored. More than one such column is an error, unless columns= chooses one.
ALIASES: dict[str, tuple[str, ...]] = {
    "rank": ("r", "lora_r", "lora_rank"),
    "lr": ("learning_rate",),
    "loss": (
        "eval_loss",
        "val_loss",
        "validation_loss",
        "test_loss",
        "test_nll",
        "value",
    ),
    "alpha": ("lora_alpha",),
    "rslora": ("use_rslora",),
    "init": (),
    "method": (),
    "fan_in": ("hidden_size",),
    "seed": (),
    "model": ("model_name", "model_name_or_path", "base_model"),
    "batch": ("batch_size",),
    "steps": ("max_steps",),
    "start": ("start_loss", "untrained_loss"),
}
_PREFIXES = ("params_", "config.", "config_")  # Optuna's dataframe, W&B's config
_ABSENT = ("", "nan", "none", "null")
_NO_STEPS = ("-1", "-1.0")  # Trainer's max_steps, by default
_DIVERGED = ("diverged", "nan", "inf", "infinity", "+inf")
_TRUTH = {
    "true": True,
    "yes": True,
    "1": True,
    "false": False,
    "no": False,
    "0": False,
    "": False,
}
_MOST = 100_000_000  # largest file, bytes

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class SweepRun:
    """One row of a sweep. Missing values are None.

    Args:
        rank: the LoRA rank, None for full finetuning.
        lr: the learning rate, per step.
        loss: the value to minimise, infinite if the run diverged.
        alpha: LoRA's alpha.
        rslora: whether alpha is divided by √rank instead of rank.
        init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero).
        fan_in: the mean fan-in of the adapted layers.
        seed: the random seed.
        model: the model's name.
        batch: examples or tokens per step.
        steps: number of steps.
        start: the loss before training.
    """

    rank: int | None
    lr: float
    loss: float
    alpha: float | None = None
    rslora: bool = False
    init: Literal["A", "B"] | None = None
    fan_in: float | None = None
    seed: int = 0
    model: str | None = None
    batch: float | None = None
    steps: int | None = None
    start: float | None = None


class Sweep(NamedTuple):
    """The runs of a sweep, and notes on rows that were left out."""

    runs: tuple[SweepRun, ...]
    notes: tuple[str, ...] = ()


def read_sweep(source: Source, *, columns: Mapping[str, str] | None = None) -> Sweep:
    """Read and check a sweep.

    The columns rank, lr and loss are required. The columns alpha, rslora, init ("A", "B"), method
    ("lora", "full"), fan_in, seed, model, batch, steps and start (the loss before training) are
    optional. `ALIASES` lists other names for them. An empty rank or "full" means full finetuning. A
    rank of nan is refused unless the method is "full". A loss of nan, inf or "diverged" means that
    the run diverged. A row without a loss is left out, with a note. A row that repeats another one
    in every cell counts once.

    Args:
        source: dicts, or a file with one of the endings .csv, .tsv, .json (a list) or .jsonl.
        columns: {field: column} if the names differ, such as {"loss": "final"}.

    Raises:
        CalibrationError: the file cannot be read, a column is missing or ambiguous, or a cell is
            impossible. The message names file, line and column.
    """
    rows = list(_rows(source))
    if not rows:
        raise CalibrationError(
            "The sweep has no rows.", "Give at least two rates of one rank."
        )
    present: dict[str, None] = {}
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise CalibrationError(
                f"{place} is a {type(row).__name__}, not a dict.",
                "Give rows such as {'rank': 16, 'lr': 1e-4, 'loss': 0.5}, or df.to_dict('records')"
                " of a dataframe.",
            )
        present |= dict.fromkeys(row)
    names = _columns(list(present), columns or {})
    read = [_run_of(_Cells(place, row, names)) for place, row in rows]
    runs = tuple(dict.fromkeys(run for run in read if run is not None))
    missing = read.count(None)
    if not missing:
        return Sweep(runs)
    note = (
        f"{missing} of {len(read)} rows have no loss and were left out; write 'diverged' if a run"
        " diverged"
    )
    return Sweep(runs, (note,))


# --- rows -----------------------------------------------------------------------------------------


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield every row with its place in words."""
    if not isinstance(source, (str, os.PathLike)):
        yield from _listed(source, "")
        return
    path = Path(source)
    try:
        text = read_bytes(path, _MOST).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"The sweep {path} cannot be read: {error}.", "Check the path and the file."
        ) from error
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"{path.name}, line {number}"
                yield place, _parsed(line, place)
    elif kind == ".json":
        yield from _listed(_parsed(text, path.name), f"{path.name}, ")
    else:
        yield from _csv_rows(path, text, "\t" if kind == ".tsv" else ",")


def _listed(rows: Any, file: str) -> Iterator[tuple[str, Any]]:
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise CalibrationError(
            f"A sweep is a list of rows, not a {type(rows).__name__}.",
            "Give dicts, or a file.",
        )
    return ((f"{file}row {number}", row) for number, row in enumerate(rows, 1))


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(
            f"{place} is not JSON: {error}.", "Correct it, or export the sweep again."
        ) from error


def _csv_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True
    )
    try:
        columns = Counter(reader.fieldnames or ())
        if any(count > 1 for count in columns.values()):
            twice = columns.most_common(1)[0][0]
            raise CalibrationError(
                f"{path.name} has two columns {twice!r}.", "Name each column once."
            )
        for row in reader:
            place = f"{path.name}, line {reader.line_num}"
            if None in row or None in row.values():
                raise CalibrationError(
                    f"{place} does not have as many cells as the header.",
                    "Quote cells that contain a comma.",
                )
            yield place, row
    except csv.Error as error:
        raise CalibrationError(
            f"{path.name}, line {reader.reader.line_num}: {error}.", "Correct the line."
        ) from error


def _columns(present: Sequence[str], chosen: Mapping[str, str]) -> dict[str, str]:
    """Return {field: column}: those chosen, then a field's own name, then its aliases."""
    listed = ", ".join(map(str, present))
    for field, column in chosen.items():
        if field not in ALIASES or column not in present:
            raise CalibrationError(
                f"columns has {field}={column}, but the sweep has {listed}.",
                f"Give one of its columns for one of {', '.join(ALIASES)}.",
            )
    plain = {column: _plain_name(column) for column in present}
    names = {}
    for field in ALIASES:
        match = chosen[field] if field in chosen else _column_of(field, plain)
        if match is not None:
            names[field] = match
    needed = ("loss", "lr") if "method" in names else ("loss", "lr", "rank")
    for field in needed:
        if field not in names:
            raise CalibrationError(
                f"The sweep has no column for {field}. It has {listed}.",
                f"Name it {field}, or choose one by columns={{{field!r}: ...}}"
                f" (--column {field}=...).",
            )
    return names


def _column_of(field: str, plain: Mapping[str, str]) -> str | None:
    """Return the column of a field or of its aliases, if there is one. plain: {column: name}."""
    columns = [column for column, name in plain.items() if name == field]
    columns = columns or [
        column for column, name in plain.items() if name in ALIASES[field]
    ]
    if len(columns) > 1:
        first = columns[0]
        raise CalibrationError(
            f"The columns {' and '.join(map(str, columns))} may all be {field}.",
            f"Choose one by columns={{{field!r}: {first!r}}} (--column {field}={first}).",
        )
    return columns[0] if columns else None


def _plain_name(column: str) -> str:
    name = str(column).strip().lower()
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return re.sub("[-/ ]", "_", name)


# --- cells ----------------------------------------------------------------------------------------


class _Cells(NamedTuple):
    """One row's cells by field. Each is checked when it is read."""

    place: str
    row: Mapping[str, Any]
    names: Mapping[str, str]

    def raw(self, field: str) -> str:
        """Return the cell as text, "" if it is empty."""
        value = self.row.get(self.names.get(field, ""))
        try:
            return "" if value is None else str(value).strip()
        except ValueError:  # an int of more than 4,300 digits
            raise self.error(field, "a short text or number") from None

    def text(self, field: str) -> str | None:
        """Return the cell as text, or None if it has no value."""
        text = self.raw(field)
        no_steps = field == "steps" and text in _NO_STEPS
        return None if no_steps or text.lower() in _ABSENT else text

    def number(self, field: str, range_: str = "") -> float | None:
        """Return the cell as a number in the range of this name, by default the field's, or None if
        it is empty.
        """
        text, range_ = self.text(field), range_ or field
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not is_within(range_, value):
            raise self.error(field, range_of(range_))
        return value

    def whole(self, field: str) -> int | None:
        value = self.number(field)
        return None if value is None else int(value)

    def choice(self, field: str, known: Mapping[str, Any]) -> Any:
        text = (self.text(field) or "").lower()
        if text not in known:
            raise self.error(field, f"one of {', '.join(key for key in known if key)}")
        return known[text]

    def rank(self) -> int | None:
        """Return the rank, None for full finetuning. A NaN is neither: pandas writes it where a
        rank is missing.
        """
        text = self.raw("rank").lower()
        if text == "nan":
            raise self.error("rank", "a rank, or 'full' for full finetuning")
        return None if text == "full" else self.whole("rank")

    def loss(self) -> float | None:
        """Return the loss: infinite if the run diverged, None if there is none."""
        diverged = self.raw("loss").lower() in _DIVERGED
        return math.inf if diverged else self.number("loss")

    def error(self, field: str, kind: str) -> CalibrationError:
        column = self.names.get(field, field)
        cause = f"{self.place}, column {column!r}: {shown(self.row.get(column))} is not {kind}."
        return CalibrationError(cause, "Correct the cell.")


def _run_of(cells: _Cells) -> SweepRun | None:
    """Return the row as a run, or None if it has no loss."""
    loss = cells.loss()
    full = cells.choice("method", {"full": True, "lora": False, "": None})
    rank = None if full else cells.rank()
    if rank is None and full is False:
        raise cells.error("rank", "a LoRA run's rank")
    lr = cells.number("lr")
    if lr is None:
        raise cells.error("lr", range_of("lr"))
    run = SweepRun(
        rank=rank,
        lr=lr,
        loss=math.inf if loss is None else loss,
        alpha=None if rank is None else cells.number("alpha"),
        rslora=rank is not None and cells.choice("rslora", _TRUTH),
        init=cells.choice("init", {"a": "A", "b": "B", "": None}),
        fan_in=cells.number("fan_in"),
        seed=cells.whole("seed") or 0,
        model=cells.text("model"),
        batch=cells.number("batch"),
        steps=cells.whole("steps"),
        start=cells.number("start", "loss"),
    )
    return None if loss is None else run


# --- runs of one model ----------------------------------------------------------------------------

Runs = Sequence[SweepRun]


def selected(runs: Runs, chosen: Mapping[str, Any]) -> Runs:
    """Return the runs of one model, batch, init and number of steps. Missing values are filled in.

    Beside LoRA rows that state an init, one without has the default, "A".
    """
    for name, wanted in chosen.items():
        if name == "init" and any(run.init for run in runs if run.rank is not None):
            runs = [_with_init(run) for run in runs]
        runs = _of_one_value(runs, name, wanted)
    return runs


def _with_init(run: SweepRun) -> SweepRun:
    return run if run.init or run.rank is None else replace(run, init="A")


def _of_one_value(runs: Runs, name: str, wanted: Any) -> Runs:
    values = sorted({getattr(run, name) for run in runs} - {None})
    listed = ", ".join(map(str, values))
    if wanted is None and len(values) > 1:
        raise CalibrationError(
            f"The sweep mixes {len(values)} values of {name}: {listed}.",
            f"A recipe is for one of them: choose it by {name}=.",
        )
    value = values[0] if wanted is None and values else wanted
    matching = [run for run in runs if getattr(run, name) in (None, value)]
    if not matching:
        raise CalibrationError(
            f"No row of the sweep has {name}={wanted!r}.", f"It has {listed}."
        )
    return [replace(run, **{name: value}) for run in matching]


def with_alpha(runs: Runs, alpha: float | str | None) -> Runs:
    """Return the runs with `alpha` filled in for LoRA rows without one. "rank" means the row's
    rank.
    """
    if alpha not in (None, "rank") and not is_within("alpha", alpha):
        raise CalibrationError(
            f"alpha is {shown(alpha)}.",
            f"Give {range_of('alpha')}, or 'rank' if it follows it.",
        )
    if alpha is not None:
        runs = [_with_alpha(run, alpha) for run in runs]
    if len({run.alpha is None for run in runs if run.rank is not None}) > 1:
        raise CalibrationError(
            "Some rows have an alpha and others do not.",
            "Give an alpha for those without.",
        )
    return runs


def _with_alpha(run: SweepRun, alpha: float | str) -> SweepRun:
    if run.rank is None or run.alpha is not None:
        return run
    return replace(run, alpha=float(run.rank if alpha == "rank" else alpha))


def with_width(runs: Runs, fan_in: float | None, full_fan_in: float | None) -> Runs:
    """Return the runs with one fan-in for LoRA and one for full finetuning: that of the rows, else
    the argument.
    """
    if full_fan_in is None:
        full_fan_in = fan_in
    lora = _width([run for run in runs if run.rank is not None], fan_in)
    full = _width([run for run in runs if run.rank is None], full_fan_in)
    return [replace(run, fan_in=full if run.rank is None else lora) for run in runs]


def _width(runs: Runs, argument: float | None) -> float | None:
    widths = sorted({run.fan_in for run in runs if run.fan_in is not None})
    if len(widths) == 1:
        return widths[0]
    if len(widths) > 1 and argument is None:
        raise CalibrationError(
            f"The sweep mixes fan-ins: {', '.join(f'{n:g}' for n in widths)}.",
            "A recipe is for one model: give its mean fan-in.",
        )
    return argument


def reference_of(runs: Runs) -> Reference:
    """Return the configuration of the middle one of the ranks swept, or full finetuning if there
    are none.
    """
    batch = runs[0].batch
    ranks = sorted({run.rank for run in runs if run.rank is not None})
    if not ranks:
        return Reference(method="full", fan_in=runs[0].fan_in, batch=batch)
    rank = ranks[(len(ranks) - 1) // 2]
    run = min(
        (run for run in runs if run.rank == rank), key=lambda run: run.alpha or 0.0
    )
    alpha = float(rank) if run.alpha is None else run.alpha
    return Reference(rank, alpha, run.rslora, run.init or "A", run.fan_in, batch=batch)


def site_of(run: SweepRun, reference: Reference) -> tuple[Reference, Reference]:
    """Return the configuration of `run`, and the reference, both with a fan-in.

    If alpha is unknown, the scaling is taken as 1 at the reference and proportional to
    1/√rank. If no fan-in is known, a usual one is used, which nearly cancels between ranks.
    """
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    width = run.fan_in or there.fan_in
    init = run.init or "A"
    if run.rank is None:
        if reference.method == "lora" and not (reference.fan_in or run.fan_in):
            raise CalibrationError(
                "The sweep has full finetuning and LoRA, but no fan-in to compare them.",
                "Give a fan-in, or leave out the rows of full finetuning.",
            )
        return Reference(method="full", fan_in=width), there
    if run.alpha is not None:
        return Reference(run.rank, run.alpha, run.rslora, init, width), there
    scaling = math.sqrt((reference.rank or 1) / run.rank)
    here = Reference.from_scaling(run.rank, scaling, init=init)
    return replace(here, fan_in=width), there


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
