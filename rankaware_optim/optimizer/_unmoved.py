"""Find parameters that do not train although they should.

This has three causes. The dtype of the weights may round a step away, Adam's epsilon
may make the step smaller, or the model's parameters may have been replaced after the
optimizer was built.

The first two causes can be calculated from the values. For example, a bfloat16 number
has 8 significant bits, so numbers near 0.02 are 1.2e-4 apart. A step of 1e-5 from such
a number is rounded back to the same number.
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

# A report and a warning mention a group if more than this share of its weights, or of its steps, is
# lost.
WORTH_SAYING = 0.1
# How many entries of a tensor are read. The standard error of a share of 0.1 is then 0.005.
ENTRIES = 2**12
# Standard deviation of weights, if no model can be read: the init of GPT-2 and Llama.
STD = 0.02
_CURES = (
    "Keep these weights in float32 and train under autocast, or use an optimizer with Kahan"
    " summation (torch-optimi) or stochastic rounding (torchao)."
)


class SameRate(NamedTuple):
    """Parameters that a sign-like optimizer, such as Adam, trains at the same learning
    rate.

    params: the parameters by name. rate: the highest known learning rate of the run,
    which is about the length of a step. kept: names of dtypes in which the optimizer
    does not lose small steps. state: Adam's state by parameter, or an empty dict for
    other optimizers. group: the user's group.
    """

    params: Mapping[str, Tensor]
    rate: float
    kept: Collection[str] = ()
    state: Mapping[Tensor, Mapping[str, Any]] = {}
    group: Mapping[str, Any] = {}


# --- two shares -----------------------------------------------------------------------------------


def unmoved_share(values: Tensor, step: float | Tensor) -> float:
    """Return the fraction of the entries of a tensor that a step would leave unchanged.

    An entry stays unchanged if the sum of the entry and the step is rounded back to the
    entry in its dtype. Steps up and steps down count equally.

    Args:
        values: entries of any shape, floating point.
        step: length of the step, in the values' units.

    >>> ones = torch.ones(4, dtype=torch.bfloat16)  # its neighbours: 1 + 2^-7 and 1 - 2^-8
    >>> [unmoved_share(ones, step) for step in (1e-3, 3e-3, 1e-2)]
    [1.0, 0.5, 0.0]
    >>> unmoved_share(ones.float(), 1e-3)
    0.0
    """
    # Optimizers add in float32 and round once. So does this.
    wide = values.float() if values.element_size() < 4 else values
    moved = torch.stack((wide + step, wide - step)).to(values.dtype)
    return float((moved == values).sum()) / moved.numel()


def epsilon_share(mean: Tensor, square: Tensor, eps: float) -> float:
    """Return the fraction by which epsilon shortens Adam's steps.

        1 - Σ |m| / (√v + ε) / Σ |m| / √v

    An entry with v = 0 and m ≠ 0 counts as a whole step that epsilon removes. Entries
    with m = 0 do not move and are not counted.

    Args:
        mean: m, the running mean of the gradient, up to a constant factor.
        square: v, the running mean of its square, corrected for its start at zero.
        eps: ε, in the gradient's units.

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
    """How much of a step is lost in a tensor.

    share: the lost fraction of the tensor's entries, or of the step's length. size: the
    number of entries. cause: the learning rate at which the dtype rounds, or the value
    of epsilon.
    """

    name: str
    share: float
    size: int
    cause: float
    dtype: str = ""


def rounding(groups: Iterable[SameRate]) -> str:
    """Return a warning about weights that a step leaves unchanged, with suggested
    fixes.

    The result is "" if every group has at most a tenth of such weights. Norms and
    biases are only considered if there are no matrices. The weights of a norm are 1, so
    in bfloat16 they stay unchanged at any usual learning rate.
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
        f"At a learning rate of {lost[0].cause:.3g} a step leaves {_percent(lost)} of the weights"
        f" in {_names(lost)} unchanged, because {lost[0].dtype} rounds it away. {_CURES}"
    )


def epsilon(groups: Iterable[SameRate]) -> str:
    """Return a warning about steps that Adam's epsilon makes smaller, with a suggested
    fix.

    The result is "" if no group loses more than a tenth of its steps.
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
        f" {_percent(lost)}, because gradients there are about as small as epsilon. Set a smaller"
        " one, such as eps=1e-12."
    )


def rounding_of_normal(step: float, dtype: str) -> str:
    """Return the warning of `rounding` for normally distributed weights.

    The weights have a standard deviation of 0.02, as in GPT-2 and Llama. They replace
    the weights of a model when there is no model to read.

    Args:
        step: the learning rate.
        dtype: the name of a dtype of torch, such as "bfloat16".
    """
    # The quantiles in place of random numbers: nobody's random state changes.
    places = (torch.arange(ENTRIES, dtype=torch.float64) + 0.5) / ENTRIES
    weights = (STD * torch.special.ndtri(places)).to(getattr(torch, dtype))
    layer = f"a layer of standard deviation {STD:g}"
    return rounding([SameRate({layer: weights}, step)])


