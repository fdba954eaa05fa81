"""This module defines `calibrate`, which finds a learning rate with several short
training runs.

The command `rankaware calibrate` is in `cli/_calibrate.py`, and the package
`calibration` contains the learning rate search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import optuna
from torch import nn
from torch.optim import Optimizer

from ._checks import check_lr, shown
from ._near_misses import explain_near_misses
from ._optimizers import get_optimizer_class
from ._rate import Rate
from ._types import Reference
from .calibration import (
    BY_TRAINING,
    FEWEST_STEPS,
    SEEDS,
    CallbackRun,
    Options,
    Progress,
    Snapshot,
    Train,
    Trial,
    TrialRunner,
    refuse_warmup,
    release_memory,
    search,
    seeded,
)
from .errors import (
    CalibrationError,
    InspectionError,
    LawError,
    OptimizerError,
    RankAwareError,
)
from .inspection import as_one_model, inspect_model
from .laws import PRIOR_LAW, Law
from .recipe import Recipe, Score
from .trainers import (
    BATCHES,
    SUPPORTED_TRAINERS,
    OwnRate,
    Touched,
    Trainer,
    TrialRun,
    trainer_of,
)
from .transfer import suggest_lr

# By default, an existing model is trained in four trials of a quarter of the run. Together these
# trials take as many steps as the run: benchmarks/results/finder.md
TRIALS, SHARE = 4, 1 / 4
STUDY = "calibration"  # the name of a study, unless the storage's URL ends with another name
BY_REWARD = "each trial was scored by minus the reward that its trainer logged, and not by its loss"


@explain_near_misses
def calibrate(  # noqa: PLR0913
    what: Any,
    optimizer: type[Optimizer] | str,
    *,
    model: nn.Module | Sequence[nn.Module] | None = None,
    ranks: Sequence[int | None] | None = None,
    steps: int | None = None,
    target_steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    score: Callable[[Any], Any] | None = None,
    law: str | Law = PRIOR_LAW,
    trials: int | None = None,
    full_trials: int = 0,
    seeds: Sequence[int] = SEEDS,
    lr_range: tuple[float, float] | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    batch: float | None = None,
    lr: float | None = None,
    progress: bool = True,
) -> Recipe:
    """Find a good learning rate with several short training runs, and return it as a recipe.

    The recipe contains the base learning rate, how the learning rate changes with the LoRA
    rank, and how certain both are::

        recipe = ra.calibrate(trainer, "adamw")  # first prints how many steps it will take
        ra.attach(trainer, recipe=recipe)
        trainer.train()

    If you pass an existing trainer or model, its state is restored after the
    calibration, even after an error or Ctrl-C. For an existing model, four trials
    search around the learning rate that `suggest_lr` suggests. If you pass a function
    that builds a new model for each trial, the search covers all LoRA ranks in `ranks`.
    Under DDP, every process must call `calibrate`, and every process gets the same
    recipe. The page `docs/calibrate.md` explains the details of a calibration.

    Args:
        what: an existing trainer of transformers, TRL or sentence-transformers, or Lightning's
            tuple `(trainer, module, *data)`. If the Lightning module builds its optimizer itself,
            it must use `self.lr` as the learning rate. Or a generator function that takes a trial.
            It calls `trial.optimizer(model, ...)`, yields a value to minimise for each optimizer
            step, and may return a score after `trial.steps` steps. Or a function that takes a trial
            and returns a new trainer.
        optimizer: a torch optimizer class or its name.
        model: an existing model that your training function uses, or a list of several models. If
            it is None, the function must build a model of rank `trial.rank` for each trial.
        ranks: the LoRA ranks to try, usually the lowest and the highest rank that you want to use.
            None means full finetuning. Pass `ranks` only if a function builds the models.
        steps: the number of optimizer steps of a trial, by default a quarter of `target_steps`.
            Trials shorter than 100 steps favour learning rates that are too low.
        target_steps: the number of optimizer steps of the run that the recipe is for. By default it
            is the length of an existing trainer's run, or `steps` if there is no existing trainer.
        settings: settings for the optimizer of a trainer, and arguments of `RankAwareOptimizer`
            such as `rates`. By default, weight decay, betas and epsilon come from the trainer's
            arguments.
        score: a function that takes the trained trainer and returns a number to minimise. By
            default a trainer is scored by its loss on at most 16 batches of evaluation data. If it
            has no evaluation data, a part of the training data is held out. A trainer with
            `reward_funcs` is scored by its negative reward.
        law: the scaling law that converts learning rates between ranks, or its name. The default is
            µA. Your own law must be registered.
        trials: the number of trials at the `ranks`, by default 8 for each rank. For an existing
            model the default is 4.
        full_trials: the number of additional trials of full finetuning after the search. They try
            learning rates around the one that the search predicts for full finetuning.
        seeds: the random seeds of the trials, which are the same for all ranks. Before each trial,
            `trial.seed` seeds torch, numpy and random.
        lr_range: the lowest and the highest base learning rate to try at the highest rank. The
            first trial uses the middle of the range. The range is widened if the best learning rate
            is near one end.
        storage: the path of a journal file, the URL of a database, or an Optuna storage. If the
            same call is repeated with this storage, it continues the search, and several processes
            can share the search. To store several studies in a database, add "#" and a name to its
            URL. By default the trials are only kept in memory.
        batch: the number of examples per optimizer step of the run that the recipe is for, which
            the recipe records. By default it comes from the trainer's arguments.
        lr: the learning rate that you have used so far, by default the learning rate of an existing
            trainer. At the end, `calibrate` prints how far it is from the best learning rate.
        progress: whether to print the progress and the result of the search to standard error.

    Returns:
        The recipe for a run of `target_steps` steps.

    Raises:
        CalibrationError: an argument or the storage cannot be used; a trial would have fewer than
            100 steps by default; the warm-up is as long as a trial; a trial changed something that
            cannot be restored; or no trial has a result, for example because every run diverged.
        CalibrationInterrupted: the user pressed Ctrl-C. The finished trials stay in `storage`, and
            the error's attribute `recipe` contains their recipe.
        OptimizerError: the trainer already has an optimizer.
    """
    native = get_optimizer_class(optimizer)
    storage, name = _study_of(storage)
    place = _place(what, model)
    shown = Progress(progress)
    runs = _Runs(native, settings or {}, score, place, shown)
    _check_arguments(settings, score)
    own = _own_rate(place, lr)
    at = _configuration(place, runs.settings, ranks, full_trials)
    if at is not None:
        ranks = (at.rank,)
        trials = TRIALS if trials is None else trials
    # `seeded` restores the random state of torch, numpy and random, and the snapshot restores
    # everything else
    with seeded(0):
        snapshot = Snapshot(place.touched())
        with snapshot.kept():
            whole = place.steps() if target_steps is None else target_steps
            options = Options(
                native,
                law=law,  # type: ignore[arg-type]
                ranks=ranks,  # type: ignore[arg-type]
                steps=_steps(steps, whole),  # type: ignore[arg-type]
                target_steps=whole,
                trials=trials,
                full_trials=full_trials,
                seeds=seeds,
                lr_range=lr_range,
                batch=batch,
                name=name,
                suggested=_suggested(place, at, runs, whole),
                noisy=runs.by_reward(place.trainer),
            )
            recipe = search(
                runs.loop(snapshot, options.target),
                options,
                storage=storage,
                progress=shown,
                price=_price(options, runs, snapshot),
            )
    recipe = runs.completed(recipe)
    full = _call_for_full(place, optimizer)
    shown.result(recipe, _verdict(recipe, own), full)
    return recipe


def _check_arguments(settings: object, score: object) -> None:
    """Raise a `CalibrationError` if the argument `settings` or `score` of `calibrate`
    has the wrong type.
    """
    if score is not None and not callable(score):
        raise CalibrationError(
            f"score={shown(score)} is not a function.",
            "Pass a function that takes the trained trainer and returns a number to minimise.",
        )
    if settings is not None and not isinstance(settings, Mapping):
        raise CalibrationError(
            f"settings={shown(settings)} is not a dict.",
            "Pass the settings of the optimizer as a dict, for example"
            ' settings={"weight_decay": 0.1}.',
        )


def _study_of(storage: Any) -> tuple[Any, str]:
    """Split a storage URL into the URL of the database and the name of the study.

    >>> _study_of("sqlite:///studies.db#mine")
    ('sqlite:///studies.db', 'mine')
    >>> _study_of("sqlite:///studies.db")
    ('sqlite:///studies.db', 'calibration')
    """
    if isinstance(storage, str) and "://" in storage:
        storage, _, name = storage.partition("#")
        return storage, name or STUDY
    return storage, STUDY


def _steps(steps: int | None, whole: int | None) -> int | None:
    """Return the number of steps of a trial, by default a quarter of the steps of the
    run that the user plans.

    Raises:
        CalibrationError: a quarter of the run is too short.
    """
    if steps is not None or whole is None:
        return steps
    part = round(SHARE * whole)
    if part >= FEWEST_STEPS:
        return part
    enough = min(FEWEST_STEPS, whole)
    total = TRIALS * enough
    raise CalibrationError(
        f"Each trial would run only {part} of the {whole} steps of your run. Trials shorter than"
        f" {FEWEST_STEPS} steps favour learning rates that are too low.",
        f"Pass steps={enough}, so that all trials together take {total} steps. Or use"
        " ra.suggest_lr(trainer), which runs no trials.",
    )


# --- the model and the training code --------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Contains the model that a calibration trains, and the training code.

    Args:
        source: the user's training function, or the training function of the trainer.
        model: the existing model, or None if the function builds a model for each trial.
        trainer: the existing trainer, or None if the user passed a function.
    """

    source: Callable[..., Any]
    model: nn.Module | None
    trainer: Trainer | None = None

    def touched(self) -> Touched:
        """Return all models, objects and data that a trial of the calibration may
        change.
        """
        if self.trainer is not None:
            return self.trainer.touched()
        return Touched([] if self.model is None else [self.model])

    def steps(self) -> int | None:
        """Return the number of steps of the existing trainer's run, or None if there is
        no existing trainer.
        """
        return None if self.trainer is None else self.trainer.steps()

    def begin(self, trial: Trial, whole: int) -> Any:
        """Return the generator or the trainer that runs a given trial."""
        if self.trainer is not None:
            return self.trainer.for_trial(trial.steps, whole)
        return self.source(trial)


