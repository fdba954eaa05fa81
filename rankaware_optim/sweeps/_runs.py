"""A sweep's runs: read from a CSV file or the rows of any tool, and as observations of a fit."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .._checks import RANGES, limits, plain, shown
from .._files import read_bytes
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import Observation

DEMO_SWEEP = Path(__file__).with_name("demo_sweep.csv")  # EfficientNet-lite0 on digits
_ABSENT = ("", "nan", "none", "null")
_OF_LORA = ("rank", "alpha", "rslora")
_MOST = 100_000_000  # largest file, bytes
_MOST_LOSS = RANGES["loss"][1]  # beyond it a run diverged

Row = Mapping[str, Any]
Source = str | os.PathLike[str] | Iterable[Row]


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
        fan_in: the mean fan-in of the adapted layers, of full finetuning the largest.
        seed: the random seed.
        model: the model's name.
        batch: examples or tokens per step.
        steps: number of steps.
        start: the loss before training.
    """

    lr: Annotated[float, limits("lr")]
    loss: Annotated[float, Meta(ge=RANGES["loss"][0])]
    rank: Annotated[int, limits("rank")] | None = None
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
    def place(self) -> Reference:
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
        """Return the run as an observation at log2 rate x. Without a start loss its score is used
        as the start.
        """
        start = self.start
        if start is None:
            start = self.loss if math.isfinite(self.loss) else 0.0
        ends = (self.loss, start, self.loss)
        return Observation(self.rank, self.seed, x, *ends, returned=True)


def read_sweep(
    source: Source, lora: Row | None = None, full: Row | None = None
) -> tuple[list[SweepRun], list[str]]:
    """Read and check a sweep. Return its runs, and notes on rows that were left out.

    The columns are the fields of `SweepRun`: rank, lr and loss are required. A rank of "full" is
    full finetuning. A loss of nan, inf or "diverged" means that the run diverged. A row without a
    loss is left out, with a note. A row that repeats another one in every cell counts once.

    Args:
        source: rows, such as df.to_dict('records') of a dataframe, or a CSV file.
        lora: values for rows of LoRA that lack them. An alpha of "rank" is the row's rank.
        full: the same for rows of full finetuning.

    Raises:
        CalibrationError: the file cannot be read, a column is missing, or a cell is impossible. The
            message names row and column.
    """
    if isinstance(source, (str, os.PathLike)):
        rows: list[Any] = _csv_rows(Path(source))
    else:
        rows = list(source)
    _check_columns(rows)
    runs = [_run_of(i, _cells(row), lora, full) for i, row in enumerate(rows, 1)]
    notes = []
    if missing := runs.count(None):
        notes.append(
            f"{missing} of {len(rows)} rows have no loss and were left out; write 'diverged' if a"
            " run diverged"
        )
    return [*dict.fromkeys(run for run in runs if run)], notes


def _check_columns(rows: list[Any]) -> None:
    """Raise if a column is missing that a sweep needs."""
    present = dict.fromkeys(
        name for row in rows if isinstance(row, Mapping) for name in row
    )
    for name in ("rank", "lr", "loss"):
        if name not in present:
            raise CalibrationError(
                f"The sweep has no column {name}. It has {', '.join(map(str, present))}.",
                "Give a CSV file or df.to_dict('records'), with columns of these names, as by"
                " df.rename(columns={'learning_rate': 'lr'}).",
            )


def _csv_rows(path: Path) -> list[Row]:
    try:
        text = read_bytes(path, _MOST).decode("utf-8-sig")
        header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [dict(zip(header, line, strict=True)) for line in lines if line]
    except (OSError, ValueError, csv.Error) as error:
        raise CalibrationError(
            f"The sweep {path} cannot be read: {error}.",
            "Check the path, and that each line has as many cells as the first. Quote a cell that"
            " contains a comma.",
        ) from error


def _cells(row: Row) -> dict[str, str]:
    """Return the cells that have a value, as texts."""
    cells = {}
    for name, value in row.items():
        text = "" if value is None else str(plain(value)).strip()
        if name == "loss" and text.lower() in ("diverged", "nan"):
            text = "inf"
        if text.lower() not in _ABSENT:
            cells[name] = text
    return cells


def _run_of(
    number: int, cells: dict[str, Any], lora: Row | None, full: Row | None
) -> SweepRun | None:
    """Return a row as a run, or None if it has no loss."""
    if "loss" not in cells:
        return None
    if cells.get("rank", "").lower() == "full":
        own = {name: cell for name, cell in cells.items() if name not in _OF_LORA}
        cells = {**(full or {}), **own}
    else:
        cells = {"rank": "", **(lora or {}), **cells}
        if cells.get("alpha") == "rank":
            cells["alpha"] = cells["rank"]
    return _checked(number, cells)


def _checked(number: int, cells: dict[str, Any]) -> SweepRun:
    """Return the cells of a row as a run."""
    try:
        run: SweepRun = msgspec.convert(cells, SweepRun, strict=False)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        name = path.rstrip("`")
        cell = f", {name} {shown(cells[name])}" if name else ""
        raise CalibrationError(
            f"row {number}{cell}: {message}.", "Correct it. A rank may be 'full', too."
        ) from error
    return replace(run, loss=math.inf) if run.loss > _MOST_LOSS else run


def _mean_losses(
    observations: Sequence[Observation], rank: int | None
) -> dict[float, float]:
    """Return a rank's {log2 rate: mean loss}."""
    losses: dict[float, list[float]] = {}
    for o in observations:
        if o.rank == rank:
            losses.setdefault(round(o.x, 6), []).append(o.value)
    return {x: fmean(values) for x, values in losses.items()}


def ends_of(observations: Sequence[Observation]) -> dict[int | None, tuple[float, str]]:
    """Return, by rank, the best rates at an end of the grid: log2 of the rate, and "lowest" or
    "highest". A tie with a rate inside the grid does not count.
    """
    ends = {}
    for rank in dict.fromkeys(o.rank for o in observations):
        means = _mean_losses(observations, rank)
        least = min(means.values())
        best = [x for x, mean in means.items() if mean == least]
        if len(means) == 1 or len(best) > 1 or not math.isfinite(least):
            continue
        end = {min(means): "lowest", max(means): "highest"}.get(best[0])
        if end is not None:
            ends[rank] = (best[0], end)
    return ends
