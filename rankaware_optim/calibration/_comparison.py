"""What must agree between all trials of a study, as JSON values that are equal in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Factor, Reference
from ..laws import Law, checked_multiplier
from ..optimizer import RankAwareOptimizer, effective_lr
from ..recipe import BASE, SAME_UPDATES, agreed, name_pattern, plain_value, settings_of

SAME_RATE = 1e-3  # relative tolerance of a law's multipliers, which a plug-in may measure
_LAW_AT = Reference(rank=16, alpha=16, fan_in=64)
# Optimizer settings that the study decides, or that do not change the updates.
_LEFT_OUT = {
    "cls", "self", "params", "optimizer", "model", "lr", "tuned_at", "law", "recipe", "method", "strict",
    "on_rank_change", "native_type", "apply_settings", "steps", "warmup_share", "seed", "generator", *SAME_UPDATES,
}  # fmt: skip


def law_values(
    law: Law, optimizer: type[Optimizer], ranks: Iterable[int | None]
) -> dict[str, float]:
    """Return a law's multipliers at a study's ranks, from a small layer to a wider one. They
    identify its code.
    """
    values = {}
    for rank in ranks:
        for role, init in (
            (("A", "A"), ("B", "A"), ("A", "B"), ("B", "B"))
            if rank
            else (("full", "A"), ("full", "B"))
        ):
            factor = Factor("", role, rank, 128, 192, 2.0 if rank else 1.0, init)  # type: ignore[arg-type]
            where = f"rank {rank}, {role}" if rank else "full finetuning"
            with suppress(
                Exception
            ):  # a law may not cover what no trial tries; a trial that needs it raises the error
                values[f"{where}, Init[{init}]"] = checked_multiplier(
                    law.bind(optimizer, {}), factor, _LAW_AT
                )
    return values


def built_with(
    opt: Optimizer, native: type[Optimizer], settings: Mapping[str, Any], at: Reference
) -> dict[str, Any]:
    """Return what decides a trial besides its rank, seed and rate: the model's width, alpha and
    init, and all settings.

    Settings that were not given have their defaults. If groups differ in a setting, its value is a
    list, and the value of the factors' groups is stored too. For a LoRA trial the rates of
    parameters that are not factors are stored.
    """
    given = {**defaults_of(RankAwareOptimizer.__new__), **defaults_of(native), **settings}
    made = {name: plain_value(value) for name, value in given.items() if name not in _LEFT_OUT}
    names, groups = opt.defaults.keys() - _LEFT_OUT, opt.param_groups
    made |= settings_of(groups, names)
    factors = settings_of(
        [group for group in groups if group["lora_role"] != "other"] or groups, names
    )
    apart = {name: value for name, value in factors.items() if value != made[name]}
    more = {
        "factors' settings": apart,
        "other rates": {} if at.method == "full" else _other_rates(opt),
    }
    made |= {key: value for key, value in more.items() if value}
    return {**made, "width": at.fan_in, "alpha": at.alpha, "init": at.init}


def _other_rates(opt: Optimizer) -> dict[str, Any]:
    """Return the rates of parameters that are not factors, by name pattern. Patterns with two rates
    are left out.
    """
    tables = []
    for group in opt.param_groups:
        if group["lora_role"] == "other":
            rate = effective_lr(group)
            kept = (
                BASE if rate == opt.defaults["lr"] else float(f"{rate:.12g}")
            )  # removes a ratio's rounding error
            tables.append({name_pattern(name): kept for name in group["param_names"]})
    return agreed(tables)


def settings_in(built: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the optimizer's settings `names` from `built_with`'s result. If groups differ, the
    factors' count.
    """
    held = {**built, **built.get("factors' settings", {})}
    return {
        name: held[name] for name in names if held.get(name) is not None and name not in _LEFT_OUT
    }
