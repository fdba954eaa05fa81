"""The study behind a calibration: Optuna holds the trials, this module what they mean.

Its one parameter is log2 of the base rate in *reference coordinates*: a rate at any rank is mapped back through the
law at its priors' means, so trials at several ranks inform one fit. All that a resumed study needs is in its
attributes: the reference, the range, and every trial's observation, curve and scaling.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from .adapters import Reference, Survey
from .errors import CalibrationError
from .inspection import inspect_model
from .laws import Law, Power, checked_multiplier, optimizer_family
from .optimizer import RankAwareOptimizer
from .recipe import Recipe, infer_scaling, plain_setting
from .trial import TAIL, Outcome, Train, Trial, run_trial, seeded

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from .fitting import Fit, Observation, Prior

__all__ = ["Study", "versions_used"]

# A usual rate by optimizer family, per step, and the configuration it is for: the median best AdamW rate at rank 16,
# alpha 32 over 18 published language models; the others are customary multiples of it.
_USUAL_AT = Reference(rank=16, alpha=32, fan_in=4096)
_USUAL_LR = {"sign-like": 2.0**-11.8, "gradient-like": 2.0**-4, "spectral": 2.0**-8, "relative-scale": 2.0**-8}
_HALF_RANGE = 4.0  # octaves on either side of the first guess
_WIDEN = 2.0  # octaves an edge moves out when the best rate sits there
_EDGE = 1.0  # octaves: how near counts as sitting there
# Prior of the drift in rank (octaves per octave) and of log2 full_factor, (mean, sd), by init. Small studies found
# Init[B] falling with rank by 0.3 to 0.75; full finetuning needs no factor at the width of Survey.full_width
# (benchmarks/results/full_width.md).
_PRIORS = {"A": ((0.0, 0.15), (0.0, 0.4)), "B": ((-0.45, 0.2), (0.0, 0.4))}


@dataclass
class Study:
    """One calibration. `reference`, `prior` and the range are learned from the first model built."""

    optimizer: type[Optimizer]
    law: Law
    ranks: tuple[int | None, ...]
    seeds: tuple[int, ...]
    steps: int
    lr_range: tuple[float, float] | None = None
    batch: float | None = None
    warmup: float | None = None
    seed: int = 0
    name: str = "calibration"
    reference: Reference | None = None
    full_fan_in: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    endless: bool | None = None

    def open(self, sampler: Any, pruner: Any, storage: Any) -> None:
        """Create the Optuna study, or go on with the stored one of this name."""
        import optuna

        self.own_sampler = sampler is None
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self.study = optuna.create_study(
                study_name=self.name,
                storage=storage,
                sampler=sampler or optuna.samplers.RandomSampler(seed=self.seed),
                pruner=pruner or optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        finally:
            optuna.logging.set_verbosity(verbosity)
        self._check_stored()
        stored = self.study.user_attrs
        self.settings = stored.get("settings", {})
        if "reference" in stored:
            self._settle(Reference(**stored["reference"]), stored["full_fan_in"])

    def _check_stored(self) -> None:
        """Refuse to go on with a study whose trials do not compare: other steps, LoRA ranks, law or optimizer."""
        mine = {
            "steps": self.steps,
            "ranks": [rank for rank in self.ranks if rank is not None],
            "law": repr(self.law),
            "optimizer": self._optimizer_name(),
        }
        stored = self.study.user_attrs.get("made_with", {} if self.study.get_trials(deepcopy=False) else mine)
        for key in (key for key, value in mine.items() if stored.get(key) != value):
            raise CalibrationError(
                f"The stored study {self.name!r} was made with {key}={stored.get(key)!r}, not {mine[key]!r}.",
                "Give this calibration another name=, or another storage=.",
            )
        self.study.set_user_attr("made_with", mine)

    def _optimizer_name(self) -> str:
        return f"{self.optimizer.__module__}.{self.optimizer.__qualname__}"

    # --- running ----------------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """The trials that count: complete, or pruned by us or the pruner."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))

    def observations(self) -> list[Observation]:
        """What the fit sees: trials that ran their steps or diverged."""
        from .search import observations_of

        return observations_of(self.study)

    def one(self, train: Train, show: Callable[[Trial, list[float]], None]) -> None:
        """Ask for, run and record one trial; a run that raises is recorded as failed and does not count."""
        import optuna

        rank, seed = self._next_cell()
        handle = self.study.ask()
        handle.set_user_attr("rank", rank)
        handle.set_user_attr("seed", seed)
        trial = Trial(rank, seed, self.steps, handle.number, self._builder(handle))

        def watch(trial: Trial, curve: list[float]) -> bool:
            show(trial, curve)
            recent = curve[-TAIL:]
            handle.report(sum(recent) / len(recent), len(curve))
            return handle.should_prune()

        try:
            with seeded(seed):
                outcome = run_trial(train, trial, limit=self._limit(), endless=self.endless, watch=watch)
            self._check_kind(outcome)
        except BaseException:
            self.study.tell(handle, state=optuna.trial.TrialState.FAIL)
            raise
        self._record(handle, trial, outcome)

    def _next_cell(self) -> tuple[int | None, int]:
        """The (rank, seed) tried least, first among runs that did not diverge: paired and balanced.

        A run that the pruner stopped was judged, so it counts as one that did not.
        """
        from .fitting import diverged

        seen = self.observations()
        lost = [(o.rank, o.seed) for o, bad in zip(seen, diverged(seen), strict=True) if bad]
        tried = [(t.user_attrs["rank"], t.user_attrs["seed"]) for t in self.trials()]
        cells = [(rank, seed) for seed in self.seeds for rank in self.ranks]
        return min(cells, key=lambda cell: (tried.count(cell) - lost.count(cell), tried.count(cell)))

    def _check_kind(self, outcome: Outcome) -> None:
        """Scores compare only if all were returned or none was."""
        returned = outcome.returned is not None
        if not outcome.stopped and any(o.returned != returned for o in self.observations() if not o.stopped):
            raise CalibrationError(
                "train returned a score in some trials and none in others.", "Return one in every trial, or in none."
            )

    def _limit(self) -> float:
        """How far above its start a run may rise before it is stopped: half the best gain seen; unlimited at first."""
        gains = [o.start - o.tail for o in self.observations() if math.isfinite(o.tail)]
        return max([g / 2 for g in gains if g > 0], default=math.inf)

    def _record(self, handle: Any, trial: Trial, outcome: Outcome) -> None:
        from optuna.trial import TrialState

        from .fitting import Observation

        self.endless = self.endless if outcome.endless is None else outcome.endless
        handle.set_user_attr("curve", outcome.curve)
        if outcome.stopped in ("pruned", "memory"):
            handle.set_user_attr("stopped", outcome.stopped)
            self.study.tell(handle, state=TrialState.PRUNED)
            return
        seen = Observation(
            rank=trial.rank,
            seed=trial.seed,
            x=handle.params["log2_lr"],
            value=outcome.score,
            start=outcome.curve[0],
            tail=outcome.tail,
            returned=outcome.returned is not None,
            stopped=outcome.stopped == "diverged",
        )
        handle.set_user_attr("observation", asdict(seen))
        if math.isfinite(seen.value):
            self.study.tell(handle, seen.value)
        else:
            self.study.tell(handle, state=TrialState.PRUNED)

    # --- the trial's optimizer --------------------------------------------------------------------------------------

    def _builder(self, handle: Any) -> Callable[[Trial, Any, dict[str, Any]], RankAwareOptimizer]:
        """What `Trial.optimizer` calls: read the model, propose a rate in reference coordinates, build."""

        def build(trial: Trial, params: Any, settings: dict[str, Any]) -> RankAwareOptimizer:
            model = params if isinstance(params, nn.Module) else settings.get("model")
            if not isinstance(model, nn.Module):
                raise CalibrationError("trial.optimizer got no model.", "Pass it, or model= beside its parameters.")
            self._read(trial, handle, inspect_model(model, method=trial.method, init=settings.get("init")))
            low, high = self._range()
            trial.lr = 2.0 ** float(handle.suggest_float("log2_lr", low, high))
            own = inspect.signature(RankAwareOptimizer.__new__).parameters
            self.settings = {key: plain_setting(value) for key, value in settings.items() if key not in own}
            self.study.set_user_attr("settings", self.settings)
            return RankAwareOptimizer(  # type: ignore[no-any-return]
                params,
                self.optimizer,
                lr=trial.lr,
                law=self.centred_law(),
                tuned_at=self.reference,
                method=trial.method,
                **settings,
            )

        return build

    def _read(self, trial: Trial, handle: Any, survey: Survey) -> None:
        seen = survey.dominant().resolve(survey)
        if seen.rank != trial.rank:
            raise CalibrationError(
                f"The model built for trial.rank={trial.rank} has rank {seen.rank}.", "Build it at trial.rank."
            )
        handle.set_user_attr("scaling", seen.scaling)
        if self.reference is None:
            self._settle(replace(seen, batch=self.batch), survey.full_width(seen.init))
            self.study.set_user_attr("reference", asdict(self._settled()))
            self.study.set_user_attr("full_fan_in", self.full_fan_in)

    def _settle(self, reference: Reference, full_fan_in: float) -> None:
        """Take the first model's configuration as the reference, and the priors that belong to its init."""
        from .search import BracketSampler

        self.reference, self.full_fan_in = reference, full_fan_in
        start = self._first_guess()
        if self.lr_range is not None:
            start = min(max(start, self.lr_range[0]), self.lr_range[1])
        self._start = start
        if self.own_sampler:
            self.study.sampler = BracketSampler(start, self.prior)

    def _settled(self) -> Reference:
        if self.reference is None:
            raise CalibrationError("No trial has built its model yet.", "Run at least one trial.")
        return self.reference

    def _first_guess(self) -> float:
        """log2 of the family's usual rate, moved by the law to the reference."""
        factor = self._settled().as_factor()
        usual = _USUAL_LR.get(optimizer_family(self.optimizer), _USUAL_LR["sign-like"])
        return math.log2(usual * checked_multiplier(self.law.bind(self.optimizer, {}), factor, _USUAL_AT))

    def _range(self) -> tuple[float, float]:
        """The range of log2 rates: as given or around the first guess, widened while the best rate sits at an edge.

        It is derived from the trials each time, so a resumed study has the range it had.
        """
        from .fitting import diverged

        low, high = self.lr_range or (self._start - _HALF_RANGE, self._start + _HALF_RANGE)
        seen = self.observations()
        bad = diverged(seen)
        for end in range(1, len(seen) + 1):
            good = [o for o, b in zip(seen[:end], bad, strict=False) if not b]
            best = min(good, key=lambda o: o.value).x if good else min(o.x for o in seen[:end])
            low -= _WIDEN if best < low + _EDGE else 0.0
            high += _WIDEN if good and best > high - _EDGE and best >= max(o.x for o in seen[:end]) else 0.0
        return low, high

    @property
    def prior(self) -> Prior:
        """What is believed of drift and full finetuning before any trial."""
        from .fitting import Prior

        reference = self._settled()
        lora = [r for r in self.ranks if r is not None]
        pivot = round(math.exp(sum(map(math.log, lora)) / len(lora)), 9) if lora else 16.0
        (_, drift_sd), (_, full_sd) = _PRIORS[reference.init]
        continues = reference.init == "B" and reference.method == "lora"
        reach = math.log2((self.full_fan_in or pivot) / pivot) if continues else 0.0
        return Prior(drift_sd, full_sd, pivot, reach)

    def centred_law(self, drift: float = 0.0, factor: float = 0.0) -> Power:
        """The law, bound to the optimizer, at its priors' means, plus a fitted `drift` and log2 `factor`."""
        reference = self._settled()
        bound = self.law.bind(self.optimizer, self.settings)
        if reference.method == "full":
            return Power(law=bound)
        (mean_drift, _), (mean_factor, _) = _PRIORS[reference.init]
        return Power(
            exponent=mean_drift + drift,
            full_factor=2.0 ** (mean_factor + factor),
            pivot=self.prior.pivot,
            to_full=reference.init == "B",
            law=bound,
        )

    # --- the result -------------------------------------------------------------------------------------------------

    def fit(self) -> Fit | None:
        """The fit of what was seen so far, or None where every run diverged."""
        from .fitting import fit_observations

        return None if self.reference is None else fit_observations(self.observations(), self.prior)

    def recipe(self) -> Recipe:
        """The recipe of what was seen so far."""
        runs, seen = self.trials(), self.observations()
        if runs and all(run.user_attrs.get("stopped") == "memory" for run in runs):
            raise CalibrationError(
                f"Every one of {len(runs)} runs ran out of memory.", "Lower the batch or the ranks=, or free memory."
            )
        fit, reference = self.fit(), self._settled()
        if fit is None:
            raise CalibrationError(
                f"Every one of {len(runs)} runs diverged{' or was pruned' * (len(seen) < len(runs))}.",
                "Lower lr_range=, or check the loss, the data and the pruner.",
            )
        base, drift, factor = (float(v) for v in fit.mean)
        shift = 0.0 if reference.rank is None else drift * math.log2(reference.rank / self.prior.pivot)
        if reference.method == "full":
            base, factor = base + factor, 0.0
        return Recipe(
            name=self.name,
            best_lr=2.0 ** (base + shift),
            reference=reference,
            law=self.centred_law(drift, factor),
            covariance=torch.from_numpy(fit.covariance),
            lean=fit.lean,
            ceiling=None if fit.ceiling is None else 2.0 ** (fit.ceiling + shift),
            scaling_rule=infer_scaling(self._scalings()),
            full_fan_in=self.full_fan_in,
            ranks=tuple(rank for rank in self.ranks if rank is not None),
            full_seen=None in self.ranks,
            optimizer=self._optimizer_name(),
            settings=self.settings,
            steps=self.steps,
            batch=self.batch,
            warmup=self.warmup,
            seed=self.seed,
            versions=versions_used(),
            tensors=self._tensors(),
        )

    def _scalings(self) -> dict[int, float]:
        seen = (t.user_attrs for t in self.trials())
        return {a["rank"]: a["scaling"] for a in seen if a["rank"] is not None and "scaling" in a}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every trial's rank (0: full finetuning), seed, base rate, score, fate and values, padded with NaN."""
        from .fitting import diverged

        trials = [t.user_attrs for t in self.trials() if "observation" in t.user_attrs]
        seen = [t["observation"] for t in trials]
        curves = torch.full((len(trials), self.steps), math.nan)
        for row, trial in zip(curves, trials, strict=True):
            row[: len(trial["curve"])] = torch.tensor(trial["curve"])
        return {
            "rank": torch.tensor([o["rank"] or 0 for o in seen]),
            "seed": torch.tensor([o["seed"] for o in seen]),
            "lr": torch.tensor([2.0 ** o["x"] for o in seen], dtype=torch.float64),
            "value": torch.tensor([o["value"] for o in seen], dtype=torch.float64),
            "diverged": torch.tensor(diverged(self.observations()), dtype=torch.bool),
            "curve": curves,
        }


def versions_used() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version(name) for name in ("rankaware-optim", "torch", "optuna")}}
