"""Recipes: what a calibration learned, as TOML for people and safetensors for arrays; `Recipe.at` gives a rate."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from . import recipe_files
from .adapters import Method, Reference, Survey
from .errors import RankAwareError, RankAwareWarning, RecipeError
from .laws import Power, checked_multiplier, law_changes, law_from_dict, law_to_dict

__all__ = ["RANK_DOUBT", "Rate", "Recipe", "Scaling", "WIDTH_DOUBT", "Z90", "infer_scaling"]

Z90 = 1.645
# What the band grows by where the data do not reach, octaves of rate per octave of rank or of width (rules of thumb
# after the spread of published sweeps around the law).
RANK_DOUBT = 0.1
WIDTH_DOUBT = 0.25
# The share of an Init[A] drift, continued to r = n, that full finetuning's band is widened by.
_DRIFT_DOUBT = 0.5
ANY_WIDTH = 4096.0  # stands in for an unknown fan-in, which all but cancels between ranks of one init

Scaling = Literal["fixed", "rslora", "alpha", "as swept", "unknown"]
# "as swept": the sweep did not say alpha, so the middle of the customs, with a wider drift about it.
_GAMMA: dict[str, float] = {"fixed": 0.0, "rslora": 0.5, "alpha": 1.0, "as swept": 0.5}


@dataclass(frozen=True)
class Rate:
    """A learning rate and how sure it is.

    `lr` is the rate to use; it may lean below the middle of the band where a cliff is near. `low` and `high` bound
    the best rate with 90 %. `ceiling` is the smallest rate seen to diverge, moved to this configuration, or None.
    """

    lr: float
    low: float
    high: float
    ceiling: float | None = None
    extrapolated: bool = False
    notes: tuple[str, ...] = ()

    def __float__(self) -> float:
        return float(self.lr)


@dataclass(frozen=True)
class Recipe:
    """A calibrated base rate with its law, uncertainty and provenance.

    best_lr: the best rate at `reference`, as fitted. lean: octaves by which quoted rates lean below it. law: a
    `Power` on top of the law calibrated with: drift in rank, factor of full finetuning. covariance: 3 × 3 tensor of
    (log2 rate at `law.pivot`, drift, log2 full_factor), octaves. scaling_rule: how the effective multiplier followed
    the ranks seen: "fixed" (alpha follows rank), "rslora" (s·√r constant), "alpha" (s·r constant), "as swept" (a
    sweep that did not say), or "unknown". steps: None where a sweep did not say. notes: what the data did not
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
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def lr(self) -> float:
        """The quoted base rate: the best rate at `reference`, leaned by `lean` octaves."""
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
    ) -> Rate:
        """The rate at another rank, alpha, init or width, or for full finetuning.

        Without alpha the effective multiplier follows the ranks seen (`scaling_rule`); where no rule fits, alpha is
        asked for. Without fan_in the width is the recipe's own. Outside what was seen the rate is `extrapolated`,
        its band wider, and a warning is given once.

        Raises:
            RecipeError: alpha is needed and was not given, or was given where the sweep did not say it; or the rate
                hangs on a fan-in that nobody told: for full finetuning, or another init.
            InvalidReferenceError: the target's rank, alpha, init, method or width is impossible.
        """
        target, reference = self._at_a_width(self._target(rank, alpha, rslora, init, method, fan_in))
        moved = checked_multiplier(self.law, target.as_factor(), reference)
        sd, outside = self._spread(target)
        if outside:
            self._warn_once(outside)
        best = self.best_lr * moved
        leans = [f"leans {self.lean:.2g} octaves low, since too high costs more"] if self.lean else []
        return Rate(
            lr=best * 2.0**-self.lean,
            low=best * 2.0 ** (-Z90 * sd),
            high=best * 2.0 ** (Z90 * sd),
            ceiling=None if self.ceiling is None else self.ceiling * moved,
            extrapolated=bool(outside),
            notes=(*outside, *leans, *self.notes),
        )

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

    def _target(
        self,
        rank: int | None,
        alpha: float | None,
        rslora: bool,
        init: Literal["A", "B"] | None,
        method: Method,
        fan_in: float | None,
    ) -> Reference:
        init = init or self.reference.init
        if (rslora and alpha is None) or (method == "full" and not rank is alpha is None):
            raise RecipeError(
                f"rank={rank}, alpha={alpha}, rslora={rslora} do not go together with method={method!r}.",
                "Give rank and alpha for LoRA, rslora= beside alpha=, and none of them for full finetuning.",
            )
        if method == "full":
            width = self.full_fan_in or self.reference.fan_in
            return Reference(method="full", init=init, fan_in=width if fan_in is None else fan_in)
        width = self.reference.fan_in if fan_in is None else fan_in
        if rank is None and self.reference.method == "full":
            raise RecipeError("This recipe was made by full finetuning alone.", "Give rank= and alpha= for LoRA.")
        rank = self.reference.rank if rank is None else rank
        if alpha is not None and self.scaling_rule == "as swept":
            raise RecipeError(
                f"The sweep behind recipe {self.name!r} did not say its alpha, so its rates hold as swept only.",
                "Fit it again with alpha=, or use recipe.at(rank=...).lr as a plain lr=.",
            )
        if alpha is not None:
            return Reference(rank, alpha, rslora, init, width, method)
        Reference(rank, 1.0, method=method)  # refuses an impossible rank before it is used below
        return replace(Reference.from_scaling(rank, self._scaling_at(rank or 1), init=init), fan_in=width)

    def _at_a_width(self, target: Reference) -> tuple[Reference, Reference]:
        """`target` and the reference, at the target's fan-in where the recipe knows none."""
        own = self.reference
        if own.fan_in is not None:
            return target, own
        if target.fan_in is None and (target.method, target.init) != (own.method, own.init):
            raise RecipeError(
                f"Recipe {self.name!r} knows no fan-in, on which the rate of {target} hangs.",
                "Give fan_in=, the model's width.",
            )
        width = target.fan_in or ANY_WIDTH
        return replace(target, fan_in=width), replace(own, fan_in=width)

    def _scaling_at(self, rank: int) -> float:
        if rank == self.reference.rank:
            return self.reference.scaling
        if self.scaling_rule not in _GAMMA or self.reference.rank is None:
            raise RecipeError(
                f"Recipe {self.name!r} saw no rule by which alpha follows the rank.", "Give alpha= beside the rank."
            )
        return float(self.reference.scaling * (rank / self.reference.rank) ** -_GAMMA[self.scaling_rule])

    def _spread(self, target: Reference) -> tuple[float, list[str]]:
        """Standard deviation of log2 of the best rate at `target`, octaves, and in words what was not seen."""
        outside = []
        pivot = self.law.pivot
        doubts = [0.0]
        if target.method == "full":
            reach = math.log2((target.fan_in or pivot) / pivot)
            x = torch.tensor([1.0, reach if self.law.to_full else 0.0, 1.0], dtype=torch.float64)
            if not self.full_seen:
                outside.append("full finetuning was not tried: the rate is the law's, times its prior factor")
                doubts.append(0.0 if self.law.to_full else _DRIFT_DOUBT * self.law.exponent * reach)
            own = self.full_fan_in
        else:
            rank = float(target.rank or pivot)
            x = torch.tensor([1.0, math.log2(rank / pivot), 0.0], dtype=torch.float64)
            beyond = self._beyond(rank)
            if beyond:
                outside.append(f"rank {rank:g} lies outside the ranks seen ({', '.join(map(str, self.ranks))})")
            doubts.append(RANK_DOUBT * beyond)
            own = self.reference.fan_in
        if target.fan_in and own and not math.isclose(target.fan_in, own, rel_tol=0.01):
            outside.append(f"fan-in {target.fan_in:g} is not the recipe's own {own:g}")
            doubts.append(WIDTH_DOUBT * math.log2(target.fan_in / own))
        if target.init != self.reference.init:
            outside.append(f"Init[{target.init}] was not tried: the law carries the rate across inits")
            doubts.append(1.0)
        variance = float(x @ self.covariance.double() @ x)
        return math.sqrt(variance + sum(d * d for d in doubts)), outside

    def _beyond(self, rank: float) -> float:
        """Octaves between `rank` and the nearest end of the ranks seen; 0 inside."""
        if not self.ranks:
            return 1.0
        return max(0.0, math.log2(min(self.ranks) / rank), math.log2(rank / max(self.ranks)))

    def _warn_once(self, outside: list[str]) -> None:
        if not self.__dict__.get("_warned"):
            object.__setattr__(self, "_warned", True)
            warnings.warn(f"Recipe {self.name!r} extrapolates: {outside[0]}.", RankAwareWarning, stacklevel=3)

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `path` (TOML) and the safetensors file beside it, atomically; a reader finds both or no recipe.

        Raises:
            RecipeError: the folder cannot be written, or `path` does not end in .toml.
        """
        return recipe_files.write(path, _header(self), to_document(self), self.arrays())

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
        return _from_toml(cls, *recipe_files.read(path))


def infer_scaling(seen: Mapping[int, float]) -> Scaling:
    """The rule by which the effective multiplier followed the rank, from {rank: scaling}; "unknown" for one rank.

    >>> infer_scaling({4: 1.0, 64: 1.0}), infer_scaling({4: 4.0, 64: 0.25}), infer_scaling({8: 2.0})
    ('fixed', 'alpha', 'unknown')
    """
    if len(seen) < 2:
        return "unknown"
    for rule, gamma in _GAMMA.items():
        constants = [math.log2(s) + gamma * math.log2(r) for r, s in seen.items()]
        if max(constants) - min(constants) < 1e-3:
            return rule  # type: ignore[return-value]
    return "unknown"


def known_rate(recipe: Recipe, rank: int | None, **where: Any) -> Rate | None:
    """The rate at a rank, None for full finetuning, without a warning; None where the recipe asks to be told more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return recipe.at(method="full", **where) if rank is None else recipe.at(rank, **where)
        except RankAwareError:
            return None


