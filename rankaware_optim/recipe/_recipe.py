"""Recipes: the result of a calibration. `Recipe.at` returns a rate, `Recipe.save` writes TOML and
safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from .._optimizers import known_optimizer
from .._printing import times
from .._rate import Rate
from .._types import (
    GAMMA,
    Method,
    Reference,
    Scaling,
    Survey,
    scaling_factor,
    width_for,
)
from .._warn import warn
from ..errors import RankAwareError, RecipeError
from ..fitting import Fit, centred_law
from ..laws import (
    Law,
    Power,
    checked_batch_multiplier,
    checked_multiplier,
)
from . import _recipe_files as files
from . import _recipe_text as words
from . import _sharing as sharing
from ._horizon import by_batch, by_steps
from ._other_rates import OtherRates, TableOfRates
from ._schema import Trials, to_document
from ._uncertainty import Z90, margin, spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Own(Enum):
    """Stands for the recipe's own rank where none is given, since None is full finetuning."""

    RANK = "the recipe's own"


# used for an unknown fan-in, which nearly cancels between ranks of one init
ANY_WIDTH = 4096.0


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
        lean: safety margin of `lr` below `fitted_lr`, octaves. Too high a rate costs more than too
            low a rate.
        ceiling: the smallest rate that diverged in any trial, moved to `reference` by the law. None
            if no trial did.
        scaling_rule: how the scaling s = alpha / rank followed the ranks r of the
            trials: "fixed" (alpha follows rank), "rslora" (s·√r constant), "alpha" (s·r constant),
            "as swept" (a sweep without alpha) or "unknown".
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
        layers: mean fan-in of the adapted layers, by name with "*" for numbers.
        versions: versions of the packages used.
        source: the training loop's name, the hash of its source and its repository's commit.
        notes: sentences on what the data did not determine.
        tensors: numpy arrays, one entry per trial: `rank` (0 for full finetuning), `lr`, `seed`,
            `value` (NaN if pruned), `diverged`, `pruned`, `steps`, and `curve` of shape (trials,
            values).
        steepness: steepness of the loss above the optimum, per octave. The margin for another
            configuration follows from it and the uncertainty there. With 0 the margin is `lean`
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
    lean: float = 0.0
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
        if to_document(self) != to_document(other):
            return False
        mine, theirs = self.tensors, other.tensors
        return mine.keys() == theirs.keys() and all(
            np.array_equal(mine[name], theirs[name], equal_nan=True) for name in mine
        )

    def __hash__(self) -> int:
        return hash((self.name, self.fitted_lr, self.lean, self.reference))

    @property
    def lr(self) -> float:
        """The base rate to use, per step: `lean` octaves below `fitted_lr`."""
        return float(self.fitted_lr * 2.0**-self.lean)

    @property
    def batch(self) -> float | None:
        """Examples or tokens per step, None if unknown."""
        return self.reference.batch

    @property
    def full_factor(self) -> float:
        """The factor by which the law's rate for full finetuning is multiplied."""
        return self.law.full_factor

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
        rank: int | Literal[_Own.RANK] | None = _Own.RANK,
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

        Outside the configurations of the trials the rate is marked `extrapolated`, and its band
        widens with the distance. A warning is given once.

        Args:
            rank: the LoRA rank, by default the recipe's own. None means full finetuning.
            alpha: LoRA's alpha. By default the scaling follows `scaling_rule`.
            rslora: whether alpha is divided by √rank instead of rank.
            init: "A" (B starts at zero, as in PEFT) or "B" (A starts at zero), by default the
                recipe's own.
            method: "lora" or "full". `at(method="full")` is `at(rank=None)`.
            fan_in: the model's width, by default the recipe's own.
            steps: optimizer steps, by default the recipe's own. Others widen the band.
            batch: batch size in the recipe's unit, by default its own. It moves the rate by the
                law's rule, which is the square root for Adam.

        Returns:
            The rate with its 90 % band, ceiling and notes.

        Raises:
            RecipeError: alpha is missing but needed, or given but unknown to the sweep; the rate
                depends on a fan-in, steps or batch that the recipe does not have; steps or batch
                are impossible; or the rate would not be a positive finite number.
            InvalidReferenceError: the target's rank, alpha, init, method or width is impossible.
            LawError: the law has no usable multiplier there.
        """
        if rank is None:
            method = "full"
        if method == "full" and init is not None:
            raise RecipeError(
                "init was given for full finetuning, which has none.",
                "Leave it out.",
                "init",
            )
        target = self._target(
            None if rank is _Own.RANK else rank, alpha, method, rslora
        )
        if init is not None:
            target = replace(target, init=init)
        if fan_in is not None:
            target = replace(target, fan_in=fan_in)
        rate = self._quoted(target, steps, batch)
        self._warn_of(rate)
        return rate

    def _warn_of(self, rate: Rate) -> None:
        """Warn, once per recipe, that a rate is extrapolated."""
        if rate.extrapolated and not self.__dict__.get("_warned"):
            object.__setattr__(self, "_warned", True)
            warn(f"Recipe {self.name!r} extrapolates: {rate.notes[0]}.")

    def _quoted(
        self, target: Reference, steps: int | None = None, batch: float | None = None
    ) -> Rate:
        """Return the rate at a reference, without a warning. Its first notes say what was not
        tried.
        """
        asked, (target, reference) = target, self._with_widths(target)
        longer = by_steps(steps, self.steps, self.name)
        by_law = math.log2(checked_batch_multiplier(self.law, 2.0))
        larger = by_batch(batch, self.batch, by_law, self.name)
        sd, untried = spread(self, target)
        sd = math.sqrt(max(sd**2 + longer.variance + larger.variance, self.scatter**2))
        untried += (*longer.notes, *larger.notes)
        try:
            moved = checked_multiplier(self.law, target.as_factor(), reference)
            moved *= 2.0 ** (longer.octaves + larger.octaves)
            width = 2.0 ** (Z90 * sd)
        except OverflowError:
            moved = width = math.inf
        best = self.fitted_lr * moved
        octaves = self._margin(sd)
        notes = [*untried]
        law_alone = target.method == "full" and not self.full_seen
        if law_alone:
            notes.append(words.to_settle(width))
        if octaves:
            notes.append(f"the best rate {times(-octaves)}, since too high costs more")
        rate = Rate(
            lr=best * 2.0**-octaves,
            low=best / width,
            high=best * width,
            ceiling=None if self.ceiling is None or law_alone else self.ceiling * moved,
            extrapolated=bool(untried),
            notes=(*notes, *self.notes),
            configuration=words.configuration(self, asked, steps, batch),
        )
        edges = (rate.lr, rate.low, rate.high, rate.ceiling)
        if not all(edge is None or 0 < edge < math.inf for edge in edges):
            raise RecipeError(
                f"Recipe {self.name!r} gives {target} a rate or a band that is not positive and"
                " finite.",
                "Ask for a configuration nearer to its own, or restore the recipe.",
            )
        return rate

    def _with_widths(self, target: Reference) -> tuple[Reference, Reference]:
        """Return a target and the recipe's reference, with a width if the reference has none."""
        reference = self.reference
        if reference.fan_in is not None:
            return target, reference
        same = (target.method, target.init) == (reference.method, reference.init)
        if target.fan_in is None and not same:
            raise RecipeError(
                f"Recipe {self.name!r} has no fan-in, and the rate for {target} depends on it.",
                "Give the model's width as fan_in.",
            )
        width = target.fan_in or ANY_WIDTH
        return replace(target, fan_in=width), replace(reference, fan_in=width)

    def _margin(self, sd: float) -> float:
        """Return how far below the best rate to stay, octaves. sd: the rate's, octaves."""
        return margin(self.steepness, sd) if self.steepness else self.lean

    def base_lr(self, survey: Survey) -> float:
        """Return the base rate for a model: the best rate less the margin for the model's
        configuration.

        Args:
            survey: the model's survey, from `inspect_model`.
        """
        own = survey.dominant()
        if not self.steepness:
            return self.lr
        width = width_for(survey, own.method, self.reference.init)
        sd, _ = spread(self, replace(own, fan_in=width))
        return float(self.fitted_lr * 2.0 ** -margin(self.steepness, sd))

    def _target(
        self,
        rank: int | None,
        alpha: float | None,
        method: Method,
        rslora: bool = False,
    ) -> Reference:
        """Return the arguments of `at` as a reference at the recipe's own init and width."""
        own = self.reference
        too_few = rslora and alpha is None
        if too_few or (method == "full" and not rank is alpha is None):
            raise RecipeError(
                f"rank={rank}, alpha={alpha}, rslora={rslora} cannot be combined with"
                f" method={method!r}.",
                "Give rank and alpha for LoRA, rslora only with alpha, and none of them for full"
                " finetuning.",
            )
        if method == "full":
            return Reference(
                method="full", init=own.init, fan_in=self.full_fan_in or own.fan_in
            )
        if rank is None and own.method == "full":
            raise RecipeError(
                "This recipe was made by full finetuning alone.",
                "Give a rank and an alpha for LoRA.",
            )
        rank = own.rank if rank is None else rank
        if alpha is None:
            Reference(rank, 1.0, method=method)  # checks the rank before it is used
            at = Reference.from_scaling(rank, self._scaling_at(rank), init=own.init)
            return replace(at, fan_in=own.fan_in)
        if self.scaling_rule == "as swept":
            raise RecipeError(
                f"The sweep behind recipe {self.name!r} has no alpha, so its rates hold only for"
                " the alpha swept.",
                "Fit it again with an alpha, or use recipe.at(rank=...).lr as a plain rate.",
            )
        return Reference(rank, alpha, rslora, own.init, own.fan_in, method)

    def _scaling_at(self, rank: int | None) -> float:
        """Return the scaling at a rank, by the rule of the trials."""
        own = self.reference
        if rank == own.rank:
            return own.scaling
        if self.scaling_rule not in GAMMA or own.rank is None or rank is None:
            raise RecipeError(
                f"The trials of recipe {self.name!r} give no rule for alpha by rank.",
                "Give an alpha with the rank.",
            )
        return own.scaling * scaling_factor(self.scaling_rule, own.rank, rank)

    def explain(self) -> str:
        """Return the recipe as text, one fact per line: rate, band, ceiling, law and provenance."""
        return words.explain(self)

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        return words.table_of(self).html()

    def plot(self) -> Figure:
        """Draw one panel per rank with its trials, fit, band, ceiling and rate, and a panel of
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

    def save_beside(self, adapter: str | os.PathLike[str]) -> Path:
        """Write the recipe into an adapter's folder: files in its subfolder `rankaware/`, a section
        in its README.

        `recipe=` and `Recipe.load` then accept the adapter's folder. Another call replaces both.

        Args:
            adapter: the folder of a saved adapter.

        Returns:
            The path of the TOML file.

        Raises:
            RecipeError: the folder does not exist; it or its README cannot be written; one of the
                files is a link to outside the folder; or as for `save`.
        """
        return sharing.save_beside(self, adapter)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe. Every value and the trials' hash are checked. Nothing is unpickled or
        imported.

        Without the file of its trials a recipe still gives every rate. `missing` then names that
        file. A warning says so if the file there cannot be used, such as that of another save.

        Args:
            path: the TOML file, or the folder of an adapter in which `save_beside` wrote it.

        Raises:
            RecipeError: the TOML is missing, cut short, too large, or has an impossible value. The
                message names the value's path.
        """
        return cls(**files.load(sharing.recipe_file(path)))


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
    to_reference = best - float(fit.mean[0])
    recipe = Recipe(
        fitted_lr=2.0**best,
        reference=reference,
        law=centred_law(law, reference, fit.prior.pivot, drift, factor),
        covariance=fit.covariance,
        steepness=fit.steepness,
        scatter=fit.prior.scatter,
        ceiling=None if fit.ceiling is None else 2.0 ** (fit.ceiling + to_reference),
        **others,
    )
    return replace(recipe, lean=margin(recipe.steepness, spread(recipe, reference)[0]))


