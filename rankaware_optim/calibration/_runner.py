"""Running a calibration: begin, train and record the next trial, on one worker of several and one
process of many.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import optuna
import torch
import torch.distributed as dist
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from torch import nn

from .._types import Reference, Survey, width_for
from .._warn import warn
from ..errors import CalibrationError
from ..fitting import TAIL, Observation, height, recent
from ..inspection import inspect_model
from ..laws import Power, checked_multiplier
from ..optimizer import RankAwareOptimizer
from ..recipe import Recipe, plain_value
from ._calibration import Calibration
from ._liveness import Heartbeat
from ._progress import Show, rank_words
from ._provenance import built_with
from ._result import ALIKE, calibrated_recipe
from ._search import BracketSampler, PairedPruner, divergence_limits, search_range
from ._storage import begin_trial
from ._trial import Run, Train, Trial, run_trial, seeded
from ._trials import PARAMETER, Setting, TrialRecord, Trials, interval, stored

# seconds between polls: at first, and while another worker's trial runs
_POLL_S, _SLOW_POLL_S = 0.05, 2.0
_PATIENCE_S = 600.0  # seconds that another worker may take to build its first model

T = TypeVar("T")


class Replicas:
    """The processes of this training, or only this one if torch.distributed was not started.

    Messages use a separate gloo group. They need no device and cannot mix with those of the
    training.
    """

    def __init__(self) -> None:
        started = (
            dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        )
        self._group = dist.new_group(backend="gloo") if started else None

    @property
    def leads(self) -> bool:
        """Whether this process decides. Only this one uses the study's storage and the terminal."""
        return self._group is None or dist.get_rank() == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """Call `decide` on the leading process. Return its result, or raise its error, on every
        process.
        """
        if self._group is None:
            return decide()
        message: list[Any] = [None]
        if self.leads:
            try:
                message = [(decide(), None)]
            except BaseException as raised:
                message = [(None, raised)]
        dist.broadcast_object_list(message, src=0, group=self._group)
        value, error = message[0]
        if error is not None:
            raise error
        return value  # type: ignore[no-any-return]

    def mean(self, value: float) -> float:
        """Return the mean of a value over all processes, each of which has a part of the batch."""
        if self._group is None:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(total, group=self._group)
        return float(total) / dist.get_world_size()

    def close(self) -> None:
        if self._group is not None:
            dist.destroy_process_group(self._group)


