"""Running a calibration: `search` runs its trials, and `TrialRun` is one of them, from its rate to
its end.
"""

from __future__ import annotations

import math
import random
import sys
import time
import weakref
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from torch import nn
from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Reference, width_for
from .._warn import warn
from ..errors import CalibrationError
from ..fitting import TAIL, recent_mean
from ..inspection import Survey, as_one_model, inspect_model
from ..laws import Power, checked_multiplier
from ..optimizer import RankAwareOptimizer
from ..recipe import (
    BASE,
    SAME_UPDATES,
    Recipe,
    agreed,
    layers_of,
    name_pattern,
    plain_value,
    settings_of,
)
from ._calibration import Settled
from ._constants import FEW
from ._schedule import Options
from ._search import divergence_limits, search_range
from ._study import Study, source_of
from ._trial import (
    Pushed,
    Train,
    Trial,
    as_float,
    has_moved,
    is_out_of_memory,
    refuse_micro_batches,
    refuse_warmup,
    release_memory,
    rising_steps,
    seeded,
)
from ._trials import (
    PARAMETER,
    End,
    Run,
    Setting,
    Trials,
    check_comparable,
    interval,
    rank_words,
)

# Optimizer settings that the study decides, or that do not change the updates.
_LEFT_OUT = {
    "cls",
    "self",
    "params",
    "optimizer",
    "model",
    "lr",
    "tuned_at",
    "law",
    "recipe",
    "method",
    "steps",
    "seed",
    "generator",
    *SAME_UPDATES,
}
# takes how many trials have ended, and what the last one ran
Show = Callable[[int, str], None]


def search(
    train: Train,
    options: Options,
    *,
    storage: Any = None,
    progress: bool = True,
    price: str = "",
) -> Recipe:
    """Run the trials of a calibration, and return their recipe. The arguments are those of the
    public `calibrate`.

    price: what the trials cost beside their steps, in words.

    Raises:
        CalibrationError: `train` or the storage cannot be used, or every run diverged.
        CalibrationInterrupted: Ctrl-C.
    """
    state = random.getstate()  # using a database may draw from it
    gradients = torch.is_grad_enabled()  # Ctrl-C inside no_grad() may leave them off
    study = Study(options, source_of(train))
    leads = study.replicas.leads
    try:
        ended = study.open(storage)
        show = progress_lines(options, ended, progress and leads, price)
        while (setting := study.next()) is not None:
            TrialRun(study, setting, show).run(train)
        return study.recipe()
    except KeyboardInterrupt as interrupt:
        if not leads:
            raise
        raise study.interrupted() from interrupt
    finally:
        torch.set_grad_enabled(gradients)
        study.close()
        random.setstate(state)


def progress_lines(
    options: Options,
    ended: int,
    wanted: bool,
    price: str,
) -> Show:
    """Return what prints a line for a trial that has ended, on standard error. Before the first
    trial the price is printed.
    """
    began = time.monotonic()

    def say(words: str) -> None:
        if wanted:
            print(f"calibrate: {words}", file=sys.stderr, flush=True)

    def show(done: int, words: str) -> None:
        total = max(options.likely_trials, done)
        each = (time.monotonic() - began) / (done - ended)
        left = timedelta(seconds=round(each * (total - done)))
        say(f"trial {done}/{total}, {words}, {left} left")

    if not ended:
        say(f"{options.price}{price}")
    return show


