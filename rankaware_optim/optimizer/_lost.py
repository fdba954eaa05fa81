"""Whether the parameters that an optimizer holds are those that train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from .._warn import warn
from ..errors import OptimizerError
from ..inspection import Walk, factor_tensors, walk


def params_of(opt: Any) -> list[Any]:
    """Return the parameters of an optimizer."""
    return [param for group in opt.param_groups for param in group["params"]]


def check_parameters(opt: Any, model: nn.Module | None, others: Iterable[Any]) -> bool:
    """Check that the parameters held here get the gradients of the model, so that training does not
    fail silently. Return whether another step has to look again.

    fully_shard and a re-created adapter replace the tensors under the names held here. Activating
    another adapter leaves those held here without gradients. A dry step without rates, as
    torch.distributed.checkpoint makes, is not checked, nor is one without any gradient, nor are
    parameters that another RankAwareOptimizer holds.

    others: the other RankAwareOptimizers of this process.
    """
    if not any(float(group["lr"]) for group in opt.param_groups):
        return True
    held = params_of(opt)
    if model is None or all(map(_is_graded, held)):
        return False
    walked = walk(model)
    graded = [(name, p) for name, p in walked.parameters if _is_graded(p)]
    elsewhere = set(chain(held, *map(params_of, others)))
    lost = {name: p for name, p in graded if p not in elsewhere}
    if lost:
        _refuse_lost(opt, walked, lost)
    return not graded


def _refuse_lost(opt: Any, walked: Walk, lost: Mapping[str, nn.Parameter]) -> None:
    """Raise if `lost` parameters, which no optimizer has, train in place of those of `opt`. Warn if
    an adapter's train in place of its adapters, beside others.
    """
    factors, held = factor_tensors(walked), params_of(opt)
    adapters = [name for name, p in lost.items() if p in factors]
    # FSDP1 flattens them
    gone = set(held).isdisjoint(dict(walked.parameters).values())
    replaced, idle = list[str](), True
    for group in opt.rates.groups:
        for name, param in zip(group.names, group.params, strict=False):
            if name in lost and not _is_graded(param):
                replaced.append(name)
        if group.role in ("A", "B") and any(map(_is_graded, group.params)):
            idle = False
    if not any(map(_is_graded, held)) and (adapters or gone):
        replaced += [*adapters, *lost]
    if replaced:
        raise OptimizerError(
            f"The model's {replaced[0]} has a gradient and is not held by this optimizer, whose"
            " tensor of that name, or all, have none: the model's parameters were replaced, or"
            " another adapter was activated, after it was built.",
            "Shard or wrap the model first (fully_shard, FSDP), with its adapters, then build the"
            " optimizer.",
        )
    if adapters and idle:
        warn(
            f"None of this optimizer's adapters has a gradient, but {adapters[0]}, which it does"
            " not hold, has one and does not train. Build the optimizer after the adapter was"
            " added and activated."
        )


def _is_graded(param: torch.Tensor) -> bool:
    return param.grad is not None
