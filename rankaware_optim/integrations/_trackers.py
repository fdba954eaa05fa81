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
    """Log the recipe of `opt` to Trainer's reporters: TensorBoard texts, W&B's run config, MLflow tags."""
    words, known = recipe_words(opt), import_module("transformers.integrations")
    for callback in callbacks if words else ():
        if isinstance(callback, known.TensorBoardCallback) and callback.tb_writer is not None:
            for key, word in words.items():
                callback.tb_writer.add_text(key, word)
        elif isinstance(callback, known.WandbCallback) and (run := import_module("wandb").run) is not None:
            run.config.update(words, allow_val_change=True)
        elif isinstance(callback, known.MLflowCallback) and import_module("mlflow").active_run() is not None:
            import_module("mlflow").set_tags(words)


def save_beside_checkpoint(output: str, step: int, opt: Any) -> None:
    """Save the recipe of `opt` beside Trainer's checkpoint of `step`. A failure is only a warning."""
    recipe, folder = recipe_of(opt), Path(output) / f"checkpoint-{step}"
    if recipe is None or not folder.is_dir():
        return
    try:
        recipe.save_beside(folder)
    except RecipeError as error:
        warn(str(error))
