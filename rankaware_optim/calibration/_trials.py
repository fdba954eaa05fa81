"""The runs of a study as typed records. All reads of Optuna's trials are here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from optuna.trial import FrozenTrial, TrialState

from .._checks import limits
from .._types import Reference
from ..fitting import (
    TAIL,
    Observation,
    impute,
    loss_at_start,
    noise_of,
    recent_mean,
    turn_of,
    usual_noise,
)
from ..recipe import without_conflicts
from ._constants import ALIKE_ERRORS, LEAST_RANKED, MOST_OCTAVES, SAME

# Optuna's name of a trial's parameter: log2 of the base rate in reference coordinates
PARAMETER = "log2_lr"
# How a run ended before its last step. "memory": it ran out of memory.
End = Literal["", "diverged", "pruned", "memory"]


class Setting(NamedTuple):
    """What runs share that differ only in their rate: rank (None for full finetuning) and seed."""

    rank: int | None
    seed: int


@dataclass(frozen=True)
class Build:
    """What a trial has built. The first trial's model is the reference of the whole study.

    Args:
        reference: the model's configuration.
        full_fan_in: the fan-in on which full finetuning's learning rate depends.
        layers: the mean fan-in of the adapted layers, by name pattern.
        settings: the optimizer's settings, see `settings_in_force`.
    """

    reference: Reference
    full_fan_in: float
    layers: Mapping[str, float]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of the training loop, as an Optuna trial keeps it.

    Its fields are the trial's number, state and rate, and its user attributes. Stored studies have
    their names, so do not rename them. A value is None until it is known.

    Args:
        rank, seed: see `Setting`.
        x: log2 of the base rate.
        own_lr: the rate of the model's most common A factors, or of its whole weights.
        curve: the values that the loop yielded.
        score: the value that it returned, None if it returned none.
        end: how it ended before its last step.
        warmup: the share of the steps over which its rate rose.
        peak_lr: the highest base learning rate that its optimizer used, if it took all steps.
        heartbeat: counts up while its worker lives.
        made_with: see this function.
        build: what it has built.
    """

    rank: Annotated[int, limits("rank")] | None = None
    seed: Annotated[int, limits("seed")] = 0
    number: int = -1
    state: TrialState = TrialState.RUNNING
    x: Annotated[float, Meta(ge=-MOST_OCTAVES, le=MOST_OCTAVES)] | None = None
    own_lr: Annotated[float, limits("trial_lr")] | None = None
    curve: list[float] = field(default_factory=list)
    score: float | None = None
    end: End = ""
    warmup: Annotated[float, limits("share")] = 0.0
    peak_lr: Annotated[float, Meta(ge=0.0)] | None = None
    heartbeat: int | None = None
    made_with: dict[str, Any] = field(default_factory=lambda: {"schema": None})
    build: Build | None = None

    @classmethod
    def read(cls, trial: FrozenTrial) -> Run:
        """Return the record of an Optuna trial.

        Raises:
            msgspec.ValidationError: it has an impossible value.
        """
        values = {
            **trial.user_attrs,
            "number": trial.number,
            "state": trial.state,
            "x": trial.params.get(PARAMETER),
        }
        return msgspec.convert(values, cls)

    @property
    def setting(self) -> Setting:
        return Setting(self.rank, self.seed)

    @property
    def lr(self) -> float | None:
        """The base learning rate that it tries."""
        return None if self.x is None else 2.0**self.x

    @property
    def peak_share(self) -> float | None:
        """The highest learning rate that it used, relative to the one that it tries."""
        if self.lr is None or self.peak_lr is None:
            return None
        return self.peak_lr / self.lr

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.build is None else self.build.settings

    @property
    def value(self) -> float:
        """The score, which is infinite for a run that diverged or has none."""
        return math.inf if self.observation is None else self.observation.value

    @cached_property
    def observation(self) -> Observation | None:
        """What the fit is given. None of a run that was pruned or ran out of memory."""
        if self.x is None or not self.curve or self.end in ("pruned", "memory"):
            return None
        score = recent_mean(self.curve) if self.score is None else self.score
        return Observation(
            self.rank,
            self.seed,
            x=self.x,
            value=math.inf if self.end else score,
            start=loss_at_start(self.curve),
            tail=recent_mean(self.curve),
            returned=self.score is not None,
            first=self.curve[0],
            noise=noise_of(self.curve),
        )


