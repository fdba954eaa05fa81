"""This module runs the trials of a learning rate search. A `TrialRunner` builds the
optimizer of one trial, checks every value that the user's training loop yields, and
stores how the trial ended.
"""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import optuna
import torch
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from torch.optim import Optimizer

from .._types import Reference
from .._warn import warn
from ..errors import CalibrationError
from ..fitting import TAIL, recent_mean
from ..inspection import Survey
from ..laws import Power
from ..optimizer import RankAwareOptimizer
from ..recipe import Recipe
from ._build import (
    describe,
    groups_of,
    groups_with_lr,
    multiplier_of,
    refuse_own_rates,
    refuse_settings,
    settings_in_force,
    survey_of,
    trained_groups,
)
from ._calibration import Calibration
from ._constants import FIRST_STEPS
from ._loop import (
    CallbackRun,
    has_moved,
    is_out_of_memory,
    one_number,
    refuse_micro_batches,
    refuse_mixed_scores,
    refuse_other_peaks,
    refuse_warmup,
    release_memory,
    rising_steps,
    seeded,
)
from ._progress import Progress
from ._schedule import Options
from ._search import divergence_limits, interval, is_behind, next_rate, search_range
from ._storage import StorageLike
from ._study import Study, source_of
from ._trial import Trial
from ._trials import PARAMETER, Build, End, Setting

Train = Callable[[Trial], Generator[object, None, object] | CallbackRun]


def search(
    train: Train,
    options: Options,
    *,
    storage: StorageLike = None,
    progress: Progress | None = None,
    price: str = "",
) -> Recipe:
    """Run the trials of a calibration and return a recipe with the best learning rate.

    Args:
        train: the user's training loop, see `calibrate`.
        options: the options of the search.
        storage: the storage of the study, see `calibrate`.
        progress: prints the progress of the search. By default nothing is printed.
        price: a description of what the trials cost in addition to their steps.

    Raises:
        CalibrationError: `train` or the storage cannot be used, or every run diverged.
        CalibrationInterrupted: the user pressed Ctrl-C.
    """
    # A database driver may draw random numbers, and Ctrl-C inside no_grad() may leave
    # gradients disabled. Neither may outlive this call.
    state = random.getstate()
    gradients = torch.is_grad_enabled()
    shown = Progress(is_shown=False) if progress is None else progress
    study = Study(options, source_of(train), shown)
    try:
        study.open(storage, price)
        while (setting := study.next()) is not None:
            TrialRunner(study, setting).run(train)
        return study.recipe()
    except KeyboardInterrupt as interrupt:
        # only the leading process can read the trials, which the error's recipe needs
        if not study.replicas.leads:
            raise
        raise study.interrupted() from interrupt
    finally:
        torch.set_grad_enabled(gradients)
        study.close()
        random.setstate(state)