class TrialRun:
    """One run of the user's `train`: gets its rate, takes its values, and records its end.

    Args:
        study: hands out rates, and keeps the outcome.
        setting: the run's rank and seed.
        show: shows how far the calibration is.
    """

    def __init__(self, study: Study, setting: Setting, show: Show) -> None:
        self.study, self.setting, self.show = study, setting, show
        self.options = study.options
        self.steps = study.options.steps
        self.curve: list[float] = []
        self.end: End = ""
        self.score: float | None = None  # that the loop returned
        self.warmup = 0.0  # the share of the steps over which the rate rose
        self._stored: Any = None  # Optuna's trial, in the leading process
        self._rates: list[float] = []  # after each step
        self._stepped: list[int] = []  # values before each step of the optimizer
        # gives the optimizer while it lives
        self._optimizer: Callable[[], Any] = lambda: None

    def run(self, train: Train) -> None:
        """Run and record the trial. If it raises, `Study.close` fails it.

        It ends as COMPLETE with its score, or as PRUNED if it has none: it diverged, was pruned or
        ran out of memory. Both count. A trial that raised, or whose worker died, is a FAIL: its
        setting is due again.
        """
        # Workers agree by what they read in the storage. A trial that has begun is seen by all, so
        # that they take other settings. Two that read at the same moment may take the same one: a
        # run more does no harm. A rate is chosen only after every trial begun before has its own,
        # so that no point is tried twice; the first trial of a study has its own once it has
        # built its model, which settles the reference. Then the trial waits until one of its rank
        # begun before has said what it was built with, and compares. While it trains it gives
        # signs of life, without which any other worker fails it, and runs its setting again.
        lead = self.study.lead
        number = lead(self._begin)
        try:
            self.study.wait(self._may_choose)
            self._limits, self._before, self._best = lead(self._prepare)
            trial = Trial(*self.setting, number, self.steps, self.build)
            with seeded(trial.seed):
                self._train(train, trial)
            lead(self._end_trial)
            self._show()
        except UpdateFinishedTrialError:
            lead(self.study.end_trial, TrialState.FAIL)
            warn(
                f"Trial {number} had no heartbeat for so long that another worker has failed it."
                " Its run here does not count."
            )

    def _show(self) -> None:
        best = "" if self._best is None else f", best rate {self._best:.3g}"
        self.show(self._before + 1, f"{rank_words(self.setting.rank)}{best}")

    # --- its rate ---------------------------------------------------------------------------------

    def _begin(self) -> int:
        self._stored = self.study.begin_trial(self.setting)
        self.study.check_options(self.study.runs())
        return int(self._stored.number)

    def _may_choose(self) -> bool:
        """Return whether trials begun before this one have their rates."""
        running = self.study.runs().running()
        earlier = [run for run in running if run.number < self._stored.number]
        # after the trials, since what a trial settles is stored before its rate
        self.study.recall()
        return all(run.x is not None for run in earlier)

    def _prepare(self) -> tuple[list[float], int, float | None]:
        """Choose the rate, if a model was built before. Return the limits above which the run
        counts as diverged, the number of runs before, and the best rate so far.
        """
        calibration, best = self.study.calibration, None
        if calibration is not None:
            self._take_rate()
            best = calibration.best()
        ended = self.study.runs().counted()
        limits = divergence_limits(ended, self.setting, self.steps)
        return limits, len(ended), best

    def _take_rate(self) -> float:
        """Return log2 of the rate, sampled once."""
        x = self._stored.params.get(PARAMETER)
        if x is None:
            assert self.study.calibration is not None
            within = search_range(self.study.calibration)
            x = self._stored.suggest_float(PARAMETER, *within)
        return float(x)

    def build(
        self, trial: Trial, params: Any, settings: dict[str, Any]
    ) -> RankAwareOptimizer:
        """Build the optimizer for `Trial.optimizer`: read the model, then choose a rate in
        reference coordinates.
        """
        model = settings.get("model")
        model = as_one_model(params if model is None else model)
        at_own_lr: set[int] = set()
        if not isinstance(as_one_model(params), nn.Module):
            params = [*params]
            groups = enumerate(params)
            at_own_lr = {i for i, g in groups if isinstance(g, Mapping) and "lr" in g}
        survey = inspect_model(model, method=trial.method, init=settings.get("init"))
        at = survey.dominant().resolve(survey)
        lead, native = self.study.lead, self.options.optimizer
        trial.lr, law, reference = lead(self._propose, survey, at, settings)
        optimizer = RankAwareOptimizer(
            params,
            native,
            lr=trial.lr,
            law=law,
            tuned_at=reference,
            method=trial.method,
            **settings,
        )
        built = built_with(optimizer, native, settings, at, at_own_lr)
        self.study.wait(self._may_compare)
        lead(self._record, built)
        # schedule-free optimizers warm up by themselves
        warmup = optimizer.defaults.get("warmup_steps", 0)
        refuse_warmup(warmup, self.steps)
        self.warmup = warmup / self.steps
        optimizer.register_step_post_hook(self._note_step)
        self._optimizer = weakref.ref(optimizer)
        return optimizer

    def _propose(
        self, survey: Survey, at: Reference, settings: dict[str, Any]
    ) -> tuple[float, Power, Reference]:
        """Return the base rate, the law centred on its priors, and the reference that both belong
        to. `at` is the model's configuration.
        """
        rank = self.setting.rank
        if at.rank != rank:
            raise CalibrationError(
                f"The model built for trial.rank={rank} has rank {at.rank}.",
                "Build it at trial.rank.",
            )
        calibration = self.study.calibration
        if calibration is None:
            reference = replace(at, batch=self.options.batch)
            full_fan_in = survey.full_width(reference.init)
            settled = Settled(reference, full_fan_in, layers_of(survey))
            calibration = self.study.settle(settled)
        lr = 2.0 ** self._take_rate()
        law = calibration.law(settings)
        reference = calibration.settled.reference
        width = width_for(survey, at.method, reference.init)
        factor = replace(at, fan_in=width).as_factor()
        own_lr = lr * checked_multiplier(law, factor, reference)
        self._stored.set_user_attr("own_lr", own_lr)
        return lr, law, reference

    def _earlier(self) -> Trials:
        """Return the trials of the rank begun before this one."""
        of_rank = self.study.runs().at(self.setting.rank)
        return Trials(run for run in of_rank if run.number < self._stored.number)

    def _may_compare(self) -> bool:
        earlier = self._earlier()
        return any(run.built for run in earlier) or not earlier.running()

    def _record(self, built: dict[str, Any]) -> None:
        """Store what the trial was built with. Raise if an earlier one of its rank, or the
        reference, had another model or other settings.
        """
        assert self.study.calibration is not None
        reference = self.study.calibration.settled.reference
        before = [run.built for run in self._earlier() if run.built]
        if reference.rank == self.setting.rank:
            before.append(shape_of(reference))
        for first in before[:1]:
            check_comparable(self.options.name, first, built)
        self._stored.set_user_attr("built", built)

    # --- its values -------------------------------------------------------------------------------

    def _train(self, train: Train, trial: Trial) -> None:
        """Run `train`, which reports its values. A run that raises optuna.TrialPruned or runs out
        of memory is pruned.
        """
        self.trial = trial
        try:
            score = self._score_of(train(trial))
        except TrialPruned:
            self.end = "pruned"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.end = "memory"
        if self.end == "memory":
            release_memory()
        if not self.end:
            self._check_whole()
            mean = self.study.replicas.mean
            self.score = None if score is None else mean(as_float(score))

    def _score_of(self, loop: Any) -> Any:
        """Report the values of a loop, and return what it returns after its steps. A generator is
        closed, so that its `finally` blocks run.
        """
        if isinstance(loop, Pushed):
            return loop.run(self.report)
        if not isinstance(loop, Generator):
            raise CalibrationError(
                f"train returned a {type(loop).__name__} instead of a generator.",
                "Let it yield a value at every step.",
            )
        with closing(loop):
            for value in loop:
                if self.report(value):
                    break
            if not self.end:
                try:
                    next(loop)
                except StopIteration as stop:
                    return stop.value
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_step(self, *hooked: Any) -> None:
        self._stepped.append(len(self.curve))

    def report(self, value: Any) -> bool:
        """Take the value of a step. Return whether the run ends: it diverged, is pruned, or has run
        its steps.
        """
        if self._is_over():
            return True
        self.curve.append(self.study.replicas.mean(as_float(value)))
        if len(self.curve) == 1:
            self._check_first()
        optimizer = (self.trial._scheduled or self._optimizer)()
        if optimizer is not None:
            self._rates.append(float(optimizer.param_groups[0]["lr"]))
        if self._has_diverged():
            self.end = "diverged"
        elif self._is_pruned():
            self.end = "pruned"
        elif len(self.curve) == self.steps:
            self._check_trained()
        elif len(self._stepped) == FEW + 1:
            refuse_micro_batches(self._stepped, len(self.curve))
        return self._is_over()

    def _is_over(self) -> bool:
        return bool(self.end) or len(self.curve) == self.steps

    def _check_first(self) -> None:
        if not math.isfinite(self.curve[0]):
            raise CalibrationError(
                f"The first value that train yielded is {self.curve[0]}, which does not depend on"
                " the rate.",
                "Fix the model or the data: the first loss must be finite.",
            )
        if self.trial.lr is None:
            raise CalibrationError(
                "train yielded without calling trial.optimizer.",
                "Take the optimizer from trial.optimizer(model).",
            )

    def _has_diverged(self) -> bool:
        if not math.isfinite(self.curve[-1]):
            return True
        limit = max(self.curve[0], self._limits[len(self.curve) - 1])
        return len(self.curve) > TAIL and recent_mean(self.curve, TAIL) > limit

    def _is_pruned(self) -> bool:
        """Store the run's mean from time to time. Return whether it is to be pruned."""
        taken = len(self.curve)
        every = interval(self.steps)
        if taken % every and taken != self.steps:
            return False
        return self.study.lead(self._judge, recent_mean(self.curve, max(TAIL, every)))

    def _judge(self, mean: float) -> bool:
        taken = len(self.curve)
        self._stored.report(mean, taken)
        return taken < self.steps and bool(self._stored.should_prune())

    def _check_trained(self) -> None:
        """Raise if the run's values were not one a step, if every factor that was zero at the start
        is still zero, since any gradient and rate would have moved some, or if its rate rose until
        its end. Take the warm-up's share of the steps.
        """
        if self.steps <= FEW:
            return
        refuse_micro_batches(self._stepped, len(self.curve))
        moved = self.study.replicas.mean(float(has_moved(self._optimizer())))
        # equal rewards give no gradient
        if moved == 0.0 and not self.options.noisy:
            raise CalibrationError(
                f"Nothing was trained: after {len(self.curve)} steps at the rate"
                f" {self.trial.lr:.3g} every LoRA factor that was zero at the start is still zero.",
                "Call loss.backward(), then the step of the optimizer of trial.optimizer, then"
                " zero_grad(), and see that the schedule lets the rate rise above zero.",
            )
        warmup = max(rising_steps(self._rates), self.warmup * self.steps)
        refuse_warmup(warmup, self.steps)
        self.warmup = warmup / self.steps

    # --- its end ----------------------------------------------------------------------------------

    def _check_whole(self) -> None:
        """Raise unless the run took its steps, and knew of them."""
        taken = len(self.curve)
        if taken < self.steps:
            raise CalibrationError(
                f"train ended after {taken} of {self.steps} steps.",
                "Let it yield a value for each step, or lower steps=.",
            )
        if self.options.target > self.steps and "steps" not in vars(self.trial):
            raise CalibrationError(
                "train never read trial.steps, so its schedule may span the steps of the target"
                " run.",
                "Let its schedule and warm-up span trial.steps.",
            )

    def _end_trial(self) -> None:
        """Record how the run ended."""
        outcome: dict[str, Any] = {
            "curve": self.curve,
            "score": self.score,
            "end": self.end,
            "warmup": self.warmup,
        }
        for name, value in outcome.items():
            self._stored.set_user_attr(name, value)
        x = self._stored.params.get(PARAMETER)
        seen = Run(*self.setting, x=x, **outcome).observation
        if seen is None:
            return self.study.end_trial(TrialState.PRUNED)
        for other in self.study.runs().observations():
            mixed = other.returned != seen.returned
            if mixed and not (seen.stopped or other.stopped):
                raise CalibrationError(
                    "train returned a score in some trials and none in others.",
                    "Return one in every trial, or in none.",
                )
        if math.isfinite(seen.value):
            return self.study.end_trial(TrialState.COMPLETE, seen.value)
        return self.study.end_trial(TrialState.PRUNED)


