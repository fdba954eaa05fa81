"""`calibrate`: a rate by short runs of a loop, of a trainer that is built, or of trainers that a
function builds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from .._checks import is_positive
from .._optimizers import get_optimizer_class
from .._rate import Rate
from .._types import Reference
from ..calibration import (
    BY_TRAINING,
    FEWEST_STEPS,
    SEEDS,
    Options,
    Pushed,
    Replicas,
    Train,
    Trial,
    release_memory,
    search,
)
from ..errors import CalibrationError, InspectionError, LawError, OptimizerError
from ..inspection import inspect_model
from ..laws import PRIOR_LAW, Law
from ..recipe import Recipe, is_for
from ..transfer import suggest_lr
from ._held_out import BATCHES
from ._in_place import BuiltPair, BuiltTrainer, Loop
from ._lightning_run import is_pair
from ._trainer_run import BY_REWARD, TrainerRun, is_by_reward, is_trainer

if TYPE_CHECKING:
    import optuna

# Four trials of a quarter of the run cost as many training steps as the run
TRIALS, SHARE = 4, 1 / 4
# Factor between the best rates of two lengths from which they are said: by hand
MOVED = 1.4
FILE = "recipe.toml"


def calibrate(  # noqa: PLR0913
    what: Any,
    optimizer: type[Optimizer] | str,
    *,
    model: nn.Module | Sequence[nn.Module] | None = None,
    ranks: Sequence[int | None] | None = None,
    steps: int | None = None,
    share: float | None = None,
    settings: Mapping[str, Any] | None = None,
    score: str | Callable[[Any], Any] | None = None,
    save: bool = True,
    name: str = "calibration",
    law: str | Law = PRIOR_LAW,
    trials: int | None = None,
    budget: int | None = None,
    full_trials: int = 0,
    seeds: Sequence[int] = SEEDS,
    lr_range: tuple[float, float] | None = None,
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    storage: str | os.PathLike[str] | optuna.storages.BaseStorage | None = None,
    batch: float | None = None,
    warmup: float | None = None,
    seed: int = 0,
    progress: bool = True,
    target_steps: int | None = None,
) -> Recipe:
    """Find the base rate, how it moves with rank, and how certain both are, by short runs. Return
    them as a recipe::

        recipe = ra.calibrate(trainer, "adamw")  # says its price, leaves the trainer as it was
        ra.attach(trainer, recipe=recipe)
        trainer.train()

    **A built trainer** of transformers or TRL, or Lightning's `(trainer, module, *data)`. Four
    trials of a quarter of the run's steps search around `suggest_lr`'s rate, at the model's own
    rank or in full finetuning. They cost as many training steps as the run. Afterwards weights,
    buffers, random state and trainer are as before, also after an error and Ctrl-C. Trackers,
    callbacks and checkpoints see the real run only. A warm-up in steps is scaled with the trial.
    The recipe is saved as `recipe.toml` in the trainer's folder. Where it is there already, nothing
    is run. Lightning's module configures its optimizer at `self.lr`, or not at all.

    **A loop of your own, in place**: `calibrate(train, "adamw", model=model, steps=100,
    target_steps=400)`. `train(trial)` trains the model as it is, and it is put back likewise.

    **A function of the trial** builds a model for `trial.rank`. It is a generator: it gets
    `trial.optimizer(model, ...)`, and yields a value to minimise at every step of the
    optimizer: one a step, not one a micro-batch. Or it returns a
    trainer, or Lightning's tuple, that is not trained and has no optimizer: it gets one at the
    trial's rate, and Lightning's `configure_optimizers` takes it from `trial.optimizer(self)`. Draw
    all random numbers, the data included, from `trial.seed`. Then runs of one rank and seed can be
    compared without noise.

    **The score** of a run is the trainer's loss on at most 16 fixed batches of its `eval_dataset`
    or validation data. Where it has none, as many batches are held out of the training data, a
    tenth at most. A generator that ends by itself at `trial.steps` may return its score. Otherwise
    it is the mean of the last tenth of the training losses (at least 5), and a note says so. A
    trainer with `reward_funcs` (GRPO, RLOO) has minus the reward that it logs. Where rewards do not
    differ between rates, the recipe has the suggested rate and says so.

    The search starts at the highest rank. It moves outwards in steps of a factor of 4 until the
    optimum is bracketed. The following runs measure around it, at each rank in turn, with four runs
    per seed. A run is stopped if it diverges, that is, if its loss rises above its start by half
    the best gain and by more than the noise of its batches explains. It is also stopped if it
    clearly lags behind the best run of its rank and seed at the same step, or raises
    `optuna.TrialPruned`. Stopped runs enter the fit too.

    **Calibrate short, train long.** `steps=2000, target_steps=8000` trains for 2000 steps and
    returns a recipe for 8000. Every trial is a whole run with its own warm-up and decay over
    `trial.steps`. The rate stays, since it rose with the steps on some tasks and fell on others,
    and the band grows with the distance to the target.

    **Full finetuning.** `full_trials=3` adds three full runs around the predicted rate. This is the
    most reliable way. With LoRA trials only, `recipe.at(method="full")` has a wide band. Where
    B starts at zero, as in PEFT, the rate follows from the law. Where A starts at zero, the line
    through the optima of two ranks is extended to r = n.

    **Resuming.** With `storage=`, the same call continues where it stopped, even if it was killed.
    Finished trials are kept, and an unfinished trial is run again. Several processes and machines
    may make the same call with one storage at the same time. They share the trials and wait for
    each other. Those that begin at the same moment may each add a run. A process that ends by
    Ctrl-C or an error gives its trial back at once. One that is killed or suspended writes no more
    heartbeats. Within a minute its trial is run again by another process, on any host, or by the
    same call. If it wakes up, its run does not count.

    **DDP and FSDP.** Call it on every process. One process decides. All get the same rate, prune at
    the same step and return the same recipe. Values are averaged over the processes. FSDP and
    DeepSpeed need a function of the trial.

    Args:
        what: the trainer or the function.
        optimizer: a torch optimizer class or its name.
        model: the model that a loop of your own trains in place, or a list of several.
        ranks: LoRA ranks to try: the lowest and the highest that you want to use. None stands for
            full finetuning. Rates are interpolated between the ranks. Outside them the band grows
            with the distance. A built model has its own.
        steps: optimizer steps per trial. Below 100 low rates look best. By default the `share` of a
            built trainer's run.
        share: a trial's share of the run of a built trainer, by default a quarter.
        settings: of a trainer's optimizer: its own, and those of `RankAwareOptimizer` such as
            `rates`. Weight decay, betas and epsilon of a trainer's arguments are taken.
        score: of a trainer, the evaluation metric to minimise after the last step ("eval_loss", or
            the name that Lightning's module logs), or a function of the trained trainer.
        save: whether to write the recipe of a built trainer into its folder.
        name: the name of the study and of the recipe.
        law: the law that maps rates between ranks, by default µA. It must be registered. The fall
            in rank at A = 0 is in the fit's prior.
        trials: number of runs at `ranks`. By default as many as `budget` allows, or 8 at each of
            them, or 4 of a built model.
        budget: optimizer steps of all trials together, which one process never exceeds. Pruned and
            killed trials count the steps they ran.
        full_trials: number of full-finetuning runs after those at `ranks`, around the predicted
            rate.
        seeds: random seeds, the same for all ranks. `trial.seed` seeds torch, numpy and random for
            each run.
        lr_range: lowest and highest base rate at the highest rank. The first run has the rate in
            their middle, so (lr / 16, 16 * lr) searches around a rate that you have. The range is
            widened if the best rate is at an edge.
        sampler: an Optuna sampler. By default it brackets the optimum and then refines it.
        pruner: an Optuna pruner, by default `PairedPruner`.
        storage: path of a journal file, or an Optuna URL or storage. By default the study is kept
            in memory.
        batch: examples per step of the target run, if known. The rate belongs to it, so the recipe
            records it. By default that of the trainer's arguments.
        warmup: share of the steps with a rising rate, below 1, if known. Nothing is pruned before
            its end. By default that of the trainer's arguments.
        seed: random seed of the sampler.
        progress: whether to show on standard error how far it is: a bar with the time left and the
            best rate so far in a notebook or on a terminal, elsewhere a line for each trial.
        target_steps: number of steps of the target run, by default those of a built trainer's run,
            else `steps`.

    Returns:
        The recipe for the target run.

    Raises:
        CalibrationError: what is given, an argument or the storage cannot be used; a trial would
            have fewer than 100 steps; the warm-up is as long as a trial; or every run diverged.
        CalibrationInterrupted: Ctrl-C. Finished trials stay in `storage`, and `.recipe` holds their
            fit.
    """
    native = get_optimizer_class(optimizer)
    if not (score is None or isinstance(score, str) or callable(score)):
        raise CalibrationError(
            f"score is {score!r}.",
            "Give the name of a metric, or a function of the trainer.",
            "score",
        )
    place = _in_place(what, model, score)
    trained = _Trained(native, settings or {}, score, built=place is not None)
    others: dict[str, Any] = {
        "law": law,
        "budget": budget,
        "seeds": seeds,
        "lr_range": lr_range,
        "batch": batch,
    }
    others |= {"name": name, "warmup": warmup, "seed": seed, "full_trials": full_trials}
    how: dict[str, Any] = {"sampler": sampler, "pruner": pruner, "storage": storage}
    how["progress"] = progress
    if place is None:
        _refuse_given("A function of the trial", share=share)
        _refuse_missing(ranks=ranks, steps=steps)
        others |= {"ranks": ranks, "steps": steps, "target_steps": target_steps}
        options = Options(native, trials=trials, **others)
        train = trained.by(what, what)
        return trained.completed(search(train, options, **how))
    _refuse_given("A built model", ranks=ranks, full_trials=full_trials)
    plan = _Plan(place, steps, share, target_steps, trials, save)
    return plan.run(trained, others, how)


# --- what is calibrated ---------------------------------------------------------------------------


def _in_place(
    what: Any, model: Any, score: Any
) -> Loop | BuiltTrainer | BuiltPair | None:
    """Return the model that is built and how it is trained, None for a function that builds one."""
    is_built = is_trainer(what) or is_pair(what)
    if is_built and model is not None:
        raise CalibrationError(
            "model was given with a trainer, which has its own.",
            "Leave it out.",
            "model",
        )
    if is_trainer(what):
        return BuiltTrainer(what, is_by_reward(what, score))
    if is_pair(what):
        return BuiltPair(what[0], what[1], what[2:])
    if not callable(what):
        raise CalibrationError(
            f"calibrate got a {type(what).__name__}.",
            "Give a function of the trial, a trainer of transformers or TRL that is built, or"
            " Lightning's (trainer, module, data).",
        )
    return None if model is None else Loop(what, model)


def _refuse_given(what: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if value:
            raise CalibrationError(
                f"{name} was given, but not for it: {what} has its own.",
                "Leave it out.",
                name,
            )


def _refuse_missing(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value is None:
            raise CalibrationError(
                f"{name} is missing.",
                "A function of the trial needs ranks=, such as (4, 64), and steps=. For a model"
                " that is built give model= too, or its trainer.",
                name,
            )


class _Trained:
    """Runs trials by whatever the user's function returns, and keeps what trainers say of them.

    Args:
        native: the optimizer's class.
        settings: of a trainer's optimizer.
        score: a trainer's.
        built: whether the model was built before the calibration.
    """

    def __init__(
        self,
        native: type[Optimizer],
        settings: Mapping[str, Any],
        score: str | Callable[[Any], Any] | None,
        built: bool,
    ) -> None:
        self.native, self.settings, self.score = native, settings, score
        self.built = built
        self.horizon: dict[str, Any] = {}  # of the trainer's arguments

    def by(self, make: Callable[[Trial], Any], source: Any) -> Train:
        """Return the loop of a calibration: `make(trial)` returns what runs a trial. source: what a
        recipe names as the loop.
        """

        @wraps(source)
        def train(trial: Trial) -> Any:
            returned = [make(trial)]
            if is_trainer(returned[0]) or is_pair(returned[0]):
                return Pushed(lambda report: self._run(returned.pop(), trial, report))
            if self.settings or self.score is not None:
                raise CalibrationError(
                    "settings= or score= was given, but train returned no trainer.",
                    "Give settings to trial.optimizer, and return the score at the end.",
                )
            return returned[0]

        return train

    def _run(self, trainer: Any, trial: Trial, report: Callable[[Any], bool]) -> Any:
        of_trial = (trial, self.native, self.settings, self.score, report, self.horizon)
        try:
            return TrainerRun(*of_trial, built=self.built).by(trainer)
        finally:
            del trainer
            release_memory()  # before the next trial

    def completed(self, recipe: Recipe) -> Recipe:
        """Return a recipe with what the trainer's arguments say of its runs."""
        if recipe.batch is None:
            batch = self.horizon.get("batch")
            recipe = replace(recipe, reference=replace(recipe.reference, batch=batch))
        if recipe.warmup is None:
            recipe = replace(recipe, warmup=self.horizon.get("warmup"))
        if self.horizon.get("by reward"):
            others = (note for note in recipe.notes if note != BY_TRAINING)
            recipe = replace(recipe, notes=(*others, BY_REWARD))
        return recipe


# --- a model that is built ------------------------------------------------------------------------


class _Plan:
    """The calibration of a model that is built.

    Args:
        place: how it is trained.
        steps, share, target_steps, trials, save: as in `calibrate`.
    """

    def __init__(
        self,
        place: Loop | BuiltTrainer | BuiltPair,
        steps: int | None,
        share: float | None,
        target_steps: int | None,
        trials: int | None,
        save: bool,
    ) -> None:
        self.place, self.trials = place, trials
        self.steps, self.target_steps = steps, target_steps
        self.share = SHARE if share is None else share
        in_loop = isinstance(place, Loop)
        if in_loop:
            _refuse_given("A loop of your own", share=share)
            _refuse_missing(steps=steps)
        if not is_positive(self.share) or self.share > 1:
            raise CalibrationError(
                f"share is {share!r}.", "Give a share of the run, such as 1/4.", "share"
            )
        self.path = place.folder / FILE if save and place.folder else None

    def run(
        self,
        trained: _Trained,
        others: dict[str, Any],
        how: dict[str, Any],
    ) -> Recipe:
        """Run the trials and put the model back, or return the recipe that lies beside the run.

        Args:
            trained: runs the trials.
            others: other arguments of `Options`.
            how: other arguments of `search`.
        """
        place, settings, native = self.place, trained.settings, trained.native
        at = _configuration(place, settings)
        team = Replicas()
        try:
            known = team.agree(lambda: _beside(self.path, native, at))
        finally:
            team.close()
        if known is not None and not self._is_of_another_length(known):
            if how["progress"] and team.leads:
                _say(
                    f"{self.path} is there, so nothing is run. Remove it to calibrate again."
                )
            return known
        kept = place.snapshot()
        with kept.kept(), place.around():
            place.check_data()
            whole = self.target_steps or place.steps() or self.steps
            assert whole is not None
            options = Options(
                native,
                ranks=(at.rank,),
                steps=self.steps or self._share_of(whole),
                target_steps=whole,
                trials=TRIALS
                if self.trials is None and not others["budget"]
                else self.trials,
                suggested=_suggested(place, native, at, settings),
                noisy=place.is_by_reward,
                **others,
            )

            def make(trial: Trial) -> Any:
                kept.begin(trial)
                return place.run(trial, whole)

            price = _price(options, place, kept.size)
            train = trained.by(make, place.source)
            recipe = trained.completed(search(train, options, price=price, **how))
        if known is not None:
            recipe = _compared(recipe, options.steps, known)
        if self.path is not None and team.leads:
            recipe.save(self.path)
        return recipe

    def _share_of(self, whole: int) -> int:
        """Return a trial's share of the run's steps.

        Raises:
            CalibrationError: it is too short.
        """
        steps = round(self.share * whole)
        if steps >= FEWEST_STEPS:
            return steps
        least = min(FEWEST_STEPS, whole)
        raise CalibrationError(
            f"A trial would have {steps} of the run's {whole} steps, and in fewer than"
            f" {FEWEST_STEPS} low rates look best.",
            f"Give steps={least}, which costs {TRIALS * least} steps in all, or take"
            " ra.suggest_lr's rate and train longer.",
        )

    def _is_of_another_length(self, known: Recipe) -> bool:
        return self.steps is not None and _length(known) not in (None, self.steps)


def _length(recipe: Recipe) -> int | None:
    """Return the steps of a recipe's trials, None if it has none."""
    curves = recipe.tensors.get("curve")
    return None if curves is None else int(curves.shape[1])


def _configuration(place: Any, settings: Mapping[str, Any]) -> Reference:
    """Return the model's most common configuration: of its adapters, else of full finetuning."""
    init = settings.get("init")
    method = settings.get("method")
    try:
        return inspect_model(place.model, method=method or "lora", init=init).dominant()
    except InspectionError as error:
        if method is not None:
            raise
        try:
            return inspect_model(place.model, method="full").dominant()
        except InspectionError:
            raise error from None


def _suggested(
    place: Any, native: type[Optimizer], at: Reference, settings: Mapping[str, Any]
) -> Rate | None:
    """Return the suggested rate, None where none is known."""
    of_optimizer = {k: v for k, v in settings.items() if k == "adjust_lr_fn"}
    task = "rl" if hasattr(getattr(place, "trainer", None), "reward_funcs") else None
    options: dict[str, Any] = {"method": at.method, "task": task}
    options["init"] = settings.get("init")
    try:
        return suggest_lr(place.model, native, settings=of_optimizer, **options)
    except (OptimizerError, LawError):
        return None


def _price(options: Options, place: Any, size: int) -> str:
    """Return what a calibration costs beside the steps of its trials, in words."""
    words = f" of training, where the run takes {options.target:,}"
    if place.evaluation:
        words += f"; {options.likely_trials} × {BATCHES} batches of evaluation"
    return f"{words}; a copy of the weights that train, {size / 2**20:,.3g} MiB"


def _say(words: str) -> None:
    print(f"calibrate: {words}", file=sys.stderr, flush=True)


# --- the recipe beside the run --------------------------------------------------------------------


def _beside(path: Path | None, native: type[Optimizer], at: Reference) -> Recipe | None:
    """Return the recipe beside a run, None if there is none.

    Raises:
        CalibrationError: it is of another optimizer or configuration.
    """
    if path is None or not path.exists():
        return None
    recipe = Recipe.load(path)
    stored = recipe.reference
    is_same = (stored.method, stored.rank, stored.init) == (at.method, at.rank, at.init)
    if not is_for(recipe, native) or not is_same or stored.scaling != at.scaling:
        raise CalibrationError(
            f"{path} is a recipe for {recipe.optimizer} at {stored}, and not for {native.__name__}"
            f" at {at}.",
            "Remove it, or give save=False or another output folder.",
        )
    return recipe


def _compared(recipe: Recipe, steps: int, known: Recipe) -> Recipe:
    """Return a recipe with a note if its best rate is far from that of trials of another length."""
    ratio = recipe.fitted_lr / known.fitted_lr
    if max(ratio, 1 / ratio) <= MOVED:
        return recipe
    note = (
        f"trials of {_length(known)} steps gave {known.fitted_lr:.3g}, those of {steps}"
        f" {recipe.fitted_lr:.3g}: the best rate moves with the length of a run"
    )
    return replace(recipe, notes=(*recipe.notes, note))
