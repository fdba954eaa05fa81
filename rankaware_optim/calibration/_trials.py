"""The trials of a study as typed records. All reads of Optuna's trials are here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta
from optuna.trial import FrozenTrial, TrialState

from .._checks import RANGES
from ..fitting import TAIL, Observation, diverged, impute
from ._constants import HOPELESS, MOST_OCTAVES, REPORTS

# Optuna's name of a trial's parameter: log2 of the base rate in reference coordinates
PARAMETER = "log2_lr"


def _within(name: str) -> Meta:
    low, high = RANGES[name]
    return Meta(ge=low, le=high)


class Setting(NamedTuple):
    """What runs share that differ only in their rate: rank (None for full finetuning) and seed."""

    rank: int | None
    seed: int


@dataclass(frozen=True)
class TrialRecord:
    """An Optuna trial: its number, state, rate and reports, and its user attributes.

    Stored studies have the attributes' names, so do not rename them. A value is None until it is
    known.

    rank, seed: see `Setting`. x: log2 of the base rate. reports: recent mean by step. heartbeat:
    counts up while its worker lives. made_with: see that function. built: see `built_with`. own_lr:
    the rate of the model's most common A factors, or of its whole weights. stopped: "pruned" or
    "memory" if the run has no final score.
    """

    rank: Annotated[int, _within("rank")] | None = None
    seed: Annotated[int, _within("seed")] = 0
    number: int = -1
    state: TrialState = TrialState.RUNNING
    x: Annotated[float, Meta(ge=-MOST_OCTAVES, le=MOST_OCTAVES)] | None = None
    reports: Mapping[int, float] = field(default_factory=dict)
    heartbeat: int | None = None
    made_with: dict[str, Any] = field(default_factory=lambda: {"schema": None})
    built: dict[str, Any] | None = None
    own_lr: Annotated[float, _within("trial_lr")] | None = None
    curve: list[float] = field(default_factory=list)
    stopped: str = ""
    observation: Observation | None = None
    warmup: Annotated[float, _within("share")] = 0.0

    @classmethod
    def read(cls, trial: FrozenTrial) -> TrialRecord:
        """Return the record of an Optuna trial.

        Raises:
            msgspec.ValidationError: it has an impossible value.
        """
        values = {
            **trial.user_attrs,
            "number": trial.number,
            "state": trial.state,
            "x": trial.params.get(PARAMETER),
            "reports": trial.intermediate_values,
        }
        return msgspec.convert(values, cls)

    @property
    def setting(self) -> Setting:
        return Setting(self.rank, self.seed)


class Trials(tuple[TrialRecord, ...]):
    """The trials of a study, of all workers, or some of them."""

    def counted(self) -> Trials:
        """Return the trials that count: those completed, diverged or pruned."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return Trials(t for t in self if t.state in ended)

    def running(self, but: int | None = None) -> Trials:
        """Return the trials that run, but for that of a number."""
        running = TrialState.RUNNING
        return Trials(t for t in self if t.state == running and t.number != but)

    def scored(self) -> list[tuple[TrialRecord, Observation]]:
        """Return the trials that ran to their end or diverged, with their observations."""
        return [(t, t.observation) for t in self.counted() if t.observation is not None]

    def observations(self) -> list[Observation]:
        """Return the observations of trials that ran to their end or diverged."""
        return [observation for _, observation in self.scored()]

    def evidence(self) -> list[Observation]:
        """Return the input of the fit: observations, and final scores of pruned runs, imputed from
        their gap to the best paired run.
        """
        evidence = self.observations()
        for trial in self.counted():
            best = self.best_of(trial.setting)
            if trial.stopped != "pruned" or trial.x is None or best is None:
                continue
            assert best.observation is not None
            score = impute(trial.x, trial.curve, best.observation, best.curve)
            if score is not None:
                evidence.append(score)
        return evidence

    def at(self, *ranks: int | None) -> Trials:
        """Return the trials of some ranks."""
        return Trials(t for t in self if t.rank in ranks)

    def rates(self) -> list[float]:
        """Return log2 of the rates. A run that ran out of memory tells nothing of its rate."""
        return [t.x for t in self if t.x is not None and t.stopped != "memory"]

    def pruned(self) -> list[float]:
        """Return log2 of the rates of the pruned trials."""
        return Trials(t for t in self.counted() if t.observation is None).rates()

    def best_of(self, setting: Setting) -> TrialRecord | None:
        """Return the best finished run of a rank and seed."""
        return Trials(t for t in self if t.setting == setting)._best()

    def curve_beside(self, setting: Setting) -> list[float]:
        """Return the curve of the best finished run of a rank and seed, else of the seed, else of
        another seed, else [].
        """
        of_seed = Trials(t for t in self if t.seed == setting.seed)
        best = self.best_of(setting) or of_seed._best() or self._best()
        return [] if best is None else best.curve

    def _best(self) -> TrialRecord | None:
        ended = [pair for pair in self.scored() if pair[0].state == TrialState.COMPLETE]
        best, _ = min(ended, key=lambda pair: pair[1].value, default=(None, None))
        return best

    def usual_height(self) -> float:
        """Return the median over runs of the mean of their first values; 0 if there are none."""
        means = [statistics.fmean(t.curve[:TAIL]) for t in self if t.curve]
        return statistics.median(list(filter(math.isfinite, means)) or [0.0])

    def spent(self, steps: int) -> int:
        """Return the training steps of all trials. A running trial counts in full, a killed one up
        to its next report.

        steps: those of a whole run.
        """
        total = 0
        for trial in self:
            if not trial.state.is_finished():
                total += steps
            elif trial.curve:
                total += len(trial.curve)
            elif trial.x is not None and trial.state == TrialState.FAIL:
                total += min(steps, max(trial.reports, default=0) + interval(steps))
        return total

    def hopeless(self) -> list[str]:
        """Name the runs that all diverged, if they are many: all runs, or those of a rank, as "12
        runs of rank 4".
        """
        lost = self.diverged()
        groups: dict[str, list[bool]] = {}
        for trial, _ in self.scored():
            for name in ("runs", f"runs of {rank_words(trial.rank)}"):
                groups.setdefault(name, []).append(trial.number in lost)
        return [
            f"{len(runs)} {name}"
            for name, runs in groups.items()
            if len(runs) >= HOPELESS and all(runs)
        ]

    def diverged(self) -> set[int]:
        """Return the numbers of the trials that diverged."""
        scored = self.scored()
        bad = diverged([observation for _, observation in scored])
        return {trial.number for trial, _ in compress(scored, bad)}


def interval(steps: int) -> int:
    """Return the number of steps between two reports of a run."""
    return max(1, steps // REPORTS)


def rank_words(rank: int | None) -> str:
    return "full finetuning" if rank is None else f"rank {rank}"
