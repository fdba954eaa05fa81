"""The runs of a study as typed records. All reads of Optuna's trials are here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import compress
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from msgspec import Meta
from optuna.trial import FrozenTrial, TrialState

from .._checks import limits
from ..errors import CalibrationError
from ..fitting import (
    TAIL,
    Observation,
    diverged,
    impute,
    loss_at_start,
    noise_of,
    recent_mean,
    turn_of,
    usual_noise,
)
from ..recipe import agreed, differences
from ._constants import (
    ALIKE_ERRORS,
    HOPELESS,
    LEAST_RANKED,
    MOST_OCTAVES,
    REPORTS,
    SAME,
)

# Optuna's name of a trial's parameter: log2 of the base rate in reference coordinates
PARAMETER = "log2_lr"
# How a run ended before its last step. "memory": it ran out of memory.
End = Literal["", "diverged", "pruned", "memory"]


class Setting(NamedTuple):
    """What runs share that differ only in their rate: rank (None for full finetuning) and seed."""

    rank: int | None
    seed: int


@dataclass(frozen=True)
class Run:
    """One run of the training loop, as an Optuna trial keeps it.

    Its fields are the trial's number, state, rate and reports, and its user attributes. Stored
    studies have their names, so do not rename them. A value is None until it is known.

    Args:
        rank, seed: see `Setting`.
        x: log2 of the base rate.
        own_lr: the rate of the model's most common A factors, or of its whole weights.
        curve: the values that the loop yielded.
        score: the value that it returned, None if it returned none.
        end: how it ended before its last step.
        warmup: the share of the steps over which its rate rose.
        reports: recent mean by step.
        heartbeat: counts up while its worker lives.
        made_with, built: what it was made with, see these functions.
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
    reports: Mapping[int, float] = field(default_factory=dict)
    heartbeat: int | None = None
    made_with: dict[str, Any] = field(default_factory=lambda: {"schema": None})
    built: dict[str, Any] | None = None

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
            "reports": trial.intermediate_values,
        }
        return msgspec.convert(values, cls)

    @property
    def setting(self) -> Setting:
        return Setting(self.rank, self.seed)

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
            stopped=bool(self.end),
            first=self.curve[0],
            noise=noise_of(self.curve),
        )


