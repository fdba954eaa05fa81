"""Rank-aware groups for an optimizer without the wrapper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .._checks import check_lr, plain_lr
from .._optimizers import in_force
from .._rate import Rate
from .._types import Init, Method
from ..inspection import ReferenceLike, as_reference, survey_of, walk
from ..laws import DEFAULT_LAW, Law
from ._param_groups import (
    Models,
    model_of,
    multiply_for_native,
    rated,
    refuse_outside,
    split,
    together,
    user_groups,
)
from ._plan import PlanOptions, make_plan
from ._validate import refuse_groups, refuse_one_rate


def rank_aware_param_groups(  # noqa: PLR0913
    params: Any,
    *,
    lr: float | Rate,
    model: nn.Module | Sequence[nn.Module] | None = None,
    law: str | Law = DEFAULT_LAW,
    tuned_at: ReferenceLike | None = None,
    optimizer_class: type | None = None,
    settings: Mapping[str, Any] | None = None,
    named: bool = True,
    method: Method = "lora",
    init: Init | None = None,
    rates: Mapping[str, float | Rate] | None = None,
    other_lr: float | Rate | None = None,
    batch: float | None = None,
) -> list[dict[str, Any]]:
    """Return parameter groups with their rates, for any torch optimizer without the wrapper.

    group["lr"] is the user group's lr, or `lr`, times group["rank_multiplier"]. The optimizer's
    step does not multiply again. A scheduler that sets rates to absolute values therefore removes
    the multipliers.

    Args:
        params: a model (its trainable parameters), or parameters or groups with `model=`.
        lr: the base rate, per step, tuned at `tuned_at`.
        model: as for `RankAwareOptimizer`.
        law: a law or its name.
        tuned_at: the configuration of `lr`, as for `RankAwareOptimizer`.
        optimizer_class: the optimizer that gets the groups. It decides the form of the law.
        settings: its settings. Muon's adjust_lr_fn and Adafactor's scale_parameter change the law's
            form.
        named: whether groups contain parameter names. ZeroRedundancyOptimizer needs False.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: as for `RankAwareOptimizer`.
        rates: as for `RankAwareOptimizer`.
        other_lr: as for `RankAwareOptimizer`.
        batch: as for `RankAwareOptimizer`.

    Raises:
        OptimizerError: the parameters or a rate cannot be used, or the optimizer would not train
            at the groups' rates.
        InspectionError: the adapters cannot be read.
        LawError: the law cannot be used.

    >>> import torch
    >>> pair, linear = torch.nn.Module(), torch.nn.Linear
    >>> pair.lora_A, pair.lora_B = linear(64, 8, bias=False), linear(8, 64, bias=False)
    >>> pair.r, pair.scaling = 8, 1.0
    >>> _ = torch.nn.init.zeros_(pair.lora_B.weight)
    >>> groups = rank_aware_param_groups(pair, lr=1e-3, tuned_at="r=32,alpha=32")
    >>> [(g["lora_role"], round(g["lr"], 5)) for g in groups]
    [('A', 0.00222), ('B', 0.00222)]
    """
    params = together(params)
    model = model_of(params, model)
    check_lr(lr)
    reference = None if tuned_at is None else as_reference(tuned_at)
    options = PlanOptions(law, reference, dict(rates or {}), other_lr, batch)
    walked = walk(model)
    survey = survey_of(walked, method=method, init=init)
    listed = user_groups(params, model, walked)
    refuse_outside(listed, walked, options)
    if optimizer_class is not None:
        refuse_one_rate(optimizer_class)
        refuse_groups(optimizer_class, listed, in_force(optimizer_class, settings))
    each = [group.options for group in listed]
    plan = make_plan(
        survey,
        options,
        optimizer_class,
        settings,
        groups=each,
        are_several=isinstance(model, Models),
    )
    groups = []
    for part in split(listed, plan, survey):
        groups.append(rated(part, plain_lr(lr), named))
        multiply_for_native(groups[-1])
    return groups
