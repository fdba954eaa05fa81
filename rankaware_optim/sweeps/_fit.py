"""`fit_sweep`: the calibration's fit on the rows of a sweep, from a CSV file or any tool."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from torch.optim import Optimizer

from .._checks import MOST_TRIALS, RANGES, check_range, limits, plain
from .._files import read_bytes
from .._near_misses import explain_near_misses
from .._optimizers import get_optimizer_class
from .._types import Reference
from ..calibration import versions_used, what_is_unknown
from ..errors import CalibrationError
from ..fitting import (
    Observation,
    centred_law,
    diverged,
    end_of,
    fit_observations,
    prior_of,
)
from ..laws import PRIOR_LAW, Law, checked_multiplier, recordable_law
from ..recipe import ANY_WIDTH, Recipe, infer_scaling, recipe_of

DEMO_SWEEP = Path(__file__).with_name("demo_sweep.csv")  # EfficientNet-lite0 on digits
_ABSENT = ("", "nan", "none", "null")
_OF_LORA = ("alpha", "rslora")
_MOST = 100_000_000  # largest file, bytes
_MOST_LOSS = RANGES["loss"][1]  # beyond it a run diverged
# Octaves: standard deviation of an optimum whose best rate is at an end of its grid: by hand
_END_SD = 1.0

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

    def __post_init__(self) -> None:
        if self.rank is not None and self.alpha is None:
            raise ValueError("LoRA's alpha is missing")

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


@explain_near_misses
def fit_sweep(
    sweep: Source,
    *,
    optimizer: type[Optimizer] | str = "AdamW",
    name: str = "sweep",
    law: str | Law = PRIOR_LAW,
    full_fan_in: float | None = None,
) -> Recipe:
    """Fit a recipe to an existing learning-rate sweep from any tool.

    A rank's loss against log2 of the rate is modelled as a bowl with a cliff, and the best rates
    are shrunk towards the law. What the data do not determine is in the recipe's `notes` and widens
    its band: a best rate at an edge of its grid, a loss that hardly depends on the rate. Diverged
    runs set the ceiling.

    Args:
        sweep: rows of one model, such as df.to_dict('records') of a dataframe, or a CSV file, with
            the columns rank, lr (per step) and loss, and alpha for LoRA. Optional are rslora, init
            ("A", where B starts at zero as in PEFT, the default, or "B"), fan_in, seed, model,
            batch, steps and start (the loss before training). A rank of "full" is full finetuning,
            a loss of "diverged" or nan one that diverged. Without a fan_in, the mean over the
            adapted layers, the recipe has no rate for full finetuning or for the other init.
        optimizer: the optimizer of the sweep, a class or a name. It decides the law's form.
        name: the recipe's name.
        law: the law that maps rates between ranks, by default µA. The fall in rank at
            A = 0 is in the fit's prior.
        full_fan_in: the largest fan-in of the adapted layers, on which the rate of full finetuning
            depends. By default that of its rows, else `fan_in`.

    Returns:
        The recipe.

    Raises:
        CalibrationError: a cell is missing or impossible, several models, batches, inits or widths
            are mixed, only one rate was tried, there are over 2,000 runs, or every run diverged.

    >>> points = [(rank, x) for rank in (8, 64) for x in range(-14, -8)]
    >>> rows = [
    ...     {"rank": r, "alpha": r, "lr": 2.0**x, "loss": 1 + 0.1 * (x + 11) ** 2}
    ...     for r, x in points
    ... ]
    >>> recipe = fit_sweep(rows)
    >>> 2**-11.5 < recipe.fitted_lr < 2**-10.5
    True
    """
    optimizer = get_optimizer_class(optimizer)
    if full_fan_in is not None:
        check_range("fan_in", full_fan_in, "full_fan_in", CalibrationError)
    bound = recordable_law(law).bind(optimizer, {})
    lora, full = _of_one_model(read_sweep(sweep))
    runs = [*lora, *full]
    ranks = sorted({run.rank or 0 for run in lora})
    reference = _middle(lora, ranks) if lora else full[0].place
    full_width = full_fan_in or (full or lora)[0].fan_in
    prior = prior_of(reference, ranks, full_width)
    centred = centred_law(bound, reference, prior.pivot)
    observations = list(_at_reference(runs, reference, centred))
    fit = fit_observations(observations, prior)
    if fit is None:
        raise CalibrationError(
            f"Every one of {len(runs)} runs diverged.", "Add lower rates to the sweep."
        )
    tried = [*ranks, None] if full else ranks
    notes = tuple(what_is_unknown(fit, observations, *tried))
    # the errors of ranks at an end have one sign, and do not average out
    at_end = [bool(end_of(observations, rank)) for rank in tried]
    fit.covariance[0, 0] += (_END_SD * np.mean(at_end)) ** 2
    return recipe_of(
        fit,
        bound,
        reference,
        name=name,
        scaling_rule=infer_scaling(run.place for run in runs),
        full_fan_in=full_width,
        ranks=tuple(ranks),
        full_seen=bool(full),
        optimizer=f"{optimizer.__module__}.{optimizer.__qualname__}",
        steps=runs[0].steps,
        versions=versions_used(),
        notes=notes,
        tensors=_tensors(runs, observations),
    )


def _tensors(
    runs: Sequence[SweepRun], observations: Sequence[Observation]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return `Recipe.tensors`: the runs in reference coordinates, and at their own rates."""
    lost = diverged(observations)
    columns = {
        "rank": [run.rank or 0 for run in runs],
        "seed": [run.seed for run in runs],
        "lr": [2.0**o.x for o in observations],
        "own_lr": [run.lr for run in runs],
        "value": [run.loss for run in runs],
        "diverged": [o in lost for o in observations],
    }
    return {name: np.array(column) for name, column in columns.items()}