def _place(what: Any, model: Any) -> _Place:
    """Check which model and training code the user passed to `calibrate`.

    Raises:
        CalibrationError: the user passed neither a trainer nor a function.
    """
    trainer = trainer_of(what)
    if trainer is not None and model is None:
        return _Place(trainer.source, trainer.model, trainer)
    kind = type(what).__name__
    if isinstance(what, nn.Module):
        raise CalibrationError(
            f"calibrate() was called with a model, a {kind}, but without the code that trains it.",
            "Pass the trainer: ra.calibrate(trainer, ...). Or write your training loop as a"
            " function that takes a trial, and call ra.calibrate(train, ..., model=model).",
        )
    if trainer is None and callable(what):
        return _Place(what, as_one_model(model))
    if trainer is not None:
        raise CalibrationError(
            f"calibrate() was called with a trainer, a {kind}, and with model=, but the trainer"
            " already has a model.",
            "Remove model=.",
        )
    raise CalibrationError(
        f"calibrate() got a {kind}, which is not a supported trainer or a training function.",
        f"Pass {SUPPORTED_TRAINERS}. Or pass a function that takes a trial and yields the loss of"
        " each step.",
    )


# --- the configuration and the first learning rate ------------------------------------------------


def _configuration(
    place: _Place, settings: Mapping[str, Any], ranks: Any, full_trials: int
) -> Reference | None:
    """Return the most common LoRA configuration (rank, alpha and width) of an existing
    model.

    If the model has no LoRA adapters, the returned configuration is full finetuning.
    The result is None if a function builds a new model for each trial.
    """
    if place.model is None:
        return None
    if ranks is not None or full_trials:
        raise CalibrationError(
            "ranks= and full_trials= cannot be used with an existing model, because its rank is"
            " fixed.",
            "Remove ranks= and full_trials=, or pass a function that builds a new model for each"
            " trial.",
        )
    init = settings.get("init")
    method = settings.get("method")
    try:
        return inspect_model(place.model, method=method or "lora", init=init).dominant()
    except InspectionError:
        if method is not None:
            raise
        return Reference(method="full")