def _share(lost: Sequence[Shortfall]) -> float:
    """Return the fraction of a step that several tensors lose on average."""
    size = sum(each.size for each in lost)
    return sum(each.share * each.size for each in lost) / max(1, size)


def _percent(lost: Sequence[Shortfall]) -> str:
    return f"{100 * _share(lost):.0f} %"


def _names(lost: Sequence[Shortfall]) -> str:
    others = len(lost) - 1
    return f"{lost[0].name} and {others} more" if others else lost[0].name


# --- reading --------------------------------------------------------------------------------------


def _rounded(group: SameRate, least_dims: int) -> list[Shortfall]:
    """Measure how much of a step is lost to rounding in each tensor.

    Tensors with fewer than `least_dims` dimensions are skipped.
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
    """Measure how much epsilon shortens the steps of a group.

    The fraction is measured over the whole group, and every tensor of the group gets
    the same value. The result is empty if the state does not contain Adam's moments.
    """
    eps = group.group.get("eps", 0.0)
    means = []
    squares = []
    for param in group.params.values():
        state = group.state.get(param, {})
        if state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
            means.append(_sample(state["exp_avg"]))
            # AMSGrad divides by the largest mean square so far.
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
    """Return evenly spaced entries of a tensor on the CPU.

    The number of entries is between `ENTRIES` and twice as many, or the whole tensor if
    it is smaller. The stride is odd, because an even stride could read only a single
    column of a matrix. Only the local entries of a sharded tensor are read. The result
    is empty for tensors with a special storage format, such as quantized tensors.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not is_plain or not tensor.is_floating_point() or tensor.is_meta:
        return torch.empty(0)
    stride = max(1, tensor.numel() // ENTRIES) | 1
    return tensor.reshape(-1)[::stride].cpu()


# --- parameters that were replaced ----------------------------------------------------------------


def check_parameters(
    opt: RankAware,
    model: nn.Module | None,
    others: Iterable[RankAware],
) -> bool:
    """Check that the model's gradients reach the parameters of this optimizer.

    If they only reach other parameters, the optimizer would silently train nothing, so
    an error is raised. The result is whether the next step must check again.

    `fully_shard`, or creating an adapter again, replaces parameters with new tensors of
    the same name. Activating another adapter leaves the parameters of this optimizer
    without gradients.

    Nothing is checked in a step at learning rate 0, which torch.distributed.checkpoint
    uses, or in a step without any gradient. Parameters of another RankAwareOptimizer
    are not considered. If an adapter trains in addition to this optimizer's parameters,
    there is only a warning.

    Args:
        opt: a `RankAwareOptimizer` that has gradients.
        model: its model, None if that is gone.
        others: the other RankAwareOptimizers of this process.
    """
    # A step at learning rate 0 in all groups changes nothing, so there is nothing to check yet.
    if not any(float(group["lr"]) for group in opt.param_groups):
        return True
    held = _params_of(opt)
    if model is None or all(map(_is_graded, held)):
        return False
    walked = walk(model)
    # Some held parameter has no gradient. Has another parameter one, which nobody holds?
    graded = {name: p for name, p in walked.parameters if _is_graded(p)}
    elsewhere = set(chain(held, *map(_params_of, others)))
    lost = {name: p for name, p in graded.items() if p not in elsewhere}
    if lost:
        _refuse_lost(opt, walked, lost)
    return not graded


def _refuse_lost(
    opt: RankAware, walked: Walk, lost: Mapping[str, nn.Parameter]
) -> None:
    """Raise an error if other parameters train in place of the parameters of this
    optimizer.

    If the other parameters belong to an adapter that trains in addition to this
    optimizer's parameters, a warning is printed instead.

    lost: the parameters by name that have a gradient but belong to no optimizer.
    """
    held = _params_of(opt)
    names = {name for group in split_groups(opt) for name in group.names}
    factors = factor_tensors(walked)
    adapters = [name for name, param in lost.items() if param in factors]
    replaced = [name for name in lost if name in names]
    # FSDP1 replaces all parameters by flat ones under other names.
    gone = set(held).isdisjoint(dict(walked.parameters).values())
    # If none of the held parameters trains, others train in their place.
    if not any(map(_is_graded, held)) and (adapters or gone):
        replaced += [*adapters, *lost]
    if replaced:
        raise OptimizerError(
            f"The model's {replaced[0]} has a gradient, but this optimizer does not hold it, and"
            " the parameters that it holds have none. After it was built, the model's parameters"
            " were replaced or another adapter was activated.",
            "Shard or wrap the model first (fully_shard, FSDP), with its adapters, then build the"
            " optimizer.",
        )
    if adapters:
        warn(
            f"{adapters[0]} has a gradient, but no RankAwareOptimizer holds it, so it does not"
            " train. If it should, add and activate the adapter before you build the optimizer."
        )


def _params_of(opt: RankAware) -> list[nn.Parameter]:
    return [param for group in opt.param_groups for param in group["params"]]


def _is_graded(param: Tensor) -> bool:
    return param.grad is not None
