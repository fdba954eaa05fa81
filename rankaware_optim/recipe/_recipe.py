"""Recipes: what a calibration learned, as TOML for people and safetensors for arrays; `Recipe.at` gives a rate."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from .._rate import Rate
from .._scaling_rule import GAMMA, Scaling
from .._types import Method, Reference, Survey
from .._warn import warn
from ..errors import RankAwareError, RecipeError
from ..laws import Power, checked_batch_multiplier, checked_multiplier, law_changes
from . import _io as recipe_files
from . import _recipe_text as words
from . import _schema as recipe_toml
from ._horizon import Horizon, by_batch
from ._uncertainty import Z90, margin, spread

ANY_WIDTH = 4096.0  # stands in for an unknown fan-in, which all but cancels between ranks of one init


@dataclass(frozen=True)
class Recipe:
    """A calibrated base rate with its law, uncertainty and provenance.

    best_lr: the best rate at `reference`, as fitted. lean: the safety margin there, octaves by which the quoted rate
    stays below it. steepness: of the cliff above the optimum, per octave, by which the margin elsewhere follows from
    the uncertainty there; 0 where it is `lean` everywhere. law: a `Power` on top of the law calibrated with: drift in
    rank, factor of full finetuning. covariance: 3 × 3 tensor of (log2 rate at `law.pivot`, drift, log2 full_factor),
    octaves. scatter: standard deviation by which a rank's own best rate lies off the law, octaves. scaling_rule: how
    the effective multiplier followed
    the ranks seen: "fixed" (alpha follows rank), "rslora" (s·√r constant), "alpha" (s·r constant), "as swept" (a
    sweep that did not say), or "unknown". steps: None where a sweep did not say. horizon: how the best rate moves with
    the steps. notes: what the data did not
    determine, in words. tensors: every trial's `rank` (0 for full finetuning), `lr`, `seed`, `value` (NaN where
    pruned), `diverged`, `pruned`, `steps` and `curve`.
    """

    name: str
    best_lr: float
    reference: Reference
    law: Power
    covariance: torch.Tensor
    lean: float = 0.0
    ceiling: float | None = None
    scaling_rule: Scaling = "unknown"
    full_fan_in: float | None = None
    ranks: tuple[int, ...] = ()
    full_seen: bool = False
    optimizer: str = "torch.optim.AdamW"
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = 1
    batch: float | None = None
    warmup: float | None = None
    horizon: Horizon = field(default_factory=Horizon)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)
    steepness: float = 0.0
    scatter: float = 0.0

    @property
    def lr(self) -> float:
        """The quoted base rate: the best rate at `reference`, less the margin there."""
        return float(self.best_lr * 2.0**-self.lean)

    @property
    def full_factor(self) -> float:
        """What the law's point for full finetuning is multiplied by."""
        return self.law.full_factor

    @property
    def tag(self) -> str:
        """The recipe in a line, "hash name", as an optimizer's state carries it.

        The hash is of what decides its rates: base rate, reference, law and the rule for alpha. A copy under another
        name, or one read by a newer package, keeps it.
        """
        r = self.reference
        at = (r.method, r.rank, r.scaling, r.init, r.fan_in, r.batch)
        decisive = (self.lr, at, self.scaling_rule, law_changes(self.law))
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=repr).encode()).hexdigest()
        return f"{digest[:12]} {self.name}"

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
        """The rate at another rank, alpha, init, width, number of steps or batch, or for full finetuning.

        Without alpha the effective multiplier follows the ranks seen (`scaling_rule`); where no rule fits, alpha is
        asked for. Without fan_in, steps or batch they are the recipe's own; steps move the rate by `horizon`, the
        batch by the law's rule (the square root for Adam). Outside what was seen the rate is `extrapolated`, its band
        the wider the farther, and a warning is given once.

        Raises:
            RecipeError: alpha is needed and was not given, or was given where the sweep did not say it; or the rate
                depends on a fan-in, steps or batch that the recipe does not know; or steps or batch are impossible; or
                the rate would not be a positive finite number.
            InvalidReferenceError: the target's rank, alpha, init, method or width is impossible.
            LawError: the law has no usable multiplier there.
        """
        target = self._target(rank, alpha, method, rslora)
        given = {"init": init, "fan_in": fan_in}
        target = replace(target, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
        rate = self._quoted(target, steps, batch)
        if rate.extrapolated and not self.__dict__.get("_warned"):
            object.__setattr__(self, "_warned", True)
            warn(f"Recipe {self.name!r} extrapolates: {rate.notes[0]}.")
        return rate

    def _quoted(self, target: Reference, steps: int | None = None, batch: float | None = None) -> Rate:
        """The rate at a reference, without a warning; its first notes say what was not seen."""
        reference = self.reference
        if reference.fan_in is None:
            if target.fan_in is None and (target.method, target.init) != (reference.method, reference.init):
                raise RecipeError(
                    f"Recipe {self.name!r} knows no fan-in, on which the rate of {target} hangs.",
                    "Give fan_in=, the model's width.",
                )
            width = target.fan_in or ANY_WIDTH
            target, reference = replace(target, fan_in=width), replace(reference, fan_in=width)
        sd, outside = spread(self, target)
        longer = self.horizon.by_steps(steps, self.steps, self.name, told=target.method == reference.method)
        larger = by_batch(batch, self.batch, math.log2(checked_batch_multiplier(self.law, 2.0)), self.name)
        sd = math.sqrt(max(sd**2 + longer.variance + larger.variance, self.scatter**2))
        outside = [*outside, *longer.notes, *larger.notes]
        try:
            moved = checked_multiplier(self.law, target.as_factor(), reference)
            moved *= 2.0 ** (longer.octaves + larger.octaves)
            width = 2.0 ** (Z90 * sd)
        except OverflowError:
            moved = width = math.inf
        best = self.best_lr * moved
        octaves = margin(self.steepness, sd) if self.steepness else self.lean
        kept = [f"stays {octaves:.2g} octaves below the best rate, since too high costs more"] if octaves else []
        rate = Rate(
            lr=best * 2.0**-octaves,
            low=best / width,
            high=best * width,
            ceiling=None if self.ceiling is None else self.ceiling * moved,
            extrapolated=bool(outside),
            notes=(*outside, *kept, *self.notes),
        )
        if not all(edge is None or 0 < edge < math.inf for edge in (rate.lr, rate.low, rate.high, rate.ceiling)):
            raise RecipeError(
                f"Recipe {self.name!r} gives {target} a rate or a band that is not positive and finite.",
                "Ask for a configuration nearer to its own, or restore the recipe.",
            )
        return rate

    def base_lr(self, survey: Survey) -> float:
        """The base rate for a model: the best one, less the margin that the model's own configuration asks for."""
        own = survey.dominant()
        if not self.steepness:
            return self.lr
        width = survey.full_width(self.reference.init) if own.method == "full" else survey.width
        sd, _ = spread(self, replace(own, fan_in=width))
        return float(self.best_lr * 2.0 ** -margin(self.steepness, sd))

    def notes_for(self, survey: Survey, optimizer_class: type) -> tuple[str, ...]:
        """What a report should say of this recipe on a model: its band there, and what it was not made for.

        Warns once, as `at` does, where the model lies outside what was seen.
        """
        own = survey.dominant()
        if own.method == "full":
            rate = self.at(method="full", fan_in=survey.full_width(self.reference.init))
        else:
            rate = self.at(own.rank, alpha=own.alpha, fan_in=survey.width, init=own.init)
        band = f"recipe {self.name!r}: the best rate lies between {rate.low:.3g} and {rate.high:.3g} with 90 %"
        notes = [f"{band}, for {self.steps or 'unknown'} steps at batch {self.batch or 'unknown'}.", *rate.notes]
        made_for = self.optimizer.rpartition(".")[2]
        if made_for != optimizer_class.__name__:
            notes.append(f"The recipe was made with {made_for}, not {optimizer_class.__name__}: its rates may not fit.")
        return tuple(notes)

    def _target(self, rank: int | None, alpha: float | None, method: Method, rslora: bool = False) -> Reference:
        """What `at` is asked for, as a reference at the recipe's own init and width."""
        own = self.reference
        if (rslora and alpha is None) or (method == "full" and not rank is alpha is None):
            raise RecipeError(
                f"rank={rank}, alpha={alpha}, rslora={rslora} do not go together with method={method!r}.",
                "Give rank and alpha for LoRA, rslora= beside alpha=, and none of them for full finetuning.",
            )
        if method == "full":
            return Reference(method="full", init=own.init, fan_in=self.full_fan_in or own.fan_in)
        if rank is None and own.method == "full":
            raise RecipeError("This recipe was made by full finetuning alone.", "Give rank= and alpha= for LoRA.")
        rank = own.rank if rank is None else rank
        if alpha is not None and self.scaling_rule == "as swept":
            raise RecipeError(
                f"The sweep behind recipe {self.name!r} did not say its alpha, so its rates hold as swept only.",
                "Fit it again with alpha=, or use recipe.at(rank=...).lr as a plain lr=.",
            )
        if alpha is not None:
            return Reference(rank, alpha, rslora, own.init, own.fan_in, method)
        Reference(rank, 1.0, method=method)  # refuses an impossible rank before it is used below
        scaling = own.scaling
        if rank != own.rank:
            if self.scaling_rule not in GAMMA or own.rank is None or rank is None:
                raise RecipeError(
                    f"Recipe {self.name!r} saw no rule by which alpha follows the rank.", "Give alpha= beside the rank."
                )
            scaling *= float((rank / own.rank) ** -GAMMA[self.scaling_rule])
        return replace(Reference.from_scaling(rank, scaling, init=own.init), fan_in=own.fan_in)

    def explain(self) -> str:
        """What the recipe holds: its rate with band and ceiling, its law, and what it was made with, a fact a line."""
        return words.explain(self)

    def __str__(self) -> str:
        return self.explain()

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path` (TOML) and the safetensors file beside it; at any time a reader finds the old or the new recipe.

        The tensors lie beside it under a name with their hash; those of an earlier version go last. A file keeps its
        mode, a link stays one.

        Raises:
            RecipeError: the folder cannot be written, `path` does not end in .toml, a newer package's recipe is there,
                or a value of this one could not be read again.
        """
        header, text, arrays = recipe_toml.header(self), recipe_toml.to_document(self), self.arrays()
        read_again = partial(recipe_toml.from_document, type(self), tensors=arrays, target=path)
        return recipe_files.write(path, header, text, arrays, read_again)

    def arrays(self) -> dict[str, torch.Tensor]:
        """What the safetensors file holds, by name."""
        return {**{f"trial.{key}": value for key, value in self.tensors.items()}, "fit.covariance": self.covariance}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe, checking every value and the tensors' hash at the door. Nothing is unpickled.

        Raises:
            RecipeError: a file is missing, cut short, of a newer schema, altered, or holds an impossible value; the
                message carries the value's path.
        """
        return recipe_toml.from_document(cls, *recipe_files.read(path), path)


def known_rate(recipe: Recipe, rank: int | None, alpha: float | None = None) -> Rate | None:
    """The rate at a rank, None for full finetuning, without a warning; None where the recipe asks to be told more."""
    with warnings.catch_warnings():  # of a real optimizer, which a measured law steps
        warnings.simplefilter("ignore")
        try:
            return recipe._quoted(recipe._target(rank, alpha, "full" if rank is None else "lora"))
        except RankAwareError:
            return None


def resolve_recipe(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    """The recipe itself, or the one in the file named."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