class Runner:
    """Runs the trials of a calibration by its schedule.

    Several workers may do so at once. Every decision is based on the storage, and a trial names its
    worker from its creation. Under DDP or FSDP only the leading process of `team` has an Optuna
    study. The others get its decisions.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.team = Replicas()
        self.before = 0  # trials that had ended before this worker came
        self._heartbeat = Heartbeat()
        # trials that ran when this worker came, and have shown no sign of life
        self._unheard: set[int] = set()
        self._trial: optuna.Trial | None = None  # that this worker runs
        self._endless: bool | None = None  # whether the loop continues past its steps

    def open(self, sampler: Any, pruner: Any, storage: Any) -> None:
        """Create the Optuna study, or continue the stored one of the same name."""
        calibration = self.calibration
        sampler = sampler or BracketSampler(calibration)
        pruner = pruner or PairedPruner(calibration)
        self.team.agree(lambda: calibration.open(sampler, pruner, storage))
        self._agree(self._watch)

    def _watch(self) -> None:
        self._heartbeat.watch(self.calibration.study)
        trials = self.calibration.trials()
        self._unheard = {trial.number for trial in trials.running()}
        self.before = len(trials.counted())

    def close(self) -> None:
        """Fail the unfinished trial, and leave the storage and the other processes.

        A signal waits until the trial is failed, and the next one raises at once. If the storage
        itself failed, other workers and the next call notice that the heartbeats have stopped.
        """
        try:
            with suppress(CalibrationError), self.calibration.guard():
                self._heartbeat.stop()
                self._close(TrialState.FAIL)
        finally:
            self.calibration.close()
            self.team.close()

    def _agree(self, decide: Callable[[], T]) -> T:
        """Return on every process what the leading process decides from the storage."""
        return self.team.agree(self.calibration.guard()(decide))

    def recipe(self) -> Recipe:
        """Return the recipe of the trials so far."""
        recipe = self._agree(lambda: calibrated_recipe(self.calibration))
        if self.team.leads and ALIKE in recipe.notes:
            warn(f"Recipe {recipe.name!r}: {ALIKE}.")
        return recipe

    # --- the next trial ---------------------------------------------------------------------------

    def begin(self) -> Trial | None:
        """Create the next trial, to be run by this worker. Return None once the schedule is
        complete.
        """
        trial = self._agree(self._begin_or_wait)
        if trial is not None:
            trial._build = self._build
        return trial

    def _begin_or_wait(self) -> Trial | None:
        self._await_signs()
        for _ in self._polls():
            # A trial that had no heartbeat before it ran was taken by another worker.
            with suppress(UpdateFinishedTrialError):
                trial = self._try_to_begin()
                # Another worker's trial may still die and be repeated here.
                if trial is not None or not self.calibration.trials().running():
                    return trial
        return None

    def _polls(self) -> Iterator[None]:
        """Yield without end, after ever longer pauses."""
        pause = _POLL_S
        while True:
            yield
            self.calibration.pause(pause)
            pause = min(2 * pause, _SLOW_POLL_S)

    def _await_signs(self) -> None:
        """Wait until each trial that ran when this worker came has shown a sign of life, or has
        ended.

        So the same call after a kill repeats the killed trial before it goes on, as if it had not
        been killed.
        """
        if not self._unheard:
            return
        for _ in self._polls():
            running = {trial.number for trial in self.calibration.trials().running()}
            self._unheard &= running - self._heartbeat.heard
            if not self._unheard:
                return

    def _try_to_begin(self) -> Trial | None:
        """Create a running trial that has its worker and its setting from the start. Give it up if
        workers that began before leave it nothing to do.
        """
        while True:
            trials = self.calibration.trials()
            setting = self._next(trials)
            killed = trials.to_repeat()
            if setting is None:
                return None
            number = self._create(setting, killed)
            earlier = Trials(
                t
                for t in self.calibration.trials()
                if t.state.is_finished() or t.number < number
            )
            taken = killed is not None and any(
                t.retry_of == killed.number for t in earlier
            )
            if not taken and self._next(earlier) is not None:
                return self._prepared()
            self._close(TrialState.FAIL)

    def _next(self, trials: Trials) -> Setting | None:
        """Return the next rank and seed, or None if the study is complete."""
        return self.calibration.schedule.next(trials)

    def _create(self, setting: Setting, killed: TrialRecord | None) -> int:
        """Create a running trial, and return its number. If one was killed, it repeats that one, at
        its rate.
        """
        attributes: dict[str, Any] = {"worker": self._heartbeat.worker, "heartbeat": 0}
        rate = {}
        if killed is not None:
            setting = killed.setting
            attributes["retry_of"] = killed.number
            rate = {} if killed.x is None else {PARAMETER: killed.x}
        self._setting = setting
        attributes |= setting._asdict()
        self._trial = begin_trial(self.calibration.study, attributes, rate)
        self._heartbeat.trial = self._trial
        return self._trial.number

    def _prepared(self) -> Trial:
        """Return the trial for `train`. Its rate is chosen now, after those of workers that began
        before, but the first trial of a study gets its rate when its model is built.
        """
        self._await_earlier()
        calibration = self.calibration
        if calibration.reference is not None:
            self._take_rate()
        steps = calibration.schedule.steps
        ended = calibration.trials().counted()
        return Trial(
            *self._setting,
            steps,
            self._running.number,
            divergence_limits(ended, self._setting, steps),
            self._endless,
            (len(ended), calibration.best()),
        )

    def _await_earlier(self) -> None:
        """Wait until trials begun before this one have their rates, so that no point is tried
        twice.

        Only the first trial of a study takes long, since its model must be built to settle the
        reference.
        """
        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            self.calibration.recall()
            running = self.calibration.trials().running()
            if all(
                t.x is not None or t.number >= self._running.number for t in running
            ):
                return
            self.calibration.pause(_POLL_S)

    @property
    def _running(self) -> optuna.Trial:
        assert self._trial is not None
        return self._trial

    def _take_rate(self) -> float:
        """Return log2 of the trial's rate, sampled once."""
        x = self._running.params.get(PARAMETER)
        if x is None:
            fit = self.calibration.fit()
            if fit is not None:
                self._running.set_user_attr("estimate", fit.best(self._setting.rank))
            within = search_range(self.calibration)
            x = self._running.suggest_float(PARAMETER, *within)
        return float(x)

    # --- one trial --------------------------------------------------------------------------------

    def one(self, trial: Trial, train: Train, show: Show) -> None:
        """Run and record one trial. If it raises, `close` fails it."""
        steps = trial._steps
        every = interval(steps)
        done, best = trial._progress

        def watch(curve: list[float]) -> bool:
            show(done + len(curve) / steps, rank_words(trial.rank), best)
            if len(curve) % every and len(curve) != steps:
                return False
            return self._agree(lambda: self._report(curve, every, steps))

        try:
            with seeded(trial.seed):
                run = run_trial(train, trial, watch, self.team.mean)
            is_read = "steps" in vars(trial)
            if self.calibration.options.is_short and not run.stopped and not is_read:
                raise CalibrationError(
                    "train never read trial.steps, so its schedule may span the steps of the target"
                    " run.",
                    "Let its schedule and warm-up span trial.steps.",
                )
            self._agree(lambda: self._end(run))
        except UpdateFinishedTrialError:
            self._agree(lambda: self._close(TrialState.FAIL))
            warn(
                f"Trial {trial.number} had no heartbeat for so long that another worker has taken"
                " it over. Its run here does not count."
            )

    def _report(self, curve: list[float], every: int, steps: int) -> bool:
        self._running.report(recent(curve, max(TAIL, every)), len(curve))
        return len(curve) < steps and self._running.should_prune()

    def _end(self, run: Run) -> None:
        """Record the outcome of a run."""
        self._check_scored(run)
        self._endless = run.trial._endless
        store = self._running.set_user_attr
        if run.stopped in ("pruned", "memory"):
            store("curve", run.curve)
            store("stopped", run.stopped)
            return self._close(TrialState.PRUNED)
        observation = Observation(
            *self._setting,
            x=self._take_rate(),
            value=run.score,
            start=height(run.curve),
            tail=run.tail,
            returned=run.returned is not None,
            stopped=run.stopped == "diverged",
        )
        store("curve", run.curve)
        store("observation", stored(observation))
        if math.isfinite(run.score):
            return self._close(TrialState.COMPLETE, run.score)
        self._close(TrialState.PRUNED)

    def _check_scored(self, run: Run) -> None:
        """Raise unless all scores were returned, or none, since they cannot be compared."""
        if run.stopped:
            return
        for other in self.calibration.trials().observations():
            if not other.stopped and other.returned != (run.returned is not None):
                raise CalibrationError(
                    "train returned a score in some trials and none in others.",
                    "Return one in every trial, or in none.",
                )

    def _close(self, state: TrialState, value: float | None = None) -> None:
        if self._trial is None:
            return
        number = self._trial.number
        self._heartbeat.trial = None
        calibration = self.calibration
        calibration.study.tell(self._trial, value, state=state, skip_if_finished=True)
        trials = calibration.trials()
        spent = trials.spent(calibration.schedule.steps)
        total = {"steps": spent, "trials": len(trials.counted())}
        calibration.study.set_user_attr("spent", total)
        self._trial = None
        if state != TrialState.FAIL and trials[number].killed:
            raise UpdateFinishedTrialError("Another worker took it over at its end.")

    # --- the trial's optimizer --------------------------------------------------------------------

    def _build(
        self, trial: Trial, params: Any, settings: dict[str, Any]
    ) -> RankAwareOptimizer:
        """Build the optimizer for `Trial.optimizer`: read the model, then choose a rate in
        reference coordinates.
        """
        model = params if isinstance(params, nn.Module) else settings.get("model")
        if not isinstance(model, nn.Module):
            raise CalibrationError(
                "trial.optimizer got no model.",
                "Pass it, or model= with its parameters.",
            )
        survey = inspect_model(model, method=trial.method, init=settings.get("init"))
        at = survey.dominant().resolve(survey)
        trial.lr, law, reference = self._agree(
            lambda: self._propose(survey, at, settings)
        )
        native = self.calibration.options.optimizer
        optimizer = RankAwareOptimizer(
            params,
            native,
            lr=trial.lr,
            law=law,
            tuned_at=reference,
            method=trial.method,
            **settings,
        )
        self._agree(lambda: self._record(built_with(optimizer, native, settings, at)))
        return optimizer

    def _propose(
        self, survey: Survey, at: Reference, settings: dict[str, Any]
    ) -> tuple[float, Power, Reference]:
        """Return the trial's base rate, the law centred on its priors, and the reference that both
        belong to. `at` is the model's configuration.
        """
        calibration = self.calibration
        rank = self._setting.rank
        if at.rank != rank:
            raise CalibrationError(
                f"The model built for trial.rank={rank} has rank {at.rank}.",
                "Build it at trial.rank.",
            )
        self._running.set_user_attr("scaling", at.scaling)
        calibration.learn(at, survey)
        ours = inspect.signature(RankAwareOptimizer.__new__).parameters
        calibration.settings = {
            key: plain_value(value)
            for key, value in settings.items()
            if key not in ours
        }
        lr = 2.0 ** self._take_rate()
        law = calibration.centred_law()
        reference = calibration.settled()
        width = width_for(survey, at.method, reference.init)
        factor = replace(at, fan_in=width).as_factor()
        own_lr = lr * checked_multiplier(law, factor, reference)
        self._running.set_user_attr("own_lr", own_lr)
        return lr, law, reference

    def _record(self, built: dict[str, Any]) -> None:
        self.calibration.compare(self._running.number, self._setting.rank, built)
        self._running.set_user_attr("built", built)
        self.calibration.study.set_user_attr("settings", self.calibration.settings)
