"""Running a study: the next trial begun, trained and written down, by one worker of several, by one process of many."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .._types import Reference, Survey
from ..errors import CalibrationError
from ..inspection import inspect_model
from ..laws import Power, checked_multiplier
from ..optimizer import RankAwareOptimizer
from ..recipe import Recipe, plain_setting
from . import _trials as ledger
from ._distributed import Replicas
from ._schedule import Plan, leverage
from ._study import Study
from ._trial import TAIL, Outcome, Train, Trial, recent, run_trial, seeded

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from ._liveness import Owner

__all__ = ["Runner", "Show", "Task"]

_POLL_S = 0.05
_PATIENCE_S = 600.0  # how long the first model of another worker may take to be built


class Task(NamedTuple):
    """A trial that is about to run, and where the study stands: trials done and expected, (low, best, high) so far."""

    number: int
    rank: int | None
    seed: int
    limits: list[float]
    endless: bool | None
    done: int
    expected: int
    estimate: tuple[float, float, float] | None


class _Proposal(NamedTuple):
    """What `Trial.optimizer` builds with: the base rate, the law centred on its priors, and the reference."""

    lr: float
    law: Power
    reference: Reference


Show = Callable[[Task, Trial, "list[float]"], None]


class Runner:
    """Runs the trials of a study by a plan.

    Other workers may do the same: every decision is read from the storage, and a trial is its owner's from its first
    moment. Under DDP or FSDP only the leading process of `team` has an Optuna study; the others hear what it decided.
    """

    def __init__(self, study: Study, plan: Plan) -> None:
        self.study, self.plan, self.team = study, plan, Replicas()
        self._endless: bool | None = None
        self._owner: Owner | None = None
        self._handle: Any = None
        self._x: float | None = None

    def open(self, sampler: Any, pruner: Any, storage: Any) -> None:
        """Create the Optuna study, or go on with the stored one of its name."""
        self.team.agree(lambda: self.study.open(sampler, pruner, storage))

    def close(self) -> None:
        """Leave the storage and the other processes."""
        self.study.close()
        self.team.close()

    def recipe(self) -> Recipe:
        """The recipe of what was seen so far."""
        return self.team.agree(self._recipe)

    def _recipe(self) -> Recipe:
        with self.study.guard():
            return self.study.recipe()

    @property
    def _optuna(self) -> Any:
        return self.study.study

    def begin(self) -> Task | None:
        """The next trial, written down as this process's own; None once the plan is fulfilled."""
        return self.team.agree(self._begin)

    def _begin(self) -> Task | None:
        from ._liveness import bury_dead

        with self.study.guard():
            while True:
                bury_dead(self._optuna)
                task = self._try_to_begin()
                if task is not None or not self._others_at_work():
                    return task
                time.sleep(_POLL_S)  # another's trial may yet die, and be this one's to run

    def _try_to_begin(self) -> Task | None:
        from ._liveness import unretried

        trials = self.study.all_trials()
        killed, cell = unretried(trials), self._next(trials)
        if cell is None:
            return None
        self._handle, self._x = self._create(ledger.cell_of(killed) if killed else cell, killed), None
        try:
            return self._prepare(killed)
        except BaseException:
            self._give_up()
            raise

    def _prepare(self, killed: FrozenTrial | None) -> Task | None:
        """Give way to workers that began before, then take a rate; the first trial of a study gets its own later."""
        trials = self.study.all_trials()
        earlier = [t for t in trials if t.state.is_finished() or t.number < self._handle.number]
        taken = killed is not None and any(t.user_attrs.get("retry_of") == killed.number for t in earlier)
        if taken or self._next(earlier) is None:
            self._close("FAIL")
            return self._try_to_begin() if taken else None
        self._await_earlier()
        if self.study.reference is not None:
            self._suggest()
        return Task(
            self._handle.number,
            self._handle.user_attrs["rank"],
            self._handle.user_attrs["seed"],
            self._limits(),
            self._endless,
            len(ledger.counted(trials)),
            self.plan.expected(),
            self.study.standing(),
        )

    def _next(self, trials: list[FrozenTrial]) -> ledger.Cell | None:
        band = None if self.plan.until is None else self.study.band(self.plan.target == "full")
        return self.plan.next(trials, band, self._weights())

    def _create(self, cell: ledger.Cell, killed: FrozenTrial | None) -> Any:
        """A running trial that from its first moment says whose it is and what it tries."""
        from datetime import datetime

        from optuna.trial import FrozenTrial, TrialState
        from optuna.trial import Trial as Handle

        from ._liveness import new_owner

        self._owner = new_owner()
        retry = {} if killed is None else {"retry_of": killed.number}
        fixed = {} if killed is None or not killed.params else {"fixed_params": dict(killed.params)}
        template = FrozenTrial(
            number=-1, trial_id=-1, state=TrialState.RUNNING, value=None, params={}, distributions={},
            user_attrs={**cell._asdict(), "owner": self._owner, **retry}, system_attrs=fixed, intermediate_values={},
            datetime_start=datetime.now(), datetime_complete=None,
        )  # fmt: skip
        return Handle(self._optuna, self._optuna._storage.create_new_trial(self._optuna._study_id, template))

    def _await_earlier(self) -> None:
        """Wait until trials begun before this one have their rates, so that no point is tried twice.

        Only the first trial of a study takes long: its model is built first, and settles the reference for all.
        """
        from ._liveness import bury_dead

        until = time.monotonic() + _PATIENCE_S
        while time.monotonic() < until:
            self.study.recall()
            trials = ledger.running(self.study.all_trials(), but=self._handle.number)
            if not any(t.number < self._handle.number and ledger.PARAMETER not in t.params for t in trials):
                return
            time.sleep(_POLL_S)
            bury_dead(self._optuna)

    def _others_at_work(self) -> bool:
        """Whether this host's other processes run trials of this study."""
        from ._liveness import is_elsewhere

        return any(not is_elsewhere(trial) for trial in ledger.running(self.study.all_trials()))

    def one(self, task: Task, train: Train, show: Show) -> None:
        """Run and record one trial; a run that raises is recorded as failed and does not count."""
        trial = Trial(task.rank, task.seed, self.study.steps, task.number, self._build)
        every = ledger.interval(self.study.steps)

        def watch(trial: Trial, curve: list[float]) -> bool:
            show(task, trial, curve)
            if len(curve) % every and len(curve) != self.study.steps:
                return False
            return self.team.agree(lambda: self._report(curve, every))

        try:
            with seeded(task.seed):
                outcome = run_trial(
                    train, trial, limits=task.limits, endless=task.endless, watch=watch, mean=self.team.mean
                )
            self.team.agree(lambda: self._record(trial, outcome))
        except BaseException:
            self._give_up()
            raise

    def _report(self, curve: list[float], every: int) -> bool:
        latest = curve[-max(TAIL, every) :]
        with self.study.guard():
            self._handle.report(sum(latest) / len(latest), len(curve))
            return len(curve) < self.study.steps and self._handle.should_prune()

    def _give_up(self) -> None:
        """Fail the trial; where the storage is what failed, the next start finds its owner gone."""
        if self.team.leads:
            with suppress(CalibrationError), self.study.guard():
                self._close("FAIL")

    def _close(self, state: str, value: float | None = None) -> None:
        from optuna.trial import TrialState

        from ._liveness import disown

        if self._owner is not None:
            disown(self._owner)
        self._optuna.tell(self._handle, value, state=TrialState[state], skip_if_finished=True)
        total = ledger.spent(self.study.all_trials(), self.study.steps)
        self._optuna.set_user_attr("spent", {"steps": total, "trials": len(self.study.trials())})

    def _check_kind(self, outcome: Outcome) -> None:
        """Scores compare only if all were returned or none was."""
        returned = outcome.returned is not None
        if not outcome.stopped and any(o.returned != returned for o in self.study.observations() if not o.stopped):
            raise CalibrationError(
                "train returned a score in some trials and none in others.", "Return one in every trial, or in none."
            )

    def _limits(self) -> list[float]:
        """How high recent values may rise, step by step, before a run is stopped: half the best gain above where runs
        have been, or, since batches may be hard ones, above where one that learns nothing would be at that step.

        Where runs have been is the usual height of their first values, as many as are averaged later: one alone may be
        low by chance. What learns nothing lies a gain, at most, above the best run on the same batches.
        """
        trials = self.study.trials()
        gains = [o.start - o.tail for o in self.study.observations() if math.isfinite(o.tail)]
        gain = max([g for g in gains if g > 0], default=math.inf)
        flat = ledger.usual_height(trials) + gain / 2
        beside = ledger.curve_beside(ledger.cell_of(self._handle), trials)
        windows = (beside[max(0, end - TAIL) : end] for end in range(1, self.study.steps + 1))
        return [max(flat, recent(window) + 1.5 * gain) if window else flat for window in windows]

    def _record(self, trial: Trial, outcome: Outcome) -> None:
        from .fit._posterior import Observation

        with self.study.guard():
            self._check_kind(outcome)
            self._endless = self._endless if outcome.endless is None else outcome.endless
            self._handle.set_user_attr("curve", outcome.curve)
            if outcome.stopped in ("pruned", "memory"):
                self._handle.set_user_attr("stopped", outcome.stopped)
                return self._close("PRUNED")
            seen = Observation(
                rank=trial.rank,
                seed=trial.seed,
                x=self._handle.params[ledger.PARAMETER],
                value=outcome.score,
                start=ledger.height(outcome.curve),
                tail=outcome.tail,
                returned=outcome.returned is not None,
                stopped=outcome.stopped == "diverged",
            )
            self._handle.set_user_attr("observation", asdict(seen))
            finite = math.isfinite(seen.value)
            self._close(*(("COMPLETE", seen.value) if finite else ("PRUNED",)))

    # --- the trial's optimizer --------------------------------------------------------------------------------------

    def _build(self, trial: Trial, params: Any, settings: dict[str, Any]) -> RankAwareOptimizer:
        """What `Trial.optimizer` calls: read the model, propose a rate in reference coordinates, build."""
        model = params if isinstance(params, nn.Module) else settings.get("model")
        if not isinstance(model, nn.Module):
            raise CalibrationError("trial.optimizer got no model.", "Pass it, or model= beside its parameters.")
        survey = inspect_model(model, method=trial.method, init=settings.get("init"))
        proposal = self.team.agree(lambda: self._propose(trial, survey, settings))
        trial.lr = proposal.lr
        return RankAwareOptimizer(
            params,
            self.study.optimizer,
            lr=proposal.lr,
            law=proposal.law,
            tuned_at=proposal.reference,
            method=trial.method,
            **settings,
        )

    def _propose(self, trial: Trial, survey: Survey, settings: dict[str, Any]) -> _Proposal:
        with self.study.guard():
            self.study.read(trial, self._handle, survey)
            own = inspect.signature(RankAwareOptimizer.__new__).parameters
            self.study.settings = {key: plain_setting(value) for key, value in settings.items() if key not in own}
            self._optuna.set_user_attr("settings", self.study.settings)
            proposal = _Proposal(2.0 ** self._suggest(), self.study.centred_law(), self.study.settled())
            self._handle.set_user_attr("own_lr", _own_lr(proposal, survey))
            return proposal

    def _suggest(self) -> float:
        """log2 of the trial's rate, sampled once."""
        if self._x is None:
            fit = self.study.fit()
            if fit is not None:
                from ._sampler import estimate_at

                rank = self._handle.user_attrs["rank"]
                self._handle.set_user_attr("estimate", estimate_at(fit, rank, self.study.prior))
            self._x = float(self._handle.suggest_float(ledger.PARAMETER, *self.study.range()))
        return self._x

    def _weights(self) -> dict[int | None, float]:
        """For full finetuning from Init[B], trials go where the line continued to r = n is sharpened most."""
        if self.plan.target != "full" or self.study.reference is None or not self.study.prior.full_reach:
            return {}
        return leverage(self.study.ranks, self.study.full_fan_in or self.study.prior.pivot)


def _own_lr(proposal: _Proposal, survey: Survey) -> float:
    """The rate that the proposal gives this model's most common A factors, or its whole weights."""
    own, reference = survey.dominant(), proposal.reference
    width = survey.full_width(reference.init) if own.method == "full" else survey.width
    return proposal.lr * checked_multiplier(proposal.law, replace(own, fan_in=width).as_factor(), reference)
