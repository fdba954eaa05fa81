"""The rate of Adam's first step that lowers the loss of a batch most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import InvalidReferenceError

Loss = Callable[[], Tensor]
Tensors = Mapping[Tensor, Tensor]

# log2 of the rates tried, and of the step after which the other factor has a gradient
_TRIED, _PROBE = range(-17, 1), -20


def line_search(
    weights: Sequence[nn.Parameter], loss: Loss, buffers: Iterable[Tensor] = ()
) -> int:
    """Return log2 of the rate of the first step, 2^-17 to 1, after which the loss is lowest.

    Adam's first step moves each weight by the rate, against the sign of its gradient. Where one
    factor of LoRA is zero, the other has no gradient: its sign is taken after a tiny step. Weights,
    gradients, buffers and torch's random state are left as they were.

    Args:
        weights: the weights that move. They are copied.
        loss: () -> the loss of a batch, the same one each time.
        buffers: what else the loss may change. They are copied.

    Raises:
        InvalidReferenceError: no weight has a gradient, or the loss is finite at no rate.
    """
    before = {tensor: tensor.detach().clone() for tensor in (*weights, *buffers)}

    def loss_after(rate: float, signs: Tensors) -> Tensor:
        _step(before, signs, rate)
        torch.manual_seed(0)  # the same noise each time
        return loss()

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            signs = _signs(weights, loss_after(0.0, {}))
            signs = {**_signs(weights, loss_after(2.0**_PROBE, signs)), **signs}
            with torch.no_grad():
                losses = {x: float(loss_after(2.0**x, signs)) for x in _TRIED}
        finally:
            _step(before, {}, 0.0)
    finite = {x: found for x, found in losses.items() if math.isfinite(found)}
    if not (signs and finite):
        raise InvalidReferenceError(
            "The loss has no gradient in the adapters, or is not finite.",
            "Give a function that returns the model's training loss on a batch.",
        )
    return min(finite, key=finite.__getitem__)


def _signs(weights: Sequence[nn.Parameter], loss: Tensor) -> Tensors:
    """Return the gradients' signs of the weights that have any."""
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(weights, grads, strict=True)
    return {
        weight: grad.sign() for weight, grad in pairs if grad is not None and grad.any()
    }


@torch.no_grad()
def _step(before: Tensors, signs: Tensors, rate: float) -> None:
    """Set each tensor to what it is after a step from before."""
    for tensor, start in before.items():
        tensor.copy_(start)
        if tensor in signs:
            tensor.sub_(signs[tensor], alpha=rate)
