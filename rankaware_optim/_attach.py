"""This module defines `attach`, which lets an existing trainer use a `RankAwareOptimizer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ._checks import shown
from ._near_misses import explain_near_misses
from ._warn import warn
from .errors import OptimizerError, RankAwareError
from .recipe import Judgement, Recipe
from .trainers import SUPPORTED_TRAINERS, Trainer, trainer_of
from .transfer import suggest_lr

if TYPE_CHECKING:
    from ._rate import Rate
    from ._types import Init, Method
    from .inspection import ReferenceLike
    from .laws import Law
    from .optimizer import Report


@explain_near_misses
def attach(
    trainer: Any,
    optimizer: type[Optimizer] | str | None = None,
    *,
    lr: float | Rate | None = None,
    tuned_at: ReferenceLike | None = None,
    law: str | Law | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    method: Method | None = None,
    init: Init | None = None,
    rates: Mapping[str, float | Rate] | None = None,
    other_lr: float | Rate | None = None,
    batch: float | None = None,
    steps: int | None = None,
    **settings: Any,
) -> Report:
    """Make a trainer use a `RankAwareOptimizer`, and return a report of the optimizer's
    learning rates.

    Call `attach` before training::

        trainer = GRPOTrainer(model, rewards, args=args, train_dataset=data)
        tuned = {"lr": 2e-4, "tuned_at": "r=16,alpha=32"}
        print(ra.attach(trainer, torch.optim.AdamW, **tuned))
        trainer.train()

    The trainer builds the optimizer after it has wrapped its model. Weight decay comes
    from the trainer's arguments, unless you pass it to `attach`. The learning rate,
    betas and epsilon also come from the trainer's arguments if you have changed their
    defaults there. As usual in the `Trainer` of transformers, norms and biases get no
    weight decay. The trainer logs the learning rate of each LoRA rank during training.
    During training, `trainer.optimizer` has the attributes `report` and `rates`, even
    if accelerate has wrapped the optimizer. The base learning rate is written into the
    trainer's arguments, which are saved with the training run.

    For Lightning, pass the tuple `(trainer, module)`. If the Lightning module defines
    `configure_optimizers`, `attach` only sets the attribute `self.lr` or
    `self.learning_rate` that this method uses. If the Lightning module does not define
    `configure_optimizers`, `attach` adds an optimizer with a constant learning rate and
    the settings of the recipe.

    Args:
        trainer: a trainer of transformers, TRL or sentence-transformers, or a tuple that starts
            with Lightning's trainer and the module.
        optimizer: a torch optimizer class or its name. The default is the class that the trainer
            would build, or AdamW for Lightning. If the trainer was built with
            `optimizer_cls_and_kwargs`, the default is this class with its settings, including the
            learning rate.
        lr: the base learning rate per step, tuned at `tuned_at`.
        tuned_at: the configuration that `lr` was tuned for, such as "r=16,alpha=32".
        law: a scaling law or its name, by default "falling".
        recipe: a calibrated recipe or its path, instead of `lr`, `tuned_at` and `law`.
        method: "lora", or "full" for full finetuning. The default is the method of the recipe, or
            "lora" without a recipe.
        init: how the adapters were initialised, if this cannot be read from the model: "A" if B
            starts at zero, or "B" if A starts at zero.
        rates: learning rates by name pattern, such as {"*classifier*": 1e-3}.
        other_lr: the learning rate of every parameter that is not a LoRA matrix.
        batch: the number of examples or tokens per step of this run.
        steps: the number of training steps of this run, used only with a recipe.
        **settings: settings of the torch optimizer, such as `betas`.

    Raises:
        OptimizerError: the object is not a supported trainer, the trainer already has an optimizer,
            or no learning rate was passed. As with every error of `RankAwareOptimizer`, nothing was
            changed. Later, `train` raises this error before the first step if the trainer has built
            a different optimizer.
    """
    found = trainer_of(trainer)
    if found is None:
        kind = type(trainer).__name__
        raise OptimizerError(
            f"attach() got a {kind}, which is not a supported trainer.",
            f"Pass {SUPPORTED_TRAINERS}.",
        )
    ours = {
        "lr": lr,
        "tuned_at": tuned_at,
        "law": law,
        "recipe": recipe,
        "method": method,
        "init": init,
        "rates": rates,
        "other_lr": other_lr,
        "batch": batch,
        "steps": steps,
    }
    given = {**ours, **settings}
    given = {name: value for name, value in given.items() if value is not None}
    if recipe is None:
        report = found.attach(optimizer, given)
        place = "" if tuned_at is not None else _in_suggestion(found, optimizer, given)
        return _with_note(report, place)
    given = _with_recipe(given)
    report = found.attach(optimizer, given)
    other = "" if batch is not None else _other_batch(given["recipe"], found.batch)
    if other:
        warn(other)
    return _with_note(report, other)


def _with_note(report: Report, note: str) -> Report:
    """Add a note to the end of an optimizer's report, unless the note is empty."""
    return replace(report, notes=(*report.notes, note)) if note else report


def _in_suggestion(
    trainer: Trainer, optimizer: type[Optimizer] | str | None, given: dict[str, Any]
) -> str:
    """Describe whether the user's learning rate is inside the 90 % interval that
    `suggest_lr` suggests for the model.

    The result is an empty string if `suggest_lr` cannot suggest a learning rate for the
    model.
    """
    own = trainer.own_rate()
    lr = given.get("lr", own and own.lr)
    if lr is None:
        return ""
    try:
        suggested = suggest_lr(
            trainer.model,
            optimizer or trainer.own_class() or "AdamW",
            method=given.get("method", "lora"),
            init=given.get("init"),
            task=trainer.task,
            steps=trainer.known_steps(),
        )
    except RankAwareError:
        return ""
    where = "inside" if Judgement(float(lr), suggested).inside else "outside"
    return (
        f"The learning rate {float(lr):.3g} is {where} the 90 % interval that"
        f" ra.suggest_lr(trainer) gives for this model: {suggested.band}, best estimate"
        f" {suggested.lr:.3g}."
    )


def _other_batch(recipe: Recipe, batch: float | None) -> str:
    """Return a warning if the trainer and the recipe have different batch sizes."""
    if batch is None or recipe.batch in (None, batch):
        return ""
    return (
        f"Recipe {recipe.name!r} was made with batch size {recipe.batch:g}, but this trainer uses"
        f" batch size {batch:g}, for which the learning rate is less certain. Pass"
        f" batch={batch:g} to convert the learning rate."
    )


def _with_recipe(given: dict[str, Any]) -> dict[str, Any]:
    """Load the recipe, and add its training method (LoRA or full finetuning) to the
    arguments of `attach` if they contain no method.

    Raises:
        OptimizerError: the arguments also contain a learning rate, its configuration or a
            scaling law.
    """
    for argument in ("lr", "tuned_at", "law"):
        if argument in given:
            raise OptimizerError(
                f"{argument}={shown(given[argument])} cannot be passed together with recipe=,"
                f" because the recipe already determines {argument}.",
                f"Remove {argument}= to train with the recipe, or remove recipe=.",
            )
    recipe = given["recipe"]
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    return {"method": recipe.reference.method, **given, "recipe": recipe}
