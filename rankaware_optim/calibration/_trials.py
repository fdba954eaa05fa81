"""What the trials of a study say: a typed record of each, read from Optuna and written to it here alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
from optuna.trial import FrozenTrial, TrialState

from .._checks import is_number
from ..recipe import TAIL, Place, carried_on
from .fit import Observation, diverged

PARAMETER = "log2_lr"  # what Optuna calls the one number of a trial: log2 of the base rate, reference coordinates
_REPORTS = 10  # reports of a run to the storage, where pruners read them
SCHEMA = 1  # of what is stored, raised where an earlier version would misread it
_SAME = 1e-3  # relative: how well the first values of two runs of one rank and seed must agree


class Cell(NamedTuple):
    """What is paired across rates: the rank, None for full finetuning, the seed of draws and data, steps and batch.

    The last two are None where the study has one: then they are the target's.
    """

    rank: int | None
    seed: int
    steps: int | None = None
    batch: float | None = None

    @property
    def place(self) -> Place:
        return Place(self.rank, self.steps, self.batch)


@dataclass(frozen=True)
class Owner:
    """The process that runs a trial: its host, that host's boot, its number and start, and a token of the trial."""

    host: str
    boot: str
    pid: int
    started: str
    token: str


@dataclass(frozen=True)
class TrialRecord:
    """What a trial is and did. A field is None until it is known.

    number, state, x (log2 of the base rate), value and reports (recent mean by step) are Optuna's own. All others are
    the trial's user attributes in Optuna, under the names of the fields: stored studies have these names. An
    observation's steps and batch are those of the record, and are stored there.

    steps, batch: planned; None where the study has one of them.
    heartbeat: counts signs of life, for other hosts. retry_of: the number of the killed trial that this one repeats.
    estimate: log2 of the rate that was thought best for the rank before the trial. built: what its model and settings
    were. own_lr: the rate of the model's most common A factors, or of its whole weights.
    stopped: "pruned" or "memory" where the run says nothing of its end.
    """

    rank: int | None = None
    seed: int = 0
    steps: int | None = None
    batch: float | None = None
    owner: Owner | None = None
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
        """What Optuna holds of a trial."""
        attributes = trial.user_attrs
        kept = {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
        if "owner" in kept:
            kept["owner"] = Owner(**kept["owner"])
        if "observation" in kept:
            own = {name: kept[name] for name in _TASK if name in kept}
            kept["observation"] = Observation(**{**kept["observation"], **own})
        x, reports = trial.params.get(PARAMETER), trial.intermediate_values
        return cls(**kept, number=trial.number, state=trial.state, x=x, value=trial.value, reports=reports)

    def attributes(self) -> dict[str, Any]:
        """What is stored as user attributes: rank and seed, and what else is known."""
        return {"rank": self.rank, "seed": self.seed, **self.changes_since(TrialRecord())}

    def changes_since(self, before: TrialRecord) -> dict[str, Any]:
        """The user attributes that are others than `before`."""
        old, new = asdict(before), asdict(self)
        for name in _TASK:
            (new["observation"] or {}).pop(name, None)
            (old["observation"] or {}).pop(name, None)
        return {name: new[name] for name in _ATTRIBUTES if new[name] != old[name]}

    @property
    def cell(self) -> Cell:
        return Cell(self.rank, self.seed, self.steps, self.batch)

    @property
    def place(self) -> Place:
        return self.cell.place


def is_typed(value: Any, hint: Any) -> bool:
    """Whether a value from a storage is of a hint's type, inside as well; a float may be a whole number."""
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
        return all(is_typed(getattr(value, name), inner) for name, inner in get_type_hints(kind).items())
    if isinstance(value, Mapping):
        return all(is_typed(key, parts[0]) and is_typed(item, parts[1]) for key, item in value.items())
    return kind is not list or all(is_typed(item, parts[0]) for item in value)


_TASK = ("steps", "batch")
_OPTUNAS_OWN = {"number", "state", "x", "value", "reports"}
_ATTRIBUTES = [f.name for f in fields(TrialRecord) if f.name not in _OPTUNAS_OWN]


class Trials(tuple[TrialRecord, ...]):
    """The trials of a study, of all workers, or some of them."""

    @classmethod
    def read(cls, trials: Iterable[FrozenTrial], cell: Cell | None = None) -> Trials:
        """What Optuna holds of these trials, or of those of one cell among them."""
        pairs = ((trial, trial.user_attrs) for trial in trials)
        mine = (trial for trial, kept in pairs if cell in (None, _cell_of(kept)))
        return cls(map(TrialRecord.read, mine))

    def counted(self) -> Trials:
        """Those that count: complete, or stopped because they diverged or a pruner said so."""
        return Trials(t for t in self if t.state in (TrialState.COMPLETE, TrialState.PRUNED))

    def running(self, but: int | None = None) -> Trials:
        return Trials(t for t in self if t.state == TrialState.RUNNING and t.number != but)

    def observations(self) -> list[Observation]:
        """What those showed that ran to their end or diverged."""
        return [t.observation for t in self.counted() if t.observation is not None]

    def evidence(self) -> list[Observation]:
        """What the fit sees: what trials showed, and what those that were stopped would have."""
        return [*self.observations(), *self.carried()]

    def carried(self) -> list[Observation]:
        """What the fit makes of runs that were stopped as worse than the best run of their rank and seed."""
        seen = []
        for trial in self.counted():
            best = self.rival_of(trial) if trial.stopped == "pruned" else None
            if best is not None and best.observation is not None and best.curve is not None and trial.x is not None:
                seen.append(carried_on(trial.x, trial.curve or [], best.observation, best.curve))
        return [observation for observation in seen if observation is not None]

    def pruned(self) -> list[tuple[Place, float]]:
        """(place, log2 rate) of those that were stopped as worse than others, by how much is not known.

        A run that ran out of memory says nothing of its rate.
        """
        ended = [t for t in self.counted() if t.observation is None and t.stopped != "memory"]
        return [(t.place, t.x) for t in ended if t.x is not None]

    def rival_of(self, trial: TrialRecord) -> TrialRecord | None:
        """The best finished run of a trial's rank and seed."""
        return Trials(t for t in self if t.cell == trial.cell)._best()

    def curve_beside(self, cell: Cell) -> list[float]:
        """The curve of the best finished run of a cell, else of its seed, else of another; empty where none ended.

        All are of the cell's own steps and batch.
        """
        like = Trials(t for t in self if t.cell[2:] == cell[2:])
        paired = Trials(t for t in like if t.seed == cell.seed)
        best = Trials(t for t in paired if t.rank == cell.rank)._best() or paired._best() or like._best()
        return [] if best is None else best.curve or []

    def _best(self) -> TrialRecord | None:
        ended = [t for t in self if t.state == TrialState.COMPLETE]
        return min(ended, key=lambda t: t.value if t.value is not None else math.inf, default=None)

    def usual_height(self) -> float:
        """The median over runs of the mean of their first values; 0 where none ran."""
        begun = [t.curve[:TAIL] for t in self if t.curve]
        means = [math.fsum(values) / len(values) for values in begun]
        return statistics.median([mean for mean in means if math.isfinite(mean)] or [0.0])

    def spent(self, steps: int) -> int:
        """Training steps of all; a running trial is counted whole, a killed one up to its next report.

        steps: of those that do not say their own.
        """
        total = 0
        for trial in self:
            whole = trial.steps or steps
            if not trial.state.is_finished():
                total += whole
            elif trial.curve is not None:
                total += len(trial.curve)
            elif trial.x is not None:
                total += min(whole, max(trial.reports, default=0) + interval(whole))
        return total

    def unsteady(self) -> Cell | None:
        """A rank and seed of which two runs began with different values, though no rate had mattered yet."""
        first: dict[Cell, float] = {}
        for trial in self.counted():
            if not trial.curve:
                continue
            start = first.setdefault(trial.cell, trial.curve[0])
            if not math.isclose(start, trial.curve[0], rel_tol=_SAME, abs_tol=1e-9):
                return trial.cell
        return None

    def tensors(self, steps: int) -> dict[str, npt.NDArray[Any]]:
        """Every trial's rank (0: full finetuning), seed, base rate, score, fate, steps and values, padded with NaN.

        A pruned run has no score: NaN. Where the study has several lengths or batches, those that were planned too.
        """
        rows = [(t, t.x, t.curve or [], t.observation) for t in self.counted() if t.x is not None]
        lost = iter(diverged([seen for *_, seen in rows if seen]))
        curves = np.full((len(rows), steps), math.nan, np.float32)
        for row, (_, _, curve, _) in zip(curves, rows, strict=True):
            row[: len(curve)] = curve
        whole, double = np.int64, np.float64
        planned = {
            "planned_steps": np.array([t.steps or 0 for t, *_ in rows], whole),
            "planned_batch": np.array([t.batch or 0.0 for t, *_ in rows], double),
        }
        return {
            **{name: values for name, values in planned.items() if values.any()},
            "rank": np.array([t.rank or 0 for t, *_ in rows], whole),
            "seed": np.array([t.seed for t, *_ in rows], whole),
            "lr": np.array([2.0**x for _, x, _, _ in rows], double),
            "own_lr": np.array([math.nan if t.own_lr is None else t.own_lr for t, *_ in rows], double),
            "value": np.array([seen.value if seen else math.nan for *_, seen in rows], double),
            "diverged": np.array([seen is not None and next(lost) for *_, seen in rows], bool),
            "pruned": np.array([seen is None for *_, seen in rows], bool),
            "steps": np.array([len(curve) for _, _, curve, _ in rows], whole),
            "curve": curves,
        }


def _cell_of(kept: Mapping[str, Any]) -> Cell:
    return Cell(kept.get("rank"), kept.get("seed", 0), *(kept.get(name) for name in _TASK))


def interval(steps: int) -> int:
    """Steps between two reports of a run."""
    return max(1, steps // _REPORTS)


def is_flat(seen: Sequence[Observation]) -> bool:
    """Whether nothing moved: no run fell below its start, and all scores agree."""
    ended = [o for o in seen if math.isfinite(o.value + o.tail)]
    values = [o.value for o in ended]
    return all(o.tail >= o.start for o in ended) and all(math.isclose(v, values[0], rel_tol=1e-6) for v in values)
