"""The optimizer as a factory, logged rates, and trials, for `Trainer` of transformers and its
subclasses in TRL.

Importing this module does not import transformers. Its functions do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._optimizers import get_optimizer_class
from ..errors import CalibrationError, OptimizerError
from ..optimizer import RankAwareOptimizer
from ._rates import group_rates
from ._trackers import log_recipe, save_beside_checkpoint
from ._trainer_run import TrainerRun
from ._training_arguments import (
    check_given,
    keep_embeddings_in_32_bits,
    settings_of,
    trainer_groups,
)


class TrainerFactory:
    """The factory that `Trainer` calls to make its optimizer.

    Trainer calls a factory without arguments, and then its result with the wrapped model. Axolotl
    adds its arguments. Older versions, and Unsloth on a CPU with a rate for embeddings, pass
    groups. All of these work.

    Args:
        make: `make(params, model=..., **settings)` builds the optimizer.
        native: the class that is wrapped.
        given: the user's settings. Without a rate or a recipe, the rate is that of the arguments at
            each call.
        args: the arguments of a trainer that does not pass them.
        model: returns the model of a trainer that does not pass it.
    """

    def __init__(
        self,
        make: Callable[..., Optimizer],
        native: type[Optimizer],
        given: Mapping[str, Any],
        args: Any = None,
        model: Callable[[], Any] = lambda: None,
    ) -> None:
        self.make, self.native, self.given, self.args, self.model = make, native, given, args, model

    def __call__(self, params: Any = None, args: Any = None, **settings: Any) -> Any:
        """Return this factory if there are no arguments, else an optimizer for a model or for
        groups.
        """
        if params is None:
            return self
        args = self.args if args is None else args
        model = params if isinstance(params, nn.Module) else self.model()
        if model is None:
            raise OptimizerError(
                f"Trainer passed a {type(params).__name__} to a factory, which needs the model.",
                "Use attach(trainer, ...), a version of transformers with factories, or"
                " optimizers=(opt, None).",
            )
        said = settings_of(self.native, args, {**settings, **self.given})
        if (
            args is not None and not {"lr", "recipe"} & said.keys()
        ):  # a search may try the default rate
            said["lr"] = args.learning_rate
        keep_embeddings_in_32_bits(model, self.native, said)
        if params is model:
            return self.make(trainer_groups(model, self.native), model=model, **said)
        base = getattr(args, "learning_rate", None)  # a group at the trainer's base rate gets ours
        groups = [{k: v for k, v in group.items() if k != "lr" or v != base} for group in params]
        return self.make(groups, model=model, **said)


def trainer_factory(
    optimizer: type[Optimizer] | str, *, args: Any = None, **settings: Any
) -> tuple[TrainerFactory, dict[str, Any]]:
    """Return a factory for transformers' `Trainer(optimizer_cls_and_kwargs=...)`. It gets the
    wrapped model::

        factory = trainer_factory(torch.optim.AdamW, args=args, recipe="recipe.toml")
        Trainer(model, args, optimizer_cls_and_kwargs=factory)

    For a trainer that is already built, `attach` does the same, and also logs and reports. Norms
    and biases get no weight decay, as in Trainer. Trainer's scheduler, clipping and resuming work
    as usual.

    Args:
        optimizer: a torch optimizer class, or its name.
        args: the trainer's `TrainingArguments`. Weight decay, and rate, betas and epsilon if they
            were set, are used unless they are given here. Trainer does not pass its arguments to a
            factory, Axolotl does.
        **settings: the arguments of `RankAwareOptimizer` and the optimizer's own. A rate or
            `recipe` is required.

    Raises:
        OptimizerError: the optimizer is unknown, or no rate was given.
    """
    native = get_optimizer_class(optimizer)
    check_given("trainer_factory", native, args, settings)
    return TrainerFactory(partial(RankAwareOptimizer, optimizer=native), native, settings, args), {}


def log_rates(trainer: Any = None) -> Any:  # noqa: C901 - its hooks are closures over the trainer
    """Return a callback for transformers' `Trainer` that logs every group's rate. Trainer logs that
    of group 0::

        trainer = Trainer(model, args, callbacks=[log_rates()])     # log history, console
        log_rates(trainer)                                          # reporters such as TensorBoard too

    Trainer calls its reporters before the callbacks that it is given, so the first form is too late
    for them. The second form puts the callback first, and logs the recipe's name and hash to
    TensorBoard, W&B and MLflow too. Both forms save the recipe beside every checkpoint
    (`Recipe.save_beside`).

    Args:
        trainer: the trainer to add the callback to. By default the callback is only returned.

    Raises:
        OptimizerError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise OptimizerError(
            "log_rates is for transformers, which is not installed.", "Install it."
        ) from error

    class LogRates(TrainerCallback):
        """Adds the rates of the last step to the training logs, as Trainer does for group 0."""

        def __init__(self) -> None:
            self.rates: dict[str, float] = {}

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rates = {}

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if (
                trainer is not None and state.is_world_process_zero and not self.rates
            ):  # its reporters are ready
                log_recipe(trainer.callback_handler.callbacks, kwargs["optimizer"])

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.rates = group_rates(kwargs["optimizer"])

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                save_beside_checkpoint(args.output_dir, state, kwargs["optimizer"])

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs.get("logs") or {}
            if "learning_rate" in logs:
                for entry in (logs, *state.log_history[-1:]):
                    entry.update(self.rates)

    callback = LogRates()
    if trainer is not None:
        trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def train(trainer: Any, run: TrainerRun) -> Any:
    """Run a trial of a calibration by `trainer.train` and return its score, or None if there is
    none.
    """
    from transformers import TrainerCallback, set_seed

    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        raise CalibrationError(
            "The trainer that make_trainer returned already has an optimizer.",
            "Leave optimizers= and optimizer_cls_and_kwargs= out, since it gets the trial's"
            " optimizer.",
        )
    trainer.args = args = copy.copy(trainer.args)
    args.max_steps = run.steps_of(args.max_steps if args.max_steps > 0 else None)
    args.seed = run.trial.seed % 2**32
    args.save_strategy = type(args.save_strategy)("no")
    args.load_best_model_at_end = args.push_to_hub = False

    def make(params: Any, *, lr: Any = None, **settings: Any) -> Any:  # the rate is the trial's
        return run.trial.optimizer(params, **settings)

    trainer.optimizer_cls_and_kwargs = (TrainerFactory(make, run.native, run.settings, args), {})
    training_step = trainer.training_step

    def watched_step(*args: Any, **kwargs: Any) -> Any:
        loss = training_step(*args, **kwargs)
        run.add(loss)
        return loss

    class Reports(TrainerCallback):
        """Reports every step, and stops the trainer when the trial ends."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if run.end_step():
                control.should_training_stop = True

    trainer.training_step = watched_step
    trainer.add_callback(Reports())
    set_seed(args.seed)  # the trainer's constructor used the seed of its arguments
    trainer.train()
    return run.score(trainer, trainer.evaluate)
