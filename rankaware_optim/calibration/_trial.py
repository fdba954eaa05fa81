"""A trial, which the user's training loop gets, from its rate to its end. `search` runs them."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from optuna import TrialPruned
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from torch import nn
from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Method, Reference, width_for
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
    layers_of,
    name_pattern,
    plain_value,
    settings_of,
    without_conflicts,
)
from ._calibration import Calibration
from ._constants import FEW
from ._loop import (
    Pushed,
    as_float,
    has_moved,
    is_out_of_memory,
    refuse_micro_batches,
    refuse_warmup,
    release_memory,
    rising_steps,
    seeded,
)
from ._schedule import Options
from ._search import divergence_limits, interval, is_behind, next_rate, search_range
from ._study import Study, source_of
from ._trials import PARAMETER, End, Setting, Settled

Train = Callable[["Trial"], "Generator[Any, None, Any] | Pushed"]
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
    study = Study(options, source_of(train), progress)
    try:
        study.open(storage, price)
        while (setting := study.next()) is not None:
            Trial(study, setting)._run(train)
        return study.recipe()
    except KeyboardInterrupt as interrupt:
        if not study.replicas.leads:
            raise
        raise study.interrupted() from interrupt
    finally:
        torch.set_grad_enabled(gradients)
        study.close()
        random.setstate(state)


class Trial:
    """One run of the user's `train`, passed to it by `calibrate`.

    Attributes:
        rank: the LoRA rank to build, None for full finetuning.
        seed: the random seed of the run.
        number: the trial's number, from 0.
        lr: the base rate, per step, in the coordinates of `Recipe.lr`. None until `optimizer` was
            called.
    """

    def __init__(self, study: Study, setting: Setting) -> None:
        self.rank, self.seed = setting
        self.lr: float | None = None
        self._study, self._setting = study, setting
        self._steps = study.options.steps
        self._curve: list[float] = []
        self._end: End = ""
        self._warmup = 0  # the steps over which the rate rose
        self._rates: list[float] = []  # after each step
        self._stepped: list[int] = []  # values before each step of the optimizer
        # gives the optimizer while it lives
        self._optimizer: Callable[[], Any] = lambda: None
        # the same of one whose schedule is followed in its place
        self._scheduled: Callable[[], Any] | None = None
        self._stored: Any = None  # Optuna's trial, in the leading process
        self.number = study.lead(self._begin)

    @cached_property  # so that its reading can be seen
    def steps(self) -> int:
        """The number of optimizer steps of the whole run, with its warm-up and decay."""
        return self._steps

    def _run(self, train: Train) -> None:
        """Run and record the trial. If it raises, `Study.close` fails it.

        It ends as COMPLETE with its score, or as PRUNED if it has none: it diverged, was pruned or
        ran out of memory. Both count. A trial that raised, or whose worker died, is a FAIL: its
        setting is due again.
        """
        # Workers agree by what they read in the storage. A trial that has begun is seen by all, so
        # that they take other settings. Two that read at the same moment may take the same one: a
        # run more does no harm. Each builds its model, and waits until every trial begun before has
        # its optimizer. So no rate is tried twice, the first trial settles the reference, and what
        # a trial was built with is compared with the first one of its rank. While it trains it
        # gives signs of life, without which any other worker fails it, and runs its setting again.
        lead = self._study.lead
        try:
            with seeded(self.seed):
                score = self._score_of(train)
            lead(self._end_trial, score)
        except UpdateFinishedTrialError:
            lead(self._study.end_trial, TrialState.FAIL)
            warn(
                f"Trial {self.number} had no heartbeat for so long that another worker has failed"
                " it. Its run here does not count."
            )

    def _begin(self) -> int:
        self._stored = self._study.begin_trial(self._setting)
        self._study.check_options(self._study.runs())
        return int(self._stored.number)

    # --- its optimizer ----------------------------------------------------------------------------

    def optimizer(self, params: Any, /, **settings: Any) -> RankAwareOptimizer:
        """Build a RankAwareOptimizer at this trial's rate.

        Args:
            params: the model, or a list of several, as [unet, text_encoder], or parameters or
                parameter groups together with `model=`.
            **settings: the optimizer's settings, which are recorded, and arguments of
                `RankAwareOptimizer` such as `rates` and `other_lr`, but those that set the rate.

        Raises:
            CalibrationError: the model has another rank, or it or the settings differ from those of
                stored trials.
        """
        model = settings.get("model")
        model = as_one_model(params if model is None else model)
        at_own_lr: set[int] = set()
        if not isinstance(as_one_model(params), nn.Module):
            params = [*params]
            groups = enumerate(params)
            at_own_lr = {i for i, g in groups if isinstance(g, Mapping) and "lr" in g}
        method: Method = "full" if self.rank is None else "lora"
        survey = inspect_model(model, method=method, init=settings.get("init"))
        at = survey.dominant().resolve(survey)
        if at.rank != self.rank:
            raise CalibrationError(
                f"The model built for trial.rank={self.rank} has rank {at.rank}.",
                "Build it at trial.rank.",
            )
        study = self._study
        native = self._study.options.optimizer
        own = replace(at, batch=study.options.batch)
        settled = Settled(own, survey.full_width(at.init), layers_of(survey))
        study.wait(self._is_next)
        proposal = study.lead(self._propose, survey, settled, settings)
        self.lr, law, reference, self._limits = proposal
        optimizer = RankAwareOptimizer(
            params,
            native,
            lr=self.lr,
            law=law,
            tuned_at=reference,
            method=method,
            **settings,
        )
        in_force = settings_in_force(optimizer, native, settings, at_own_lr)
        study.lead(self._record, replace(settled, settings=in_force))
        # schedule-free optimizers warm up by themselves
        self._warmup = optimizer.defaults.get("warmup_steps", 0)
        refuse_warmup(self._warmup, self._steps)
        optimizer.register_step_post_hook(self._note_step)
        self._optimizer = weakref.ref(optimizer)
        return optimizer

    def _is_next(self) -> bool:
        """Return whether every trial begun before has its optimizer, or has ended."""
        running = self._study.runs().running()
        return all(run.settled for run in running if run.number < self.number)

    def _propose(
        self, survey: Survey, settled: Settled, settings: dict[str, Any]
    ) -> tuple[float, Power, Reference, list[float]]:
        """Return the base rate, the law centred on its priors, the reference that both belong to,
        and for each step the value above which the run has diverged.
        """
        study = self._study
        at = settled.reference
        calibration = study.calibration()
        if calibration is None:
            calibration = Calibration(study.options, settled, study.runs)
        x = next_rate(calibration, self.rank, search_range(calibration))
        lr = 2.0 ** self._stored.suggest_float(PARAMETER, x, x)
        law = calibration.law(settings)
        reference = calibration.settled.reference
        width = width_for(survey, at.method, reference.init)
        factor = replace(at, fan_in=width).as_factor()
        own_lr = lr * checked_multiplier(law, factor, reference)
        self._stored.set_user_attr("own_lr", own_lr)
        ended = study.runs().counted()
        return lr, law, reference, divergence_limits(ended, self._setting, self._steps)

    def _record(self, settled: Settled) -> None:
        """Store what the trial was built with. Raise if the first one of its rank had another model
        or other settings.
        """
        of_rank = [run.settled for run in self._study.runs().at(self.rank)]
        first = next(filter(None, of_rank), settled)
        check = self._study.check_comparable
        check(asdict(first.reference), asdict(settled.reference))
        check(first.settings, settled.settings)
        self._stored.set_user_attr("settled", asdict(settled))

    # --- its values -------------------------------------------------------------------------------

    def _score_of(self, train: Train) -> float | None:
        """Run `train`, which reports its values, and return its score if it returned one. A run
        that raises optuna.TrialPruned or runs out of memory is pruned.
        """
        try:
            score = self._returned(train(self))
        except TrialPruned:
            self._end = "pruned"
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._end = "memory"
        if self._end == "memory":
            release_memory()
        if self._end:
            return None
        self._check_whole()
        return None if score is None else self._study.replicas.mean(as_float(score))

    def _returned(self, loop: Any) -> Any:
        """Report the values of a loop, and return what it returns after its steps. A generator is
        closed, so that its `finally` blocks run.
        """
        if isinstance(loop, Pushed):
            return loop.run(self._report)
        if not isinstance(loop, Generator):
            raise CalibrationError(
                f"train returned a {type(loop).__name__} instead of a generator.",
                "Let it yield a value at every step.",
            )
        with closing(loop):
            for value in loop:
                if self._report(value):
                    break
            if not self._end:
                try:
                    next(loop)
                except StopIteration as stop:
                    return stop.value
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_step(self, *hooked: Any) -> None:
        self._stepped.append(len(self._curve))

    def _report(self, value: Any) -> bool:
        """Take the value of a step. Return whether the run ends: it diverged, is pruned, or has run
        its steps.
        """
        if self._is_over():
            return True
        self._curve.append(self._study.replicas.mean(as_float(value)))
        self._check_first()
        optimizer = (self._scheduled or self._optimizer)()
        if optimizer is not None:
            self._rates.append(float(optimizer.param_groups[0]["lr"]))
        if self._has_diverged():
            self._end = "diverged"
        elif self._is_pruned():
            self._end = "pruned"
        elif len(self._curve) == self._steps:
            self._check_trained()
        elif len(self._stepped) == FEW + 1:
            refuse_micro_batches(self._stepped, len(self._curve))
        return self._is_over()

    def _is_over(self) -> bool:
        return bool(self._end) or len(self._curve) == self._steps

    def _check_first(self) -> None:
        if not math.isfinite(self._curve[0]):
            raise CalibrationError(
                f"The first value that train yielded is {self._curve[0]}, which does not depend on"
                " the rate.",
                "Fix the model or the data: the first loss must be finite.",
            )
        if self.lr is None:
            raise CalibrationError(
                "train yielded without calling trial.optimizer.",
                "Take the optimizer from trial.optimizer(model).",
            )

    def _has_diverged(self) -> bool:
        taken = len(self._curve)
        if not math.isfinite(self._curve[-1]):
            return True
        limit = max(self._curve[0], self._limits[taken - 1])
        return taken > TAIL and recent_mean(self._curve, TAIL) > limit

    def _is_pruned(self) -> bool:
        """Store the run's mean from time to time. Return whether it is to be pruned."""
        taken = len(self._curve)
        every = interval(self._steps)
        if taken % every and taken != self._steps:
            return False
        return self._study.lead(self._judge, recent_mean(self._curve, max(TAIL, every)))

    def _judge(self, mean: float) -> bool:
        self._stored.report(mean, len(self._curve))  # for those who watch
        calibration = self._study.calibration()
        run = replace(self._study.runs()[self.number], curve=self._curve)
        assert calibration is not None
        return len(self._curve) < self._steps and is_behind(calibration, run)

    def _check_trained(self) -> None:
        """Raise if the run's values were not one a step, if every factor that was zero at the start
        is still zero, since any gradient and rate would have moved some, or if its rate rose until
        its end. Take the warm-up's steps.
        """
        if self._steps <= FEW:
            return
        refuse_micro_batches(self._stepped, self._steps)
        moved = self._study.replicas.mean(float(has_moved(self._optimizer())))
        # equal rewards give no gradient
        if moved == 0.0 and not self._study.options.noisy:
            raise CalibrationError(
                f"Nothing was trained: after {self._steps} steps at the rate {self.lr:.3g} every"
                " LoRA factor that was zero at the start is still zero.",
                "Call loss.backward(), then the step of the optimizer of trial.optimizer, then"
                " zero_grad(), and see that the schedule lets the rate rise above zero.",
            )
        self._warmup = max(rising_steps(self._rates), self._warmup)
        refuse_warmup(self._warmup, self._steps)

    # --- its end ----------------------------------------------------------------------------------

    def _check_whole(self) -> None:
        """Raise unless the run took its steps, and knew of them."""
        taken = len(self._curve)
        if taken < self._steps:
            raise CalibrationError(
                f"train ended after {taken} of {self._steps} steps.",
                "Let it yield a value for each step, or lower steps=.",
            )
        if self._study.options.target > self._steps and "steps" not in vars(self):
            raise CalibrationError(
                "train never read trial.steps, so its schedule may span the steps of the target"
                " run.",
                "Let its schedule and warm-up span trial.steps.",
            )

    def _end_trial(self, score: float | None) -> None:
        """Record how the run ended."""
        outcome: dict[str, Any] = {
            "curve": self._curve,
            "score": score,
            "end": self._end,
            "warmup": self._warmup / self._steps,
        }
        for name, value in outcome.items():
            self._stored.set_user_attr(name, value)
        seen = self._study.runs()[self.number].observation
        if seen is None:
            return self._study.end_trial(TrialState.PRUNED)
        for other in self._study.runs().observations():
            mixed = other.returned != seen.returned
            if mixed and math.isfinite(seen.value + other.value):
                raise CalibrationError(
                    "train returned a score in some trials and none in others.",
                    "Return one in every trial, or in none.",
                )
        if math.isfinite(seen.value):
            return self._study.end_trial(TrialState.COMPLETE, seen.value)
        return self._study.end_trial(TrialState.PRUNED)