def _suggested(
    place: _Place, at: Reference | None, runs: _Runs, whole: int | None
) -> Rate | None:
    """Return the learning rate that `suggest_lr` suggests for an existing model.

    The result is None if there is no existing model, or if `suggest_lr` cannot suggest
    a learning rate.
    """
    if at is None:
        return None
    task = None if place.trainer is None else place.trainer.task
    settings = runs.settings
    try:
        return suggest_lr(
            place.model,
            runs.native,
            settings=settings,
            method=at.method,
            init=settings.get("init"),
            task=task,
            steps=whole,
        )
    except (OptimizerError, LawError):
        return None


def _price(options: Options, runs: _Runs, snapshot: Snapshot) -> str:
    """Describe how much memory and how many evaluation batches the trials of an
    existing model need.
    """
    place = runs.place
    if place.model is None:
        return ""
    words = f"a copy of the weights that train, {snapshot.size / 2**20:,.3g} MiB"
    if place.trainer is not None and not runs.by_reward(place.trainer):
        words = f"{options.runs} × {BATCHES} batches of evaluation; {words}"
    return words


def _call_for_full(place: _Place, optimizer: type[Optimizer] | str) -> str:
    """Return a call of `calibrate` that would measure the best learning rate of full
    finetuning.

    A search that tries only LoRA can merely estimate the best learning rate of full
    finetuning.
    """
    if place.model is None:
        return "full_trials=3"
    name = f'"{optimizer}"' if isinstance(optimizer, str) else optimizer.__name__
    if place.trainer is None:
        return f"ra.calibrate(train, {name}, model=model_without_adapters)"
    return f"ra.calibrate(trainer_of_the_full_model, {name})"


