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

from .._optimizers import known_optimizer
from .._rate import Rate
from .._scaling_rule import GAMMA, Scaling
from .._types import Method, Reference, Survey
from .._warn import warn
from ..errors import RankAwareError, RecipeError
from ..laws import Power, checked_batch_multiplier, checked_multiplier, law_changes
from . import _beside as beside
from . import _hub as on_hub
from . import _io as recipe_files
from . import _recipe_text as words
from . import _schema as recipe_toml
from ._horizon import Horizon, by_batch
from ._io import Array
from ._other_rates import OtherRates, Seen
from ._uncertainty import Z90, margin, spread

ANY_WIDTH = 4096.0  # stands in for an unknown fan-in, which all but cancels between ranks of one init


@dataclass(frozen=True)
class Recipe:
    """A calibrated base rate with its law, uncertainty and provenance.

    fitted_lr: the optimum at `reference`, as fitted. `lr`, the rate to use, lies `lean` octaves below it, a margin,
    since too high costs more than too low. steepness: of the cliff above the optimum, per octave, by which the margin
    elsewhere follows from the uncertainty there; 0 where it is `lean` everywhere. law: a `Power` on top of the law
    calibrated with: drift in rank, factor of full finetuning. covariance: 3 × 3 array of (log2 rate at `law.pivot`,
    drift, log2 full_factor), octaves. scatter: standard deviation by which a rank's own best rate lies off the law,
    octaves. scaling_rule: how the effective multiplier followed the ranks seen: "fixed" (alpha follows rank), "rslora"
    (s·√r constant), "alpha" (s·r constant), "as swept" (a sweep that did not say), or "unknown". steps: None where a
    sweep did not say. horizon: how the best rate moves with the steps. settings: the optimizer's, other than the rate.
    other_rates: what LoRA trials trained beside the factors, by name with "*" for numbers: at "base", the trial's base
    rate, or at a rate of its own. source: the training loop's name, its source's hash, its repository's commit. notes:
    what the data did not determine, in words. tensors: numpy arrays of every trial's `rank` (0 for full finetuning),
    `lr`, `seed`, `value` (NaN where pruned), `diverged`, `pruned`, `steps` and `curve`.
    """

    name: str
    fitted_lr: float
    reference: Reference
    law: Power
    covariance: Array
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
    other_rates: Seen = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, Array] = field(default_factory=dict, repr=False)
    steepness: float = 0.0
    scatter: float = 0.0

    @property
    def lr(self) -> float:
        """The base rate to use, and that is quoted: `lean` octaves below the fitted optimum at `reference`."""
        return float(self.fitted_lr * 2.0**-self.lean)

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
        self._warn_of(rate)
        return rate

    def _warn_of(self, rate: Rate) -> None:
        """Warn, once a recipe, where one of its rates is extrapolated."""
        if rate.extrapolated and not self.__dict__.get("_warned"):
            object.__setattr__(self, "_warned", True)
            warn(f"Recipe {self.name!r} extrapolates: {rate.notes[0]}.")

    def _quoted(self, target: Reference, steps: int | None = None, batch: float | None = None) -> Rate:
        """The rate at a reference, without a warning; its first notes say what was not seen."""
        reference, asked = self.reference, target
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
        best = self.fitted_lr * moved
        octaves = margin(self.steepness, sd) if self.steepness else self.lean
        kept = [f"stays {octaves:.2g} octaves below the best rate, since too high costs more"] if octaves else []
        rate = Rate(
            lr=best * 2.0**-octaves,
            low=best / width,
            high=best * width,
            ceiling=None if self.ceiling is None else self.ceiling * moved,
            extrapolated=bool(outside),
            notes=(*outside, *kept, *self.notes),
            configuration=words.configuration(self, asked, steps, batch),
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
        return float(self.fitted_lr * 2.0 ** -margin(self.steepness, sd))

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

    def arrays(self) -> dict[str, Array]:
        """What the safetensors file holds, by name."""
        return {**{f"trial.{key}": value for key, value in self.tensors.items()}, "fit.covariance": self.covariance}

    def save_beside(self, adapter: str | os.PathLike[str]) -> Path:
        """Write the recipe into an adapter's folder: files in its subfolder `rankaware/`, a section in its README.

        `recipe=` and `Recipe.load` then take the adapter's folder. Another call replaces both. Returns the file.

        Raises:
            RecipeError: there is no such folder, or it or its README cannot be written; or as `save`.
        """
        return beside.save_beside(self, adapter)

    def push_to_hub(
        self,
        repo: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Push to a repository of the Hugging Face Hub, laid out as `save_beside` does; the commit's address.

        The repository is made if need be. Its README stays, one is written where there is none; its head gets the
        tag `rankaware-recipe` and `base_model`, its end what was calibrated, with a plot. Needs the extra `hub`.

        Args:
            repo: "owner/name", a new one or an adapter's.
            base_model: the model's own repository, as "owner/name".
            private, token, revision, commit_message: as in huggingface_hub.

        Raises:
            RecipeError: the Hub refuses or cannot be reached. PlotError: matplotlib is missing. Nothing was pushed.
        """
        message = commit_message or f"Learning-rate recipe {self.tag}"
        return on_hub.push(
            self, repo, base_model=base_model, private=private, token=token, message=message, revision=revision
        )

    @classmethod
    def from_hub(
        cls,
        repo: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Recipe:
        """Read the recipe in a repository of the Hub, or its cached copy where HF_HUB_OFFLINE=1. Extra `hub`.

        Raises:
            RecipeError: the repository cannot be reached, or holds no recipe; or as `load`.
        """
        return cls.load(on_hub.pull(repo, revision=revision, token=token, cache_dir=cache_dir))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe, checking every value and the tensors' hash at the door. Nothing is unpickled.

        `path` is its TOML file, or the folder of an adapter that it was saved beside.

        Raises:
            RecipeError: a file is missing, cut short, of a newer schema, altered, or holds an impossible value; the
                message carries the value's path.
        """
        path = beside.recipe_file(path)
        return recipe_toml.from_document(cls, *recipe_files.read(path), path)


def known_rate(recipe: Recipe, rank: int | None, alpha: float | None = None) -> Rate | None:
    """The rate at a rank, None for full finetuning, without a warning; None where the recipe asks to be told more."""
    with warnings.catch_warnings():  # of a real optimizer, which a measured law steps
        warnings.simplefilter("ignore")
        try:
            return recipe._quoted(recipe._target(rank, alpha, "full" if rank is None else "lora"))
        except RankAwareError:
            return None


def rate_on(recipe: Recipe, survey: Survey, steps: int | None = None, batch: float | None = None) -> Rate:
    """The rate at a model's own most common configuration. Warns once, as `at` does, where that was not seen."""
    own = survey.dominant()
    if own.method == "full":
        target = _full_target(recipe, survey)
    else:
        target = replace(recipe._target(own.rank, own.alpha, "lora"), fan_in=survey.width, init=own.init)
    rate = recipe._quoted(target)
    recipe._warn_of(rate)
    return rate if steps is batch is None else recipe._quoted(target, steps, batch)


def other_rates_on(recipe: Recipe, survey: Survey) -> OtherRates:
    """What a recipe says of a model's parameters that are no factors."""
    full = recipe._quoted(_full_target(recipe, survey)).lr if recipe.full_seen else None
    return OtherRates(recipe.name, recipe.other_rates, recipe.lr, full)


def _full_target(recipe: Recipe, survey: Survey) -> Reference:
    return replace(recipe._target(None, None, "full"), fan_in=survey.full_width(recipe.reference.init))


def is_for(recipe: Recipe, optimizer: type) -> bool:
    """Whether an optimizer is the recipe's own, or that one with its state in fewer bits or paged memory."""
    name = recipe.optimizer.rpartition(".")[2]
    known = known_optimizer(name)[0]
    return name == optimizer.__name__ or (known != "" and known == known_optimizer(optimizer)[0])


def resolve_recipe(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    """The recipe itself, or the one in the file or folder named."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
