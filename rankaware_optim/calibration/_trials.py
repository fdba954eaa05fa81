"""This module converts the Optuna trials of a calibration to typed records. Other
modules read the results of trials only from these records.
"""

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

# The name of the only parameter of an Optuna trial: the base-2 logarithm of the base
# learning rate in the reference configuration
PARAMETER = "log2_lr"
# How a run ended before its last step: "" if it took all its steps, "pruned" if it was stopped
# because it was far behind another run, "memory" if it ran out of memory.
End = Literal["", "diverged", "pruned", "memory"]


class Setting(NamedTuple):
    """The LoRA rank and the random seed of a training run. In full finetuning, the rank
    is None.

    Runs with the same rank and seed differ only in their learning rate.
    """

    rank: int | None
    seed: int


@dataclass(frozen=True)
class Build:
    """Describes the model and the optimizer that a trial of a calibration has built.

    The model of the first trial is the reference configuration of the whole
    calibration.

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
    """The typed record of a single training run, which is stored as an Optuna trial.

    The fields of this class contain the number, state, parameter and user attributes of
    the Optuna trial. The names of the fields of this class are part of the storage
    format. If you rename a field of this class, increase the schema number in
    `_study.py`. Fields whose values are not known yet are None.

    Args:
        rank, seed: see `Setting`.
        x: log2 of the base learning rate.
        own_lr: the learning rate of the model's most common A matrices, or of its whole weights in
            full finetuning.
        curve: the values that the loop yielded.
        score: the score that the loop returned, or None if it did not return a score.
        end: how the run ended before its last step.
        why: why the run was stopped early, in words.
        warmup: the fraction of the steps over which the learning rate rose.
        peak_lr: the highest base learning rate that the optimizer used, if the run took all steps.
        heartbeat: a number that grows while the run's worker lives.
        made_with: see the function of this name.
        build: a description of the model and the optimizer.
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
        """Convert an Optuna trial to a `Run`.

        Raises:
            msgspec.ValidationError: the trial contains an invalid value.
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
        """The base learning rate of this run, or None if the search has not chosen it
        yet.
        """
        return None if self.x is None else 2.0**self.x

    @property
    def peak_share(self) -> float | None:
        """The highest learning rate that the run used, divided by its base learning rate."""
        if self.lr is None or self.peak_lr is None:
            return None
        return self.peak_lr / self.lr

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.build is None else self.build.settings

    @property
    def value(self) -> float:
        """The score of the training run, which is infinite if the run diverged or has
        no score.
        """
        return math.inf if self.observation is None else self.observation.value

    @cached_property
    def observation(self) -> Observation | None:
        """The learning rate, score and noise of the run, in the form that the fit uses.

        This property is None if the run was stopped early or ran out of memory.
        """
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
    """A tuple of the training runs of a study, with methods that select and compare
    runs.
    """

    def counted(self) -> Trials:
        """Return the training runs that were completed, diverged or were stopped
        early.
        """
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return Trials(run for run in self if run.state in ended)

    def running(self) -> Trials:
        """Return the training runs that have not ended."""
        return Trials(run for run in self if run.state == TrialState.RUNNING)

    def at(self, *ranks: int | None) -> Trials:
        """Return the training runs that have one of the given LoRA ranks."""
        return Trials(run for run in self if run.rank in ranks)

    def observations(self) -> list[Observation]:
        """Return the learning rates and scores of all training runs that finished or
        diverged.
        """
        seen = (run.observation for run in self.counted())
        return [each for each in seen if each is not None]

    def evidence(self) -> list[Observation]:
        """Return the learning rate and score of each finished run, and an estimate of
        the score for each run that was stopped early.

        The estimated score is based on a comparison of the stopped run with the best
        run of the same rank and seed. The difference between the losses of the two runs
        is assumed to stay the same until the end of training.
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
        """Return the base-2 logarithms of the learning rates of all runs that did not
        run out of memory.
        """
        # running out of memory has nothing to do with the learning rate
        fits = (run for run in self if run.end != "memory")
        return [run.x for run in fits if run.x is not None]

    def pruned(self) -> list[float]:
        """Return the base-2 logarithms of the learning rates of runs that were stopped early."""
        return Trials(run for run in self.counted() if run.observation is None).rates()

    def best_of(self, setting: Setting) -> Run | None:
        """Of all finished runs with a given rank and seed, return the run with the
        lowest score.
        """
        whole = [run for run in self if run.state == TrialState.COMPLETE]
        of_setting = [run for run in whole if run.setting == setting]
        return min(of_setting, key=lambda run: run.value, default=None)

    @property
    def warmup(self) -> float:
        """The longest warm-up of the learning rate in any run, as a fraction of the
        run's steps.
        """
        return max((run.warmup for run in self), default=0.0)

    # --- what they were built with ----------------------------------------------------------------

    def settings_in_force(self) -> dict[str, Any]:
        """Return the optimizer settings that have the same value in all trials,
        including default values.
        """
        return without_conflicts(run.settings for run in self)

    def other_rates(self) -> dict[str, Any]:
        """Return a dict with the learning rates of all parameters that are not LoRA
        matrices.

        The returned dict leaves out learning rates that differ between trials.
        """
        return without_conflicts(run.settings.get("other rates", {}) for run in self)

    def models(self) -> list[Reference]:
        """Return the configuration (rank, alpha and width) of each model that a trial
        has built.
        """
        return [run.build.reference for run in self if run.build]

    # --- what may be wrong with them --------------------------------------------------------------

    def spread(self) -> float:
        """Return the largest difference between the scores of two runs with the same
        rank and seed.

        The result is infinite if a run diverged or has no score, or if every run has a
        different rank or seed.
        """
        scores: dict[Setting, list[float]] = {}
        for run in self:
            scores.setdefault(run.setting, []).append(run.value)
        spreads = [max(each) - min(each) for each in scores.values() if len(each) > 1]
        is_whole = all(math.isfinite(run.value) for run in self)
        return max(spreads) if spreads and is_whole else math.inf

    def differ_by_chance(self) -> bool:
        """Return whether the noise of the loss curves alone can explain the differences
        between the scores of the runs.

        The standard error of a score is computed from the noise of the loss curves. The
        computation assumes that each score is the mean of one tenth of a loss curve.
        """
        count = max(TAIL, len(self[0].curve) // 10)
        error = usual_noise(self.observations()) / math.sqrt(count)
        return self.spread() <= ALIKE_ERRORS * error

    def changes(self) -> list[int]:
        """Return for each run whether its loss fell (-1), rose (1) or stayed level (0).

        The runs are sorted by increasing learning rate. If the user's `train` function
        returned scores, the list is empty, because the search minimises the scores and
        not the losses.
        """
        if any(run.returned for run in self.observations()):
            return []
        changes = [(run.x, turn_of(run.curve)) for run in self if run.x and run.curve]
        return [change for _, change in sorted(changes)]

    def scores_oppose_losses(self) -> bool:
        """Return whether the runs with better scores tend to have higher final losses.

        If there are only four or five runs, their order by score must be the exact
        reverse of their order by loss. A nearly reversed order often occurs by chance.
        """
        scored = self._scored()
        if len(scored) < LEAST_RANKED:
            return False
        # Sorting the sort order gives the ranks of the values. The correlation of the ranks is
        # Spearman's, which ignores the different scales of scores and losses.
        by_score = np.argsort(np.argsort([run.value for run in scored]))
        by_curve = np.argsort(np.argsort([run.tail for run in scored]))
        correlation = float(np.corrcoef(by_score, by_curve)[0, 1])
        enough = OPPOSED if len(scored) >= RANKED else -1.0
        return correlation <= enough + 1e-9

    def best_score_learned_nothing(self) -> bool:
        """Return whether the training loss hardly fell in the run with the lowest
        score.

        The result is True only if the loss clearly fell in some other run.
        """
        scored = self._scored()
        if len(scored) < 2:
            return False
        best = min(scored, key=lambda run: run.value)
        most = max(run.start - run.tail for run in scored)
        has_learned = most > CLEAR * usual_noise(scored)
        return has_learned and best.start - best.tail < LITTLE * most

    def _scored(self) -> list[Observation]:
        """Return the observations of the runs for which the user's `train` function
        returned a finite score.
        """
        returned = [run for run in self.observations() if run.returned]
        return [run for run in returned if math.isfinite(run.value)]

    def unsteady(self) -> Setting | None:
        """Return a rank and seed at which two runs have different losses at the first
        step, or None.

        The loss at the first step of a run does not depend on the learning rate. If
        these first losses differ, the training loop uses random numbers that the seed
        does not control.
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
