"""Recipes: the result of a calibration. `Recipe.at` returns a rate, `Recipe.save` writes TOML and
safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._rate import Rate
from .._types import Method, Reference, Scaling
from ..fitting import Fit, centred_law
from ..laws import Law, Power
from . import _recipe_files as files
from . import _recipe_text as words
from ._constants import TableOfRates
from ._ground import check_width
from ._rates import configuration, rate, warn_of
from ._schema import Trials
from ._settings import plain_value
from ._uncertainty import margin, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BELOW = (
    "a run diverged at {:.3g}, below the fitted optimum, so the recipe has no ceiling: see whether"
    " that run diverges again"
)


@dataclass(frozen=True, eq=False)
class Recipe:
    """A calibrated base rate with its law, uncertainty and provenance. `calibrate` and `fit_sweep`
    make one.

    All rates are per optimizer step. Octaves are units of log2 of a rate.

    Args:
        name: the recipe's name, for messages.
        fitted_lr: the fitted optimum at `reference`. The rate to use is `lr`.
        reference: the configuration that the base rate belongs to.
        law: a `Power` around the law that was calibrated. It holds the drift in rank and the factor
            of full finetuning.
        covariance: 3 × 3 array of (log2 rate at `law.pivot`, drift, log2 `full_factor`), octaves².
        margin: octaves of `lr` below `fitted_lr`. Too high a rate costs more than too low a rate.
        ceiling: the smallest rate that diverged in any trial, moved to `reference` by the law of
            best rates, which a ceiling need not follow. None if no trial did, or if one did below
            `fitted_lr`, as a note says.
        scaling_rule: how the scaling s = alpha / rank followed the ranks r of the
            trials: "fixed" (alpha follows rank), "rslora" (s·√r constant), "alpha" (s·r constant),
            or "unknown".
        full_fan_in: the width that full finetuning's rate belongs to.
        ranks: the LoRA ranks of the trials.
        full_seen: whether full finetuning was among the trials.
        optimizer: the optimizer's class, as "module.Class".
        settings: the optimizer's settings other than the rate.
        steps: optimizer steps of a trial, None if a sweep did not give them.
        warmup: share of the steps with a rising rate, from 0 to 1.
        seed: random seed of the calibration.
        other_rates: rates of the parameters that LoRA trials trained beside the factors, by name
            with "*" for numbers. "base" means each trial's base rate.
        layers: mean fan-in of the adapted layers, by name with "*" for numbers. On a model that has
            others the optimizer warns.
        versions: versions of the packages used.
        source: the training loop's name, the hash of its source and its repository's commit.
        notes: sentences on what the data did not determine.
        tensors: numpy arrays, one entry per trial: `rank` (0 for full finetuning), `lr`, `seed`,
            `value` (NaN if pruned), `diverged`, `pruned`, `steps`, and `curve` of shape (trials,
            values).
        steepness: steepness of the loss above the optimum, per octave. The margin for another
            configuration follows from it and the uncertainty there. With 0 it is `margin`
            everywhere.
        scatter: standard deviation of a rank's own best rate about the law, octaves.
        missing: the name of the trials' file if it was not beside the recipe when it was read.
            Rates do not need it.
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
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    warmup: float | None = None
    seed: int = 0
    other_rates: TableOfRates = field(default_factory=dict)
    layers: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: Trials = field(default_factory=dict, repr=False)
    steepness: float = 0.0
    scatter: float = 0.0
    missing: str = ""

    def __eq__(self, other: object) -> bool:
        """Return whether all values and trials are equal. NaN equals NaN."""
        if not isinstance(other, Recipe):
            return NotImplemented
        compared = (f.name for f in fields(Recipe) if f.name != "missing")
        return all(_is_equal(getattr(self, n), getattr(other, n)) for n in compared)

    @property
    def lr(self) -> float:
        """The base rate to use, per step: `margin` octaves below `fitted_lr`."""
        return float(self.fitted_lr * 2.0**-self.margin)

    @property
    def batch(self) -> float | None:
        """Examples or tokens per step, None if unknown."""
        return self.reference.batch

    @property
    def tag(self) -> str:
        """The recipe in a line, "hash name", as stored in an optimizer's state_dict.

        The hash covers what decides the rates: base rate, reference, law and scaling rule. It does
        not depend on the name or on the version of this package.
        """
        r = self.reference
        at = (r.method, r.rank, r.scaling, r.init, r.fan_in, r.batch)
        decisive = (self.lr, at, self.scaling_rule, self.law)
        text = json.dumps(decisive, sort_keys=True, default=repr)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{digest[:12]} {self.name}"

    def at(
        self,
        rank: int | Literal["full"] | None = None,
        *,
        alpha: float | None = None,
        rslora: bool = False,
        init: Literal["A", "B"] | None = None,
        method: Method = "lora",
        fan_in: float | None = None,
        steps: int | None = None,
        batch: float | None = None,
    ) -> Rate:
        """Return the rate for another rank, alpha, init, width, number of steps or batch, or for
        full finetuning.

        Outside the configurations of the trials the rate is marked `extrapolated`, its band widens
        with the distance, and a warning says so.

        Args:
            rank: the LoRA rank, by default the recipe's own, or "full".
            alpha: LoRA's alpha. By default the scaling follows `scaling_rule`.
            rslora: whether alpha is divided by √rank instead of rank.
            init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero), by default the
                recipe's own.
            method: "lora" or "full".
            fan_in: the model's width, by default the recipe's own. One that differs by more than a
                factor of 2 is another model's, and refused.
            steps: optimizer steps, by default the recipe's own. Others widen the band.
            batch: batch size in the recipe's unit, by default its own. It moves the rate by the
                law's rule, which is the square root for Adam, as for 4 times the batch at most.

        Returns:
            The rate with its 90 % band, ceiling and notes.

        Raises:
            RecipeError: alpha is missing but needed, or given but unknown to the sweep; the rate
                depends on a fan-in, steps or batch that the recipe does not have; the fan-in is
                that of another model; steps or batch
                are impossible; or the rate would not be a positive finite number.
            InvalidReferenceError: the target's rank, alpha, init, method or width is impossible.
            LawError: the law has no usable multiplier there.
        """
        target = configuration(self, rank, alpha, rslora, init, method, fan_in)
        check_width(self, target)
        found = rate(self, target, steps, batch)
        warn_of(self, found)
        return found

    def explain(self) -> str:
        """Return the recipe as text, one fact per line: rate, band, ceiling, law and provenance."""
        return words.explain(self)

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        return words.table_of(self).html()

    def plot(self) -> Figure:
        """Draw one panel per rank with its trials, band, ceiling and rate, and a panel of
        rates by rank.

        Needs the extra `plots`. A notebook shows the figure, and its `savefig(path)` writes it.

        Raises:
            PlotError: matplotlib is not installed, or the recipe has no trials.
        """
        from ..reports import recipe_figure

        return recipe_figure(self)

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the recipe as a TOML file, and its trials as a safetensors file beside it.

        The TOML gives every rate by itself. Each file is replaced atomically. NAME.toml has its
        trials in NAME.trials.safetensors.

        Args:
            path: the TOML file.

        Returns:
            The path written.

        Raises:
            RecipeError: the folder cannot be written, `path` does not end in .toml, or a value
                could not be read back.
        """
        return files.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe. Every value and the trials' hash are checked. Nothing is unpickled or
        imported.

        Without the file of its trials a recipe still gives every rate. `missing` then names that
        file. A warning says so if the file there cannot be used, such as that of another save.

        Args:
            path: the TOML file.

        Raises:
            RecipeError: the TOML is missing, cut short, too large, or has an impossible value. The
                message names the value's path.
        """
        return files.load(cls, path)