class Trials(tuple[Run, ...]):
    """The runs of a study, of all workers, or some of them."""

    def counted(self) -> Trials:
        """Return the runs that count: those completed, diverged or pruned."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        return Trials(run for run in self if run.state in ended)

    def running(self, but: int | None = None) -> Trials:
        """Return the runs that have not ended, but for that of a number."""
        running = (run for run in self if run.state == TrialState.RUNNING)
        return Trials(run for run in running if run.number != but)

    def scored(self) -> Trials:
        """Return the runs that came to their end or diverged."""
        return Trials(run for run in self.counted() if run.observation is not None)

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

    def at(self, *ranks: int | None) -> Trials:
        """Return the runs of some ranks."""
        return Trials(run for run in self if run.rank in ranks)

    def rates(self) -> list[float]:
        """Return log2 of the rates. A run that ran out of memory tells nothing of its rate."""
        fits = (run for run in self if run.end != "memory")
        return [run.x for run in fits if run.x is not None]

    def pruned(self) -> list[float]:
        """Return log2 of the rates of the pruned runs."""
        return Trials(t for t in self.counted() if t.observation is None).rates()

    def below(self, diverged: set[int]) -> list[Observation]:
        """Return the observations below every rate of the runs of these numbers."""
        lost = Trials(run for run in self if run.number in diverged)
        cliff = min(lost.rates(), default=math.inf)
        return [seen for seen in self.observations() if seen.x < cliff]

    def best_of(self, setting: Setting) -> Run | None:
        """Return the best finished run of a rank and seed."""
        return Trials(run for run in self if run.setting == setting)._best()

    def curve_beside(self, setting: Setting) -> list[float]:
        """Return the curve of the best finished run of a rank and seed, else of the seed, else of
        another seed, else [].
        """
        of_seed = Trials(run for run in self if run.seed == setting.seed)
        best = self.best_of(setting) or of_seed._best() or self._best()
        return [] if best is None else best.curve

    def _best(self) -> Run | None:
        complete = [run for run in self.scored() if run.state == TrialState.COMPLETE]
        return min(complete, key=lambda run: run.value, default=None)

    def usual_first_loss(self) -> float:
        """Return the median over runs of the mean of their first values; 0 if there are none."""
        means = [statistics.fmean(run.curve[:TAIL]) for run in self if run.curve]
        return statistics.median(list(filter(math.isfinite, means)) or [0.0])

    def spent(self, steps: int) -> int:
        """Return the training steps of all runs. One that has not ended counts in full, a killed
        one up to its next report.

        steps: those of a whole run.
        """
        total = 0
        for run in self:
            if not run.state.is_finished():
                total += steps
            elif run.curve:
                total += len(run.curve)
            elif run.x is not None and run.state == TrialState.FAIL:
                total += min(steps, max(run.reports, default=0) + interval(steps))
        return total

    def hopeless(self) -> list[str]:
        """Name the runs that all diverged, if they are many: all runs, or those of a rank, as "12
        runs of rank 4".
        """
        lost, scored = self.diverged(), self.scored()
        groups = {"runs": scored}
        for run in scored:
            groups[f"runs of {rank_words(run.rank)}"] = scored.at(run.rank)
        hopeless = []
        for name, runs in groups.items():
            numbers = {run.number for run in runs}
            if len(numbers) >= HOPELESS and numbers <= lost:
                hopeless.append(f"{len(numbers)} {name}")
        return hopeless

    def diverged(self) -> set[int]:
        """Return the numbers of the runs that diverged."""
        scored = self.scored()
        bad = diverged(scored.observations())
        return {run.number for run in compress(scored, bad)}

    # --- what they were built with ----------------------------------------------------------------

    def settings_in_force(self) -> dict[str, Any]:
        """Return the settings of all trials, defaults included; if groups differ, those of the
        factors.
        """
        tables = []
        for run in self:
            built = run.built or {}
            tables.append({**built, **built.get("factors' settings", {})})
        return agreed(tables)

    def other_rates(self) -> dict[str, Any]:
        """Return the rates of what trained beside the factors in all trials."""
        built = [run.built or {} for run in self]
        return agreed(each.get("other rates", {}) for each in built)

    def scalings(self) -> dict[int, float]:
        """Return s = alpha / r of the models, by rank."""
        built = [(run.rank, run.built) for run in self]
        return {rank: at["lora_alpha"] / rank for rank, at in built if rank and at}

    # --- what may be wrong with them --------------------------------------------------------------

    def differ_by_chance(self) -> bool:
        """Return whether the scores differ by no more than the noise of the curves explains. Each
        is the mean of a tenth of its curve.
        """
        runs = self.observations()
        scores = [run.value for run in runs]
        if len(runs) < len(self) or not all(map(math.isfinite, scores)):
            return False
        count = max(TAIL, len(self[0].curve) // 10)
        error = usual_noise(runs) / math.sqrt(count)
        return max(scores) - min(scores) <= ALIKE_ERRORS * error

    def went_alike(self) -> bool:
        """Return whether all runs of each rank and seed have the same values, some at several
        rates.
        """
        settings, rates, values = set(), set(), set()
        for run in self.scored():
            if math.isfinite(run.value):
                settings.add(run.setting)
                rates.add((run.setting, run.x))
                values.add((run.setting, run.value, *run.curve))
        return len(values) == len(settings) < len(rates)

    def turns(self) -> list[int]:
        """Return whether each curve fell (-1), rose (1) or neither, from the lowest rate on. None
        where scores were returned, since the curves are not minimised.
        """
        if any(run.returned for run in self.observations()):
            return []
        turns = [(run.x, turn_of(run.curve)) for run in self if run.x is not None]
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

    def edge(self) -> str:
        """Return "low" or "high" if the best run has the lowest or highest rate, else ""."""
        lost, rates = self.diverged(), self.rates()
        good = Trials(run for run in self if run.number not in lost).observations()
        if not good or min(rates) == max(rates):
            return ""
        best = min(good, key=lambda run: run.value).x
        return {min(rates): "low", max(rates): "high"}.get(best, "")

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


def check_comparable(
    name: str, stored: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise a `CalibrationError` if what stored runs of the study `name` were made with differs
    from what new ones are.
    """
    if difference := differences(stored, now):
        raise CalibrationError(
            f"The stored study {name!r} was made with {difference}.",
            "Give this calibration another name, or another storage.",
        )


def interval(steps: int) -> int:
    """Return the number of steps between two reports of a run."""
    return max(1, steps // REPORTS)


def rank_words(rank: int | None) -> str:
    return "full finetuning" if rank is None else f"rank {rank}"
