"""Running a study: begin, train and record the next trial, on one worker of several and one process
of many.
"""

from __future__ import annotations

import inspect
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from torch import nn

from .._types import Reference, Survey
from .._warn import warn
from ..errors import CalibrationError
from ..fitting import CLEAR, TAIL, Observation, best_fall, height, recent, usual_noise
from ..inspection import inspect_model
from ..laws import Power, checked_multiplier
from ..optimizer import RankAwareOptimizer
from ..recipe import Recipe, plain_setting
from ._comparison import built_with
from ._distributed import Replicas
from ._liveness import Heartbeat
from ._optuna import begin_trial
from ._sampler import estimate_at
from ._schedule import Schedule
from ._study import Study
from ._trial import Outcome, Train, Trial, run_trial, seeded
from ._trials import PARAMETER, Cell, TrialRecord, Trials, interval

_LOG = logging.getLogger(__package__)
_POLL_S, _SLOW_POLL_S = (
    0.05,
    2.0,
)  # seconds between polls: at first, and while another worker's trial runs
_QUIET_S = (
    15.0  # seconds after which a wait for signs of life is logged; those that live show one before
)
_PATIENCE_S = 600.0  # seconds that another worker may take to build its first model


class NextTrial(NamedTuple):
    """A trial that is about to run, and the study's progress: trials done and expected, (low, best,
    high) so far.
    """

    number: int
    rank: int | None
    seed: int
    steps: int
    limits: list[float]
    endless: bool | None
    done: int
    expected: int
    estimate: tuple[float, float, float] | None


Show = Callable[[NextTrial, Trial, "list[float]"], None]
Ended = Callable[[NextTrial, Trial, Outcome], None]
T = TypeVar("T")