def known_rate(
    recipe: Recipe, rank: int | None, alpha: float | None = None
) -> Rate | None:
    """Return the rate at a rank, or for full finetuning if it is None. No warning is given.

    Returns None if the recipe needs more arguments, such as alpha.
    """
    with warnings.catch_warnings():  # a third-party law may warn
        warnings.simplefilter("ignore")
        try:
            return recipe._quoted(
                recipe._target(rank, alpha, "full" if rank is None else "lora")
            )
        except RankAwareError:
            return None


def rate_on(
    recipe: Recipe, survey: Survey, steps: int | None = None, batch: float | None = None
) -> Rate:
    """Return the rate at a model's most common configuration. Warn once, as `at` does, if it is
    extrapolated.
    """
    own = survey.dominant()
    if own.method == "full":
        target = _full_target(recipe, survey)
    else:
        target = replace(
            recipe._target(own.rank, own.alpha, "lora"),
            fan_in=survey.width,
            init=own.init,
        )
    rate = recipe._quoted(target)
    recipe._warn_of(rate)
    return rate if steps is batch is None else recipe._quoted(target, steps, batch)


def other_rates_on(recipe: Recipe, survey: Survey) -> OtherRates:
    """Return a recipe's rates for a model's parameters that are not factors."""
    full = recipe._quoted(_full_target(recipe, survey)).lr if recipe.full_seen else None
    return OtherRates(recipe.name, recipe.other_rates, recipe.lr, full)


def _full_target(recipe: Recipe, survey: Survey) -> Reference:
    return replace(
        recipe._target(None, None, "full"),
        fan_in=survey.full_width(recipe.reference.init),
    )


def is_for(recipe: Recipe, optimizer: type) -> bool:
    """Return whether an optimizer is the recipe's, or its variant with a quantized state."""
    name = recipe.optimizer.rpartition(".")[2]
    known = known_optimizer(name)[0]
    return name == optimizer.__name__ or (
        known != "" and known == known_optimizer(optimizer)[0]
    )
