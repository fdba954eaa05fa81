"""Initialisation of every trainable LoRA pair at B = 0 or A = 0, without a change of the
model's function.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from .._checks import check_init
from ..errors import InspectionError
from ._pairs import Half, Pair, pairs_of, reading_of, scaling_of, walk
from ._record import Survey
from ._survey import INIT_MARK, inspect_model

DrawnInit = Literal["A", "B"]


class Start(NamedTuple):
    """The new init of one pair: which factor is drawn, with which variance, and which is zeroed."""

    pair: Pair
    drawn: Half
    zeroed: Half
    variance: float


def initialize(
    model: nn.Module | Sequence[nn.Module], init: DrawnInit, *, seed: int = 0
) -> Survey:
    """Initialise every trainable LoRA pair of a model, without a change of the model's function.

    "A" sets B = 0 and draws A ~ N(0, 1/fan_in), with fan-in 1 for an embedding. "B" sets A = 0 and
    draws B ~ N(0, 1/r). Here r is the number of inner features that one output sums: r·k
    in loralib's convolutions, r/groups with a grouped B. A = 0 with alpha = rank is closest to
    full finetuning (Chen, Villar, Hayou, arXiv 2602.06204).

    The function does not change in any bit, since B·A is zero before and after. Each draw depends
    only on `seed` and the factor's name, and is made on the CPU in float32. It is the same on every
    device, and does not change if other layers are added. Tied factors are drawn once. Biases of
    the factors are set to zero. Frozen pairs, all other parameters, gradients, modes and the global
    random state are kept.

    The init is recorded on the model, so that `inspect_model` knows it after training. Another
    process that loads a trained adapter needs `init=` of `inspect_model`, or must call `initialize`
    before it loads the weights. Call it before the optimizer is built, since a `RankAwareOptimizer`
    keeps the rates of the init and scaling that it found.

    Args:
        model: the model with adapters, or several as a list.
        init: "A" (B starts at zero) or "B" (A starts at zero).
        seed: random seed of the draws.

    Returns:
        The survey of the model afterwards.

    Raises:
        InspectionError: the init is impossible, there is no trainable pair, or a pair cannot be
            initialised. It was trained already or started with both factors drawn, is sharded,
            needs its own init (AdaLoRA), or could not learn from this init. Nothing was changed.
    """
    check_init(init, "An adapter is initialised at")
    pairs = [pair for pair in pairs_of(walk(model).modules) if pair.trains]
    if not pairs:
        raise InspectionError(
            "The model has no trainable LoRA pair.",
            "Add adapters with requires_grad, and initialise before sharding, which hides them.",
        )
    with torch.no_grad():
        starts = [_start_of(pair, init) for pair in pairs]
        for start in reversed(starts):  # a tied factor keeps the draw of its first name
            _write(start, init, seed)
    return inspect_model(model)


def _start_of(pair: Pair, init: DrawnInit) -> Start:
    """Return a pair's new init. Raise an `InspectionError` if it cannot have it."""
    if pair.convention.init is not None:
        raise InspectionError(
            f"{pair.where} needs the init of its convention {pair.convention.name!r}.",
            "Freeze its adapter to initialise the others.",
        )
    if pair.is_sharded or hasattr(pair.a.tensor, "full_tensor"):
        raise InspectionError(
            f"{pair.where} is sharded.",
            "Initialise before sharding, on the whole model.",
        )
    reading = reading_of(pair)
    scaling_of(pair, reading.rank_a)
    # the input of an embedding is one-hot
    fan_in = 1.0 if reading.kind == "embedding" else reading.fan_in
    start = Start(pair, pair.a, pair.b, 1 / fan_in)
    if init == "B":
        start = Start(pair, pair.b, pair.a, 1 / (reading.rank_a * reading.inner))
    if not start.zeroed.tensor.requires_grad:
        raise InspectionError(
            f"{start.zeroed.name} of {pair.where} is frozen, so the pair could not learn if it is"
            " zero.",
            f"Unfreeze it, or use init={'A' if init == 'B' else 'B'!r}.",
        )
    if _adds(pair):
        raise InspectionError(
            f"{pair.where} was trained already, or started with both factors drawn: its B·A is not"
            " zero.",
            "Rebuild the adapter on the unchanged base model, with B = 0.",
        )
    return start


def _adds(pair: Pair) -> bool:
    """Return whether the pair changes the layer's output: B·(A·x + bias of A) + bias of B is not
    zero.
    """
    inner = _has_values(pair.a.tensor, *_bias(pair, pair.a))
    of_b = _bias(pair, pair.b)
    return (inner and _has_values(pair.b.tensor)) or _has_values(*of_b)


def _has_values(*tensors: torch.Tensor) -> bool:
    return any(bool(tensor.ne(0).any()) for tensor in tensors)


def _bias(pair: Pair, half: Half) -> list[torch.Tensor]:
    """Return the bias of a factor's module, as PEFT's lora_bias adds it, if there is one."""
    inner = half.name.rpartition(".")[0]
    bias = getattr(pair.owner.get_submodule(inner), "bias", None) if inner else None
    return [bias] if isinstance(bias, torch.Tensor) else []


def _write(start: Start, init: DrawnInit, seed: int) -> None:
    """Draw and zero the factors, and record the init."""
    pair, half, zeroed, variance = start
    digest = hashlib.sha256(f"{seed}:{pair.layer}.{half.name}".encode()).digest()
    # torch's CPU generator takes 32 bits
    source = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    values = torch.randn(
        half.shape, generator=source, dtype=torch.float32, device="cpu"
    )
    half.tensor.copy_(values * math.sqrt(variance))
    for tensor in (zeroed.tensor, *_bias(pair, pair.a), *_bias(pair, pair.b)):
        tensor.zero_()
    marks = {**getattr(pair.owner, INIT_MARK, {}), pair.adapter: init}
    setattr(pair.owner, INIT_MARK, marks)
