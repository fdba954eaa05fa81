"""What does not train though it should: weights whose dtype rounds a step away, steps that Adam's
epsilon makes smaller, and parameters that others took the place of.

The first two are arithmetic on the values. A bfloat16 number has 8 significant bits: about .02 they
lie 1.2e-4 apart, so a step of 1e-5 from one of them is rounded back.
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

# The share of a group's weights, or of their steps, above which it is said.
WORTH_SAYING = 0.1
ENTRIES = 2**12  # read of a tensor: a share of .1 is within .014, three standard errors
STD = 0.02  # of weights where there is no model to read: the init of GPT-2 and Llama
_CURES = (
    "Keep these weights in float32 and train under autocast, or take an optimizer with Kahan"
    " summation (torch-optimi) or stochastic rounding (torchao)."
)


class Trained(NamedTuple):
    """Parameters that an optimizer of Adam's or another sign-like family trains at one rate.

    params: by name. rate: the highest that is known, per step. kept: the dtypes, by name, in which
    the optimizer loses no small step. state: Adam's, by parameter. group: the user's.
    """

    params: Mapping[str, Tensor]
    rate: float
    kept: Collection[str] = ()
    state: Mapping[Tensor, Mapping[str, Any]] = {}
    group: Mapping[str, Any] = {}


# --- two shares -----------------------------------------------------------------------------------


def unmoved_share(values: Tensor, step: float | Tensor) -> float:
    """Return the share of entries that a step leaves where they are, in the values' own dtype: the
    sum is rounded back to the entry. Steps up and down count alike.

    Args:
        values: entries of any shape, floating point.
        step: length of the step, in the values' units.

    >>> ones = torch.ones(4, dtype=torch.bfloat16)  # its neighbours: 1 + 2^-7 and 1 - 2^-8
    >>> [unmoved_share(ones, step) for step in (1e-3, 3e-3, 1e-2)]
    [1.0, 0.5, 0.0]
    >>> unmoved_share(ones.float(), 1e-3)
    0.0
    """
    # as optimizers do: the sum in float32, then one rounding
    wide = values.float() if values.element_size() < 4 else values
    moved = torch.stack((wide + step, wide - step)).to(values.dtype)
    return float((moved == values).sum()) / moved.numel()


def epsilon_share(mean: Tensor, square: Tensor, eps: float) -> float:
    """Return the share of Adam's steps that epsilon takes: 1 - Σ |m| / (√v + ε) / Σ |m| / √v.

    Where v is 0 and m is not, it takes a whole step of the rate. Entries without a step count for
    nothing.

    Args:
        mean: m, the running mean of the gradient, up to a factor.
        square: v, that of its square, corrected for its start at zero.
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


class _Lost(NamedTuple):
    """What a step loses of one tensor.

    share: of its entries. size: their number. at: the rate, or epsilon.
    """

    name: str
    share: float
    size: int
    at: float
    dtype: str


def rounding(groups: Iterable[Trained]) -> str:
    """Return a sentence on the groups of whose weights a step leaves more than a tenth where they
    are, with the cures; "" if there are none.

    Norms and biases do not count beside matrices: in bfloat16 a norm's weights of 1 stay where they
    are at any usual rate.
    """
    groups = [group for group in groups if group.rate > 0]
    dims = [param.dim() for group in groups for param in group.params.values()]
    least = min(2, max(dims, default=0))
    return _sentence(
        (_rounded(group, least) for group in groups),
        "At a rate of {0.at:.3g} a step leaves {share} of the weights where they are in {where}:"
        f" {{0.dtype}} rounds it away. {_CURES}",
    )


def epsilon(groups: Iterable[Trained]) -> str:
    """Return a sentence on the groups of whose steps Adam's epsilon takes more than a tenth, with
    the cure; "" if there are none.
    """
    return _sentence(
        map(_damped, groups),
        "Adam's epsilon of {0.at:.3g} takes {share} of the steps of {where}, whose gradients are"
        " about as small. Give a smaller one, such as eps=1e-12.",
    )


def _sentence(groups: Iterable[Sequence[_Lost]], words: str) -> str:
    """Return what is said of the groups that lose more than a tenth."""
    lost = [each for group in groups if _share(group) > WORTH_SAYING for each in group]
    if not lost:
        return ""
    others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    share = f"{100 * _share(lost):.0f} %"
    return words.format(lost[0], share=share, where=lost[0].name + others)