class Trials(tuple[Run, ...]):
    """The runs of a study, of all workers, or some of them."""

    def counted(self) -> Trials:
        """Return the runs that count: those completed, diverged or pruned."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return Trials(run for run in self if run.state in ended)

    def running(self) -> Trials:
        """Return the runs that have not ended."""
        return Trials(run for run in self if run.state == TrialState.RUNNING)

    def at(self, *ranks: int | None) -> Trials:
        """Return the runs of some ranks."""
        return Trials(run for run in self if run.rank in ranks)

    def observations(self) -> list[Observation]:
        """Return the observations of runs that came to their end or diverged."""
        seen = (run.observation for run in self.counted())
        return [each for each in seen if each is not None]

    def evidence(self) -> list[Observation]:
        """Return the input of the fit: observations, and final scores of pruned runs, imputed from
        their gap to the best paired run.
        """
        evidence = self.observations()
        for run in self.counted():
            best = self.best_of(run.setting)
            if run.end != "pruned" or run.x is None or best is None:
                continue
            assert best.observation is not None
            score = impute(run.x, run.curve, best.observation, best.curve)
            if score is not None:
                evidence.append(score)
        return evidence

    def rates(self) -> list[float]:
        """Return log2 of the rates. A run that ran out of memory tells nothing of its rate."""
        fits = (run for run in self if run.end != "memory")
        return [run.x for run in fits if run.x is not None]

    def pruned(self) -> list[float]:
        """Return log2 of the rates of the pruned runs."""
        return Trials(run for run in self.counted() if run.observation is None).rates()

    def best_of(self, setting: Setting) -> Run | None:
        """Return the best finished run of a rank and seed."""
        whole = [run for run in self if run.state == TrialState.COMPLETE]
        of_setting = [run for run in whole if run.setting == setting]
        return min(of_setting, key=lambda run: run.value, default=None)

    @property
    def warmup(self) -> float:
        """The largest share of the steps over which the learning rate of a run rose."""
        return max((run.warmup for run in self), default=0.0)

    # --- what they were built with ----------------------------------------------------------------

    def settings_in_force(self) -> dict[str, Any]:
        """Return the settings of all trials, defaults included, of the factors' groups."""
        return without_conflicts(run.settings for run in self)

    def other_rates(self) -> dict[str, Any]:
        """Return the rates of what trained beside the factors in all trials."""
        return without_conflicts(run.settings.get("other rates", {}) for run in self)

    def models(self) -> list[Reference]:
        """Return the configurations of the models."""
        return [run.build.reference for run in self if run.build]

    # --- what may be wrong with them --------------------------------------------------------------

    def spread(self) -> float:
        """Return by how much the scores of a rank and seed differ at most; infinity where one run
        has none, or each rank and seed has one run.
        """
        scores: dict[Setting, list[float]] = {}
        for run in self:
            scores.setdefault(run.setting, []).append(run.value)
        spreads = [max(each) - min(each) for each in scores.values() if len(each) > 1]
        is_whole = all(math.isfinite(run.value) for run in self)
        return max(spreads) if spreads and is_whole else math.inf

    def differ_by_chance(self) -> bool:
        """Return whether the scores differ by no more than the noise of the curves explains. Each
        is the mean of a tenth of its curve.
        """
        count = max(TAIL, len(self[0].curve) // 10)
        error = usual_noise(self.observations()) / math.sqrt(count)
        return self.spread() <= ALIKE_ERRORS * error

    def turns(self) -> list[int]:
        """Return whether each curve fell (-1), rose (1) or neither, from the lowest rate on. None
        where scores were returned, since the curves are not minimised.
        """
        if any(run.returned for run in self.observations()):
            return []
        turns = [(run.x, turn_of(run.curve)) for run in self if run.x and run.curve]
        return [turn for _, turn in sorted(turns)]

    def score_agreement(self) -> float:
        """Return the rank correlation of the returned scores and the ends of the curves; 1 if there
        are too few.
        """
        returned = [run for run in self.observations() if run.returned]
        runs = [run for run in returned if math.isfinite(run.value)]
        if len(runs) < LEAST_RANKED:
            return 1.0
        by_score = np.argsort(np.argsort([run.value for run in runs]))
        by_curve = np.argsort(np.argsort([run.tail for run in runs]))
        return float(np.corrcoef(by_score, by_curve)[0, 1])

    def unsteady(self) -> Setting | None:
        """Return a rank and seed with two runs whose first values differ, although these do not
        depend on the rate.
        """
        first: dict[Setting, float] = {}
        for run in self:
            if not run.curve:
                continue
            start = first.setdefault(run.setting, run.curve[0])
            if not math.isclose(start, run.curve[0], rel_tol=SAME, abs_tol=1e-9):
                return run.setting
        return None


def rank_words(rank: int | None) -> str:
    return "full finetuning" if rank is None else f"rank {rank}"
