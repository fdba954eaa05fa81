"""This module measures how well scaling laws predict the best learning rates in a sweep.

A *cell* is one configuration of the sweep: either a LoRA rank with its alpha, or full finetuning.
The scaling law predicts the best learning rate of each cell from the best learning rates of the
other LoRA cells. For each cell, the module then compares the prediction with the best learning rate
that was found in the cell's runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from torch.optim import Optimizer

from .._near_misses import explain_near_misses
from .._optimizers import get_optimizer_class
from .._printing import Table
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import LossCurve, curves_of, diverged, end_of
from ..laws import Law, checked_multiplier, get_law, law_sentence
from ..recipe import ANY_WIDTH
from ._read import Source, SweepRun, read_sweep

_HEADINGS = (
    "law",
    "ranks: octaves off",
    "worst",
    "excess loss",
    "worst",
    "full: octaves off",
    "excess loss",
)


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep, with the loss curve that was fitted to its runs.

    Args:
        at: the configuration.
        best: log2 of the best learning rate, from the fitted curve.
        curve: the fitted loss curve.
        diverged: log2 of the smallest learning rate that diverged, or infinity if no run diverged.
    """

    at: Reference
    best: float
    curve: LossCurve
    diverged: float

    def excess_at(self, x: float) -> float | None:
        """Return the excess loss at a learning rate, as a fraction of the cell's lowest loss.

        The excess loss is the difference between the loss at this learning rate and the cell's
        lowest loss. If a run diverged at this learning rate or at a lower one, the excess loss is
        infinite. If the learning rate is outside the range that was tried, the method returns None.

        x: log2 of the learning rate.
        """
        if x >= self.diverged:
            return math.inf
        # Outside the range that was tried, the curve is only a guess and must not decide about a
        # scaling law.
        low, high = self.curve.tried
        if not low <= x <= high:
            return None
        loss, lowest = self.curve.losses(np.array([x, self.best]))[0]
        return float(max(0.0, loss - lowest) / max(abs(lowest), 1e-12))


@dataclass(frozen=True)
class Prediction:
    """A scaling law's prediction of the best learning rate for one configuration.

    Args:
        at: the configuration.
        octaves: log2 of the predicted learning rate divided by the best one. It is positive if the
            prediction is too high.
        excess: the excess loss at the predicted learning rate, see `Cell.excess_at`.
    """

    at: Reference
    octaves: float
    excess: float | None


@dataclass(frozen=True)
class LawScore:
    """The predictions that one scaling law makes for a sweep.

    Args:
        law: the name or formula of the law.
        between_ranks: the predictions for LoRA ranks.
        to_full: the predictions for full finetuning.
    """

    law: str
    between_ranks: tuple[Prediction, ...]
    to_full: tuple[Prediction, ...]


