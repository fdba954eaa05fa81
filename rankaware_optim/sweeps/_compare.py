"""`compare_laws`: how well scaling laws predict the best learning rates of a sweep.

A *cell* is one configuration of the sweep: a rank with its alpha, or full finetuning. For each cell
in turn, its best learning rate is predicted from the best ones of the other LoRA cells, each
converted by the law, and compared with the best one that the cell's own runs show.
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
    """A configuration of a sweep, and the result of its own runs.

    Args:
        at: the configuration.
        best: log2 of the best learning rate, from the fitted curve.
        curve: the fitted loss.
        diverged: log2 of the smallest learning rate that diverged, infinite if none did.
    """

    at: Reference
    best: float
    curve: LossCurve
    diverged: float

    def excess_at(self, x: float) -> float | None:
        """Return how far the loss at log2 learning rate x is above the cell's lowest, as a share of
        it. It is infinite where runs diverged, and None beyond the learning rates tried.
        """
        if x >= self.diverged:
            return math.inf
        # Beyond the learning rates tried the curve is a guess, by which no law should be scored.
        low, high = self.curve.tried
        if not low <= x <= high:
            return None
        loss, lowest = self.curve.losses(np.array([x, self.best]))[0]
        return float(max(0.0, loss - lowest) / max(abs(lowest), 1e-12))


@dataclass(frozen=True)
class Prediction:
    """A best learning rate that a law predicted.

    Args:
        at: the configuration.
        octaves: log2 of the predicted over the best learning rate, positive if it is too high.
        excess: the excess loss at the predicted learning rate, see `Cell.excess_at`.
    """

    at: Reference
    octaves: float
    excess: float | None


@dataclass(frozen=True)
class LawScore:
    """How well one law predicts.

    Args:
        law: the law in words.
        between_ranks: its predictions at the LoRA cells.
        to_full: its predictions of full finetuning.
    """

    law: str
    between_ranks: tuple[Prediction, ...]
    to_full: tuple[Prediction, ...]


@dataclass(frozen=True)
class LawComparison:
    """The scores of several laws on one sweep. `print` shows a table.

    Args:
        scores: one for each law.
        notes: which cells were left out, and why.
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
            "octaves off: mean difference of log2 between the predicted and the best learning rate;"
            " 1 is a factor of 2",
            "excess loss: how far the loss at the predicted learning rate is above the cell's"
            " lowest, in the mean over cells whose trials reach that far",
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
    """Compare how well scaling laws predict the best learning rates of a sweep.

    The best learning rate of each rank is predicted from the best ones of the other ranks. The best
    one of full finetuning is predicted from the best ones of all ranks. A rank is left out if its
    best learning rate is the lowest or the highest one tried, because the true optimum may then be
    anywhere beyond. Rows of different models, batches, steps and inits are not compared.

    Args:
        sweep: the runs, as for `fit_sweep`.
        laws: names of laws, such as "falling", or instances, such as your own.
        optimizer: the optimizer of the sweep, a class or a name. It decides the laws' forms.
        columns: which column holds which field, as for `fit_sweep`.
        where: use only rows with these values, as for `fit_sweep`.

    Returns:
        The table.

    Raises:
        CalibrationError: the sweep cannot be read, or has fewer than two ranks with a best learning
            rate between others.
        LawError: a law is unknown, or gave no usable multiplier.

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
            "The sweep has fewer than two ranks whose best learning rate lies between others that"
            " were tried.",
            "Add runs at lower and at higher learning rates, for two ranks at least.",
        )
    scores = []
    for given, law in zip(laws, bound, strict=True):
        name = given if isinstance(given, str) else law_sentence(given)
        scores.append(_score(name, law, groups))
    return LawComparison(tuple(scores), tuple(notes))


def _score(name: str, law: Law, groups: Iterable[Sequence[Cell]]) -> LawScore:
    between_ranks: list[Prediction] = []
    to_full: list[Prediction] = []
    for cells in groups:
        for prediction in _predictions(law, cells):
            is_full = prediction.at.method == "full"
            (to_full if is_full else between_ranks).append(prediction)
    return LawScore(name, tuple(between_ranks), tuple(to_full))


# --- cells ----------------------------------------------------------------------------------------


def _comparable(runs: Sequence[SweepRun]) -> list[list[SweepRun]]:
    """Return the runs in groups of one model, batch, number of steps and init. Full finetuning has
    no init, so it belongs to the groups of both.
    """
    # First the groups, from the LoRA runs alone, then the members, so that full finetuning can
    # join both inits.
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
    """Yield the cells of comparable runs. A cell needs a best learning rate between others that
    were tried. The other cells are left out, with a note on each.
    """
    by_reference: dict[Reference, list[SweepRun]] = {}
    for run in runs:
        by_reference.setdefault(run.reference, []).append(run)
    observations = []
    for number, members in enumerate(by_reference.values(), 1):
        for run in members:
            # Cells are numbered, because two of them may have the same rank.
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
        # The lowest point of the median curve, and not the posterior mean of the optimum, so that
        # the excess loss there is zero.
        grid = np.linspace(*curve.tried, 500)
        best = float(grid[np.argmin(curve.losses(grid)[0])])
        yield Cell(at, best, curve, cliff)


def _why_left_out(at: Reference, end: str, has_curve: bool) -> str:
    """Return why a cell cannot be compared, "" if it can."""
    if at.method == "full" and not at.fan_in:
        return "the sweep has no fan_in for it"
    if not has_curve:
        return "all of its runs diverged"
    return f"its best learning rate is the {end} one" if end else ""


def _lora(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.at.method == "lora"]


def _predictions(law: Law, cells: Sequence[Cell]) -> Iterator[Prediction]:
    """Yield the prediction of each cell from the other LoRA cells."""
    for target in cells:
        sources = [cell for cell in _lora(cells) if cell is not target]
        if not sources:
            continue
        to = _with_width(target.at).as_factor()
        # Each source predicts the target by itself. Their mean in log2 is the geometric mean of the
        # predicted learning rates.
        predicted = fmean(
            source.best + math.log2(checked_multiplier(law, to, _with_width(source.at)))
            for source in sources
        )
        octaves = predicted - target.best
        yield Prediction(target.at, octaves, target.excess_at(predicted))


def _with_width(at: Reference) -> Reference:
    # Without a width a usual one is assumed, which nearly cancels between ranks.
    return replace(at, fan_in=at.fan_in or ANY_WIDTH)


# --- the table ------------------------------------------------------------------------------------


def _mean(octaves: Sequence[float]) -> str:
    return f"{fmean(octaves):.2f}" if octaves else ""


def _worst(octaves: Sequence[float]) -> str:
    return f"{max(octaves):.2f}" if octaves else ""


def _excess(predictions: Sequence[Prediction]) -> list[str]:
    """Return the mean and the worst excess loss in words."""
    known = [p.excess for p in predictions if p.excess is not None]
    if not known:
        return ["", ""]
    ends = fmean(known), max(known)
    return ["diverged" if math.isinf(x) else f"{x:.2%}" for x in ends]
