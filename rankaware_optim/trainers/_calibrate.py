"""`calibrate`: a rate by short runs of a loop, of a trainer that is built, or of trainers that a
function builds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import optuna
from torch import nn
from torch.optim import Optimizer

from .._near_misses import explain_near_misses
from .._optimizers import get_optimizer_class
from .._rate import Rate
from .._types import Reference
from ..calibration import (
    BY_TRAINING,
    FEWEST_STEPS,
    SEEDS,
    CallbackRun,
    Options,
    Replicas,
    Train,
    Trial,
    release_memory,
    search,
    seeded,
)
from ..errors import CalibrationError, InspectionError, LawError, OptimizerError
from ..inspection import as_one_model, inspect_model
from ..laws import PRIOR_LAW, Law
from ..recipe import Recipe, is_for
from ..transfer import suggest_lr
from ._lightning import BuiltPair, is_pair, run_pair
from ._transformers import BuiltTrainer, is_by_reward, is_trainer, run_trainer
from ._trial import BATCHES, Snapshot, TrainerRuns

# Four trials of a quarter of the run cost as many training steps as the run
TRIALS, SHARE = 4, 1 / 4
# Factor between the best rates of two lengths from which they are said: by hand
MOVED = 1.4
BY_REWARD = (
    "a run's value is minus the reward that its trainer logged, and not its loss"
)


@explain_near_misses
def calibrate(  # noqa: PLR0913
    what: Any,
    optimizer: type[Optimizer] | str,
    *,
    model: nn.Module | Sequence[nn.Module] | None = None,
    ranks: Sequence[int | None] | None = None,
    steps: int | None = None,
    target_steps: int | None = None,
    share: float = SHARE,
    settings: Mapping[str, Any] | None = None,
    score: Callable[[Any], Any] | None = None,
    save: bool = True,
    name: str = "calibration",
    law: str | Law = PRIOR_LAW,
    trials: int | None = None,
    full_trials: int = 0,
    seeds: Sequence[int] = SEEDS,
    lr_range: tuple[float, float] | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    batch: float | None = None,
    warmup: float | None = None,
    progress: bool = True,
) -> Recipe:
    """Find the base rate, how it moves with rank, and how certain both are, by short runs. Return
    them as a recipe::

        recipe = ra.calibrate(trainer, "adamw")  # says its price, leaves the trainer as it was
        ra.attach(trainer, recipe=recipe)
        trainer.train()

    A built trainer, and a model that is given, are as before afterwards, also after an error and
    Ctrl-C. They are calibrated at their own rank or in full finetuning, by four trials around
    `suggest_lr`'s rate. The search of a function covers `ranks`. Under DDP every process calls it,
    and all return the same recipe. `docs/calibrate.md` has the rest.

    Args:
        what: a trainer of transformers or TRL that is built, or Lightning's `(trainer, module,
            *data)`, whose module configures its optimizer at `self.lr` or not at all. Or a
            generator function of a trial: it gets `trial.optimizer(model, ...)` and yields a value
            to minimise, one for each step of the optimizer, and may return its score after
            `trial.steps`. With `model` it trains that, else a model of `trial.rank` that it builds.
            Or a function of a trial that returns a trainer, or Lightning's tuple, not trained yet.
        optimizer: a torch optimizer class or its name.
        model: the model that a loop of your own trains in place, or a list of several.
        ranks: LoRA ranks that a function is tried at: the lowest and the highest that you want to
            use. None stands for full finetuning.
        steps: optimizer steps per trial. By default the `share` of `target_steps`. Below 100 low
            rates look best.
        target_steps: optimizer steps of the target run, by default those of a built trainer's run,
            else `steps`.
        share: a trial's share of the target run.
        settings: of a trainer's optimizer: its own, and those of `RankAwareOptimizer` such as
            `rates`. Weight decay, betas and epsilon of a trainer's arguments are taken.
        score: a function of the trained trainer, whose value is minimised. By default its loss on
            at most 16 batches of its evaluation data, else of training data held out; or minus the
            reward of a trainer with `reward_funcs`.
        save: whether to write the recipe of a built trainer into its folder, as `recipe.toml`.
            Where it is there already, it is returned and nothing is run.
        name: the name of the study and of the recipe.
        law: the law that maps rates between ranks, by default µA. It must be registered.
        trials: number of runs at `ranks`. By default 8 at each of them, or 4 of a built model.
        full_trials: number of full-finetuning runs after those at `ranks`, around the predicted
            rate.
        seeds: random seeds, the same for all ranks. `trial.seed` seeds torch, numpy and random for
            each run.
        lr_range: lowest and highest base rate at the highest rank. The first run has the rate in
            their middle. The range is widened if the best rate is at an edge.
        storage: path of a journal file, or an Optuna URL or storage, with which the same call
            continues, and other processes join. By default the study is kept in memory.
        batch: examples per step of the target run, if known, for the recipe. By default that of the
            trainer's arguments.
        warmup: share of the steps with a rising rate, below 1, if known. Nothing is pruned before
            its end. By default that of the trainer's arguments.
        progress: whether to show on standard error how far it is.

    Returns:
        The recipe for the target run.

    Raises:
        CalibrationError: what is given, an argument or the storage cannot be used; a trial would
            have fewer than 100 steps; the warm-up is as long as a trial; or every run diverged.
        CalibrationInterrupted: Ctrl-C. Finished trials stay in `storage`, and `.recipe` holds their
            fit.
        OptimizerError: the trainer has an optimizer already.
    """
    native = get_optimizer_class(optimizer)
    place = _place(what, model, score)
    runs = TrainerRuns(native, settings or {}, score, place.model is not None)
    at = _configuration(place, runs, ranks, full_trials)
    beside = place.file if save else None
    with closing(Replicas()) as team:
        leads = team.leads
        stored = team.agree(lambda: _stored(beside, native, at, steps, progress))
    if stored is not None and steps in (None, _length(stored)):
        return stored
    if at is not None:
        ranks = (at.rank,)
        trials = trials or TRIALS
    snapshot = place.snapshot()
    with seeded(0), snapshot.kept():
        whole = target_steps or place.steps()
        of_trials: dict[str, Any] = {
            "law": law,
            "ranks": ranks,
            "steps": _steps(steps, whole, share),
        }
        options = Options(
            native,
            **of_trials,
            target_steps=whole,
            trials=trials,
            full_trials=full_trials,
            seeds=seeds,
            lr_range=lr_range,
            batch=batch,
            warmup=warmup,
            name=name,
            suggested=_suggested(place.subject, at, runs),
            noisy=place.is_by_reward,
        )
        searched = search(
            _loop(runs, place, snapshot, options.target),
            options,
            storage=storage,
            progress=progress,
            price=_price(options, place, snapshot),
        )
    recipe = _completed(searched, runs, stored)
    if beside is not None and leads:
        recipe.save(beside)
    return recipe


def _steps(steps: int | None, whole: int | None, share: float) -> int | None:
    """Return a trial's steps, by default its share of the run's.

    Raises:
        CalibrationError: the share is too short.
    """
    if steps or whole is None:
        return steps
    part = round(share * whole)
    if part >= FEWEST_STEPS:
        return part
    least = min(FEWEST_STEPS, whole)
    raise CalibrationError(
        f"A trial would have {part} of the run's {whole} steps, and in fewer than"
        f" {FEWEST_STEPS} low rates look best.",
        f"Give steps={least}, which costs {TRIALS * least} steps in all, or take"
        " ra.suggest_lr's rate and train longer.",
    )


# --- what is calibrated ---------------------------------------------------------------------------


def _place(what: Any, model: Any, score: object) -> Any:
    """Return how trials are run: a `Loop`, a `BuiltTrainer` or a `BuiltPair`."""
    if score is not None and not callable(score):
        raise CalibrationError(
            f"score is {score!r}.", "Give a function of the trained trainer."
        )
    if callable(what):
        return Loop(what, model)
    if model is None and is_trainer(what):
        return BuiltTrainer(what, is_by_reward(what, score))
    if model is None and is_pair(what):
        return BuiltPair(*what)
    raise CalibrationError(
        f"calibrate got a {type(what).__name__} and model={type(model).__name__}.",
        "Give a function of the trial, alone or with model=; or alone a trainer of transformers or"
        " TRL that is built, or Lightning's (trainer, module, data).",
    )


class Loop:
    """A function of the trial.

    Args:
        source: the function.
        model: the model that it trains, or a list of several, or None if it builds them.
    """

    file: Path | None = None
    is_by_reward = False

    def __init__(self, source: Callable[[Trial], Any], model: Any) -> None:
        self.source = source
        self.model = self.subject = as_one_model(model)

    def snapshot(self) -> Snapshot:
        """Return the state to which every trial's is put back."""
        return Snapshot([] if self.model is None else [self.model])

    def steps(self) -> None:
        """Return no steps of the run, which are an argument."""

    def run(self, trial: Trial, whole: int) -> Any:
        """Return what runs a trial: a generator, or a trainer. whole: the steps of the run."""
        return self.source(trial)


def _loop(runs: TrainerRuns, place: Any, snapshot: Snapshot, whole: int) -> Train:
    """Return the loop of a calibration, whose trials all begin at the snapshot."""

    @wraps(place.source)
    def train(trial: Trial) -> Any:
        release_memory()  # of the trial before
        snapshot.begin()
        made = place.run(trial, whole)
        if is_trainer(made) or is_pair(made):
            run_made = run_trainer if is_trainer(made) else run_pair
            return CallbackRun(lambda runner: run_made(made, runs.begin(trial, runner)))
        if runs.settings or runs.score is not None:
            raise CalibrationError(
                "settings= or score= was given, but train returned no trainer.",
                "Give settings to trial.optimizer, and return the score at the end.",
            )
        return made

    return train


def _configuration(
    place: Any, runs: TrainerRuns, ranks: Any, full_trials: int
) -> Reference | None:
    """Return the most common configuration of a model that is built: of its adapters, else of full
    finetuning. None where none is.
    """
    if place.model is None:
        return None
    if ranks is not None or full_trials:
        raise CalibrationError(
            "A model that is built is calibrated at its own rank.",
            "Leave ranks= and full_trials= out, or give a function that builds one.",
        )
    init = runs.settings.get("init")
    method = runs.settings.get("method")
    try:
        return inspect_model(place.model, method=method or "lora", init=init).dominant()
    except InspectionError:
        if method is not None:
            raise
        return Reference(method="full")


def _suggested(subject: Any, at: Reference | None, runs: TrainerRuns) -> Rate | None:
    """Return the suggested rate of a model or a trainer, None where none is known."""
    if at is None:
        return None
    settings = runs.settings
    init = runs.settings.get("init")
    try:
        return suggest_lr(
            subject, runs.native, settings=settings, method=at.method, init=init
        )
    except (OptimizerError, LawError):
        return None


def _price(options: Options, place: Any, snapshot: Snapshot) -> str:
    """Return what trials of a model that is built cost beside their steps, in words."""
    if place.model is None:
        return ""
    words = f" of training, where the run takes {options.target:,}"
    if place.file and not place.is_by_reward:
        words += f"; {options.runs} × {BATCHES} batches of evaluation"
    mebibytes = f"{snapshot.size / 2**20:,.3g} MiB"
    return f"{words}; a copy of the weights that train, {mebibytes}"


# --- the recipe -----------------------------------------------------------------------------------


def _stored(
    path: Path | None,
    native: type[Optimizer],
    at: Any,
    steps: int | None,
    progress: bool,
) -> Recipe | None:
    """Return the recipe that lies beside a run, and say so if nothing is run.

    Raises:
        CalibrationError: it is of another optimizer or configuration.
    """
    if path is None or not path.exists():
        return None
    recipe = Recipe.load(path)
    stored = recipe.reference
    same = replace(stored, fan_in=at.fan_in, batch=at.batch)
    if not is_for(recipe, native) or same != at:
        raise CalibrationError(
            f"{path} is a recipe for {recipe.optimizer} at {stored}, and not for"
            f" {native.__name__} at {at}.",
            "Remove it, or give save=False or another output folder.",
        )
    if progress and steps in (None, _length(recipe)):
        words = f"{path} is there, so nothing is run: remove it to calibrate"
        print(f"calibrate: {words}", file=sys.stderr, flush=True)
    return recipe


def _length(recipe: Recipe) -> int | None:
    """Return the steps of a recipe's trials, None if it has none."""
    curves = recipe.tensors.get("curve")
    return None if curves is None else int(curves.shape[1])


def _completed(recipe: Recipe, runs: TrainerRuns, stored: Recipe | None) -> Recipe:
    """Return a recipe with what the trainers' arguments say of their runs, and a note if its best
    rate is far from the one that was stored, by trials of another length.
    """
    notes = [*recipe.notes]
    if runs.by_reward:
        notes = [*(note for note in notes if note != BY_TRAINING), BY_REWARD]
    ratio = recipe.fitted_lr / stored.fitted_lr if stored else 1.0
    if stored is not None and max(ratio, 1 / ratio) > MOVED:
        notes.append(
            f"trials of {_length(stored)} steps gave {stored.fitted_lr:.3g}, those of"
            f" {_length(recipe)} {recipe.fitted_lr:.3g}: the best rate moves with the length of a"
            " run"
        )
    batch = recipe.batch or runs.batch
    return replace(
        recipe,
        reference=replace(recipe.reference, batch=batch),
        warmup=runs.warmup if recipe.warmup is None else recipe.warmup,
        notes=tuple(notes),
    )
