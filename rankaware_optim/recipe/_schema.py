"""A recipe as the sections of its TOML file, and back, each value checked at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .._scaling_rule import SCALINGS
from .._types import Reference
from ..laws import Power, law_from_dict, law_to_dict
from ._horizon import SLOPE_SD, Horizon
from ._io import Reader
from ._uncertainty import own_band

if TYPE_CHECKING:
    from ._recipe import Recipe


def header(recipe: Recipe) -> str:
    """Three comment lines by which the file introduces itself."""
    name, maker = recipe.name, "ra.calibrate" if "curve" in recipe.tensors else "ra.sweeps.fit_sweep"
    return (
        f"# The learning-rate recipe {name!r} of rankaware_optim, made by {maker}.\n"
        "# Read a rate: `rankaware lr FILE --rank 32`. Use it: RankAwareOptimizer(model, AdamW, recipe=FILE).\n"
        "# Rates are per step; octaves are log2 of a rate; the safetensors file beside it holds the trials.\n"
    )


def to_document(recipe: Recipe) -> dict[str, Any]:
    """What the TOML file holds, section by section; None where there is nothing to write."""
    r, trials = recipe.reference, recipe.tensors
    low, high = own_band(recipe)
    # Training steps of all trials, and the pruned and diverged ones among them.
    spent = {key: int(trials[key].sum()) for key in ("steps", "pruned", "diverged") if "steps" in trials}
    return {
        "name": recipe.name,
        "rate": {
            "lr": recipe.lr,
            "best_lr": recipe.best_lr,
            "band_low": low,
            "band_high": high,
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
        "horizon": {
            "steps": recipe.steps or "unknown",
            "batch": recipe.batch,
            "warmup_share": recipe.warmup,
            "slope": recipe.horizon.slope,
            "slope_sd": recipe.horizon.slope_sd,
        },
        "seen": {
            "ranks": list(recipe.ranks),
            "full": recipe.full_seen,
            "seed": recipe.seed,
            "notes": list(recipe.notes),
        },
        "spent": None if "steps" not in trials else {"trials": len(trials["steps"]), **spent},
        "versions": dict(recipe.versions),
    }


def plain_setting(value: Any) -> Any:
    """An optimizer's setting as TOML can hold it; what it cannot is written as Python would show it."""
    if isinstance(value, (list, tuple)):
        return [plain_setting(v) for v in value]
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def from_document(cls: type[Recipe], take: Reader, tensors: dict[str, torch.Tensor]) -> Recipe:
    """The recipe in both files, every value checked."""
    law = take.build("law", lambda: law_from_dict(take("law", dict)))
    ranks = take("seen.ranks", list, [])
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        raise take.error(f"holds {ranks!r} where positive whole numbers belong", "seen.ranks")
    made = cls(
        name=take("name", str),
        best_lr=take.positive("rate.best_lr"),
        lean=take.number("rate.lean_octaves", 0.0),
        ceiling=take.positive("rate.ceiling", None),
        reference=take.build("reference", lambda: _reference(take)),
        law=law if isinstance(law, Power) else Power(law=law),
        covariance=_covariance(tensors.pop("fit.covariance", None), take),
        scaling_rule=take.choice("scaling_rule", SCALINGS, "unknown"),
        full_fan_in=take.positive("reference.full_fan_in", None),
        ranks=tuple(ranks),
        full_seen=take("seen.full", bool, False),
        optimizer=take("optimizer.class", str),
        settings=take("optimizer.settings", dict, {}),
        steps=None if take("horizon.steps", object) == "unknown" else take.whole("horizon.steps"),
        batch=take.positive("horizon.batch", None),
        warmup=take.number("horizon.warmup_share", None),
        horizon=Horizon(take.signed("horizon.slope", 0.0), take.number("horizon.slope_sd", SLOPE_SD)),
        seed=take("seen.seed", int, 0),
        versions=take("versions", dict, {}),
        notes=tuple(map(str, take("seen.notes", list, []))),
        tensors=_trials(tensors, take),
    )
    if not math.isclose(take.positive("rate.lr"), made.lr, rel_tol=1e-6):
        raise take.error("holds another rate than its best one and its lean give", "rate.lr")
    return made


def _reference(take: Reader) -> Reference:
    return Reference(
        rank=take.whole("reference.rank", None),
        alpha=take.positive("reference.alpha", None),
        rslora=take("reference.rslora", bool, False),
        init=take.choice("reference.init", ("A", "B"), "A"),
        fan_in=None if take("reference.fan_in", object) == "unknown" else take.positive("reference.fan_in"),
        method=take.choice("reference.method", ("lora", "full"), "lora"),
        batch=take.positive("reference.batch", None),
    )


def _covariance(tensor: torch.Tensor | None, take: Reader) -> torch.Tensor:
    if tensor is None or tensor.shape != (3, 3) or not tensor.is_floating_point() or not tensor.isfinite().all():
        raise take.error("has no usable 3 × 3 covariance", "fit.covariance")
    spectrum = torch.linalg.eigvalsh((tensor + tensor.T).double())
    if spectrum[0] < -1e-6 * spectrum[-1].abs():
        raise take.error("has a covariance with a negative variance", "fit.covariance")
    return tensor


def _trials(tensors: Mapping[str, torch.Tensor], take: Reader) -> dict[str, torch.Tensor]:
    trials = {key.removeprefix("trial."): value for key, value in tensors.items() if key.startswith("trial.")}
    if len({len(value) if value.dim() else 0 for value in trials.values()}) > 1:
        raise take.error("has tensors of different numbers of trials", "trial")
    lr = trials.get("lr", torch.ones(1))
    if not bool((torch.isfinite(lr) & (lr > 0)).all()):
        raise take.error("has a trial whose rate is not positive", "trial.lr")
    return trials
