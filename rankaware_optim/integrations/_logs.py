"""What a run logs: every group's rates, and the optimizer's recipe.

Importing this module imports no trainer. Its functions do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from .._warn import warn
from ..errors import OptimizerError, RecipeError
from ..optimizer import effective_lr, recipe_of


def group_rates(opt: Any) -> dict[str, float]:
    """Return every group's rate: "lr/A/r8" = "base_lr/A/r8" × "rank_multiplier/A/r8". Repeated
    names are numbered.

    Args:
        opt: the optimizer, or a framework's wrapper with `param_groups`. Its base rates are those
            that schedulers and trainers set and log.
    """
    names = [_group_name(group) for group in opt.param_groups]
    number = Counter[str]()
    rates = {}
    for name, group in zip(names, opt.param_groups, strict=True):
        unique = name if names.count(name) == 1 else f"{name}/{number[name]}"
        number[name] += 1
        lr, multiplier = effective_lr(group), float(group.get("rank_multiplier", 1.0))
        rates[f"lr/{unique}"] = lr
        rates[f"base_lr/{unique}"] = lr / multiplier
        rates[f"rank_multiplier/{unique}"] = multiplier
    return rates


def _group_name(group: dict[str, Any]) -> str:
    role, rank = group.get("lora_role", "other"), group.get("lora_rank")
    return role if rank is None else f"{role}/r{rank}"


def _recipe_words(opt: Any) -> dict[str, str]:
    """Return name and hash of the optimizer's recipe, as settings of a run; {} without a recipe."""
    recipe = recipe_of(opt)
    if recipe is None:
        return {}
    digest, _, name = recipe.tag.partition(" ")
    return {"rankaware/recipe": name, "rankaware/recipe_hash": digest}


# --- transformers ---------------------------------------------------------------------------------


def log_rates(trainer: Any = None) -> Any:  # noqa: C901 - its hooks are closures over the trainer
    """Return a callback for transformers' `Trainer` that logs every group's rate. Trainer logs that
    of group 0::

        trainer = Trainer(model, args, callbacks=[log_rates()])     # log history, console
        log_rates(trainer)                                          # reporters, TensorBoard too

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

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.rates = {}

        def on_step_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            # before the first step, when the reporters are ready
            if trainer is not None and state.is_world_process_zero and not self.rates:
                _log_recipe(
                    trainer.callback_handler.callbacks,
                    _recipe_words(kwargs["optimizer"]),
                )

        def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
            self.rates = group_rates(kwargs["optimizer"])

        def on_save(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                _save_beside_checkpoint(args.output_dir, state, kwargs["optimizer"])

        def on_log(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
            logs = kwargs.get("logs") or {}
            if "learning_rate" in logs:
                for entry in (logs, *state.log_history[-1:]):
                    entry.update(self.rates)

    callback = LogRates()
    if trainer is not None:
        trainer.callback_handler.callbacks.insert(0, callback)
    return callback


def _log_recipe(callbacks: Iterable[Any], words: dict[str, str]) -> None:
    """Log a recipe to Trainer's reporters: TensorBoard texts, W&B's run config, MLflow tags."""
    if not words:
        return
    reporters = import_module("transformers.integrations")
    for callback in callbacks:
        if (
            isinstance(callback, reporters.TensorBoardCallback)
            and callback.tb_writer is not None
        ):
            for key, word in words.items():
                callback.tb_writer.add_text(key, word)
        if isinstance(callback, reporters.WandbCallback):
            run = import_module("wandb").run
            if run is not None:
                run.config.update(words, allow_val_change=True)
        if isinstance(callback, reporters.MLflowCallback):
            mlflow = import_module("mlflow")
            if mlflow.active_run() is not None:
                mlflow.set_tags(words)


def _save_beside_checkpoint(output: str, state: Any, opt: Any) -> None:
    """Save the recipe of `opt` beside Trainer's last checkpoint. A failure is only a warning."""
    recipe = recipe_of(opt)
    run = "*/" if state.is_hyper_param_search else ""
    folders = list(Path(output).glob(f"{run}checkpoint-{state.global_step}"))
    if recipe is None or not folders:
        return
    try:
        recipe.save_beside(max(folders, key=lambda folder: folder.stat().st_mtime))
    except RecipeError as error:
        warn(str(error))


# --- Lightning ------------------------------------------------------------------------------------


def lightning_rates() -> Any:
    """Return a callback for Lightning's `Trainer` that logs every group's rate. LearningRateMonitor
    logs base rates::

        trainer = Trainer(callbacks=[LearningRateMonitor(), lightning_rates()])

    They are logged as often as the trainer logs. With several optimizers the names start with the
    optimizer's number. A recipe's name and hash are logged as hyperparameters, "rankaware/recipe"
    and "rankaware/recipe_hash".

    Raises:
        OptimizerError: neither lightning nor pytorch_lightning is installed.
    """
    for package in ("lightning.pytorch", "pytorch_lightning"):
        with suppress(ImportError):
            callbacks = import_module(f"{package}.callbacks")
            break
    else:
        raise OptimizerError(
            "lightning_rates is for Lightning, which is not installed.", "Install it."
        )

    class Rates(callbacks.Callback):  # type: ignore[name-defined]
        """Logs the recipe, and the rates of the next step."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            words: dict[str, str] = {}
            for opt in trainer.optimizers:
                words |= _recipe_words(opt)
            for logger in trainer.loggers if words else ():
                logger.log_hyperparams(words)

        def on_train_batch_start(
            self, trainer: Any, module: Any, batch: Any, number: int
        ) -> None:
            # as LearningRateMonitor does
            if not trainer._logger_connector.should_update_logs:
                return
            rates: dict[str, float] = {}
            for i, opt in enumerate(trainer.optimizers):
                prefix = f"{i}/" if len(trainer.optimizers) > 1 else ""
                rates |= {
                    f"{prefix}{name}": rate for name, rate in group_rates(opt).items()
                }
            for logger in trainer.loggers:
                logger.log_metrics(
                    rates, step=trainer.fit_loop.epoch_loop._batches_that_stepped
                )

    return Rates()
