"""Parameters that do not train although they should. There are three causes: the weights' dtype
rounds the step away, Adam's epsilon makes the step smaller, or the model's parameters were replaced
after the optimizer was built.

The first two are arithmetic on the values. A bfloat16 number has 8 significant bits. Near 0.02 such
numbers lie 1.2e-4 apart, so a step of 1e-5 from one of them is rounded back to it.
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
    """Parameters that a sign-like optimizer, such as Adam, trains at one learning rate.

    params: the parameters by name. rate: the highest learning rate that is known of the run, which
    is about the length of a step. kept: names of dtypes with which the optimizer loses no small
    step. state: Adam's state by parameter, empty for other optimizers. group: the user's group.
    """

    params: Mapping[str, Tensor]
    rate: float
    kept: Collection[str] = ()
    state: Mapping[Tensor, Mapping[str, Any]] = {}
    group: Mapping[str, Any] = {}


# --- two shares -----------------------------------------------------------------------------------


def unmoved_share(values: Tensor, step: float | Tensor) -> float:
    """Return the share of entries that a step leaves unchanged, because the sum is rounded back to
    the entry in the values' own dtype. Steps up and down count equally.

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
    """Return how much epsilon shortens Adam's steps, as a share:
    1 - Σ |m| / (√v + ε) / Σ |m| / √v.

    An entry with v = 0 and m ≠ 0 counts as one whole step that epsilon removes. Entries with m = 0
    do not step and do not count.

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
    """How much of a step is lost in one tensor.

    share: of the tensor's entries, or of the step's length. size: number of entries. cause: the
    learning rate that a dtype rounds, or epsilon.
    """

    name: str
    share: float
    size: int
    cause: float
    dtype: str = ""


def rounding(groups: Iterable[SameRate]) -> str:
    """Return a sentence on the weights that a step leaves unchanged, with the cures. It is "" if no
    group has more than a tenth of them.

    Norms and biases do not count beside matrices: in bfloat16 the weights of a norm, which are 1,
    stay unchanged at any usual learning rate.
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
    """Return a sentence on the steps that Adam's epsilon makes smaller, with the cure. It is "" if
    no group loses more than a tenth of its steps.
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
    """Return the sentence of `rounding` for normal weights of standard deviation 0.02, in place of
    a model's.

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
    """Return the share that several tensors lose together."""
    size = sum(each.size for each in lost)
    return sum(each.share * each.size for each in lost) / max(1, size)


def _percent(lost: Sequence[Shortfall]) -> str:
    return f"{100 * _share(lost):.0f} %"


def _names(lost: Sequence[Shortfall]) -> str:
    others = len(lost) - 1
    return f"{lost[0].name} and {others} more" if others else lost[0].name


# --- reading --------------------------------------------------------------------------------------


def _rounded(group: SameRate, least_dims: int) -> list[Shortfall]:
    """Measure how much of a step rounding takes, in each tensor that has at least so many
    dimensions.
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
    """Measure how much of a group's steps epsilon takes, if the state holds Adam's moments. All
    tensors of the group get the group's share.
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
    """Return evenly spaced entries of a tensor, on the CPU: between `ENTRIES` and twice as many, or
    all if there are fewer. Of a sharded tensor only this process's entries are read. A tensor that
    stores its values in a form of its own, such as a quantized one, gives none.

    The stride is odd, so that it does not walk along one column of a matrix.
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
    """Raise an error if the model's gradients reach parameters that this optimizer does not hold,
    so that it would silently train nothing. Return whether the next step must check again.

    fully_shard, and an adapter that is created again, put new tensors under the same names. After
    another adapter was activated, the parameters held here have no gradients.

    Not checked are a step at learning rate 0, as torch.distributed.checkpoint makes one, a step
    without any gradient, and parameters that another RankAwareOptimizer holds. If an adapter
    trains beside the parameters held here, there is only a warning.

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
    """Raise an error if parameters that no optimizer holds train in place of the ones in `opt`.
    Warn if they belong to an adapter that trains beside them.

    lost: the parameters with a gradient that no optimizer holds, by name.
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
