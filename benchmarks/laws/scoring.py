"""Scores of laws on a sweep: the error of the rates that they predict, and its cost in loss.

For every model of a sweep and every ordered pair of its ranks, the best rate found at the first is moved by the law to
the second and compared with the best rate found there.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from internals import (
    Source,
    SweepRun,
    get_optimizer_class,
    read_sweep,
)
from recording import table_of
from study.loss_curves import between, vertex_of

from rankaware_optim import CalibrationError, Constant, Law, Power, Reference
from rankaware_optim.fitting import Prior, fit_observations
from rankaware_optim.laws import (
    checked_multiplier,
    get_law,
    law_sentence,
)
from rankaware_optim.recipe import ANY_WIDTH
from rankaware_optim.sweeps import DEMO_SWEEP

Best = Literal["parabola", "bowl"]
COMPARED: tuple[str | Law, ...] = (
    "mua",
    "mua-paper",
    "constant",
    "loraplus",
    Power(-1.0, law=Constant()),
    Power(-0.5, law=Constant()),
    "falling",
)


@dataclass(frozen=True)
class LossCurve:
    """One rank's loss against the rate.

    Args:
        model: the model's name.
        at: the configuration.
        best: log2 of the best rate.
        losses: {log2 rate: mean loss over seeds}, infinite if a run diverged.
        runs: the runs.
    """

    model: str
    at: Reference
    best: float
    losses: Mapping[float, float]
    runs: tuple[SweepRun, ...]

    def lost_at(self, x: float) -> float | None:
        """Return the loss at log2 rate x above the curve's minimum, relative to the minimum; None off the grid.

        It is infinite above the last rate that did not diverge.
        """
        if not min(self.losses) <= x <= max(self.losses):
            return None
        ended = {at: loss for at, loss in self.losses.items() if math.isfinite(loss)}
        if not min(ended) <= x <= max(ended):
            return math.inf
        lowest = min(ended.values())
        return (between(ended, x) - lowest) / max(abs(lowest), 1e-12)

    @property
    def group(self) -> tuple[str, float | None, str]:
        """Model, batch and init. Laws move rates between ranks for which these agree."""
        return self.model, self.at.batch, self.at.init

    def compares_with(self, other: LossCurve) -> bool:
        return self.group == other.group and self.at.rank != other.at.rank


@dataclass(frozen=True)
class Move:
    """A best rate moved from one rank to another.

    Args:
        model: the model's name.
        source: the configuration from which the rate was moved.
        target: the configuration to which it was moved.
        octaves: log2 of the moved rate over the best one at the target, positive if too high.
        lost: loss at the moved rate above the minimum, relative to the minimum. Infinite if runs diverged, None if the
            moved rate is off the grid.
    """

    model: str
    source: Reference
    target: Reference
    octaves: float
    lost: float | None


@dataclass(frozen=True)
class LawScore:
    """A law's moves. Errors in octaves are absolute. Losses are shares of the best loss, for moves on the grid.

    Args:
        label: the law as text.
        law: the law.
        moves: one entry per ordered pair of ranks.
    """

    label: str
    law: Law
    moves: tuple[Move, ...]

    @property
    def median(self) -> float:
        return statistics.median(abs(move.octaves) for move in self.moves)

    @property
    def worst(self) -> float:
        return max(abs(move.octaves) for move in self.moves)

    @property
    def lost(self) -> tuple[float, ...]:
        return tuple(move.lost for move in self.moves if move.lost is not None)

    @property
    def off_grid(self) -> int:
        """The number of moved rates outside the grid of their rank, whose loss is unknown."""
        return len(self.moves) - len(self.lost)


def bench_law(
    sweep: Source = DEMO_SWEEP,
    laws: Sequence[str | Law] = COMPARED,
    *,
    best: Best = "parabola",
) -> list[LawScore]:
    """Score laws on a sweep of AdamW by their error in octaves and in loss, over every ordered pair of ranks.

    Losses are averaged over seeds. Full finetuning is left out, and so are ranks whose lowest loss is at an end of
    their grid. Rows that differ in model, batch or init are not compared with each other.

    Args:
        sweep: dicts or a file, as for `fit_sweep`. By default the package's own (EfficientNet-lite0 on digits).
        laws: `Law` instances, or names as for `get_law`.
        best: how a rank's best rate is found. "parabola" is the vertex through its best three rates in log2. "bowl" is
            the calibration's fit to all runs of a model, which is less sensitive to noise.

    Returns:
        One score per law.

    Raises:
        CalibrationError: a cell is impossible, alpha is unknown, or no model has two ranks with a best rate inside the
            grid.
        LawError: a law is unknown, or gave no usable multiplier.

    >>> points = [(rank, x) for rank in (8, 64) for x in range(-14, -8)]
    >>> rows = [{"rank": r, "alpha": r, "lr": 2.0**x, "loss": 1 + (x + 11) ** 2} for r, x in points]
    >>> [(score.label, round(score.worst, 2)) for score in bench_law(rows, ["constant"])]
    [('constant', 0.0)]
    """
    curves = loss_curves(read_sweep(sweep).runs, best)
    return [score_of(law, curves) for law in laws]


def score_of(law: str | Law, curves: Sequence[LossCurve]) -> LawScore:
    """Score one law on the moves between all comparable ranks."""
    found, moves = get_law(law), []
    bound = found.bind(get_optimizer_class("AdamW"), {})
    for source, target in itertools.permutations(curves, 2):
        if source.compares_with(target):
            moved = source.best + math.log2(
                checked_multiplier(bound, target.at.as_factor(), source.at)
            )
            moves.append(
                Move(
                    source.model,
                    source.at,
                    target.at,
                    moved - target.best,
                    target.lost_at(moved),
                )
            )
    label = law if isinstance(law, str) else law_sentence(law)
    return LawScore(label, found, tuple(moves))


# --- best rates -----------------------------------------------------------------------------------------------------


def loss_curves(runs: Sequence[SweepRun], best: Best) -> list[LossCurve]:
    """Return the curves of ranks whose best rate is inside the grid, for models with two or more of them."""
    curves = [curve for curve in all_curves(runs) if math.isfinite(curve.best)]
    curves = [curve for curve in curves if any(map(curve.compares_with, curves))]
    if not curves:
        raise CalibrationError(
            "No model of the sweep has two ranks whose best rate is inside their grid.",
            "Sweep at least two ranks past their best rate on both sides.",
        )
    return _best_by_bowls(curves) if best == "bowl" else curves


def all_curves(runs: Sequence[SweepRun]) -> list[LossCurve]:
    """Return the curve of every model and rank. Its best rate is nan where the lowest loss is at an end of the grid."""
    tried: dict[tuple[str, Reference], list[SweepRun]] = {}
    for run in (run for run in runs if run.rank is not None):
        at = run.reference
        at = replace(at, fan_in=at.fan_in or ANY_WIDTH)
        tried.setdefault((run.model or "", at), []).append(run)
    curves = []
    for (model, at), mine in tried.items():
        by_rate: dict[float, list[float]] = {}
        for run in mine:
            by_rate.setdefault(math.log2(run.lr), []).append(run.loss)
        losses = {x: statistics.fmean(by_rate[x]) for x in sorted(by_rate)}
        x = vertex_of(losses)
        best = math.nan if x is None else x
        curves.append(LossCurve(model, at, best, losses, tuple(mine)))
    return curves


def _best_by_bowls(curves: Sequence[LossCurve]) -> list[LossCurve]:
    """Return the curves with best rates from the calibration's fit, in which ranks of a model share a bowl's shape."""
    placed = []
    for group in dict.fromkeys(curve.group for curve in curves):
        mine = [curve for curve in curves if curve.group == group]
        # Curves are numbered, since two of them may have the same rank.
        seen = [
            replace(run.observed_at(math.log2(run.lr)), rank=i)
            for i, curve in enumerate(mine, 1)
            for run in curve.runs
        ]
        fit = fit_observations(seen, Prior())
        vertices = {} if fit is None else fit.vertices
        placed += [
            replace(curve, best=vertices[i][0]) for i, curve in enumerate(mine, 1)
        ]
    return placed


def score_table(scores: Sequence[LawScore]) -> str:
    """Return scores as a plain table."""
    heads = (
        "law",
        "octaves: median",
        "worst",
        "loss lost: median",
        "worst",
        "off the grid",
    )
    rows = []
    for score in scores:
        shares = ["", ""]
        if score.lost:
            ends = statistics.median(score.lost), max(score.lost)
            shares = ["diverged" if math.isinf(x) else f"{x:.2%}" for x in ends]
        off = f"{score.off_grid} of {len(score.moves)}"
        rows.append(
            [score.label, f"{score.median:.2f}", f"{score.worst:.2f}", *shares, off]
        )
    moves = scores[0].moves if scores else ()
    tuned = {(move.model, move.source) for move in moves}
    below = f"{len(moves)} moves between {len(tuned)} ranks of {len({model for model, _ in tuned})} models"
    return f"{table_of(heads, rows)}\n\n{below}"
