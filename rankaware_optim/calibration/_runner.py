"""The search, trial by trial. A `TrialRunner` runs one trial: it builds the optimizer, judges every
value that the user's loop yields, and stores how the run ended.
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
    """Run the trials of a calibration, and return the recipe that follows from them.

    Args:
        train: the training loop, see `calibrate`.
        options: what is tried.
        storage: where the study is kept, see `calibrate`.
        progress: what shows how far the search is, by default nothing.
        price: what the trials cost beside their steps, in words.

    Raises:
        CalibrationError: `train` or the storage cannot be used, or every run diverged.
        CalibrationInterrupted: Ctrl-C.
    """
    state = random.getstate()  # using a database may draw from it
    gradients = torch.is_grad_enabled()  # Ctrl-C inside no_grad() may leave them off
    shown = Progress(is_shown=False) if progress is None else progress
    study = Study(options, source_of(train), shown)
    try:
        study.open(storage, price)
        while (setting := study.next()) is not None:
            TrialRunner(study, setting).run(train)
        return study.recipe()
    except KeyboardInterrupt as interrupt:
        if not study.replicas.leads:
            raise
        raise study.interrupted() from interrupt
    finally:
        torch.set_grad_enabled(gradients)
        study.close()
        random.setstate(state)


class TrialRunner:
    """Runs one trial, and records what happens to it.

    Args:
        study: the study to which the trial belongs.
        setting: its rank and seed.

    Attributes:
        number: the trial's number, from 0.
        steps: its number of optimizer steps.
        steps_were_read: whether the loop has asked for them.
        lr: its base learning rate, None until the optimizer is built.
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
        self._limits: list[float] = []  # by step: a mean above it has diverged
        self._rates: list[float] = []  # the base learning rate after each step
        # for each step of the optimizer, how many values came before it
        self._values_before: list[int] = []
        # returns the optimizer while it lives: the loop owns it
        self._optimizer: Callable[[], RankAwareOptimizer | None] = _no_optimizer
        # the optimizer whose learning rates a schedule sets, and the group to look at
        self._scheduled: Callable[[], Optimizer | None] = _no_optimizer
        self._scheduled_group = 0
        self._stored: optuna.trial.Trial  # only in the leading process
        self.number = study.lead(self._begin)

    def _begin(self) -> int:
        self._stored = self._study.begin_trial(self.setting)
        self._study.check_options(self._study.runs())
        return self._stored.number

    def run(self, train: Train) -> None:
        """Run `train`, and store the outcome. If it raises an error, `Study.close` fails the trial.

        A trial ends as COMPLETE with its score, or as PRUNED without one: it diverged, was stopped
        early or ran out of memory. Both count. A trial that raised an error, or whose worker died,
        ends as FAIL, and its rank and seed are run again.
        """
        # Several workers, on one machine or many, may run trials of one study. They never talk to
        # each other: each reads and writes the storage, and this is what makes them agree.
        #   1. A worker begins its trial in the storage first. All others see its rank and seed
        #      there, and take others. Two workers that read at the same moment may take the same
        #      one; then one more run is made, which does no harm.
        #   2. It builds its model, and then waits until every trial with a lower number has its
        #      optimizer or has ended. So learning rates are chosen one after the other, none is
        #      tried twice, and the first trial's model becomes the reference of all.
        #   3. While it trains, its heartbeat thread writes to the storage. If the heartbeats stop,
        #      any other worker fails the trial and runs its rank and seed again. A worker that was
        #      only asleep finds out when it stores the outcome, and drops it (see below).
        lead = self._study.lead
        try:
            with seeded(self.setting.seed):
                score = self._score_of(train)
            lead(self._end_trial, score)
        except UpdateFinishedTrialError:
            lead(self._study.end_trial, TrialState.FAIL)
            warn(
                f"Trial {self.number} had no heartbeat for so long that another worker declared it"
                " dead and runs it again. The result of this run is dropped."
            )

    # --- its optimizer ----------------------------------------------------------------------------

    def build_optimizer(
        self, params: Any, settings: dict[str, Any]
    ) -> RankAwareOptimizer:
        """Build the trial's optimizer, and record what it was built with. See `Trial.optimizer`."""
        study, options = self._study, self._study.options
        rank = self.setting.rank
        refuse_settings(settings)
        params = groups_of(params)
        at_own_lr = groups_with_lr(params)
        survey = survey_of(params, rank, settings)
        build = describe(survey, rank, options.batch)
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
        # schedule-free optimizers warm up by themselves
        self._warmup = opt.defaults.get("warmup_steps", 0)
        refuse_warmup(self._warmup, self.steps)
        opt.register_step_post_hook(self._note_step)
        self._optimizer = weakref.ref(opt)
        self.follow(opt)
        return opt

    def follow(self, opt: Optimizer) -> None:
        """Read the trial's learning rates off an optimizer, which a scheduler may change.

        It is the trial's own optimizer, unless a trainer trains with another one that it has built
        at the trial's learning rate.
        """
        self._scheduled = weakref.ref(opt)
        self._scheduled_group = trained_groups(opt)[0]

    def _is_next(self) -> bool:
        """Return whether every trial begun before has its optimizer, or has ended."""
        running = self._study.runs().running()
        return all(run.build for run in running if run.number < self.number)

    def _choose_rate(
        self, survey: Survey, build: Build, settings: dict[str, Any]
    ) -> tuple[float, Power, Reference, list[float]]:
        """Choose the trial's base learning rate, and store it.

        Returns:
            The learning rate, the law at its prior means, the reference configuration that both
            belong to, and for each step the value above which the run has diverged.
        """
        study = self._study
        calibration = study.calibration()
        if calibration is None:  # this is the first trial
            calibration = Calibration(study.options, build, study.runs)
        within = search_range(calibration)
        x = next_rate(calibration, self.setting.rank, within)
        # Optuna stores a parameter only if its trial draws it, here from a single value
        lr = 2.0 ** self._stored.suggest_float(PARAMETER, x, x)
        law = calibration.law(settings)
        own_lr = lr * multiplier_of(law, survey, build, calibration.build)
        self._stored.set_user_attr("own_lr", own_lr)
        limits = divergence_limits(study.runs().counted(), self.setting, self.steps)
        return lr, law, calibration.build.reference, limits

    def _record(self, build: Build) -> None:
        """Store what the trial was built with.

        Raises:
            CalibrationError: the first trial of its rank had another model or other settings.
        """
        of_rank = [run.build for run in self._study.runs().at(self.setting.rank)]
        first = next(filter(None, of_rank), build)
        check = self._study.check_comparable
        check(asdict(first.reference), asdict(build.reference))
        check(first.settings, build.settings)
        self._stored.set_user_attr("build", asdict(build))

    # --- its values -------------------------------------------------------------------------------

    def _score_of(self, train: Train) -> float | None:
        """Run `train`, which reports its values, and return the score that it returned, if any.

        A run that raises `optuna.TrialPruned`, or that runs out of memory, has ended early.
        """
        try:
            score = self._run_to_end(train(Trial(self)))
        except TrialPruned:
            self._end, self._why = "pruned", "train raised TrialPruned"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._end, self._why = "memory", "out of memory"
        # here, and not in the except block: until that ends, the error holds the run's tensors
        if self._end == "memory":
            release_memory()
        if self._end:
            return None
        self._check_whole()
        if score is None:
            return None
        return self._study.replicas.mean(one_number(score, "The score is"))

    def _run_to_end(self, loop: object) -> object:
        """Report the values of a loop, and return what it returns after its steps.

        A generator is closed, so that its `finally` blocks run.
        """
        if isinstance(loop, CallbackRun):
            return loop.run(self)
        if not isinstance(loop, Generator):
            raise CalibrationError(
                f"train returned {_kind(loop)} instead of a generator.",
                "Write train with yield: it yields the loss of every step, as a number.",
            )
        with closing(loop):
            for value in loop:
                if self.report(value):
                    break
            # a loop returns its score when it is asked for a value after its last step
            if not self._end:
                try:
                    next(loop)
                except StopIteration as stop:
                    return stop.value
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_step(self, *hooked: object) -> None:
        self._values_before.append(len(self._curve))

    def report(self, value: object) -> bool:
        """Take the value of a step, and return whether the run ends here.

        It ends because it diverged, is stopped early, or has run all its steps.
        """
        if (
            self._is_over()
        ):  # a trainer may report a step or two after it was asked to stop
            return True
        at = f"At step {len(self._curve) + 1} train yielded"
        self._curve.append(self._study.replicas.mean(one_number(value, at)))
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
        # as early as possible, so that a whole trial is not wasted
        elif len(self._values_before) == FIRST_STEPS + 1:
            refuse_micro_batches(self._values_before, len(self._curve))
        return self._is_over()

    def _is_over(self) -> bool:
        return bool(self._end) or len(self._curve) == self.steps

    def _check_first(self) -> None:
        if not math.isfinite(self._curve[0]):
            raise CalibrationError(
                f"The first value that train yielded is {self._curve[0]}. It does not depend on the"
                " learning rate, so no trial can do better.",
                "Fix the model or the data until the first loss is finite.",
            )
        if self.lr is None:
            raise CalibrationError(
                "train yielded a value before it called trial.optimizer.",
                "Build the optimizer with trial.optimizer(model), and train with it.",
            )

    def _has_diverged(self) -> bool:
        """Return whether the last value is not finite, or the recent mean is above its limit.

        A loss may always return to its first value: only a rise above it is a divergence.
        """
        taken = len(self._curve)
        if not math.isfinite(self._curve[-1]):
            return True
        limit = max(self._curve[0], self._limits[taken - 1])
        return taken > TAIL and recent_mean(self._curve, TAIL) > limit

    def _is_pruned(self) -> bool:
        """Store the run's mean ten times a run. Return whether to stop the run early."""
        taken = len(self._curve)
        every = interval(self.steps)
        if taken % every and taken != self.steps:
            return False
        return self._study.lead(self._judge, recent_mean(self._curve, max(TAIL, every)))

    def _judge(self, mean: float) -> bool:
        self._stored.report(mean, len(self._curve))  # for Optuna's dashboard
        if len(self._curve) == self.steps:
            return False
        calibration = self._study.calibration()
        assert calibration is not None
        # the curve is stored only when the run has ended
        run = replace(self._study.runs()[self.number], curve=self._curve)
        return is_behind(calibration, run)

    def _check_trained(self) -> None:
        """Check a run that took all its steps, and count the steps of its warm-up.

        Raises:
            CalibrationError: it yielded several values a step; it trained nothing, because every
                LoRA matrix that was zero at the start is still zero, and any gradient and learning
                rate would have moved some; or its learning rate rose until the end.
        """
        if self.steps <= FIRST_STEPS:
            return
        refuse_micro_batches(self._values_before, self.steps)
        moved = self._study.replicas.mean(float(has_moved(self._optimizer())))
        # rewards that are all equal give no gradient
        if moved == 0.0 and not self._study.options.noisy:
            raise CalibrationError(
                f"Nothing was trained: after {self.steps} steps at learning rate {self.lr:.3g},"
                " every LoRA matrix that was zero at the start is still zero.",
                "Call loss.backward(), then step() of the optimizer that trial.optimizer returned,"
                " then zero_grad(). If you use a schedule, check that it lets the learning rate"
                " rise above zero.",
            )
        self._warmup = max(rising_steps(self._rates), self._warmup)
        refuse_warmup(self._warmup, self.steps)

    # --- its end ----------------------------------------------------------------------------------

    def _check_whole(self) -> None:
        """Raise a `CalibrationError` if `train` took too few steps, or could not know how many."""
        taken = len(self._curve)
        if taken < self.steps:
            raise CalibrationError(
                f"train ended after {taken} of {self.steps} steps.",
                "Let it yield a value for each of trial.steps steps, or pass a lower steps=.",
            )
        if self._study.options.target > self.steps and not self.steps_were_read:
            raise CalibrationError(
                "train never read trial.steps, so its schedule may span the steps of the target"
                f" run instead of the trial's {self.steps}.",
                "Let its schedule and warm-up span trial.steps.",
            )

    def _end_trial(self, score: float | None) -> None:
        """Store how the run ended.

        Raises:
            CalibrationError: only some trials return a score, or the trials did not train at the
                learning rates that they were meant to try.
        """
        outcome: dict[str, object] = {
            "curve": self._curve,
            "score": score,
            "end": self._end,
            "why": self._why,
            "warmup": self._warmup / self.steps,
        }
        if not self._end and self._rates:
            outcome["peak_lr"] = max(self._rates)
        for name, value in outcome.items():
            self._stored.set_user_attr(name, value)
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
    """Stand in for a weak reference to an optimizer that was not built yet."""


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
