"""The trials of a study as typed records. All reads from and writes to Optuna's trials are here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial, TrialState

from .._checks import is_number
from ..fitting import TAIL, Observation, diverged, impute, noise_of

# Optuna's name of a trial's parameter: log2 of the base rate in reference coordinates
PARAMETER = "log2_lr"
_REPORTS = 10  # reports per run to the storage, for pruners
SCHEMA = 1  # version of the stored format, raised if an earlier version would misread it
_HOPELESS = 12  # runs, each at a lower rate, after which a rank where all diverged is given up
_SAME = 1e-3  # relative tolerance for the first values of two runs of one rank and seed


class Cell(NamedTuple):
    """Runs that differ only in their rate: they share rank (None for full finetuning) and seed."""

    rank: int | None
    seed: int


@dataclass(frozen=True)
class TrialRecord:
    """A trial's configuration and results. A field is None until it is known.

    number, state, x (log2 of the base rate), value and reports (recent mean by step) are Optuna's.
    The other fields are user attributes of the Optuna trial. Stored studies have their names, so do
    not rename them. An observation's first value and noise are read from the curve.

    worker: who runs it, a random name. heartbeat: a counter, its sign of life. killed: its worker
    was found dead, so nothing that it writes counts. retry_of: the number of the killed trial that
    this one repeats. estimate: log2 of the rate estimated as best for the rank before the trial.
    built: see `built_with`. own_lr: the rate of the model's most common A factors, or of its whole
    weights. stopped: "pruned" or "memory" if the run has no final score.
    """

    rank: int | None = None
    seed: int = 0
    worker: str = ""
    heartbeat: int | None = None
    retry_of: int | None = None
    killed: bool = False
    estimate: float | None = None
    scaling: float | None = None
    built: dict[str, Any] | None = None
    own_lr: float | None = None
    curve: list[float] | None = None
    stopped: str = ""
    observation: Observation | None = None
    number: int = -1
    state: TrialState = TrialState.RUNNING
    x: float | None = None
    value: float | None = None
    reports: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def read(cls, trial: FrozenTrial) -> TrialRecord:
        """Return the record of an Optuna trial."""
        attributes = trial.user_attrs
        kept = {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
        if "observation" in kept:
            curve = kept.get("curve")
            own = {"first": curve[0], "noise": noise_of(curve)} if curve else {}
            kept["observation"] = Observation(**{**kept["observation"], **own})
        x, reports = trial.params.get(PARAMETER), trial.intermediate_values
        return cls(
            **kept, number=trial.number, state=trial.state, x=x, value=trial.value, reports=reports
        )

    def attributes(self) -> dict[str, Any]:
        """Return the user attributes to store: rank, seed and all known fields."""
        return {"rank": self.rank, "seed": self.seed, **self.changes_since(TrialRecord())}

    def changes_since(self, before: TrialRecord) -> dict[str, Any]:
        """Return the user attributes that differ from `before`."""
        old, new = asdict(before), asdict(self)
        for kept in (old["observation"] or {}, new["observation"] or {}):
            for name in ("first", "noise"):  # see `read`
                kept.pop(name, None)
        return {name: new[name] for name in _ATTRIBUTES if new[name] != old[name]}

    @property
    def cell(self) -> Cell:
        return Cell(self.rank, self.seed)


def is_typed(value: Any, hint: Any) -> bool:
    """Return whether a value from a storage has a hint's type, checked recursively. A float may be
    a whole number.
    """
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return True
    if kind is UnionType:
        return any(is_typed(value, part) for part in parts)
    if kind in (int, float) and isinstance(value, int) and abs(value) >= 2**63:
        return False  # too large for an array
    if kind is float:
        return is_number(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    if is_dataclass(kind):
        return all(
            is_typed(getattr(value, name), inner) for name, inner in get_type_hints(kind).items()
        )
    if isinstance(value, Mapping):
        return all(
            is_typed(key, parts[0]) and is_typed(item, parts[1]) for key, item in value.items()
        )
    return kind is not list or all(is_typed(item, parts[0]) for item in value)


_OPTUNAS_OWN = {"number", "state", "x", "value", "reports"}
_ATTRIBUTES = [f.name for f in fields(TrialRecord) if f.name not in _OPTUNAS_OWN]


class Trials(tuple[TrialRecord, ...]):
    """The trials of a study, of all workers, or some of them."""

    @classmethod
    def read(cls, trials: Iterable[FrozenTrial], cell: Cell | None = None) -> Trials:
        """Return the records of Optuna trials, or of those of one cell."""
        pairs = ((trial, trial.user_attrs) for trial in trials)
        mine = (
            trial
            for trial, kept in pairs
            if cell in (None, (kept.get("rank"), kept.get("seed", 0)))
        )
        return cls(map(TrialRecord.read, mine))

    def counted(self) -> Trials:
        """Return the trials that count: those completed, diverged or pruned.

        A storage may let a worker that was taken for dead end its trial in the moment in which it
        wakes up. The mark of the worker that repeats the trial decides.
        """
        return Trials(
            t for t in self if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and not t.killed
        )

    def to_repeat(self) -> TrialRecord | None:
        """Return the first killed trial that no other trial repeats."""
        repeated = {trial.retry_of for trial in self}
        killed = (trial for trial in self if trial.killed and trial.state.is_finished())
        return next((trial for trial in killed if trial.number not in repeated), None)

    def running(self, but: int | None = None) -> Trials:
        return Trials(t for t in self if t.state == TrialState.RUNNING and t.number != but)

    def observations(self) -> list[Observation]:
        """Return the observations of trials that ran to their end or diverged."""
        return [t.observation for t in self.counted() if t.observation is not None]

    def evidence(self) -> list[Observation]:
        """Return the input of the fit: observations, and imputed scores of pruned runs."""
        return [*self.observations(), *self.imputed()]

    def imputed(self) -> list[Observation]:
        """Impute final scores of pruned runs from their gap to the best paired run."""
        seen = []
        for trial in self.counted():
            best = self.rival_of(trial) if trial.stopped == "pruned" else None
            if (
                best is not None
                and best.observation is not None
                and best.curve is not None
                and trial.x is not None
            ):
                seen.append(impute(trial.x, trial.curve or [], best.observation, best.curve))
        return [observation for observation in seen if observation is not None]

    def pruned(self) -> list[tuple[int | None, float]]:
        """Return (rank, log2 rate) of the pruned trials. Runs that ran out of memory are not among
        them.
        """
        ended = [t for t in self.counted() if t.observation is None and t.stopped != "memory"]
        return [(t.rank, t.x) for t in ended if t.x is not None]

    def rival_of(self, trial: TrialRecord) -> TrialRecord | None:
        """Return the best finished run of a trial's rank and seed."""
        return Trials(t for t in self if t.cell == trial.cell)._best()

    def curve_beside(self, cell: Cell) -> list[float]:
        """Return the curve of the best finished run of a cell, else of its seed, else of another
        seed, else [].
        """
        paired = Trials(t for t in self if t.seed == cell.seed)
        best = (
            Trials(t for t in paired if t.rank == cell.rank)._best()
            or paired._best()
            or self._best()
        )
        return [] if best is None else best.curve or []

    def _best(self) -> TrialRecord | None:
        ended = [t for t in self.counted() if t.state == TrialState.COMPLETE]
        return min(ended, key=lambda t: t.value if t.value is not None else math.inf, default=None)

    def usual_height(self) -> float:
        """Return the median over runs of the mean of their first values; 0 if there are none."""
        begun = [t.curve[:TAIL] for t in self if t.curve]
        means = [math.fsum(values) / len(values) for values in begun]
        return statistics.median([mean for mean in means if math.isfinite(mean)] or [0.0])

    def spent(self, steps: int) -> int:
        """Return the training steps of all trials. A running trial counts in full, a killed one up
        to its next report.

        steps: those of a whole run.
        """
        total = 0
        for trial in self:
            if not trial.state.is_finished():
                total += steps
            elif trial.curve is not None:
                total += len(trial.curve)
            elif trial.x is not None:
                total += min(steps, max(trial.reports, default=0) + interval(steps))
        return total

    def hopeless(self) -> list[str]:
        """Name the runs that all diverged, if they are many: all runs, or those of a rank, as "12
        runs of rank 4".
        """
        seen = self.counted().observations()
        bad = diverged(seen)
        groups = {"": bad}
        for o, lost in zip(seen, bad, strict=True):
            of = " of full finetuning" if o.rank is None else f" of rank {o.rank}"
            groups.setdefault(of, []).append(lost)
        return [
            f"{len(lost)} runs{of}"
            for of, lost in groups.items()
            if len(lost) >= _HOPELESS and all(lost)
        ]

    def unsteady(self) -> Cell | None:
        """Return a cell with two runs whose first values differ, although these do not depend on
        the rate.
        """
        first: dict[Cell, float] = {}
        for trial in self.counted():
            if not trial.curve:
                continue
            start = first.setdefault(trial.cell, trial.curve[0])
            if not math.isclose(start, trial.curve[0], rel_tol=_SAME, abs_tol=1e-9):
                return trial.cell
        return None

    def tensors(self, steps: int) -> dict[str, npt.NDArray[Any]]:
        """Return `Recipe.tensors`: each trial's rank (0: full finetuning), seed, rate, score, end,
        steps and curve.

        Curves are padded with NaN, to the steps of a whole run. A pruned run has the score NaN.
        """
        rows = [(t, t.x, t.curve or [], t.observation) for t in self.counted() if t.x is not None]
        lost = iter(diverged([seen for *_, seen in rows if seen]))
        curves = np.full((len(rows), steps), math.nan, np.float32)
        for row, (_, _, curve, _) in zip(curves, rows, strict=True):
            row[: len(curve)] = curve
        whole, double = np.int64, np.float64
        return {
            "rank": np.array([t.rank or 0 for t, *_ in rows], whole),
            "seed": np.array([t.seed for t, *_ in rows], whole),
            "lr": np.array([2.0**x for _, x, _, _ in rows], double),
            "own_lr": np.array(
                [math.nan if t.own_lr is None else t.own_lr for t, *_ in rows], double
            ),
            "value": np.array([seen.value if seen else math.nan for *_, seen in rows], double),
            "diverged": np.array([seen is not None and next(lost) for *_, seen in rows], bool),
            "pruned": np.array([seen is None for *_, seen in rows], bool),
            "steps": np.array([len(curve) for _, _, curve, _ in rows], whole),
            "curve": curves,
        }


def interval(steps: int) -> int:
    """Return the number of steps between two reports of a run."""
    return max(1, steps // _REPORTS)


def is_flat(trials: Iterable[TrialRecord]) -> bool:
    """Return whether the runs show nothing: none fell below its start, and all scores of a rank and
    seed agree.
    """
    first: dict[Cell, float] = {}
    ended = [(t.cell, t.observation) for t in trials if t.observation is not None]
    return all(
        o.tail >= o.start and math.isclose(o.value, first.setdefault(cell, o.value), rel_tol=1e-6)
        for cell, o in ended
        if math.isfinite(o.value + o.tail)
    )
