"""What the trials of a study say: what ran, what it cost, what was seen; read from Optuna, written into the recipe."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ._trial import TAIL, recent
from .fit._posterior import Observation, diverged

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

__all__ = [
    "PARAMETER",
    "Cell",
    "carried",
    "cell_of",
    "counted",
    "curve_beside",
    "EARLY",
    "evidence",
    "height",
    "interval",
    "is_flat",
    "observations",
    "pruned",
    "rival_of",
    "running",
    "scalings",
    "spent",
    "tensors",
    "unsteady",
    "usual_height",
]

PARAMETER = "log2_lr"  # what Optuna calls the one number of a trial: log2 of the base rate, reference coordinates
_REPORTS = 10  # reports of a run to the storage, where pruners read them
EARLY = 0.3  # share of its steps in which a run is not judged
_SAME = 1e-3  # relative: how well the first values of two runs of one rank and seed must agree


class Cell(NamedTuple):
    """What is paired across rates: the rank, None for full finetuning, and the seed of draws and data."""

    rank: int | None
    seed: int


def cell_of(trial: FrozenTrial) -> Cell:
    return Cell(trial.user_attrs.get("rank"), trial.user_attrs.get("seed", 0))


def interval(steps: int) -> int:
    """Steps between two reports of a run."""
    return max(1, steps // _REPORTS)


def counted(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that count: complete, or stopped because they diverged or a pruner said so."""
    return [t for t in trials if t.state.name in ("COMPLETE", "PRUNED")]


def height(curve: Sequence[float]) -> float:
    """Where a run begins: its first value, or the median of the first few where its first batch was an easy one."""
    return max(curve[0], statistics.median(curve[:TAIL]))


def usual_height(trials: Sequence[FrozenTrial]) -> float:
    """The median over runs of the mean of their first values; 0 where none ran."""
    begun = [t.user_attrs["curve"][:TAIL] for t in trials if t.user_attrs.get("curve")]
    means = [math.fsum(values) / len(values) for values in begun]
    return statistics.median([mean for mean in means if math.isfinite(mean)] or [0.0])


def running(trials: Sequence[FrozenTrial], but: int | None = None) -> list[FrozenTrial]:
    return [t for t in trials if t.state.name == "RUNNING" and t.number != but]


def observations(trials: Sequence[FrozenTrial]) -> list[Observation]:
    """What the trials showed that ran to their end or diverged."""
    return [Observation(**t.user_attrs["observation"]) for t in counted(trials) if "observation" in t.user_attrs]


def evidence(trials: Sequence[FrozenTrial]) -> list[Observation]:
    """What the fit sees: what trials showed, and what those that were stopped would have."""
    return [*observations(trials), *carried(trials)]


def carried(trials: Sequence[FrozenTrial]) -> list[Observation]:
    """What the fit makes of runs that were stopped as worse: they end as far above the best run of their rank and seed
    as they lay when they were stopped. Left out, a rate too high would seem never to have been tried. Stopped in its
    first 30 %, a run says nothing.
    """
    lost = [t for t in trials if t.user_attrs.get("stopped") == "pruned" and PARAMETER in t.params]
    pairs = [(t, rival_of(t, trials)) for t in lost]
    return [_carried(t, best) for t, best in pairs if best is not None and _is_judged(t, best)]


