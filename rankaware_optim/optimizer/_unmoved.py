"""Weights that a step leaves where they are, since their dtype rounds it away, and steps that
Adam's epsilon makes smaller.

It is arithmetic on the values. A bfloat16 number has 8 significant bits: about .02 they lie 1.2e-4
apart, so a step of 1e-5 from one of them is rounded back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .._optimizers import kept_dtypes, known_optimizer
from .._warn import warn

# The share of a group's weights, or of their steps, above which it is said.
WORTH_SAYING = 0.1
ENTRIES = 2**12  # read of a group: a share of .1 is within .014, three standard errors
STD = 0.02  # of weights where there is no model to read: the init of GPT-2 and Llama
# The step at which epsilon is looked at once. Where B starts at zero, A's first gradients are zero,
# and grow with B.
EPSILON_AT = 100
_PEAKS = ("initial_lr", "max_lr")  # what schedulers note in a group
_CURES = (
    "Keep these weights in float32 and train under autocast, or take an optimizer with Kahan"
    " summation (torch-optimi) or stochastic rounding (torchao)."
)


@dataclass(frozen=True)
class Trained:
    """Parameters that an optimizer of Adam's or another sign-like family trains at one rate.

    params: by name. rate: the highest that is known, per step. kept: the dtypes, by name, in which
    the optimizer loses no small step. state: the optimizer's, by parameter. eps, beta2: Adam's.
    """

    params: Mapping[str, Tensor]
    rate: float
    kept: Collection[str] = ()
    state: Mapping[Tensor, Mapping[str, Any]] = field(default_factory=dict)
    eps: float = 0.0
    beta2: float = 0.0


def trained_by(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    params: Mapping[str, Tensor],
    rate: float,
) -> Trained:
    """Return what an optimizer trains at one rate.

    Args:
        optimizer: the optimizer. Its state is read for Adam's epsilon.
        group: the settings of these parameters.
        params: the parameters by name. Frozen ones are left out.
        rate: their highest rate, per step.
    """
    params = {name: param for name, param in params.items() if param.requires_grad}
    kept = kept_dtypes(optimizer, group)
    if known_optimizer(type(optimizer))[1].relation != "as AdamW":
        return Trained(params, rate, kept)
    eps, betas = group.get("eps", 0.0), group.get("betas", (0.0, 0.0))
    return Trained(params, rate, kept, optimizer.state, eps, float(betas[1]))


def trained_parts(opt: Any, *, first_step: bool = False) -> list[Trained]:
    """Return what a `RankAwareOptimizer` of a sign-like family trains, at its highest rates.

    first_step: whether the rates with which it was built count too.
    """
    parts, trained = opt._rankaware.parts, []
    users = parts.shown(opt)
    splits = parts.of(users)
    none_trains = not any(float(user["lr"]) for user in users)
    for group in opt.rates.groups:
        if group.family != "sign-like":
            continue
        user = users[group.user_group]
        # a rate of 0 freezes a group beside others, and begins a warm-up of all
        trains = none_trains or float(user["lr"]) > 0
        before = [splits[group.user_group].lr] if first_step and trains else ()
        rate = highest_rate(user, before) * group.multiplier
        params = dict(zip(group.names, group.params, strict=False))
        trained.append(trained_by(opt, user, params, rate))
    return trained


def warn_of_unmoved(opt: Any, step: int) -> None:
    """Warn of weights that do not move at the first step, and later of Adam's epsilon."""
    text = ""
    if step == 1:
        text = rounding(trained_parts(opt, first_step=True))
    elif step == EPSILON_AT:
        text = epsilon(trained_parts(opt))
    if text:
        warn(text)


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
    """
    size, root = mean.double().abs(), square.double().sqrt()
    whole = torch.where(root > 0, size / root, size.sign()).sum()
    left = torch.where(size > 0, size / (root + eps), 0.0).sum()
    return round(1 - float(left / whole), 6) if whole > 0 else 0.0


# --- sentences ------------------------------------------------------------------------------------


def highest_rate(group: Mapping[str, Any], before: Iterable[Any] = ()) -> float:
    """Return the highest rate of a group that is known, since the first steps of a warm-up are
    small: that which a scheduler noted, else the largest of now and `before`.

    before: rates that the group had, such as the one that it was built with.

    >>> highest_rate({"lr": 0.0, "initial_lr": 1e-5}, [1e-3]), highest_rate({"lr": 0.0}, [1e-3])
    (1e-05, 0.001)
    """
    peaks = [group[key] for key in _PEAKS if group.get(key) is not None]
    return max(map(float, (group["lr"], *(peaks or before))))


def rounding(groups: Iterable[Trained]) -> str:
    """Return a sentence on the groups of whose weights in one dtype a step leaves more than a tenth
    where they are, with the cures; "" if there are none.
    """
    lost = [each for each in _rounded(groups) if each.share > WORTH_SAYING]
    if not lost:
        return ""
    dtypes = " and ".join(sorted({each.dtype for each in lost}))
    return (
        f"At a rate of {_ends(lost)} a step leaves {_share(lost)} of the weights where they are in"
        f" {_names(lost)}: {dtypes} rounds it away. {_CURES}"
    )


def epsilon(groups: Iterable[Trained]) -> str:
    """Return a sentence on the groups of whose steps Adam's epsilon takes more than a tenth, with
    the cure; "" if there are none.
    """
    lost = [each for each in _damped(groups) if each.share > WORTH_SAYING]
    if not lost:
        return ""
    smaller = min(each.at for each in lost) / 1e4
    return (
        f"Adam's epsilon of {_ends(lost)} takes {_share(lost)} of the steps of {_names(lost)},"
        f" whose gradients are about as small. Give a smaller one, such as eps={smaller:.0e}."
    )


def rounding_of_normal(step: float, dtype: str) -> str:
    """Return the sentence of `rounding` for weights of standard deviation .02 where there is no
    model to read. dtype: the name of one of torch's.
    """
    places = (torch.arange(ENTRIES, dtype=torch.float64) + 0.5) / ENTRIES
    weights = (STD * torch.special.ndtri(places)).to(getattr(torch, dtype))
    return rounding(
        [Trained({f"a layer of standard deviation {STD:g}": weights}, step)]
    )


class _Lost(NamedTuple):
    """What one group's weights, or their steps, lose.

    share: of their entries. size: number of these. at: the rate, or epsilon.
    """

    share: float
    size: int
    names: Sequence[str]
    at: float
    dtype: str


def _share(lost: Sequence[_Lost]) -> str:
    total = sum(each.share * each.size for each in lost)
    return f"{100 * total / sum(each.size for each in lost):.0f} %"


def _ends(lost: Sequence[_Lost]) -> str:
    ends = min(each.at for each in lost), max(each.at for each in lost)
    return " to ".join(dict.fromkeys(f"{end:.3g}" for end in ends))


def _names(lost: Sequence[_Lost]) -> str:
    first, *others = [name for each in lost for name in each.names]
    return first + (f" and {len(others)} more" if others else "")


# --- reading --------------------------------------------------------------------------------------


def _rounded(groups: Iterable[Trained]) -> Iterator[_Lost]:
    """Yield what the weights of each group lose in each dtype.

    Norms and biases do not count beside matrices: in bfloat16 a norm's weights of 1 stay where they
    are at any usual rate.
    """
    groups = [group for group in groups if group.rate > 0]
    dims = [param.dim() for group in groups for param in group.params.values()]
    least = min(2, max(dims, default=0))
    for group in groups:
        counted = {n: p for n, p in group.params.items() if p.dim() >= least}
        for dtype, values in _by_place(counted):
            if dtype in group.kept:
                continue
            entries = torch.cat(_samples(values.values()))
            share = unmoved_share(entries, group.rate)
            yield _Lost(share, _size(values.values()), list(values), group.rate, dtype)


def _damped(groups: Iterable[Trained]) -> Iterator[_Lost]:
    """Yield what epsilon takes of each group's steps, where the state holds Adam's moments."""
    for group in groups:
        means, squares, steps = {}, {}, {}
        for name, param in group.params.items():
            state = group.state.get(param, {})
            if not group.eps or not state.keys() >= {"step", "exp_avg", "exp_avg_sq"}:
                continue
            square = _local(state.get("max_exp_avg_sq", state["exp_avg_sq"]))
            if square is not None:
                means[name], squares[name] = state["exp_avg"], square
                steps[name] = state["step"]
        for dtype, local in _by_place(means):
            corrected = [
                square / (1 - group.beta2 ** steps[name])
                for name, square in zip(
                    local, _samples([squares[name] for name in local]), strict=True
                )
            ]
            entries = torch.cat(_samples(local.values()))
            share = epsilon_share(entries, torch.cat(corrected), group.eps)
            yield _Lost(share, _size(local.values()), list(local), group.eps, dtype)


def _by_place(
    tensors: Mapping[str, Tensor],
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the tensors that can be read, of each dtype, by its name, and device."""
    places: dict[Any, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        local = _local(tensor)
        if local is not None:
            places.setdefault((local.dtype, local.device), {})[name] = local
    for (dtype, _), local_tensors in places.items():
        yield str(dtype).removeprefix("torch."), local_tensors


def _local(tensor: Tensor) -> Tensor | None:
    """Return a tensor's values, of a sharded one those of this process. None if it has none, or
    keeps them in a form of its own, as quantized ones do.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    is_read = is_plain and tensor.is_floating_point() and not tensor.is_meta
    return tensor if is_read and tensor.numel() else None


def _samples(tensors: Collection[Tensor]) -> list[Tensor]:
    """Return every so many-th entry of tensors, about `ENTRIES` of all together, or all of fewer.

    The stride is odd, so that it does not walk along one column of a matrix.
    """
    stride = max(1, _size(tensors) // ENTRIES) | 1
    return [tensor.reshape(-1)[::stride] for tensor in tensors]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