class TrialRunner:
    """Run one trial of a calibration and record its loss or score.

    Args:
        study: the study that the trial belongs to.
        setting: the rank and seed of the trial.

    Attributes:
        number: the trial's number, from 0.
        steps: the trial's number of optimizer steps.
        steps_were_read: whether the user's loop has read `trial.steps`.
        lr: the trial's base learning rate, or None until the optimizer is built.
    """

    def __init__(self, study: Study, setting: Setting) -> None:
        self.setting = setting
        self.steps = study.options.steps
        self.steps_were_read = False
        self.lr: float | None = None
        self._study = study
        self._curve: list[float] = []  # the values that the loop yielded
        self._end: End = ""
        self._why = ""  # why the run was stopped early, in words
        self._warmup = 0  # steps over which the learning rate rose
        # for each step, the limit above which the mean of the recent values means divergence
        self._limits: list[float] = []
        self._rates: list[float] = []  # the base learning rate after each step
        # for each optimizer step, the number of values that were yielded before it
        self._values_before: list[int] = []
        # Weak references, because the user's loop owns the optimizer, and the optimizer's memory
        # must be free before the next trial builds a model. The references return None once the
        # optimizer no longer exists.
        self._optimizer: Callable[[], RankAwareOptimizer | None] = _no_optimizer
        # the optimizer whose learning rate the schedule changes, and the group to read
        self._scheduled: Callable[[], Optimizer | None] = _no_optimizer
        self._scheduled_group = 0
        self._stored: optuna.trial.Trial  # only in the leading process
        self.number = study.lead(self._begin)

    def _begin(self) -> int:
        self._stored = self._study.begin_trial(self.setting)
        self._study.check_options(self._study.runs())
        return self._stored.number

    def run(self, train: Train) -> None:
        """Run the user's `train` function and store the final state and the score of
        the trial.

        Optuna's state of a trial becomes COMPLETE if the trial has a score, and PRUNED
        if it diverged, was stopped early or ran out of memory. Complete trials and
        pruned trials both count towards the length of the search. Optuna's state of a
        trial becomes FAIL if the trial raised an error or its worker process died. A
        new trial then repeats the rank and seed of the failed trial. If `train` raises
        an error, `Study.close` marks the trial as failed.
        """
        # Several workers, on one machine or on many, may run trials of the same study. They
        # never send messages to each other: they only read and write the storage, and three
        # rules keep them consistent.
        #   1. A worker first creates its trial in the storage. Other workers see its rank and
        #      seed there and choose different ones. If two workers read the storage at the
        #      same moment, they may choose the same. The study then has one extra run, which
        #      does no harm.
        #   2. The worker builds its model and waits until every trial with a lower number has
        #      an optimizer or has ended. Learning rates are thus chosen in order, none is
        #      tried twice, and the model of the first trial becomes everybody's reference.
        #   3. While the worker trains, its heartbeat thread writes to the storage. If the
        #      heartbeats stop, any other worker marks the trial as failed and repeats its rank
        #      and seed. If the worker was only suspended, storing its result raises
        #      UpdateFinishedTrialError below, and the result is dropped.
        lead = self._study.lead
        try:
            with seeded(self.setting.seed):
                score = self._score_of(train)
            lead(self._end_trial, score)
        except UpdateFinishedTrialError:
            lead(self._study.end_trial, TrialState.FAIL)
            warn(
                f"Trial {self.number} sent no heartbeat for too long. Another worker therefore"
                " assumed that this process had died, and repeats the trial. The result of this"
                " run is not used. The search continues, and you do not need to do anything."
            )

    # --- its optimizer ----------------------------------------------------------------------------

    def build_optimizer(
        self, params: Any, settings: dict[str, Any]
    ) -> RankAwareOptimizer:
        """Build the trial's optimizer, and store the optimizer's settings and the
        model's configuration.

        `Trial.optimizer` calls this method.
        """
        study, options = self._study, self._study.options
        rank = self.setting.rank
        refuse_settings(settings)
        params = groups_of(params)
        at_own_lr = groups_with_lr(params)
        survey = survey_of(params, rank, settings)
        build = describe(survey, rank, options.batch)
        # from here on trials take turns, see rule 2 in `run`
        study.wait(self._is_next)
        choice = study.lead(self._choose_rate, survey, build, settings)
        self.lr, law, reference, self._limits = choice
        opt = RankAwareOptimizer(
            params,
            options.optimizer,
            lr=self.lr,
            law=law,
            tuned_at=reference,
            method=build.reference.method,
            **settings,
        )
        refuse_own_rates(opt, self.lr)
        in_force = settings_in_force(opt, options.optimizer, settings, at_own_lr)
        study.lead(self._record, replace(build, settings=in_force))
        # A schedule-free optimizer warms up without a scheduler, so read the length here.
        self._warmup = opt.defaults.get("warmup_steps", 0)
        refuse_warmup(self._warmup, self.steps)
        opt.register_step_post_hook(self._note_step)
        self._optimizer = weakref.ref(opt)
        self.follow(opt)
        return opt

    def follow(self, opt: Optimizer) -> None:
        """Read the trial's learning rate from `opt` after every step, because a
        scheduler may change the learning rate.

        Usually, `opt` is the optimizer that the method `build_optimizer` returned.
        However, a trainer may build its own optimizer with the trial's learning rate,
        and train with this optimizer instead.
        """
        self._scheduled = weakref.ref(opt)
        self._scheduled_group = trained_groups(opt)[0]

    def _is_next(self) -> bool:
        """Return whether every earlier trial has built its optimizer or has ended."""
        running = self._study.runs().running()
        return all(run.build for run in running if run.number < self.number)

    def _choose_rate(
        self, survey: Survey, build: Build, settings: dict[str, Any]
    ) -> tuple[float, Power, Reference, list[float]]:
        """Choose the base learning rate of this trial and store it in the study.

        Returns:
            The learning rate, the scaling law at its prior means, the reference configuration
            for both of them, and for each step the value above which the run has diverged.
        """
        study = self._study
        calibration = study.calibration()
        if calibration is None:  # this is the first trial
            calibration = Calibration(study.options, build, study.runs)
        within = search_range(calibration)
        x = next_rate(calibration, self.setting.rank, within)
        # Optuna stores a parameter only if the trial samples it. Here it is sampled from a range
        # that contains a single value.
        lr = 2.0 ** self._stored.suggest_float(PARAMETER, x, x)
        law = calibration.law(settings)
        own_lr = lr * multiplier_of(law, survey, build, calibration.build)
        self._stored.set_user_attr("own_lr", own_lr)
        limits = divergence_limits(study.runs().counted(), self.setting, self.steps)
        return lr, law, calibration.build.reference, limits

    def _record(self, build: Build) -> None:
        """Store the configuration of the trial's model and the settings of the trial's
        optimizer.

        Raises:
            CalibrationError: the model or the settings differ from those of the first trial
                with the same rank.
        """
        of_rank = [run.build for run in self._study.runs().at(self.setting.rank)]
        first = next(filter(None, of_rank), build)
        check = self._study.check_comparable
        check(asdict(first.reference), asdict(build.reference))
        check(first.settings, build.settings)
        self._stored.set_user_attr("build", asdict(build))

    # --- its values -------------------------------------------------------------------------------

    def _score_of(self, train: Train) -> float | None:
        """Run the user's `train` function and return its score, or None if `train`
        returns no score.

        A training run that raises `optuna.TrialPruned` or runs out of memory counts as
        stopped early.
        """
        try:
            score = self._run_to_end(train(Trial(self)))
        except TrialPruned:
            self._end, self._why = "pruned", "train raised TrialPruned"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._end, self._why = "memory", "out of memory"
        # Not inside the except block, where the error's traceback keeps the tensors alive.
        if self._end == "memory":
            release_memory()
        if self._end:
            return None
        self._check_whole()
        if score is None:
            return None
        return self._study.replicas.mean(
            one_number(score, "score that train() returned")
        )

    def _run_to_end(self, loop: object) -> object:
        """Report every value that the user's training loop yields, and return the value
        that the training loop returns.

        If the training loop is a generator, it is always closed at the end, so that its
        `finally` blocks run.
        """
        if isinstance(loop, CallbackRun):
            return loop.run(self)
        if not isinstance(loop, Generator):
            result = "None" if loop is None else f"a {type(loop).__name__}"
            raise CalibrationError(
                f"train() must be a generator function, but it returned {result}.",
                "Yield the loss of every step in train(), for example yield loss.item().",
            )
        with closing(loop):
            for value in loop:
                if self.report(value):
                    break
            # The loop is suspended at its last yield. It returns its score only when it is
            # resumed once more. If it yields another value instead, that value is ignored.
            if not self._end:
                try:
                    next(loop)
                except StopIteration as stop:
                    return stop.value
        return None

    # torch.compile may trace the optimizer's step, and must leave this Python side effect out
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_step(self, *hooked: object) -> None:
        self._values_before.append(len(self._curve))

    def report(self, value: object) -> bool:
        """Record the loss or other value of a training step, and return whether the
        trial must end now.

        A trial ends if it has diverged, if it is stopped early, or if it has completed
        all its steps.
        """
        # A trainer may still report a step or two after it was asked to stop.
        if self._is_over():
            return True
        name = f"value that train() yielded at step {len(self._curve) + 1}"
        self._curve.append(self._study.replicas.mean(one_number(value, name)))
        self._check_first()
        opt = self._scheduled()
        if opt is not None:
            self._rates.append(float(opt.param_groups[self._scheduled_group]["lr"]))
        if self._has_diverged():
            self._end = "diverged"
        elif self._is_pruned():
            self._end, self._why = "pruned", "far behind the best trial"
        elif len(self._curve) == self.steps:
            self._check_trained()
        # Check this as early as possible, because the rest of the trial would be wasted.
        elif len(self._values_before) == FIRST_STEPS + 1:
            refuse_micro_batches(self._values_before, len(self._curve))
        return self._is_over()

    def _is_over(self) -> bool:
        return bool(self._end) or len(self._curve) == self.steps

    def _check_first(self) -> None:
        if not math.isfinite(self._curve[0]):
            raise CalibrationError(
                f"The first value that train() yielded is {self._curve[0]}, which is not a finite"
                " number. The first loss does not depend on the learning rate, so every trial"
                " would fail.",
                "Check the model and the data for values that are not finite.",
            )
        if self.lr is None:
            raise CalibrationError(
                "train() yielded a value before it called trial.optimizer().",
                "Call opt = trial.optimizer(model) before the first yield, and train with this"
                " optimizer.",
            )

    def _has_diverged(self) -> bool:
        """Return whether the trial diverged: its last loss is not finite, or the mean
        of its recent losses is above the divergence limit of this step.

        The divergence limit is never lower than the trial's first loss, because a trial
        counts as diverged only if its loss rises above this first loss.
        """
        taken = len(self._curve)
        if not math.isfinite(self._curve[-1]):
            return True
        limit = max(self._curve[0], self._limits[taken - 1])
        return taken > TAIL and recent_mean(self._curve, TAIL) > limit

    def _is_pruned(self) -> bool:
        """Ten times per trial, store the mean of the recent losses and decide whether
        to stop the trial early.
        """
        taken = len(self._curve)
        every = interval(self.steps)
        if taken % every and taken != self.steps:
            return False
        return self._study.lead(self._judge, recent_mean(self._curve, max(TAIL, every)))

    def _judge(self, mean: float) -> bool:
        # `is_behind` uses the whole curve. This mean is only for Optuna's dashboard.
        self._stored.report(mean, len(self._curve))
        if len(self._curve) == self.steps:
            return False
        calibration = self._study.calibration()
        assert calibration is not None
        # the curve is stored only when the run has ended
        run = replace(self._study.runs()[self.number], curve=self._curve)
        return is_behind(calibration, run)

    def _check_trained(self) -> None:
        """Check a trial that completed all its steps, and count the warm-up steps of
        its learning rate.

        Raises:
            CalibrationError: the loop yielded several values per step, the run trained nothing
                because every LoRA matrix that was zero at the start is still zero, or the
                learning rate increased until the last step.
        """
        if self.steps <= FIRST_STEPS:
            return
        refuse_micro_batches(self._values_before, self.steps)
        moved = self._study.replicas.mean(float(has_moved(self._optimizer())))
        # Any gradient would have changed a matrix that was zero. Rewards are the exception:
        # if all rewards of a batch are equal, there is no gradient.
        if moved == 0.0 and not self._study.options.noisy:
            raise CalibrationError(
                f"Nothing was trained: after {self.steps} steps at learning rate {self.lr:.3g},"
                " all LoRA matrices that were zero at the start are still zero.",
                "Train with the optimizer that trial.optimizer() returned: call loss.backward(),"
                " opt.step() and opt.zero_grad() in every step. If you use a schedule, check that"
                " its learning rate is not always zero.",
            )
        self._warmup = max(rising_steps(self._rates), self._warmup)
        refuse_warmup(self._warmup, self.steps)

    # --- its end ----------------------------------------------------------------------------------

    def _check_whole(self) -> None:
        """Raise a `CalibrationError` if the user's `train` function took too few steps
        or never read `trial.steps`.
        """
        taken = len(self._curve)
        if taken < self.steps:
            raise CalibrationError(
                f"train() ended after {taken} of {self.steps} steps.",
                "Train for trial.steps steps and yield a value after each step, or pass a lower"
                " steps= to calibrate().",
            )
        if self._study.options.target > self.steps and not self.steps_were_read:
            raise CalibrationError(
                "train() never read trial.steps, so its learning rate schedule may be planned for"
                f" the whole run instead of the {self.steps} steps of a trial.",
                "Plan the schedule and the warm-up for trial.steps steps.",
            )

    def _end_trial(self, score: float | None) -> None:
        """Store how the run ended.

        Raises:
            CalibrationError: only some trials return a score, or some trials did not train at
                the learning rate that they were given.
        """
        outcome: dict[str, object] = {
            "curve": self._curve,
            "score": score,
            "end": self._end,
            "why": self._why,
            "warmup": self._warmup / self.steps,
        }
        # Only for a whole run, because a run that ended early may not have finished its warm-up.
        if not self._end and self._rates:
            outcome["peak_lr"] = max(self._rates)
        for name, value in outcome.items():
            self._stored.set_user_attr(name, value)
        # Everything is stored before the state changes: other workers read the attributes of
        # a trial as soon as it has ended.
        runs = self._study.runs()
        this = runs[self.number].observation
        if this is None:
            return self._study.end_trial(TrialState.PRUNED)
        refuse_mixed_scores(this, runs.observations())
        refuse_other_peaks(runs[self.number], runs.counted())
        if math.isfinite(this.value):
            return self._study.end_trial(TrialState.COMPLETE, this.value)
        return self._study.end_trial(TrialState.PRUNED)


def _no_optimizer() -> None:
    """Return None. Until the trial's optimizer is built, this function replaces the
    weak reference to the optimizer.
    """
