"""`Recipe`: a calibrated learning rate with everything needed to use it again.

The class holds values and the methods that users call. The work is in the modules beside it:
`_rates` computes a learning rate, `_judge` compares one with it, `_files` reads and writes,
`_facts` describes a recipe in words, and `_from_fit` makes one from a fit.
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

# In `Recipe.other_rates`: the parameter trained at the base rate of each trial.
BASE: Literal["base"] = "base"
Trials = Mapping[str, npt.NDArray[Any]]
Score = Literal["loss", "reward", "own"]

_COLUMN = 16  # width of the column with the facts' names, in characters


@dataclass(frozen=True, eq=False)
class Recipe:
    """A calibrated base learning rate with its scaling law, uncertainty and provenance.

    `calibrate` and `fit_sweep` make recipes. All learning rates are per optimizer step. An octave
    is a factor of 2, so octaves are differences of log2 of a learning rate.

    Args:
        name: the recipe's name, used in messages.
        fitted_lr: the fitted best learning rate at `reference`. The learning rate to use is `lr`.
        reference: the configuration that the base learning rate belongs to.
        law: a `Power` around the scaling law that was calibrated. It holds the fitted drift with
            rank and the fitted factor of full finetuning.
        covariance: 3 × 3 array, the covariance of (log2 of the learning rate at `law.pivot`, drift,
            log2 of `full_factor`), octaves².
        margin: how many octaves `lr` is below `fitted_lr`. A learning rate that is too high costs
            more than one that is too low.
        ceiling: the smallest learning rate at which a trial diverged, converted to `reference` by
            the law. The law describes best learning rates, and a ceiling need not follow it. None
            if no trial diverged, or if one diverged below `fitted_lr` (a note then says so).
        scaling_rule: how the scaling s = alpha / rank followed the ranks r of the trials: "fixed"
            (alpha is proportional to rank), "rslora" (s·√r constant), "alpha" (s·r constant, so
            alpha is fixed), or "unknown".
        full_fan_in: the width that full finetuning's learning rate depends on.
        ranks: the LoRA ranks of the trials.
        full_seen: whether full finetuning was among the trials.
        optimizer: the optimizer's class, as "module.Class".
        settings: the optimizer's settings other than the learning rate.
        steps: optimizer steps of a trial. None if a sweep did not give them.
        warmup: the fraction of the steps over which the learning rate rises, from 0 to 1.
        other_rates: learning rates of the parameters that LoRA trials trained beside the LoRA
            matrices, by name with "*" for numbers. "base" means the base learning rate of each
            trial.
        layers: mean fan-in of the adapted layers, by name with "*" for numbers. The optimizer warns
            on a model with other layers.
        versions: versions of the packages that were used.
        source: where the trials came from, such as the name of the training function.
        notes: sentences on what the data did not determine.
        tensors: NumPy arrays with one entry per trial: `rank` (0 for full finetuning), `lr`,
            `own_lr`, `seed`, `value` (NaN if the trial was stopped early), `diverged`, `pruned`,
            `steps`, and `curve` of shape (trials, values).
        steepness: how steeply the loss rises above the optimum, per octave. The margin at another
            configuration follows from the steepness and the uncertainty there. With a steepness of
            0 the margin is `margin` everywhere.
        scatter: standard deviation of one rank's own best learning rate about the law, octaves.
        score: the kind of the trials' scores: "loss" (of training, or the trainer's own on held-out
            data), "reward", or "own" (a value that the user's code returned).
        missing: the name of the trials' file, if it was not beside the recipe when the recipe was
            read. Learning rates do not need it.
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
        """Return whether all values and trials are equal. NaN equals NaN, and `missing`, which
        only depends on the files that were there, does not count.
        """
        if not isinstance(other, Recipe):
            return NotImplemented
        return _is_equal({**vars(self), "missing": ""}, {**vars(other), "missing": ""})

    @property
    def lr(self) -> float:
        """The base learning rate to use, per step: `margin` octaves below `fitted_lr`."""
        return float(self.fitted_lr * 2.0**-self.margin)

    @property
    def batch(self) -> float | None:
        """Examples or tokens per step. None if unknown."""
        return self.reference.batch

    @property
    def tag(self) -> str:
        """The recipe in one line, "hash name", as an optimizer's state_dict stores it.

        The hash covers the values that decide the learning rates: base learning rate, reference,
        law and scaling rule. It does not depend on the name or on the version of this package.
        """
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
        """Return the learning rate for another rank, alpha, init, width, number of steps or batch,
        or for full finetuning.

        Outside the configurations of the trials the result is marked `extrapolated`, its interval
        widens with the distance, and a warning names the reason.

        Args:
            rank: the LoRA rank, by default the recipe's own.
            alpha: LoRA's alpha. By default the scaling follows `scaling_rule`.
            rslora: whether alpha is divided by √rank instead of rank.
            init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero), by default the
                recipe's own.
            method: "lora" or "full".
            fan_in: the model's width, by default the recipe's own. A width that differs by more
                than a factor of 2 belongs to another model, and raises an error.
            steps: optimizer steps, by default the recipe's own. Another number widens the interval.
            batch: batch size in the recipe's unit, by default its own. The learning rate follows
                the law's rule for the batch, which is the square root for Adam, up to a batch 4
                times as large.

        Returns:
            The learning rate with its 90 % interval, ceiling and notes.

        Raises:
            RecipeError: alpha is needed and missing, because the trials show no rule for it; the
                learning rate depends on a fan-in, steps or batch that the recipe does not have; the
                fan-in belongs to another model; the steps are impossible; or the learning rate
                would not be a positive finite number.
            InvalidReferenceError: the target's rank, alpha, init, method, width or batch is
                impossible.
            LawError: the law has no usable multiplier there.
        """
        given = rank, alpha, rslora, init, method
        target = configuration(self, *given, fan_in=fan_in, batch=batch)
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
        """Compare a learning rate with the recipe's, such as the one that you used so far.

        By default at the recipe's own configuration. The other arguments are those of `at`.

        Args:
            lr: the learning rate to judge, per step.
            rank: the LoRA rank, by default the recipe's own.
            alpha: LoRA's alpha. By default the scaling follows `scaling_rule`.
            rslora: whether alpha is divided by √rank instead of rank.
            init: "A" or "B", by default the recipe's own.
            method: "lora" or "full".
            fan_in: the model's width, by default the recipe's own.
            steps: optimizer steps, by default the recipe's own.
            batch: batch size in the recipe's unit, by default its own.

        Returns:
            The factor by which it is too high or too low, whether it lies in the 90 % interval, and
            the share of the possible improvement that it costs. `print` shows a sentence.

        Raises:
            RecipeError: `lr` is not a positive finite number, or `at` raises one.
            InvalidReferenceError: the configuration is impossible.
            LawError: the law has no usable multiplier there.
        """
        number = checked_lr(lr)
        given = rank, alpha, rslora, init, method
        if rank is None and self.reference.method == "full":
            given = None, alpha, rslora, init, "full"
        target = configuration(self, *given, fan_in=fan_in, batch=batch)
        check_width(self, target)
        return judge(self, number, target, steps)

    # --- in words and pictures --------------------------------------------------------------------

    def explain(self) -> str:
        """Return the recipe as text, one fact per line: learning rate, interval, ceiling, law and
        provenance.
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
        """Draw one panel for each rank that was tried, and one of the learning rates of all ranks.

        A panel shows the trials, the fitted loss, the recipe's learning rate, both with their 90 %
        intervals, the ceiling, and the default law's prediction. Needs the extra `plots`. A
        notebook shows the figure, and `figure.savefig(path)` writes it.

        Args:
            lr: a learning rate to compare with, such as the one that you used so far.

        Raises:
            PlotError: matplotlib is not installed, or the recipe has no trials.
            RecipeError: `lr` is not a positive finite number.
        """
        from ..reports import recipe_figure

        return recipe_figure(self, None if lr is None else checked_lr(lr))

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe as a TOML file, and its trials as a safetensors file beside it.

        The TOML alone is enough for every learning rate. Each file is replaced atomically. The
        trials of NAME.toml are in NAME.trials.safetensors.

        Args:
            path: the TOML file.

        Returns:
            The path written.

        Raises:
            RecipeError: the folder cannot be written, or a value could not be read back.
        """
        return files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe. Every value and the trials' hash are checked. Nothing is unpickled or
        imported.

        Without the file of its trials a recipe still has every learning rate, and `missing` names
        the file. If the file is there but does not belong to the recipe, a warning says so.

        Args:
            path: the TOML file.

        Raises:
            RecipeError: the TOML is missing, cut short, too large, or has an impossible value. The
                message names the value's path.
        """
        return files.load(path, cls)


def _is_equal(one: object, two: object) -> bool:
    if isinstance(one, np.ndarray) or isinstance(two, np.ndarray):
        return np.array_equal(np.asarray(one), np.asarray(two), equal_nan=True)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_is_equal(one[k], two[k]) for k in one)
    return bool(one == two)