# --- what a trial is built with -------------------------------------------------------------------


def built_with(
    opt: Any,
    native: type[Optimizer],
    settings: Mapping[str, Any],
    at: Reference,
    at_own_lr: Collection[int],
) -> dict[str, Any]:
    """Return what decides a trial besides its rank, seed and rate, as JSON values that are equal in
    every process: the model's width, alpha and init, and all settings.

    Settings that were not given have their defaults. If groups differ in a setting, its value is a
    list, and the value of the factors' groups is stored too. For a LoRA trial the rates of
    parameters that are not factors are stored. at_own_lr: numbers of the groups that were given an
    "lr".
    """
    ours = defaults_of(RankAwareOptimizer.__new__)
    given = {**ours, **defaults_of(native), **settings}
    built = {name: plain_value(given[name]) for name in given.keys() - _LEFT_OUT}
    names = opt.defaults.keys() - _LEFT_OUT
    built |= settings_of(opt.param_groups, names)
    rates = opt.rates.groups
    numbers = sorted({group.user_group for group in rates if group.role != "other"})
    of_factors = [opt.param_groups[number] for number in numbers]
    factors = settings_of(of_factors or opt.param_groups, names)
    apart = {name: value for name, value in factors.items() if value != built[name]}
    if apart:
        built["factors' settings"] = apart
    if at.method != "full":
        built["other rates"] = _other_rates(rates, at_own_lr)
    return {**built, **shape_of(at)}


def shape_of(at: Reference) -> dict[str, Any]:
    """Return what decides a trial of a model's configuration."""
    # not "alpha", which is a setting of RMSprop
    return {"width": at.fan_in, "lora_alpha": at.alpha, "init": at.init}


def _other_rates(
    rates: Any,
    at_own_lr: Collection[int],
) -> dict[str, Any]:
    """Return the rates of parameters that are not factors, by name pattern. Patterns with two rates
    are left out.
    """
    tables = []
    for group in rates:
        if group.role != "other":
            continue
        is_own = group.given is not None or group.user_group in at_own_lr
        # twelve digits remove a ratio's rounding error
        rate = float(f"{group.lr:.12g}") if is_own else BASE
        tables.append({name_pattern(name): rate for name in group.names})
    return agreed(tables)
