"""Values for loggers: every group's rates by name, and the optimizer's recipe."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..optimizer import effective_lr, recipe_of


def group_rates(opt: Any) -> dict[str, float]:
    """Return every group's rate: "lr/A/r8" = "base_lr/A/r8" × "rank_multiplier/A/r8". Repeated
    names are numbered.

    Args:
        opt: the optimizer, or a framework's wrapper with `param_groups`. Its base rates are those
            that schedulers and trainers set and log.
    """
    names = [
        group.get("lora_role", "other")
        + ("" if group.get("lora_rank") is None else f"/r{group['lora_rank']}")
        for group in opt.param_groups
    ]
    total, seen, rates = Counter(names), Counter[str](), {}
    for name, group in zip(names, opt.param_groups, strict=True):
        shown = f"{name}/{seen[name]}" if total[name] > 1 else name
        seen[name] += 1
        multiplier = float(group.get("rank_multiplier", 1.0))
        rates[f"lr/{shown}"] = effective_lr(group)
        rates[f"base_lr/{shown}"] = effective_lr(group) / multiplier
        rates[f"rank_multiplier/{shown}"] = multiplier
    return rates


def recipe_words(opt: Any) -> dict[str, str]:
    """Return name and hash of the optimizer's recipe, as settings of a run; {} without a recipe."""
    recipe = recipe_of(opt)
    if recipe is None:
        return {}
    digest, _, name = recipe.tag.partition(" ")
    return {"rankaware/recipe": name, "rankaware/recipe_hash": digest}