def _is_equal(one: Any, two: Any) -> bool:
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two, equal_nan=True)
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_is_equal(one[k], two[k]) for k in one)
    # a list is as a tuple
    return bool(one == two or plain_value(one) == plain_value(two))


def recipe_of(fit: Fit, law: Law, reference: Reference, **others: Any) -> Recipe:
    """Return the recipe of a fit, with the margin that follows from its uncertainty.

    Args:
        fit: the fit, at the steps of the target.
        law: the law without the correction that was fitted, bound to the optimizer.
        reference: the configuration of the base rate.
        others: fields that the fit does not decide.
    """
    _, drift, factor = (float(value) for value in fit.mean)
    best = fit.best(reference.rank)
    ceiling = None
    if fit.ceiling is not None:
        ceiling = 2.0 ** (fit.ceiling + best - float(fit.mean[0]))
    if ceiling is not None and ceiling <= 2.0**best:
        others["notes"] = (*others.get("notes", ()), _BELOW.format(ceiling))
        ceiling = None
    recipe = Recipe(
        fitted_lr=2.0**best,
        reference=reference,
        law=centred_law(law, reference, fit.prior.pivot, drift, factor),
        covariance=fit.covariance,
        steepness=fit.steepness,
        scatter=fit.prior.scatter,
        ceiling=ceiling,
        **others,
    )
    return replace(
        recipe, margin=margin(recipe.steepness, spread(recipe, reference)[0])
    )
