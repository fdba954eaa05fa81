"""This module defines the class `Recipe`, which stores the result of a calibration for later use.

Other modules of this package implement the methods of the class: `_rates` computes a learning rate,
`_judge` compares a learning rate with the best estimate, `_files` reads and writes recipes,
`_facts` describes a recipe in words, and `_from_fit` creates a recipe from a fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._near_misses import explain_near_misses
from .._printing import Table, printable
from .._rate import Rate
from .._types import Method, Reference, Scaling
from ..laws import Power
from . import _files as files
from ._facts import facts
from ._judge import Judgement, checked_lr, judge
from ._rates import configuration, rate, warn_of
from ._same_model import check_width
from ._settings import Plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# This value in `Recipe.other_rates` means that the parameter trained at the base learning rate of
# each trial.
BASE: Literal["base"] = "base"
Trials = Mapping[str, npt.NDArray[Any]]
Score = Literal["loss", "reward", "own"]

_COLUMN = 16  # width of the first column of explain(), in characters


@dataclass(frozen=True, eq=False)
class Recipe:
    """A calibrated learning rate, together with its scaling law, its uncertainty and its origin.

    `calibrate` and `fit_sweep` return recipes. Learning rates in a recipe are per optimizer step.
    Differences between learning rates are measured in octaves, and one octave is a factor of 2.

    Args:
        name: the recipe's name, used in messages.
        fitted_lr: the fitted best learning rate at `reference`. The learning rate to use is `lr`.
        reference: the configuration that the base learning rate applies to.
        law: a `Power` around the scaling law that was calibrated. It contains the fitted drift with
            rank and the fitted factor of full finetuning.
        covariance: 3 × 3 array, the covariance of (log2 of the learning rate at `law.pivot`, drift,
            log2 of `full_factor`), octaves².
        margin: how many octaves `lr` is below `fitted_lr`. A learning rate that is too high costs
            more than one that is too low.
        ceiling: the smallest learning rate where a trial diverged, converted to `reference` by
            the scaling law. The law was made for best learning rates, so the converted ceiling is
            only approximate. None if no trial diverged, or if a trial diverged below `fitted_lr`
            (`notes` then reports it).
        scaling_rule: how the scaling s = alpha / rank followed the ranks r of the trials: "fixed"
            (alpha is proportional to rank), "rslora" (s·√r constant), "alpha" (s·r constant, so
            alpha is fixed), or "unknown".
        full_fan_in: the width on which full finetuning's learning rate depends.
        ranks: the LoRA ranks of the trials.
        full_seen: whether full finetuning was among the trials.
        optimizer: the optimizer's class, as "module.Class".
        settings: the optimizer's settings, except the learning rate.
        steps: optimizer steps of a trial, or None if a sweep did not record them.
        warmup: the fraction of the steps over which the learning rate rises, from 0 to 1.
        other_rates: learning rates of the parameters that LoRA trials trained in addition to the
            LoRA matrices, by name with "*" for numbers. "base" means the base learning rate of
            each trial.
        layers: mean fan-in of the adapted layers, by name with "*" for numbers. The optimizer
            prints a warning if the model has other layers.
        versions: versions of the packages that were used.
        source: the origin of the trials, such as the name of the training function.
        notes: sentences about everything that the trials did not determine.
        tensors: NumPy arrays with one entry per trial: `rank` (0 for full finetuning), `lr`,
            `own_lr`, `seed`, `value` (NaN if the trial was stopped early), `diverged`, `pruned`,
            `steps`, and `curve` of shape (trials, values).
        steepness: how steeply the loss rises above the optimum, per octave. The steepness and the
            uncertainty determine the margin for other configurations. With a steepness of 0, the
            margin is `margin` for every configuration.
        scatter: standard deviation of the best learning rates of single ranks around the scaling
            law, octaves.
        score: the kind of the trials' scores: "loss" (the training loss, or the trainer's loss on
            held-out data), "reward", or "own" (a value that the user's code returned).
        missing: the name of the file with the trials, if the file was missing when the recipe was
            loaded. Learning rates do not depend on this file.
    """

    name: str
    fitted_lr: float
    reference: Reference
    law: Power
    covariance: npt.NDArray[np.float64]
    margin: float = 0.0
    ceiling: float | None = None
    scaling_rule: Scaling = "unknown"
    full_fan_in: float | None = None
    ranks: tuple[int, ...] = ()
    full_seen: bool = False
    optimizer: str = "torch.optim.AdamW"
    settings: Mapping[str, Plain | tuple[Plain, ...]] = field(default_factory=dict)
    steps: int | None = None
    warmup: float | None = None
    other_rates: Mapping[str, float | Literal["base"]] = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: Trials = field(default_factory=dict, repr=False)
    steepness: float = 0.0
    scatter: float = 0.0
    score: Score = "loss"
    missing: str = ""

    def __eq__(self, other: object) -> bool:
        """Return whether all values and trials of two recipes are equal.

        Two NaNs count as equal. The field `missing` is ignored in the comparison,
        because it only tells whether the trials file existed when a recipe was loaded.
        """
        if not isinstance(other, Recipe):
            return NotImplemented
        return _is_equal({**vars(self), "missing": ""}, {**vars(other), "missing": ""})

    @property
    def lr(self) -> float:
        """The base learning rate for training, which is `margin` octaves below `fitted_lr`."""
        return float(self.fitted_lr * 2.0**-self.margin)

    @property
    def batch(self) -> float | None:
        """The batch size in examples or tokens per optimizer step, or None if unknown."""
        return self.reference.batch

    @property
    def tag(self) -> str:
        """A string that identifies the recipe by a hash and the recipe's name.

        The hash is computed from the base learning rate, the reference, the law and the scaling
        rule, which determine all learning rates of the recipe. The hash does not depend on the
        recipe's name or on the version of this package.
        """
        # scaling instead of alpha, because two alphas with the same scaling s = alpha / rank (or
        # alpha / √rank) give the same learning rates.
        r = self.reference
        at = (r.method, r.rank, r.scaling, r.init, r.fan_in, r.batch)
        decisive = (self.lr, at, self.scaling_rule, self.law)
        text = json.dumps(decisive, default=repr)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{digest[:12]} {self.name}"

    # --- learning rates ---------------------------------------------------------------------------

    @explain_near_misses
    def at(
        self,
        rank: int | None = None,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        init: Literal["A", "B"] | None = None,
        method: Method = "lora",
        fan_in: float | None = None,
        steps: int | None = None,
        batch: float | None = None,
    ) -> Rate:
        """Return the recipe's learning rate for another rank, alpha, batch size or training method.

        If the trials did not cover the requested configuration, the learning rate is extrapolated.
        An extrapolated result has `extrapolated=True` and a wider 90 % interval, and a warning
        explains why.

        Args:
            rank: the LoRA rank, by default the rank of the recipe.
            alpha: LoRA's alpha. By default it is computed from `scaling_rule`.
            rslora: whether alpha is divided by √rank instead of rank.
            init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero), by default the init
                of the recipe.
            method: "lora" or "full".
            fan_in: the model's width, by default the width in the recipe. If the two differ by more
                than a factor of 2, the model counts as a different model, which is an error.
            steps: optimizer steps, by default those of the recipe. A different number only widens
                the interval.
            batch: batch size in the recipe's unit, by default the batch size of the recipe. The
                learning rate is converted by the law's rule for batch sizes, which is the square
                root for Adam, up to a batch 4 times as large.

        Returns:
            The learning rate with its 90 % interval, ceiling and notes.

        Raises:
            RecipeError: alpha is missing, and the trials do not determine it; the learning rate
                depends on a fan-in, steps or batch that the recipe does not record; the fan-in
                belongs to a different model; the steps are impossible; or the learning rate would
                not be a positive finite number.
            InvalidReferenceError: the target's rank, alpha, init, method, width or batch is
                impossible.
            LawError: the scaling law returned an unusable multiplier for this configuration.
        """
        given = rank, alpha, rslora, init, method
        target = configuration(self, *given, fan_in=fan_in, batch=batch)
        # An error, because the learning rate of a different model would only look like a result.
        check_width(self, target)
        answer = rate(self, target, steps)
        warn_of(self, answer)
        return answer

    @explain_near_misses
    def judge(
        self,
        lr: float,
        rank: int | None = None,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        init: Literal["A", "B"] | None = None,
        method: Method = "lora",
        fan_in: float | None = None,
        steps: int | None = None,
        batch: float | None = None,
    ) -> Judgement:
        """Compare a learning rate with the best learning rate that the recipe predicts.

        The arguments other than `lr` describe the configuration, as in `Recipe.at`. By default, the
        method uses the configuration of the recipe.

        Args:
            lr: the learning rate to judge, per step.
            rank: the LoRA rank, by default the rank of the recipe.
            alpha: LoRA's alpha. By default it is computed from `scaling_rule`.
            rslora: whether alpha is divided by √rank instead of rank.
            init: "A" or "B", by default the init of the recipe.
            method: "lora" or "full".
            fan_in: the model's width, by default the width in the recipe.
            steps: optimizer steps, by default those of the recipe.
            batch: batch size in the recipe's unit, by default the batch size of the recipe.

        Returns:
            How many times too high or too low `lr` is, whether it is inside the 90 % interval,
            and the fraction of the possible improvement that would be lost. `print` shows the
            result as a sentence.

        Raises:
            RecipeError: `lr` is not a positive finite number, or `at` raises an error.
            InvalidReferenceError: the configuration is impossible.
            LawError: the scaling law returned an unusable multiplier for this configuration.
        """
        number = checked_lr(lr)
        given = rank, alpha, rslora, init, method
        if rank is None and self.reference.method == "full":
            # A recipe without LoRA trials has no default rank, so compare with full finetuning.
            given = None, alpha, rslora, init, "full"
        target = configuration(self, *given, fan_in=fan_in, batch=batch)
        check_width(self, target)
        return judge(self, number, target, steps)

    # --- in words and pictures --------------------------------------------------------------------

    def explain(self) -> str:
        """Return a description of the recipe with its learning rate, 90 % interval and law.

        Each line of the description states one fact about the recipe.
        """
        table = self._table()
        indent = " " * _COLUMN
        lines = [table.title]
        for name, text in table.rows:
            line = name.ljust(_COLUMN) + text
            lines.append(fill(line, 100, subsequent_indent=indent))
        return printable("\n".join(lines))

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> Table:
        return Table((), facts(self), title=f"Recipe {self.name!r}")

    def plot(self, lr: float | None = None) -> Figure:
        """Plot the trials and the fitted loss of each rank, and the learning rate as a function of
        the rank.

        The figure has a panel for each rank with its trials, the fitted loss and the recipe's
        learning rate. Each of these panels also shows the ceiling and the prediction of the default
        scaling law. Shaded areas show the 90 % intervals of the fitted loss and of the recipe's
        learning rate. Plotting requires matplotlib, which you can install with the extra `plots`.
        Notebooks display the figure, and `figure.savefig(path)` saves it to a file.

        Args:
            lr: a learning rate to mark in the plot, such as the one that you use now.

        Raises:
            PlotError: matplotlib is not installed, or the recipe's trials are missing.
            RecipeError: `lr` is not a positive finite number.
        """
        from ..reports import recipe_figure

        return recipe_figure(self, None if lr is None else checked_lr(lr))

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save the recipe to a TOML file, and its trials to a safetensors file in the same folder.

        If the recipe is saved as NAME.toml, the trials are saved as NAME.trials.safetensors. The
        TOML file alone is enough to compute learning rates. Existing files are replaced atomically.

        Args:
            path: the TOML file.

        Returns:
            The path of the TOML file.

        Raises:
            RecipeError: the folder cannot be written, or a value could not be read back.
        """
        return files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Load a recipe from a TOML file, together with its trials if their file exists.

        This method checks every value in the TOML file and the hash of the trials file.
        `load` does not unpickle objects or import modules, so you can safely load a
        recipe from an untrusted source. If the file with the trials is missing, the
        recipe can still compute every learning rate, and `missing` contains the name of
        the file. If the file with the trials belongs to a different recipe, the method
        prints a warning.

        Args:
            path: the TOML file.

        Raises:
            RecipeError: the TOML file is missing, incomplete or too large, or contains an
                impossible value. The message names the field.
        """
        return files.load(path, cls)


def _is_equal(one: object, two: object) -> bool:
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(two), equal_nan=True)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_is_equal(one[k], two[k]) for k in one)
    return bool(one == two)