@dataclass(frozen=True)
class LawComparison:
    """The scores of several scaling laws on the same sweep.

    `print(comparison)` shows the scores as a table.

    Args:
        scores: one `LawScore` for each law.
        notes: sentences about the configurations that were left out.
    """

    scores: tuple[LawScore, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        rows = []
        for score in self.scores:
            ranks, full = score.between_ranks, score.to_full
            octaves = [abs(p.octaves) for p in ranks]
            cells = [_mean(octaves), _worst(octaves), *_excess(ranks)]
            cells += [_mean([abs(p.octaves) for p in full]), _excess(full)[0]]
            rows.append([score.law, *cells])
        lines = [
            "octaves off: mean distance between the predicted and the best learning rate; 1 octave"
            " is a factor of 2",
            "excess loss: how far the loss at the predicted learning rate is above the lowest loss"
            " of the rank (mean over the ranks that were tried at such learning rates)",
            *(f"note: {note}" for note in self.notes),
        ]
        return Table(_HEADINGS, rows, lines, left=("law",))


@explain_near_misses
def compare_laws(
    sweep: Source,
    laws: Sequence[str | Law],
    *,
    optimizer: type[Optimizer] | str = "AdamW",
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
) -> LawComparison:
    """Compare how well scaling laws predict the best learning rates in a sweep.

    Each scaling law predicts the best learning rate of a LoRA rank from the best learning rates of
    the other ranks in the sweep. The prediction for full finetuning is based on the best learning
    rates of all ranks. A rank is left out if its best learning rate is at either end of the tried
    range, because the true optimum may be outside this range. Only runs with the same model, batch
    size, number of steps and init are compared with each other.

    Args:
        sweep: the runs, as for `fit_sweep`.
        laws: names of laws, such as "falling", or instances of your law classes.
        optimizer: the optimizer of the sweep, as a class or a name. The formulas of the laws depend
            on it.
        columns: the column for each field, as for `fit_sweep`.
        where: use only rows with these values, as for `fit_sweep`.

    Returns:
        The scores of all laws.

    Raises:
        CalibrationError: the sweep cannot be read, or fewer than two ranks have a best learning
            rate that is neither the lowest nor the highest one tried.
        LawError: a law is unknown, or returned an unusable multiplier.

    >>> points = [(rank, x) for rank in (8, 64) for x in range(-14, -8)]
    >>> rows = [
    ...     {"rank": r, "alpha": r, "lr": 2.0**x, "loss": 1 + 0.1 * (x + 11) ** 2}
    ...     for r, x in points
    ... ]
    >>> (score,) = compare_laws(rows, ["constant"]).scores
    >>> max(abs(p.octaves) for p in score.between_ranks) < 0.1
    True
    """
    if isinstance(laws, (str, Law)):
        laws = [laws]
    native = get_optimizer_class(optimizer)
    bound = [get_law(law).bind(native, {}) for law in laws]
    read = read_sweep(sweep, columns, where)
    notes = list(read.notes)
    groups = [[*_cells(runs, notes)] for runs in _comparable(read.runs)]
    if not any(len(_lora(cells)) > 1 for cells in groups):
        raise CalibrationError(
            "The sweep needs at least two LoRA ranks whose best learning rate is neither the lowest"
            " nor the highest one that was tried, but it has fewer such ranks.",
            "Add runs with lower and higher learning rates, until two ranks have their best"
            " learning rate between others.",
        )
    scores = []
    for given, law in zip(laws, bound, strict=True):
        name = given if isinstance(given, str) else law_sentence(given)
        scores.append(_score(name, law, groups))
    return LawComparison(tuple(scores), tuple(notes))


def _score(name: str, law: Law, groups: Iterable[Sequence[Cell]]) -> LawScore:
    """Collect a law's predictions for the cells of all groups of comparable runs."""
    between_ranks: list[Prediction] = []
    to_full: list[Prediction] = []
    for cells in groups:
        for prediction in _predictions(law, cells):
            is_full = prediction.at.method == "full"
            (to_full if is_full else between_ranks).append(prediction)
    return LawScore(name, tuple(between_ranks), tuple(to_full))


# --- cells ----------------------------------------------------------------------------------------


def _comparable(runs: Sequence[SweepRun]) -> list[list[SweepRun]]:
    """Group the runs by model, batch size, number of steps and init.

    Runs of full finetuning have no init, so they are compared with the LoRA runs of
    both inits.
    """
    # The first loop creates the groups from the LoRA runs, and the second loop adds the members.
    # In this way, a run of full finetuning can join the groups of both inits.
    groups: dict[tuple[object, ...], list[SweepRun]] = {}
    for run in runs:
        if run.rank is not None:
            groups.setdefault((run.model, run.batch, run.steps, run.init), [])
    for group, members in groups.items():
        for run in runs:
            init = group[-1] if run.rank is None else run.init
            if (run.model, run.batch, run.steps, init) == group:
                members.append(run)
    return [*groups.values()]


def _cells(runs: Sequence[SweepRun], notes: list[str]) -> Iterator[Cell]:
    """Fit a loss curve to the runs of each configuration, and yield the results as cells.

    If a configuration cannot be compared, it is left out, and a note gives the reason.
    """
    by_reference: dict[Reference, list[SweepRun]] = {}
    for run in runs:
        by_reference.setdefault(run.reference, []).append(run)
    observations = []
    for number, members in enumerate(by_reference.values(), 1):
        for run in members:
            # The fit distinguishes curves by rank, but two cells may have the same rank with
            # different alphas. So each cell gets a number that replaces the rank.
            seen = run.observed_at(math.log2(run.lr))
            observations.append(replace(seen, rank=number))
    curves = curves_of(observations)
    lost = diverged(observations)
    for number, at in enumerate(by_reference, 1):
        if why := _why_left_out(at, end_of(observations, number), number in curves):
            notes.append(f"{at} was left out: {why}")
            continue
        curve = curves[number]
        cliff = min((o.x for o in lost if o.rank == number), default=math.inf)
        # The best learning rate is the minimum of the median curve. With the posterior mean of the
        # optimum instead, the excess loss of the best learning rate would not be zero.
        grid = np.linspace(*curve.tried, 500)
        best = float(grid[np.argmin(curve.losses(grid)[0])])
        yield Cell(at, best, curve, cliff)


def _why_left_out(at: Reference, end: str, has_curve: bool) -> str:
    """Return the reason why a cell cannot be compared, or an empty string if it can."""
    if at.method == "full" and not at.fan_in:
        return "the sweep has no value for fan_in"
    if not has_curve:
        return "all of its runs diverged"
    return f"its best learning rate is the {end} that was tried" if end else ""


def _lora(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.at.method == "lora"]


def _predictions(law: Law, cells: Sequence[Cell]) -> Iterator[Prediction]:
    """Predict the best learning rate of each cell from the best learning rates of the other LoRA
    cells.
    """
    for target in cells:
        sources = [cell for cell in _lora(cells) if cell is not target]
        if not sources:
            continue
        to = _with_width(target.at).as_factor()
        # The law converts the best learning rate of each other cell to this cell. The prediction is
        # their geometric mean, which is the mean of the logarithms.
        predicted = fmean(
            source.best + math.log2(checked_multiplier(law, to, _with_width(source.at)))
            for source in sources
        )
        octaves = predicted - target.best
        yield Prediction(target.at, octaves, target.excess_at(predicted))


def _with_width(at: Reference) -> Reference:
    # If the width is unknown, assume a typical width. Its effect nearly cancels when a learning
    # rate is converted between ranks.
    return replace(at, fan_in=at.fan_in or ANY_WIDTH)


# --- the table ------------------------------------------------------------------------------------


def _mean(octaves: Sequence[float]) -> str:
    return f"{fmean(octaves):.2f}" if octaves else ""


def _worst(octaves: Sequence[float]) -> str:
    return f"{max(octaves):.2f}" if octaves else ""


def _excess(predictions: Sequence[Prediction]) -> list[str]:
    """Return the mean and the largest excess loss of the predictions as strings."""
    known = [p.excess for p in predictions if p.excess is not None]
    if not known:
        return ["", ""]
    ends = fmean(known), max(known)
    return ["diverged" if math.isinf(x) else f"{x:.2%}" for x in ends]
