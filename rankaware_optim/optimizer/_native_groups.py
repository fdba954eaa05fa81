"""Rank-aware groups for an optimizer without the wrapper."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .._checks import check_lr, plain_lr
from .._rate import Rate
from .._types import Init, Method
from ..inspection import ReferenceLike, as_one_model
from ..laws import Law
from ..recipe import Recipe
from ._assign import Explicit
from ._parts import Part, SplitGroup
from ._prepare import prepare
from ._refuse import Wrapped, refuse_one_rate
from ._source import read_source
from ._user_groups import MULTIPLIED, model_of


def rank_aware_param_groups(  # noqa: PLR0913
    params: Any,
    *,
    lr: float | Rate | None = None,
    model: nn.Module | Sequence[nn.Module] | None = None,
    law: str | Law | None = None,
    tuned_at: ReferenceLike | None = None,
    recipe: Recipe | str | os.PathLike[str] | None = None,
    optimizer_class: type[Optimizer] | None = None,
    settings: Mapping[str, Any] | None = None,
    named: bool = True,
    method: Method = "lora",
    init: Init | None = None,
    rates: Mapping[str, float | Rate] | None = None,
    other_lr: float | Rate | None = None,
    batch: float | None = None,
    steps: int | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups with their rates, for any torch optimizer without the wrapper.

    group["lr"] is the user group's lr, or the base rate, times group["rank_multiplier"]. The
    optimizer's step does not multiply again. A scheduler that sets rates to absolute values
    therefore removes the multipliers.

    Args:
        params: a model (its trainable parameters), or parameters or groups with `model=`.
        lr: the base rate, per step, tuned at `tuned_at`. A recipe has its own.
        model: as for `RankAwareOptimizer`.
        law: a law or its name.
        tuned_at: the configuration of `lr`, as for `RankAwareOptimizer`.
        recipe: as for `RankAwareOptimizer`.
        optimizer_class: the optimizer that gets the groups, by default AdamW. It decides the form
            of the law.
        settings: its settings. Muon's adjust_lr_fn and Adafactor's scale_parameter change the law's
            form.
        named: whether groups contain parameter names. ZeroRedundancyOptimizer needs False.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: as for `RankAwareOptimizer`.
        rates: as for `RankAwareOptimizer`.
        other_lr: as for `RankAwareOptimizer`.
        batch: as for `RankAwareOptimizer`.
        steps: as for `RankAwareOptimizer`.

    Raises:
        OptimizerError: the parameters or a rate cannot be used, or the optimizer would not train
            at the groups' rates.
        InspectionError: the adapters cannot be read.
        LawError: the law cannot be used.
        RecipeError: the recipe cannot be read, or has no rate for this model.

    >>> import torch
    >>> pair, linear = torch.nn.Module(), torch.nn.Linear
    >>> pair.lora_A, pair.lora_B = linear(64, 8, bias=False), linear(8, 64, bias=False)
    >>> pair.r, pair.scaling = 8, 1.0
    >>> _ = torch.nn.init.zeros_(pair.lora_B.weight)
    >>> groups = rank_aware_param_groups(pair, lr=1e-3, tuned_at="r=32,alpha=32")
    >>> [(g["lora_role"], round(g["lr"], 5)) for g in groups]
    [('A', 0.00222), ('B', 0.00222)]
    """
    params = as_one_model(params)
    native = AdamW if optimizer_class is None else optimizer_class
    refuse_one_rate(native)
    source = read_source(recipe, law, tuned_at, plain_lr(lr), batch, steps)
    if recipe is None:
        check_lr(lr)
    prepared, splits = prepare(
        params,
        model_of(params, model),
        Wrapped(native, None, settings or {}),
        source,
        Explicit(dict(rates or {}), other_lr),
        method,
        init,
    )
    lr = prepared.assigner.source.lr
    return [
        _multiplied(split, part, lr, named) for split in splits for part in split.parts
    ]


def _multiplied(split: SplitGroup, part: Part, lr: Any, named: bool) -> dict[str, Any]:
    """Return a part as a group of its own. lr: the base rate if its group has none."""
    group, assigned = part.group, part.assigned
    part.settle(group.get("lr", lr))
    made = {**group, "lr": part.base * part.multiplier}
    for key in ("initial_lr", "max_lr", "min_lr"):
        if made.get(key) is not None:
            made[key] = made[key] * part.multiplier
    made.pop("param_names", None)
    if named:
        names = [split.members[i].name for i in part.at]
        made["params"] = list(zip(names, group["params"], strict=True))
    made |= {"lora_role": assigned.role, "lora_rank": assigned.rank}
    return {**made, MULTIPLIED: part.multiplier}