class Runner:
    """Runs the trials of a study by a schedule.

    Several workers may do so at once. Every decision is based on the storage, and a trial names its
    worker from its creation. Under DDP or FSDP only the leading process of `team` has an Optuna
    study. The others get its decisions.
    """

    def __init__(self, study: Study, schedule: Schedule) -> None:
        self.study, self.schedule, self.team = study, schedule, Replicas()
        self._endless: bool | None = None
        self._heartbeat = Heartbeat()
        self._found: set[int] = (
            set()
        )  # trials that ran when this worker came, and have shown no sign of life
        self._handle: optuna.Trial
        self._record = TrialRecord()

    def open(self, sampler: Any, pruner: Any, storage: Any) -> None:
        """Create the Optuna study, or continue the stored one of the same name."""
        self.team.agree(lambda: self.study.open(sampler, pruner, storage))
        self._agree(self._watch)

    def _watch(self) -> None:
        self._heartbeat.watch(self.study.optuna)
        self._found = {trial.number for trial in self.study.trials().running()}

    def close(self) -> None:
        """Fail the unfinished trial, and leave the storage and the other processes.

        If the storage itself failed, other workers and the next call notice that the heartbeats
        have stopped.
        """
        try:
            self._heartbeat.stop()
            if self._record.worker:
                with suppress(CalibrationError), self.study.guard():
                    self._close(TrialState.FAIL)
        finally:
            self.study.close()
            self.team.close()

    def _agree(self, decide: Callable[[], T]) -> T:
        """Return on every process what the leading process decides from the storage."""

        def guarded() -> T:
            with self.study.guard():
                return decide()

        return self.team.agree(guarded)

    def recipe(self) -> Recipe:
        """Return the recipe of the trials so far."""
        return self._agree(self.study.recipe)

    def begin(self) -> NextTrial | None:
        """Create the next trial, to be run by this worker. Return None once the schedule is
        complete.
        """

        def decide() -> NextTrial | None:
            poll = _POLL_S
            self._await_signs()
            while True:
                with suppress(
                    UpdateFinishedTrialError
                ):  # no heartbeat before it ran, so another worker took it
                    begun = self._try_to_begin()
                    if begun is not None or not self.study.trials().running():
                        return begun
                self.study.pause(poll)  # another worker's trial may still die and be repeated here
                poll = min(2 * poll, _SLOW_POLL_S)

        return self._agree(decide)

    def _await_signs(self) -> None:
        """Wait until each trial that ran when this worker came has shown a sign of life, or has
        ended.

        So the same call after a kill repeats the killed trial before it goes on, as if it had not
        been killed.
        """
        poll, quiet_until = _POLL_S, time.monotonic() + _QUIET_S
        while self._found:
            running = {trial.number for trial in self.study.trials().running()}
            self._found = {
                number for number in self._found & running if not self._heartbeat.heard(number)
            }
            if self._found and time.monotonic() > quiet_until:
                _LOG.info("waiting for a sign of life of trials %s", sorted(self._found))
                quiet_until = math.inf
            if self._found:
                self.study.pause(poll)
                poll = min(2 * poll, _SLOW_POLL_S)

    def _try_to_begin(self) -> NextTrial | None:
        """Create a running trial that has its worker and its configuration from the start."""
        trials = self.study.trials()
        killed, cell = trials.to_repeat(), self._next(trials)
        if cell is None:
            return None
        cell = cell if killed is None else killed.cell
        again = None if killed is None else killed.number
        mine = TrialRecord(*cell, worker=self._heartbeat.worker, heartbeat=0, retry_of=again)
        params = {} if killed is None or killed.x is None else {PARAMETER: killed.x}
        self._handle = begin_trial(self.study.optuna, mine.attributes(), params)
        self._record = replace(mine, number=self._handle.number)
        self._heartbeat.trial = self._handle
        return self._prepare(killed)

    def _prepare(self, killed: TrialRecord | None) -> NextTrial | None:
        """Wait for workers that began before, then choose a rate. The first trial of a study gets
        its rate later.
        """
        trials, mine = self.study.trials(), self._record
        earlier = Trials(t for t in trials if t.state.is_finished() or t.number < mine.number)
        taken = killed is not None and any(t.retry_of == killed.number for t in earlier)
        if taken or self._next(earlier) is None:
            self._close(TrialState.FAIL)
            return self._try_to_begin() if taken else None
        self._await_earlier()
        if self.study.reference is not None:
            self._take_rate()
        expected, standing = self.schedule.expected(), self.study.standing()
        return NextTrial(
            number=mine.number,
            rank=mine.rank,
            seed=mine.seed,
            steps=self.study.steps,
            limits=self._limits(),
            endless=self._endless,
            done=len(trials.counted()),
            expected=expected,
            estimate=standing,
        )

    def _next(self, trials: Trials) -> Cell | None:
        """Return the next rank and seed, or None if the study is complete."""
        band = None if self.schedule.until is None else self.study.band()
        return self.schedule.next(trials, band)

    def _await_earlier(self) -> None:
        """Wait until trials begun before this one have their rates, so that no point is tried
        twice.

        Only the first trial of a study takes long, since its model must be built to settle the
        reference.
        """
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            self.study.recall()
            if all(
                t.x is not None or t.number >= self._record.number
                for t in self.study.trials().running()
            ):
                return
            self.study.pause(_POLL_S)

    def _limits(self) -> list[float]:
        """Return, for each step, the mean of recent values above which a run is stopped as
        diverged.

        The limit is a margin above the usual start of the runs: half the best gain, or what the
        noise of the curves explains. Batches may be hard, so it is at least that margin above the
        loss of a run that learns nothing, which is at most one gain above the best run on the same
        batches. The usual start is a mean of first values, since a single one may be low by chance.
        """
        trials = self.study.trials().counted()
        seen = trials.observations()
        gain = best_fall(seen) or math.inf
        margin = max(gain / 2, CLEAR * usual_noise(seen))
        flat = trials.usual_height() + margin
        beside = trials.curve_beside(self._record.cell)
        windows = (beside[max(0, end - TAIL) : end] for end in range(1, self.study.steps + 1))
        return [max(flat, recent(window) + gain + margin) if window else flat for window in windows]

    # --- one trial --------------------------------------------------------------------------------

    def one(self, begun: NextTrial, train: Train, show: Show, ended: Ended) -> None:
        """Run and record one trial. If it raises, `close` fails it."""
        trial = Trial(begun.rank, begun.seed, begun.steps, begun.number, self._build)
        every = interval(begun.steps)

        def watch(trial: Trial, curve: list[float]) -> bool:
            show(begun, trial, curve)
            if len(curve) % every and len(curve) != begun.steps:
                return False
            return self._agree(lambda: self._report(curve, every, begun.steps))

        try:
            with seeded(begun.seed):
                outcome = run_trial(
                    train,
                    trial,
                    limits=begun.limits,
                    endless=begun.endless,
                    watch=watch,
                    mean=self.team.mean,
                )
            self._check_read(trial, outcome)
            self._agree(lambda: self._end(outcome))
        except UpdateFinishedTrialError:
            self._agree(lambda: self._close(TrialState.FAIL))
            warn(
                f"Trial {begun.number} had no heartbeat for so long that another worker has taken"
                " it over. Its run here does not count."
            )
        else:
            ended(begun, trial, outcome)

    def _check_read(self, trial: Trial, outcome: Outcome) -> None:
        """Refuse a loop that never read its number of steps, if the target run has more."""
        if self.study.is_short and not outcome.stopped and not trial._steps_were_read:
            raise CalibrationError(
                "train never read trial.steps, so its schedule may span the steps of the target"
                " run.",
                "Let its schedule and warm-up span trial.steps.",
            )

    def _report(self, curve: list[float], every: int, steps: int) -> bool:
        self._handle.report(recent(curve, max(TAIL, every)), len(curve))
        return len(curve) < steps and self._handle.should_prune()

    def _end(self, outcome: Outcome) -> None:
        """Record the outcome of a run. Scores can be compared only if all of them were returned, or
        none.
        """
        returned, record, stopped = outcome.returned is not None, self._record, outcome.stopped
        others = [o for o in self.study.trials().observations() if not o.stopped]
        if not stopped and any(o.returned != returned for o in others):
            raise CalibrationError(
                "train returned a score in some trials and none in others.",
                "Return one in every trial, or in none.",
            )
        self._endless = self._endless if outcome.endless is None else outcome.endless
        if stopped in ("pruned", "memory"):
            self._write(replace(record, curve=outcome.curve, stopped=stopped))
            return self._close(TrialState.PRUNED)
        seen = Observation(
            rank=record.rank,
            seed=record.seed,
            x=self._take_rate(),
            value=outcome.score,
            start=height(outcome.curve),
            tail=outcome.tail,
            returned=returned,
            stopped=stopped == "diverged",
        )
        self._write(replace(record, curve=outcome.curve, observation=seen))
        finite = math.isfinite(seen.value)
        self._close(
            TrialState.COMPLETE if finite else TrialState.PRUNED, seen.value if finite else None
        )

    def _write(self, record: TrialRecord) -> None:
        """Store the fields of this trial that changed."""
        for name, value in record.changes_since(self._record).items():
            self._handle.set_user_attr(name, value)
        self._record = record

    def _close(self, state: TrialState, value: float | None = None) -> None:
        self._heartbeat.trial = None
        self.study.optuna.tell(self._handle, value, state=state, skip_if_finished=True)
        trials = self.study.trials()
        total = {"steps": trials.spent(self.study.steps), "trials": len(trials.counted())}
        self.study.optuna.set_user_attr("spent", total)
        self._record = TrialRecord()
        if state != TrialState.FAIL and any(
            t.killed for t in trials if t.number == self._handle.number
        ):
            raise UpdateFinishedTrialError("Another worker took it over at its end.")

    # --- the trial's optimizer --------------------------------------------------------------------

    def _build(self, trial: Trial, params: Any, settings: dict[str, Any]) -> RankAwareOptimizer:
        """Build the optimizer for `Trial.optimizer`: read the model, then choose a rate in
        reference coordinates.
        """
        model = params if isinstance(params, nn.Module) else settings.get("model")
        if not isinstance(model, nn.Module):
            raise CalibrationError(
                "trial.optimizer got no model.", "Pass it, or model= with its parameters."
            )
        survey = inspect_model(model, method=trial.method, init=settings.get("init"))
        trial.lr, law, reference = self._agree(lambda: self._propose(survey, settings))
        made = RankAwareOptimizer(
            params,
            self.study.optimizer,
            lr=trial.lr,
            law=law,
            tuned_at=reference,
            method=trial.method,
            **settings,
        )
        found = survey.dominant().resolve(survey)
        self._agree(
            lambda: self._keep_built(built_with(made, self.study.optimizer, settings, found))
        )
        return made

    def _keep_built(self, built: dict[str, Any]) -> None:
        self.study.compare(self._record, built)
        self._write(replace(self._record, built=built))
        self.study.optuna.set_user_attr("settings", self.study.settings)

    def _propose(self, survey: Survey, settings: dict[str, Any]) -> tuple[float, Power, Reference]:
        """Return the trial's base rate, the law centred on its priors, and the reference that both
        belong to.
        """
        study, found = self.study, survey.dominant().resolve(survey)
        if found.rank != self._record.rank:
            raise CalibrationError(
                f"The model built for trial.rank={self._record.rank} has rank {found.rank}.",
                "Build it at trial.rank.",
            )
        self._write(replace(self._record, scaling=found.scaling))
        study.learn(found, survey)
        own = inspect.signature(RankAwareOptimizer.__new__).parameters
        study.settings = {
            key: plain_setting(value) for key, value in settings.items() if key not in own
        }
        lr, law, reference = 2.0 ** self._take_rate(), study.centred_law(), study.settled()
        width = survey.full_width(reference.init) if found.method == "full" else survey.width
        own_lr = lr * checked_multiplier(law, replace(found, fan_in=width).as_factor(), reference)
        self._write(replace(self._record, own_lr=own_lr))
        return lr, law, reference

    def _take_rate(self) -> float:
        """Return log2 of the trial's rate, sampled once."""
        x = self._record.x
        if x is None:
            fit = self.study.fit()
            if fit is not None:
                estimate = estimate_at(fit, self._record.rank, self.study.prior)
                self._write(replace(self._record, estimate=estimate))
            x = float(self._handle.suggest_float(PARAMETER, *self.study.range()))
            self._record = replace(self._record, x=x)
        return x
