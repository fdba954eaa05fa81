"""What must be the same in all trials of a study, so that they compare: as JSON holds it, alike in every process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer

from .._optimizer_classes import defaults_of
from .._types import Factor, Reference
from ..laws import Law, checked_multiplier
from ..optimizer import RankAwareOptimizer, effective_lr
from ..recipe import BASE, SAME_UPDATES, agreed, name_pattern, plain_value, settings_of

SAME_RATE = 1e-3  # of a law's multipliers: some are measured
_LAW_AT = Reference(rank=16, alpha=16, fan_in=64)
# What an optimizer is given that the study decides, or that leaves its updates as they are.
_LEFT_OUT = {
    "cls", "self", "params", "optimizer", "model", "lr", "tuned_at", "law", "recipe", "method", "strict",
    "on_rank_change", "native_type", "apply_settings", "steps", "warmup_share", "seed", "generator", *SAME_UPDATES,
}  # fmt: skip


def law_values(law: Law, optimizer: type[Optimizer], ranks: Iterable[int | None]) -> dict[str, float]:
    """What a law says at a study's ranks, whatever its code: its multipliers from a small layer to a wider one."""
    values = {}
    for rank in ranks:
        for role, init in (("A", "A"), ("B", "A"), ("A", "B"), ("B", "B")) if rank else (("full", "A"), ("full", "B")):
            factor = Factor("", role, rank, 128, 192, 2.0 if rank else 1.0, init)  # type: ignore[arg-type]
            where = f"rank {rank}, {role}" if rank else "full finetuning"
            with suppress(Exception):  # a law need not cover what no trial tries, and trials say what is wrong with it
                values[f"{where}, Init[{init}]"] = checked_multiplier(law.bind(optimizer, {}), factor, _LAW_AT)
    return values


def built_with(opt: Optimizer, native: type[Optimizer], settings: Mapping[str, Any], at: Reference) -> dict[str, Any]:
    """What decides a trial beside its rank, seed and rate: the model's width, alpha and init, and all settings.

    Settings that were left out have their defaults. Where groups differ in one, it is the list of its values, and what
    the factors' groups have is beside it. Of the parameters that are no factors, in a LoRA trial, their rates are kept.
    """
    given = {**defaults_of(RankAwareOptimizer.__new__), **defaults_of(native), **settings}
    made = {name: plain_value(value) for name, value in given.items() if name not in _LEFT_OUT}
    names, groups = opt.defaults.keys() - _LEFT_OUT, opt.param_groups
    made |= settings_of(groups, names)
    factors = settings_of([group for group in groups if group["lora_role"] != "other"] or groups, names)
    apart = {name: value for name, value in factors.items() if value != made[name]}
    more = {"factors' settings": apart, "other rates": {} if at.method == "full" else _other_rates(opt)}
    made |= {key: value for key, value in more.items() if value}
    return {**made, "width": at.fan_in, "alpha": at.alpha, "init": at.init}


def _other_rates(opt: Optimizer) -> dict[str, Any]:
    """Rates of parameters that are no factors, by name pattern: `BASE` or a rate; where two differ, none."""
    tables = []
    for group in opt.param_groups:
        if group["lora_role"] == "other":
            rate = effective_lr(group)
            kept = BASE if rate == opt.defaults["lr"] else float(f"{rate:.12g}")  # without the rounding of a ratio
            tables.append({name_pattern(name): kept for name in group["param_names"]})
    return agreed(tables)


def settings_in(built: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The optimizer's settings `names` in what `built_with` gave, those of the factors where groups differ."""
    held = {**built, **built.get("factors' settings", {})}
    return {name: held[name] for name in names if held.get(name) is not None and name not in _LEFT_OUT}
