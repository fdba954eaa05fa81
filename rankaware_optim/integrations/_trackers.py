"""The recipe in a run of transformers' `Trainer`: in its reporters, and beside its checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from .._warn import warn
from ..errors import RecipeError
from ..optimizer import recipe_of
from ._rates import recipe_words


def log_recipe(callbacks: Iterable[Any], opt: Any) -> None:
    """Log the recipe of `opt` to Trainer's reporters: TensorBoard texts, W&B's run config, MLflow
    tags.
    """
    words, known = recipe_words(opt), import_module("transformers.integrations")
    for callback in callbacks if words else ():
        if isinstance(callback, known.TensorBoardCallback) and callback.tb_writer is not None:
            for key, word in words.items():
                callback.tb_writer.add_text(key, word)
        elif (
            isinstance(callback, known.WandbCallback)
            and (run := import_module("wandb").run) is not None
        ):
            run.config.update(words, allow_val_change=True)
        elif (
            isinstance(callback, known.MLflowCallback)
            and import_module("mlflow").active_run() is not None
        ):
            import_module("mlflow").set_tags(words)


def save_beside_checkpoint(output: str, state: Any, opt: Any) -> None:
    """Save the recipe of `opt` beside Trainer's last checkpoint. A failure is only a warning."""
    recipe, run = recipe_of(opt), "*/" if state.is_hyper_param_search else ""
    folders = sorted(
        Path(output).glob(f"{run}checkpoint-{state.global_step}"),
        key=lambda folder: folder.stat().st_mtime,
    )
    if recipe is None or not folders:
        return
    try:
        recipe.save_beside(folders[-1])
    except RecipeError as error:
        warn(str(error))