# --- the settings of a trial ----------------------------------------------------------------------


def settings_in_force(
    opt: Any,
    native: type[Optimizer],
    settings: Mapping[str, Any],
    at_own_lr: Collection[int],
) -> dict[str, Any]:
    """Return what decides a trial besides its rank, seed, rate and model, as JSON values that are
    equal in every process: all settings, those of groups without factors apart.

    Settings that were not given have their defaults. If groups differ in a setting, its value is a
    list. Beside factors the rates of other parameters are stored too. at_own_lr: numbers of the
    groups that were given an "lr".
    """
    given = {**defaults_of(RankAwareOptimizer.__new__), **defaults_of(native)}
    given.update(settings)
    made = {name: plain_value(given[name]) for name in given.keys() - _LEFT_OUT}
    names = opt.defaults.keys() - _LEFT_OUT
    rates = opt.rates.groups
    trained = {group.user_group for group in rates if group.role != "other"}
    others: list[Any] = []
    factors: list[Any] = []
    for number, group in enumerate(opt.param_groups):
        (factors if number in trained else others).append(group)
    made |= settings_of(factors or others, names)
    if others:
        made["others' settings"] = settings_of(others, names)
    if not any(group.role == "full" for group in rates):
        made["other rates"] = _other_rates(rates, at_own_lr)
    return made


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
    return without_conflicts(tables)
