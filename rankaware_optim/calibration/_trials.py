"""The stored runs of a study, as typed records. Only this module reads Optuna's trials."""

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
    CLEAR,
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
from ._constants import (
    ALIKE_ERRORS,
    LEAST_RANKED,
    LITTLE,
    MOST_OCTAVES,
    OPPOSED,
    RANKED,
    SAME,
)

# Optuna's name of a trial's parameter: log2 of the base rate in reference coordinates
PARAMETER = "log2_lr"
# How a run ended before its last step: "" if it took all its steps, "pruned" if it was stopped
# because it was far behind another run, "memory" if it ran out of memory.
End = Literal["", "diverged", "pruned", "memory"]


class Setting(NamedTuple):
    """The rank (None for full finetuning) and the seed of a run. Runs with the same setting differ
    only in their learning rate.
    """

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

    The fields are the trial's number, state and parameter, and its user attributes. Stored studies
    contain the fields' names: whoever renames one raises the schema in `_study.py`. A value is None
    until it is known.

    Args:
        rank, seed: see `Setting`.
        x: log2 of the base learning rate.
        own_lr: the learning rate of the model's most common A matrices, or of its whole weights in
            full finetuning.
        curve: the values that the loop yielded.
        score: the value that the loop returned, None if it returned none.
        end: how the run ended before its last step.
        why: why the run was stopped early, in words.
        warmup: the share of the steps over which the learning rate rose.
        peak_lr: the highest base learning rate that the optimizer used, if the run took all steps.
        heartbeat: a number that grows while the run's worker lives.
        made_with: see the function of this name.
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
    why: str = ""
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
        """The score; infinite for a run that diverged or has no score."""
        return math.inf if self.observation is None else self.observation.value

    @cached_property
    def observation(self) -> Observation | None:
        """The run as the fit takes it, or None if it was stopped early or ran out of memory."""
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
        """Return the observations of the runs that took all their steps or diverged."""
        seen = (run.observation for run in self.counted())
        return [each for each in seen if each is not None]

    def evidence(self) -> list[Observation]:
        """Return the input of the fit: the observations, and an estimated final score for each run
        that was stopped early.

        The estimate adds the run's gap to the best run of its rank and seed, when it was stopped,
        to the score of that run.
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
        """Return log2 of the learning rates, without runs that ran out of memory, because they say
        nothing about their learning rate.
        """
        fits = (run for run in self if run.end != "memory")
        return [run.x for run in fits if run.x is not None]

    def pruned(self) -> list[float]:
        """Return log2 of the learning rates of the runs that were stopped early."""
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
        """Return the optimizer settings that all trials share, defaults included."""
        return without_conflicts(run.settings for run in self)

    def other_rates(self) -> dict[str, Any]:
        """Return the learning rates that parameters beside the LoRA matrices had in all trials."""
        return without_conflicts(run.settings.get("other rates", {}) for run in self)

    def models(self) -> list[Reference]:
        """Return the configurations of the models."""
        return [run.build.reference for run in self if run.build]

    # --- what may be wrong with them --------------------------------------------------------------

    def spread(self) -> float:
        """Return the largest difference between two scores of the same rank and seed.

        It is infinite if a run has no score, or if no two runs share their rank and seed.
        """
        scores: dict[Setting, list[float]] = {}
        for run in self:
            scores.setdefault(run.setting, []).append(run.value)
        spreads = [max(each) - min(each) for each in scores.values() if len(each) > 1]
        is_whole = all(math.isfinite(run.value) for run in self)
        return max(spreads) if spreads and is_whole else math.inf

    def differ_by_chance(self) -> bool:
        """Return whether the noise of the curves explains how much the scores differ.

        Each score is taken as the mean of a tenth of its curve.
        """
        count = max(TAIL, len(self[0].curve) // 10)
        error = usual_noise(self.observations()) / math.sqrt(count)
        return self.spread() <= ALIKE_ERRORS * error

    def changes(self) -> list[int]:
        """Return whether each curve fell (-1), rose (1) or stayed (0), by increasing learning rate.

        The list is empty if scores were returned, because the curves are not minimised then.
        """
        if any(run.returned for run in self.observations()):
            return []
        changes = [(run.x, turn_of(run.curve)) for run in self if run.x and run.curve]
        return [change for _, change in sorted(changes)]

    def scores_oppose_losses(self) -> bool:
        """Return whether the returned scores order the runs against their final losses.

        With four or five runs the order must be exactly reversed: chance alone often reverses most
        of so short an order.
        """
        scored = self._scored()
        if len(scored) < LEAST_RANKED:
            return False
        by_score = np.argsort(np.argsort([run.value for run in scored]))
        by_curve = np.argsort(np.argsort([run.tail for run in scored]))
        correlation = float(np.corrcoef(by_score, by_curve)[0, 1])
        enough = OPPOSED if len(scored) >= RANKED else -1.0
        return correlation <= enough + 1e-9

    def best_score_learned_nothing(self) -> bool:
        """Return whether the lowest score belongs to a run whose loss rose or hardly fell, while
        the loss of another run fell.
        """
        scored = self._scored()
        if len(scored) < 2:
            return False
        best = min(scored, key=lambda run: run.value)
        most = max(run.start - run.tail for run in scored)
        has_learned = most > CLEAR * usual_noise(scored)
        return has_learned and best.start - best.tail < LITTLE * most

    def _scored(self) -> list[Observation]:
        """Return the observations with a returned score that is finite."""
        returned = [run for run in self.observations() if run.returned]
        return [run for run in returned if math.isfinite(run.value)]

    def unsteady(self) -> Setting | None:
        """Return a rank and seed of which two runs begin with different values, or None.

        A first value does not depend on the learning rate. So if two differ, the loop draws random
        numbers that do not come from the seed.
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