def _of_one_model(runs: Sequence[SweepRun]) -> tuple[list[SweepRun], list[SweepRun]]:
    """Return the runs of LoRA and of full finetuning. Raise if they are of several models, inits,
    widths, batches or lengths, or at one rate.
    """
    if len(runs) > MOST_TRIALS:
        raise CalibrationError(
            f"The sweep has {len(runs):,} runs, and a fit takes {MOST_TRIALS:,}.",
            "Keep those near the best rates.",
        )
    if len({run.lr for run in runs}) < 2:
        raise CalibrationError(
            "The sweep has one rate.", "Sweep two at least, better six."
        )
    lora = [run for run in runs if run.rank is not None]
    full = [run for run in runs if run.rank is None]
    _refuse_mixed(runs, "model", "batch", "steps")
    _refuse_mixed(lora, "init", "fan_in")
    _refuse_mixed(full, "fan_in")
    return lora, full


def _refuse_mixed(runs: Sequence[SweepRun], *names: str) -> None:
    """Raise if the runs have several values in one of these columns."""
    for name in names:
        values = dict.fromkeys(getattr(run, name) for run in runs)
        if len(values) > 1:
            raise CalibrationError(
                f"The sweep mixes {len(values)} values of {name}: {', '.join(map(str, values))}.",
                "A recipe is for one of them: keep its rows.",
            )


def _middle(runs: Sequence[SweepRun], ranks: Sequence[int]) -> Reference:
    """Return the configuration of the middle one of the ranks swept, at its lowest alpha."""
    rank = ranks[(len(ranks) - 1) // 2]
    of_rank = [run.place for run in runs if run.rank == rank]
    return min(of_rank, key=lambda place: place.alpha or 0.0)


def _at_reference(
    runs: Sequence[SweepRun], reference: Reference, law: Law
) -> Iterator[Observation]:
    """Yield the runs as observations, whose rates the law has moved to the reference."""
    # where no width is known, a usual one nearly cancels between ranks
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    for run in runs:
        place = run.place
        if place.method != reference.method and not place.fan_in:
            raise CalibrationError(
                "The sweep has full finetuning and LoRA, but no fan-in to compare them.",
                "Give the column fan_in, or leave out the rows of full finetuning.",
            )
        here = replace(place, fan_in=place.fan_in or ANY_WIDTH)
        octaves = math.log2(checked_multiplier(law, here.as_factor(), there))
        yield run.observed_at(math.log2(run.lr) - octaves)


# --- reading --------------------------------------------------------------------------------------


def read_sweep(source: Source) -> list[SweepRun]:
    """Read and check a sweep. A row that repeats another one in every cell counts once.

    Args:
        source: rows, such as df.to_dict('records') of a dataframe, or a CSV file. The columns are
            the fields of `SweepRun`.

    Raises:
        CalibrationError: the file cannot be read, or a cell is missing or impossible. The message
            names row and column.
    """
    if isinstance(source, (str, os.PathLike)):
        try:
            text = read_bytes(Path(source), _MOST).decode("utf-8-sig")
            header, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
            source = [dict(zip(header, each, strict=True)) for each in lines if each]
        except (OSError, ValueError, csv.Error) as error:
            raise CalibrationError(
                f"The sweep {source} cannot be read: {error}.",
                "Check the path, and that each line has as many cells as the first. Quote a cell"
                " that contains a comma.",
            ) from error
    runs = [_run_of(number, row) for number, row in enumerate(source, 1)]
    return [*dict.fromkeys(runs)]


def _run_of(number: int, row: Row) -> SweepRun:
    try:
        run: SweepRun = msgspec.convert(_cells(dict(row)), SweepRun, strict=False)
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise CalibrationError(
            f"row {number} of the sweep: {error}.",
            "Every row needs a rank and an alpha (or the rank 'full'), an lr and a loss (or"
            " 'diverged'), in columns of these names, as by"
            " df.rename(columns={'learning_rate': 'lr'}).",
        ) from error
    return replace(run, loss=math.inf) if run.loss > _MOST_LOSS else run


def _cells(row: dict[str, Any]) -> dict[str, Any]:
    """Return the cells that have a value, as texts."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        text = "" if value is None else str(plain(value)).strip()
        if name == "loss" and text.lower() in ("diverged", "nan"):
            text = "inf"
        if text.lower() not in _ABSENT:
            cells[name] = text
    if cells.get("rank", "").lower() != "full":
        return cells
    whole = {name: cell for name, cell in cells.items() if name not in _OF_LORA}
    return {**whole, "rank": None}