# --- the learning rate that the user already has --------------------------------------------------


def _own_rate(place: _Place, lr: float | None) -> OwnRate | None:
    """Return the learning rate that the user passed to `calibrate`, or otherwise the
    learning rate that is set in the trainer.

    Raises:
        OptimizerError: the user passed a learning rate that is not a positive number.
    """
    if lr is not None:
        return OwnRate("lr", check_lr(lr))
    return None if place.trainer is None else place.trainer.own_rate()


def _verdict(recipe: Recipe, own: OwnRate | None) -> str:
    """Describe how far the user's learning rate is from the best learning rate of the
    calibration.
    """
    if own is None:
        return ""
    # an error here must not lose the result of the search
    with suppress(RankAwareError):
        return recipe.judge(own.lr).verdict(str(own))
    return ""


# --- the trials -----------------------------------------------------------------------------------


@dataclass
class _Runs:
    """Runs the trials of a calibration, and records the batch size of their trainers.

    Args:
        native: the optimizer class.
        settings: the settings for a trainer's optimizer.
        score: the user's function that scores the trained trainer.
        place: the model and the training code.
        shown: prints the progress of the search.
        batch: the number of examples per step of the last trainer.
        rewarded: whether the trials of the last trainer were scored by rewards.
        by_trainer: whether a trainer runs the trials.
    """

    native: type[Optimizer]
    settings: Mapping[str, Any]
    score: Callable[[Any], Any] | None
    place: _Place
    shown: Progress
    batch: float | None = None
    rewarded: bool = False
    by_trainer: bool = False

    def by_reward(self, trainer: Trainer | None) -> bool:
        """Return whether the trials of the calibration minimise the negative reward of
        a trainer.
        """
        return self.score is None and trainer is not None and trainer.task == "rl"

    def loop(self, snapshot: Snapshot, whole: int) -> Train:
        """Return a function that restores the saved state of the model and then runs a
        trial.
        """

        @wraps(self.place.source)
        def train(trial: Trial) -> Any:
            release_memory()  # of the previous trial
            snapshot.begin()
            made = self.place.begin(trial, whole)
            trainer = made if isinstance(made, Trainer) else trainer_of(made)
            if trainer is not None:
                return self._by_trainer(trainer, trial)
            if self.settings or self.score is not None:
                raise CalibrationError(
                    "settings= and score= can only be used with a trainer, but train() did not"
                    " return a trainer.",
                    "Remove both arguments. Pass the settings to trial.optimizer(), and return"
                    " the score at the end of train().",
                )
            return made

        return train

    def _by_trainer(self, trainer: Trainer, trial: Trial) -> CallbackRun:
        """Return a training run in which a trainer runs the given trial."""
        self.batch, self.rewarded = trainer.batch, self.by_reward(trainer)
        self.by_trainer = True
        if self.score is None:  # otherwise the printed value is the user's score
            self.shown.value = "reward" if self.rewarded else "loss"
        refuse_warmup(trainer.warmup(trial.steps), trial.steps)
        existing = self.place.trainer is not None

        def run(runner: TrialRunner) -> Any:
            own = (self.native, dict(self.settings), self.score, existing)
            return trainer.train(TrialRun(trial, runner, *own))

        return CallbackRun(run)

    def completed(self, recipe: Recipe) -> Recipe:
        """Add the batch size and the type of the trials' scores (loss, reward or
        another value) to a recipe.

        If the trials were scored by rewards, a note is also added to the recipe.
        """
        notes = [*recipe.notes]
        if self.rewarded:
            notes = [*(note for note in notes if note != BY_TRAINING), BY_REWARD]
        at = replace(recipe.reference, batch=recipe.batch or self.batch)
        score = self._kind_of_score(recipe)
        return replace(recipe, reference=at, notes=tuple(notes), score=score)

    def _kind_of_score(self, recipe: Recipe) -> Score:
        """Return whether the trials' scores are losses, rewards or values that the
        user's function returned.
        """
        # a recipe can predict the excess loss only if the scores are losses
        if self.rewarded:
            return "reward"
        if self.score is not None:
            return "own"
        # Without a function of the user, a trainer is scored by its loss on held-out data.
        if self.by_trainer or self.place.trainer is not None:
            return "loss"
        return recipe.score