def _share(lost: Sequence[_Lost]) -> float:
    size = sum(each.size for each in lost)
    return sum(each.share * each.size for each in lost) / max(1, size)


def rounding_of_normal(step: float, dtype: str) -> str:
    """Return the sentence of `rounding` for weights of standard deviation .02 where there is no
    model to read. dtype: the name of one of torch's.
    """
    places = (torch.arange(ENTRIES, dtype=torch.float64) + 0.5) / ENTRIES
    weights = (STD * torch.special.ndtri(places)).to(getattr(torch, dtype))
    return rounding(
        [Trained({f"a layer of standard deviation {STD:g}": weights}, step)]
    )


# --- reading --------------------------------------------------------------------------------------


def _rounded(group: Trained, least: int) -> list[_Lost]:
    """Return what the weights of a group with `least` dimensions lose."""
    lost = []
    for name, param in group.params.items():
        values = _sample(param)
        dtype = str(param.dtype).removeprefix("torch.")
        if len(values) and param.dim() >= least and dtype not in group.kept:
            share = unmoved_share(values, group.rate)
            lost.append(_Lost(name, share, param.numel(), group.rate, dtype))
    return lost


def _damped(group: Trained) -> list[_Lost]:
    """Return what epsilon takes of a group's steps, where the state holds Adam's moments."""
    eps = group.group.get("eps", 0.0)
    means = []
    squares = []
    for param in group.params.values():
        state = group.state.get(param, {})
        if state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
            means.append(_sample(state["exp_avg"]))
            square = _sample(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
            correction = 1 - group.group["betas"][1] ** float(state["step"])
            squares.append(square / correction)
    if not means:
        return []
    share = epsilon_share(torch.cat(means), torch.cat(squares), eps)
    sizes = {name: param.numel() for name, param in group.params.items()}
    return [_Lost(name, share, size, eps, "") for name, size in sizes.items()]


def _sample(tensor: Tensor) -> Tensor:
    """Return every so many-th entry of a tensor, `ENTRIES` to twice as many, or all of fewer, on
    the CPU; of a sharded one those of this process. There are none if it keeps its values in a form
    of its own, as quantized ones do.

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


# --- parameters that others took the place of -----------------------------------------------------


def check_parameters(opt: Any, model: nn.Module | None, others: Iterable[Any]) -> bool:
    """Check that the parameters held here get the gradients of the model, so that training does not
    fail silently. Return whether another step has to look again.

    fully_shard and a re-created adapter replace the tensors under the names held here. Activating
    another adapter leaves those held here without gradients. A dry step without rates, as
    torch.distributed.checkpoint makes, is not checked, nor is one without any gradient, nor are
    parameters that another RankAwareOptimizer holds. Of an adapter's that train beside those held
    a warning is given.

    others: the other RankAwareOptimizers of this process.
    """
    if not any(float(group["lr"]) for group in opt.param_groups):
        return True
    held = _params_of(opt)
    if model is None or all(map(_is_graded, held)):
        return False
    walked = walk(model)
    graded = {name: p for name, p in walked.parameters if _is_graded(p)}
    elsewhere = set(chain(held, *map(_params_of, others)))
    lost = {name: p for name, p in graded.items() if p not in elsewhere}
    if lost:
        _refuse_lost(opt, walked, lost)
    return not graded


def _refuse_lost(opt: Any, walked: Walk, lost: Mapping[str, nn.Parameter]) -> None:
    """Raise if `lost` parameters, which no optimizer has, train in place of those of `opt`. Warn of
    an adapter's that train beside them.
    """
    held = _params_of(opt)
    names = set(opt.rates)
    factors = factor_tensors(walked)
    adapters = [name for name, param in lost.items() if param in factors]
    replaced = [name for name in lost if name in names]
    # FSDP1 flattens them
    gone = set(held).isdisjoint(dict(walked.parameters).values())
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
    if adapters:
        warn(
            f"{adapters[0]} has a gradient, and no RankAwareOptimizer holds it. If it should train"
            " here, build the optimizer after the adapter was added and activated."
        )


def _params_of(opt: Any) -> list[Any]:
    return [param for group in opt.param_groups for param in group["params"]]


def _is_graded(param: Tensor) -> bool:
    return param.grad is not None