def rival_of(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The best finished run of a trial's rank and seed."""
    return _best([t for t in trials if cell_of(t) == cell_of(trial)])


def curve_beside(cell: Cell, trials: Sequence[FrozenTrial]) -> list[float]:
    """The curve of the best finished run of a seed, of the same rank if there is one; empty where none ended."""
    mine = [t for t in trials if cell_of(t).seed == cell.seed]
    best = _best([t for t in mine if cell_of(t) == cell]) or _best(mine)
    return [] if best is None else list(best.user_attrs["curve"])


def _best(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    ended = [t for t in trials if t.state.name == "COMPLETE"]
    return min(ended, key=lambda t: t.value if t.value is not None else math.inf, default=None)


def _is_judged(trial: FrozenTrial, best: FrozenTrial) -> bool:
    return len(trial.user_attrs["curve"]) >= max(1.0, EARLY * len(best.user_attrs["curve"]))


def _carried(trial: FrozenTrial, best: FrozenTrial) -> Observation:
    curve, own = trial.user_attrs["curve"], Observation(**best.user_attrs["observation"])
    tail = recent(curve)
    gap = max(0.0, tail - recent(best.user_attrs["curve"][: len(curve)]))
    return replace(own, x=trial.params[PARAMETER], value=own.value + gap, start=height(curve), tail=own.tail + gap)


def pruned(trials: Sequence[FrozenTrial]) -> list[tuple[int | None, float]]:
    """(rank, log2 rate) of the trials that were stopped as worse than others, by how much is not known.

    A run that ran out of memory says nothing of its rate.
    """
    ended = [
        t for t in counted(trials) if "observation" not in t.user_attrs and t.user_attrs.get("stopped") != "memory"
    ]
    return [(cell_of(t).rank, t.params[PARAMETER]) for t in ended if PARAMETER in t.params]


def spent(trials: Sequence[FrozenTrial], steps: int) -> int:
    """Training steps of all trials; a running one is counted whole, a killed one up to its next report."""
    return sum(_steps_of(trial, steps) for trial in trials)


def _steps_of(trial: FrozenTrial, steps: int) -> int:
    if not trial.state.is_finished():
        return steps
    if "curve" in trial.user_attrs:
        return len(trial.user_attrs["curve"])
    if PARAMETER not in trial.params:
        return 0
    return min(steps, max(trial.intermediate_values, default=0) + interval(steps))


def scalings(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """The effective multiplier that each rank's model was built with."""
    seen = [t for t in counted(trials) if cell_of(t).rank is not None and "scaling" in t.user_attrs]
    return {t.user_attrs["rank"]: t.user_attrs["scaling"] for t in seen}


def unsteady(trials: Sequence[FrozenTrial]) -> Cell | None:
    """A rank and seed of which two runs began with different values, though no rate had mattered yet."""
    first: dict[Cell, float] = {}
    for trial in counted(trials):
        curve = trial.user_attrs.get("curve")
        if not curve:
            continue
        start = first.setdefault(cell_of(trial), curve[0])
        if not math.isclose(start, curve[0], rel_tol=_SAME, abs_tol=1e-9):
            return cell_of(trial)
    return None


def is_flat(seen: Sequence[Observation]) -> bool:
    """Whether nothing moved: no run fell below its start, and all scores agree."""
    ended = [o for o in seen if math.isfinite(o.value + o.tail)]
    values = [o.value for o in ended]
    return all(o.tail >= o.start for o in ended) and all(math.isclose(v, values[0], rel_tol=1e-6) for v in values)


def tensors(trials: Sequence[FrozenTrial], steps: int) -> dict[str, torch.Tensor]:
    """Every trial's rank (0: full finetuning), seed, base rate, score, fate, steps and values, padded with NaN.

    A pruned run has no score: NaN.
    """
    rows = [t for t in counted(trials) if PARAMETER in t.params]
    seen = [t.user_attrs.get("observation") for t in rows]
    lost = iter(diverged(observations(rows)))
    curves = torch.full((len(rows), steps), math.nan)
    for row, trial in zip(curves, rows, strict=True):
        row[: len(trial.user_attrs["curve"])] = torch.tensor(trial.user_attrs["curve"])
    return {
        "rank": torch.tensor([cell_of(t).rank or 0 for t in rows]),
        "seed": torch.tensor([cell_of(t).seed for t in rows]),
        "lr": torch.tensor([2.0 ** t.params[PARAMETER] for t in rows], dtype=torch.float64),
        "own_lr": torch.tensor([t.user_attrs.get("own_lr", math.nan) for t in rows], dtype=torch.float64),
        "value": torch.tensor([o["value"] if o else math.nan for o in seen], dtype=torch.float64),
        "diverged": torch.tensor([bool(o) and next(lost) for o in seen], dtype=torch.bool),
        "pruned": torch.tensor([not o for o in seen], dtype=torch.bool),
        "steps": torch.tensor([len(t.user_attrs["curve"]) for t in rows]),
        "curve": curves,
    }
