"""Initialisation of every trainable LoRA pair at B = 0 or A = 0, without a change of the
model's function.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from torch import nn

from .._checks import check_init
from .._types import Survey
from ..errors import InspectionError
from ._pairs import (
    Half,
    Pair,
    declared_number,
    pairs_of,
    reading_of,
    scaling_of,
    walk,
)
from ._survey import INIT_MARK, inspect_model

DrawnInit = Literal["A", "B"]


class Start(NamedTuple):
    """The new init of one pair: which factor is drawn, with which variance, and which is zeroed."""

    pair: Pair
    drawn: Half
    zeroed: Half
    variance: float


def initialize(model: nn.Module, init: DrawnInit, *, seed: int = 0) -> Survey:
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
        model: the model with adapters.
        init: "A" (B starts at zero) or "B" (A starts at zero).
        seed: random seed of the draws.

    Returns:
        The survey of the model afterwards.

    Raises:
        InspectionError: an argument is impossible, there is no trainable pair, or a pair cannot be
            initialised. It was trained already or started with both factors drawn, is sharded, has
            no values yet, needs its own init (AdaLoRA), or could not learn from this init. Nothing
            was changed.
    """
    check_init(init, "An adapter is initialised at")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InspectionError(
            f"The seed {seed!r} is not a whole number.", "Give a whole number."
        )
    walked = walk(model)
    pairs = [pair for pair in pairs_of(walked.modules) if pair.trains]
    if not pairs:
        raise InspectionError(
            f"No trainable LoRA pair among {len(walked.parameters)} parameters.",
            "Add adapters with requires_grad, and initialise before sharding, which hides them.",
        )
    with torch.no_grad():
        starts = [_start_of(pair, init) for pair in pairs]
        drawn = {_memory_of(start.drawn) for start in starts}
        for start in starts:
            if _memory_of(start.zeroed) in drawn:
                raise InspectionError(
                    f"{start.zeroed.name} of {start.pair.where} is tied to a factor that must be"
                    " drawn.",
                    "Untie the adapters, or freeze one of the two.",
                )
        _write_starts(starts, init, seed)
    return inspect_model(model)


# --- checks ---------------------------------------------------------------------------------------


def _start_of(pair: Pair, init: DrawnInit) -> Start:
    """Return a pair's new init. Raise an `InspectionError` if it cannot have it."""
    if pair.convention.init is not None:
        raise InspectionError(
            f"{pair.where} needs the init of its convention {pair.convention.name!r}.",
            "Freeze its adapter to initialise the others.",
        )
    _refuse_unwritable(pair, pair.a)
    _refuse_unwritable(pair, pair.b)
    reading = reading_of(pair)
    scaling_of(pair, reading.rank_a)
    if init == "B":
        drawn, zeroed, variance = pair.b, pair.a, 1 / (reading.rank_a * reading.inner)
    else:
        # the input of an embedding is one-hot
        fan_in = 1.0 if reading.kind == "embedding" else reading.fan_in
        drawn, zeroed, variance = pair.a, pair.b, 1 / fan_in
    if not zeroed.tensor.requires_grad:
        raise InspectionError(
            f"{zeroed.name} of {pair.where} is frozen, so the pair could not learn if it is zero.",
            f"Unfreeze it, or use init={'A' if init == 'B' else 'B'!r}.",
        )
    if declared_number(pair, ("scalar",)) == 0:
        raise InspectionError(
            f"{pair.where} multiplies its adapter by a `scalar` of zero, so with a zero factor it"
            " could not learn.",
            "Build it without the scalar (use_scalar=False).",
        )
    if _adds(pair):
        raise InspectionError(
            f"{pair.where} was trained already, or started with both factors drawn: its B·A is not"
            " zero.",
            "Rebuild the adapter on the unchanged base model, with B = 0.",
        )
    return Start(pair, drawn, zeroed, variance)


def _refuse_unwritable(pair: Pair, half: Half) -> None:
    tensor = half.tensor
    problems = (
        (
            tensor.is_meta,
            "is on the meta device",
            "Materialise the model (to_empty) first.",
        ),
        (
            hasattr(tensor, "full_tensor") or half.is_shard,
            "is sharded",
            "Initialise before sharding, on the whole model.",
        ),
        (
            not tensor.is_leaf or not tensor.is_floating_point(),
            "cannot be drawn: it is computed from other tensors or does not have a floating-point"
            " dtype",
            "Remove its parametrization, or keep the factors in a floating dtype.",
        ),
        (
            tensor.is_inference() and not torch.is_inference_mode_enabled(),
            "is an inference tensor",
            "Build the model outside torch.inference_mode().",
        ),
    )
    for is_so, problem, cure in problems:
        if is_so:
            raise InspectionError(f"{half.name} of {pair.where} {problem}.", cure)


def _memory_of(half: Half) -> tuple[torch.device, int]:
    """Return a key of a factor's memory. Tied factors may be two parameters with the same memory,
    one transposed.
    """
    return half.tensor.device, half.tensor.data_ptr()


def _adds(pair: Pair) -> bool:
    """Return whether the pair changes the layer's output: B·(A·x + bias of A) + bias of B is not
    zero.
    """
    inner = _has_values(pair.a.tensor) or _has_values(_bias(pair, pair.a))
    return (inner and _has_values(pair.b.tensor)) or _has_values(_bias(pair, pair.b))


def _has_values(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and bool(tensor.detach().ne(0).any())


def _bias(pair: Pair, half: Half) -> torch.Tensor | None:
    """Return the bias of a factor's module, as PEFT's lora_bias adds it."""
    inner, _, last = half.name.rpartition(".")
    if not inner or last != "weight":
        return None
    bias = getattr(pair.owner.get_submodule(inner), "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


# --- drawing --------------------------------------------------------------------------------------


def _write_starts(starts: Iterable[Start], init: DrawnInit, seed: int) -> None:
    """Draw and zero the factors, and record the inits. A tied factor is drawn once, by its first
    name.
    """
    drawn = set[tuple[torch.device, int]]()
    for pair, half, zeroed, variance in starts:
        if _memory_of(half) not in drawn:
            drawn.add(_memory_of(half))
            name = f"{seed}:{pair.layer}.{half.name}"
            digest = hashlib.sha256(name.encode()).digest()
            # torch's CPU generator takes 32 bits.
            source = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            values = torch.randn(
                half.shape, generator=source, dtype=torch.float32, device="cpu"
            )
            half.tensor.copy_(values * math.sqrt(variance))
        for tensor in (zeroed.tensor, _bias(pair, pair.a), _bias(pair, pair.b)):
            if tensor is not None:
                tensor.zero_()
        marks = {**getattr(pair.owner, INIT_MARK, {}), pair.adapter: init}
        setattr(pair.owner, INIT_MARK, marks)