def resolve_recipe(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    """The recipe itself, or the one in the file named."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


# --- TOML -----------------------------------------------------------------------------------------------------------


def _header(recipe: Recipe) -> str:
    name, maker = recipe.name, "ra.calibrate" if "curve" in recipe.tensors else "ra.fit_sweep"
    return (
        f"# The learning-rate recipe {name!r} of rankaware_optim, made by {maker}.\n"
        "# Read a rate: `rankaware lr FILE --rank 32`. Use it: RankAwareOptimizer(model, AdamW, recipe=FILE).\n"
        "# Rates are per step; octaves are log2 of a rate; the safetensors file beside it holds the trials.\n"
    )


def to_document(recipe: Recipe) -> dict[str, Any]:
    """What the TOML file holds, section by section; None where there is nothing to write."""
    sd = recipe._spread(recipe.reference)[0]
    r = recipe.reference
    return {
        "name": recipe.name,
        "rate": {
            "lr": recipe.lr,
            "best_lr": recipe.best_lr,
            "band_low": recipe.best_lr * 2.0 ** (-Z90 * sd),
            "band_high": recipe.best_lr * 2.0 ** (Z90 * sd),
            "ceiling": recipe.ceiling,
            "lean_octaves": recipe.lean,
        },
        "reference": {
            "method": r.method,
            "rank": r.rank,
            "alpha": r.alpha,
            "rslora": r.rslora,
            "init": r.init,
            "fan_in": r.fan_in or "unknown",
            "full_fan_in": recipe.full_fan_in,
            "batch": r.batch,
        },
        "scaling_rule": recipe.scaling_rule,
        "law": law_to_dict(recipe.law),
        "optimizer": {"class": recipe.optimizer, "settings": {k: plain_setting(v) for k, v in recipe.settings.items()}},
        "horizon": {"steps": recipe.steps or "unknown", "batch": recipe.batch, "warmup_share": recipe.warmup},
        "seen": {
            "ranks": list(recipe.ranks),
            "full": recipe.full_seen,
            "seed": recipe.seed,
            "notes": list(recipe.notes),
        },
        "spent": _spent(recipe.tensors),
        "versions": dict(recipe.versions),
    }


def _spent(trials: Mapping[str, torch.Tensor]) -> dict[str, int] | None:
    """Trials, pruned and diverged ones among them, and training steps of all."""
    if "steps" not in trials:
        return None
    counts = {key: int(trials[key].sum()) for key in ("steps", "pruned", "diverged")}
    return {"trials": len(trials["steps"]), **counts}


def plain_setting(value: Any) -> Any:
    """An optimizer's setting as TOML can hold it; what it cannot is written as Python would show it."""
    if isinstance(value, (list, tuple)):
        return [plain_setting(v) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def _from_toml(cls: type[Recipe], take: recipe_files.Reader, tensors: dict[str, torch.Tensor]) -> Recipe:
    law = take.build("law", lambda: law_from_dict(take("law", dict)))
    made = cls(
        name=take("name", str),
        best_lr=take.positive("rate.best_lr"),
        lean=take.number("rate.lean_octaves", 0.0),
        ceiling=take.positive("rate.ceiling", None),
        reference=take.build("reference", lambda: _reference(take)),
        law=law if isinstance(law, Power) else Power(law=law),
        covariance=_covariance(tensors.pop("fit.covariance", None), take),
        scaling_rule=take.choice("scaling_rule", (*_GAMMA, "unknown"), "unknown"),
        full_fan_in=take.positive("reference.full_fan_in", None),
        ranks=_ranks(take),
        full_seen=take("seen.full", bool, False),
        optimizer=take("optimizer.class", str),
        settings=take("optimizer.settings", dict, {}),
        steps=None if take("horizon.steps", object) == "unknown" else take.whole("horizon.steps"),
        batch=take.positive("horizon.batch", None),
        warmup=take.number("horizon.warmup_share", None),
        seed=take("seen.seed", int, 0),
        versions=take("versions", dict, {}),
        notes=tuple(map(str, take("seen.notes", list, []))),
        tensors=_trials(tensors, take),
    )
    if not math.isclose(take.positive("rate.lr"), made.lr, rel_tol=1e-6):
        raise take.error("holds another rate than its best one and its lean give", "rate.lr")
    return made


def _reference(take: recipe_files.Reader) -> Reference:
    return Reference(
        rank=take.whole("reference.rank", None),
        alpha=take.positive("reference.alpha", None),
        rslora=take("reference.rslora", bool, False),
        init=take.choice("reference.init", ("A", "B"), "A"),
        fan_in=None if take("reference.fan_in", object) == "unknown" else take.positive("reference.fan_in"),
        method=take.choice("reference.method", ("lora", "full"), "lora"),
        batch=take.positive("reference.batch", None),
    )


def _ranks(take: recipe_files.Reader) -> tuple[int, ...]:
    ranks = take("seen.ranks", list, [])
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise take.error(f"holds {ranks!r} where positive whole numbers belong", "seen.ranks")
    return tuple(ranks)


def _covariance(tensor: torch.Tensor | None, take: recipe_files.Reader) -> torch.Tensor:
    if tensor is None or tensor.shape != (3, 3) or not tensor.is_floating_point() or not tensor.isfinite().all():
        raise take.error("has no usable 3 × 3 covariance", "fit.covariance")
    spectrum = torch.linalg.eigvalsh((tensor + tensor.T).double())
    if spectrum[0] < -1e-6 * spectrum[-1].abs():
        raise take.error("has a covariance with a negative variance", "fit.covariance")
    return tensor


def _trials(tensors: Mapping[str, torch.Tensor], take: recipe_files.Reader) -> dict[str, torch.Tensor]:
    trials = {key.removeprefix("trial."): value for key, value in tensors.items() if key.startswith("trial.")}
    if len({len(value) if value.dim() else 0 for value in trials.values()}) > 1:
        raise take.error("has tensors of different numbers of trials", "trial")
    lr = trials.get("lr", torch.ones(1))
    if not bool((torch.isfinite(lr) & (lr > 0)).all()):
        raise take.error("has a trial whose rate is not positive", "trial.lr")
    return trials
