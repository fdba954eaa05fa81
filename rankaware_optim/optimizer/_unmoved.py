"""This module detects parameters that do not train although they should.

There are three causes. The update of a weight can be so small that it is rounded to
zero, Adam's epsilon can shrink the update, or the model's parameters may have been
replaced after the optimizer was built.

The module reads the values of the tensors to detect steps that are rounded to zero, or
that Adam's epsilon makes much shorter. For example, a bfloat16 number has 8 significant
bits, so the distance between two neighbouring numbers near 0.02 is 1.2e-4. If 1e-5 is
added to a bfloat16 number near 0.02, the sum is therefore rounded back to the old
number.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._warn import warn
from ..errors import OptimizerError
from ..inspection import Walk, factor_tensors, walk
from ._parts import RankAware, split_groups

# There is a warning about a group if more than this fraction of its weights does not
# change, or if epsilon shortens its steps by more than this fraction.
WORTH_SAYING = 0.1
# The number of entries that are read from each tensor. A measured fraction of 0.1 then
# has a standard error of 0.005.
ENTRIES = 2**12
# The standard deviation that is assumed for weights if there is no model. GPT-2 and
# Llama are initialised with this value.
STD = 0.02
_CURES = (
    "Keep these weights in float32 and train under autocast, or use an optimizer with Kahan"
    " summation (torch-optimi) or stochastic rounding (torchao)."
)


class SameRate(NamedTuple):
    """Parameters that a sign-like optimizer, such as Adam, trains at the same learning
    rate.

    Args:
        params: the parameters by name.
        rate: the highest known learning rate of the run. In a sign-like update, each
            weight changes by about this amount.
        kept: the names of dtypes with which the optimizer does not lose small updates.
        state: Adam's state for each parameter, or an empty dict for other optimizers.
        group: the user's parameter group.
    """

    params: Mapping[str, Tensor]
    rate: float
    kept: Collection[str] = ()
    state: Mapping[Tensor, Mapping[str, Any]] = {}
    group: Mapping[str, Any] = {}


# --- two shares -----------------------------------------------------------------------------------


def unmoved_share(values: Tensor, step: float | Tensor) -> float:
    """Return which fraction of a tensor's values does not change when a small step is
    added.

    A value does not change if the sum of value and step is rounded back to the value in
    the tensor's dtype. The result is the mean of the fractions for a positive and for a
    negative step.

    Args:
        values: a floating-point tensor of any shape.
        step: the size of the step, in the same units as the values.

    >>> ones = torch.ones(4, dtype=torch.bfloat16)  # its neighbours: 1 + 2^-7 and 1 - 2^-8
    >>> [unmoved_share(ones, step) for step in (1e-3, 3e-3, 1e-2)]
    [1.0, 0.5, 0.0]
    >>> unmoved_share(ones.float(), 1e-3)
    0.0
    """
    # Optimizers compute the sum in float32 and round it once, so we do the same.
    wide = values.float() if values.element_size() < 4 else values
    moved = torch.stack((wide + step, wide - step)).to(values.dtype)
    return float((moved == values).sum()) / moved.numel()


def epsilon_share(mean: Tensor, square: Tensor, eps: float) -> float:
    """Return the fraction by which epsilon shortens the steps of Adam.

    The fraction is 1 - Σ |m| / (√v + ε) / Σ |m| / √v. If an entry of the
    weight has v = 0 and m ≠ 0, epsilon removes the whole step of this entry. Entries
    of the weight with m = 0 do not move and are left out of the sum.

    Args:
        mean: m, the running mean of the gradient. A constant factor does not matter.
        square: v, the running mean of the squared gradient, with bias correction.
        eps: ε, in the units of the gradient.

    >>> epsilon_share(torch.tensor([0.0, 3e-8]), torch.tensor([0.0, 9e-16]), 1e-8)
    0.25
    >>> epsilon_share(torch.tensor([1e-30]), torch.zeros(1), 1e-8)
    1.0
    """
    size = mean.double().abs()
    root = square.double().sqrt()
    whole = torch.where(root > 0, size / root, size.sign()).sum()
    left = torch.where(size > 0, size / (root + eps), 0.0).sum()
    return round(1 - float(left / whole), 6) if whole > 0 else 0.0


# --- sentences ------------------------------------------------------------------------------------


class Shortfall(NamedTuple):
    """How much of a step is lost in one tensor, as a fraction.

    Args:
        name: the name of the tensor.
        share: the fraction of entries that do not change, or the fraction by which the
            step is shorter.
        size: the number of entries of the tensor.
        cause: the learning rate that is too small for the dtype, or Adam's epsilon.
        dtype: the dtype that rounds the step, if this is the cause.
    """

    name: str
    share: float
    size: int
    cause: float
    dtype: str = ""


def rounding(groups: Iterable[SameRate]) -> str:
    """Return a warning about weights that no step changes, with suggested fixes.

    If rounding keeps at most a tenth of the weights in every group unchanged, "" is
    returned. If the groups contain matrices, norms and biases are ignored. The weights
    of a norm layer are close to 1, and in bfloat16 such weights do not change at any
    usual learning rate.
    """
    groups = [group for group in groups if group.rate > 0]
    dims = [param.dim() for group in groups for param in group.params.values()]
    least_dims = min(2, max(dims, default=0))
    lost: list[Shortfall] = []
    for group in groups:
        rounded = _rounded(group, least_dims)
        if _share(rounded) > WORTH_SAYING:
            lost += rounded
    if not lost:
        return ""
    return (
        f"At a learning rate of {lost[0].cause:.3g}, {_percent(lost)} of the weights in"
        f" {_names(lost)} do not change in a step, because the change is too small for"
        f" {lost[0].dtype} and is rounded to zero. {_CURES}"
    )


def epsilon(groups: Iterable[SameRate]) -> str:
    """Return a warning if Adam's epsilon makes the steps smaller, with a suggested fix.

    If epsilon shortens the steps of every parameter group by at most a tenth, "" is
    returned.
    """
    lost: list[Shortfall] = []
    for group in groups:
        damped = _damped(group)
        if _share(damped) > WORTH_SAYING:
            lost += damped
    if not lost:
        return ""
    return (
        f"Adam's epsilon of {lost[0].cause:.3g} makes the steps of {_names(lost)} smaller by"
        f" {_percent(lost)}, because the gradients are almost as small as epsilon. Set a smaller"
        " epsilon, such as eps=1e-12."
    )


def rounding_of_normal(step: float, dtype: str) -> str:
    """Return the warning that `rounding` would return for a model with typical weights.

    Typical weights have a normal distribution with a standard deviation of 0.02.

    Args:
        step: the learning rate.
        dtype: the name of a dtype of torch, such as "bfloat16".
    """
    # We use the quantiles of the distribution instead of random numbers. The result is
    # the same every time, and the user's random state does not change.
    places = (torch.arange(ENTRIES) + 0.5) / ENTRIES
    weights = (STD * torch.special.ndtri(places)).to(getattr(torch, dtype))
    layer = f"a layer of standard deviation {STD:g}"
    return rounding([SameRate({layer: weights}, step)])


def _share(lost: Sequence[Shortfall]) -> float:
    """Return the mean of the lost fractions of several tensors, weighted by their sizes."""
    size = sum(each.size for each in lost)
    return sum(each.share * each.size for each in lost) / max(1, size)


def _percent(lost: Sequence[Shortfall]) -> str:
    return f"{100 * _share(lost):.0f} %"


def _names(lost: Sequence[Shortfall]) -> str:
    others = len(lost) - 1
    return f"{lost[0].name} and {others} more" if others else lost[0].name


# --- reading --------------------------------------------------------------------------------------


def _rounded(group: SameRate, least_dims: int) -> list[Shortfall]:
    """Measure the fraction of entries that rounding leaves unchanged in each tensor.

    Tensors with fewer than `least_dims` dimensions are left out.
    """
    lost = []
    for name, param in group.params.items():
        values = _sample(param)
        dtype = str(param.dtype).removeprefix("torch.")
        if len(values) and param.dim() >= least_dims and dtype not in group.kept:
            share = unmoved_share(values, group.rate)
            lost.append(Shortfall(name, share, param.numel(), group.rate, dtype))
    return lost


def _damped(group: SameRate) -> list[Shortfall]:
    """Measure the fraction by which Adam's epsilon shortens the steps of a group.

    The fraction is measured for the whole group and returned for each of its tensors.
    If the state does not contain Adam's running means, the result is empty.
    """
    eps = group.group.get("eps", 0.0)
    means = []
    squares = []
    for param in group.params.values():
        state = group.state.get(param, {})
        if state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
            means.append(_sample(state["exp_avg"]))
            # AMSGrad divides by the largest value that the mean square has had so far.
            square = _sample(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
            correction = 1 - group.group["betas"][1] ** float(state["step"])
            squares.append(square / correction)
    if not means:
        return []
    share = epsilon_share(torch.cat(means), torch.cat(squares), eps)
    return [
        Shortfall(name, share, param.numel(), eps)
        for name, param in group.params.items()
    ]


def _sample(tensor: Tensor) -> Tensor:
    """Copy evenly spaced entries of a tensor to the CPU, and return them.

    The result has between `ENTRIES` and twice as many entries, or all entries of a
    smaller tensor. If a tensor is sharded, only the entries of this process are read.
    For a quantized tensor, or any other tensor with a special storage format, the
    result is empty.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not is_plain or not tensor.is_floating_point() or tensor.is_meta:
        return torch.empty(0)
    # The sizes of matrices are mostly even. With an even stride, all entries could come
    # from a few columns, so `| 1` makes the stride odd.
    stride = max(1, tensor.numel() // ENTRIES) | 1
    return tensor.reshape(-1)[::stride].cpu()


# --- parameters that were replaced ----------------------------------------------------------------


def check_parameters(
    opt: RankAware,
    model: nn.Module | None,
    others: Iterable[RankAware],
) -> bool:
    """Raise an error if the gradients belong to parameters that are not in the
    optimizer.

    Without this check, the optimizer would silently train nothing. The error occurs if
    `fully_shard` replaces the model's parameters after the optimizer was built, if the
    adapter is created again, or if a different adapter is activated.

    Nothing is checked in a step without gradients, or in a step with a learning rate of
    0, which torch.distributed.checkpoint makes. Parameters of other
    `RankAwareOptimizer` objects are ignored. If the optimizer's parameters have
    gradients but an additional adapter has gradients too, there is only a warning.

    Args:
        opt: a `RankAwareOptimizer`.
        model: the model of the optimizer, or None if it was deleted.
        others: all other `RankAwareOptimizer` objects in this process.

    Returns:
        Whether the check must be repeated at the next step.
    """
    # A step with a learning rate of 0 in all groups changes nothing, so the check can
    # wait.
    if not any(float(group["lr"]) for group in opt.param_groups):
        return True
    held = _params_of(opt)
    if model is None or all(map(_is_graded, held)):
        return False
    walked = walk(model)
    # Some parameters of this optimizer have no gradient, which is unusual. Next, we
    # search the model for parameters that have a gradient but are not in any optimizer.
    # This takes longer, because all modules must be visited.
    graded = {name: p for name, p in walked.parameters if _is_graded(p)}
    elsewhere = set(chain(held, *map(_params_of, others)))
    lost = {name: p for name, p in graded.items() if p not in elsewhere}
    if lost:
        _refuse_lost(opt, walked, lost)
    return not graded


def _refuse_lost(
    opt: RankAware, walked: Walk, lost: Mapping[str, nn.Parameter]
) -> None:
    """Raise an error if the parameters of an optimizer were replaced in the model.

    If the optimizer's parameters have gradients too, there is only a warning about
    adapters that are in no optimizer.

    Args:
        opt: the optimizer.
        walked: the modules and parameters of its model.
        lost: the parameters, by name, that have a gradient but are in no optimizer.
    """
    held = _params_of(opt)
    names = {name for group in split_groups(opt) for name in group.names}
    factors = factor_tensors(walked)
    adapters = [name for name, param in lost.items() if param in factors]
    replaced = [name for name in lost if name in names]
    # FSDP1 replaces all parameters by flat ones with different names, so comparing
    # names is not enough.
    gone = set(held).isdisjoint(dict(walked.parameters).values())
    # If no parameter of the optimizer has a gradient, the parameters that have one must
    # have taken their place.
    if not any(map(_is_graded, held)) and (adapters or gone):
        replaced += [*adapters, *lost]
    if replaced:
        name = replaced[0]
        raise OptimizerError(
            f"The parameter {name} has a gradient, but it is not in this optimizer, so the"
            " step would not train it. The model's parameters were replaced, or a different"
            " adapter was activated, after the optimizer was built.",
            "First add and activate the adapters and shard the model (fully_shard, FSDP). Then"
            " build the optimizer.",
        )
    if adapters:
        name = adapters[0]
        warn(
            f"The parameter {name} has a gradient, but no RankAwareOptimizer contains it, so it is"
            " not trained. To train it, add and activate its adapter before you build the"
            " optimizer."
        )


def _params_of(opt: RankAware) -> list[nn.Parameter]:
    return [param for group in opt.param_groups for param in group["params"]]


def _is_graded(param: Tensor) -> bool:
    return param.grad is not None
