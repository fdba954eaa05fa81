"""Initialisation of every trainable LoRA pair at B = 0 or A = 0, without a change of the
model's function.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from .._checks import check_init
from ..errors import InspectionError
from ._pairs import Pair, reading_of, walk
from ._record import Survey
from ._survey import INIT_MARK, survey_of

DrawnInit = Literal["A", "B"]


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
    device, and does not change if other layers are added. Tied factors are drawn once. Frozen
    pairs, all other parameters, gradients, modes and the global random state are kept.

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
            initialised. It was trained already, started with both factors drawn or has a bias, is
            sharded, needs its own init (AdaLoRA), or could not learn from this init. Nothing was
            changed.
    """
    check_init(init, "An adapter is initialised at")
    walked = walk(model)
    survey = survey_of(walked, init=init)
    pairs = [pair for pair in walked.pairs if pair.trains]
    with torch.no_grad():
        for pair in pairs:
            _check(pair, init)
        for pair in reversed(pairs):  # a tied factor keeps the draw of its first name
            _write(pair, init, seed)
    return survey


def _check(pair: Pair, init: DrawnInit) -> None:
    """Raise if a pair cannot have the init."""
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
    zeroed = pair.b if init == "A" else pair.a
    if not zeroed.tensor.requires_grad:
        raise InspectionError(
            f"{zeroed.name} of {pair.where} is frozen, so the pair could not learn if it is zero.",
            "Unfreeze it, or use the other init.",
        )
    if _has_bias(pair) or (pair.a.tensor.any() and pair.b.tensor.any()):
        raise InspectionError(
            f"{pair.where} was trained already, or started with both factors drawn or with a bias:"
            " its output is not zero.",
            "Rebuild the adapter on the unchanged base model, with B = 0.",
        )


def _has_bias(pair: Pair) -> bool:
    """Return whether the module of a factor has a bias that is not zero."""
    parameters = dict(pair.owner.named_parameters())
    for half in pair.halves:
        name = half.name.removesuffix("weight") + "bias"
        if name in parameters and parameters[name].any():
            return True
    return False


def _write(pair: Pair, init: DrawnInit, seed: int) -> None:
    """Draw and zero the factors, and record the init."""
    reading = reading_of(pair)
    drawn = pair.b
    zeroed = pair.a
    units = reading.rank_a * reading.inner
    if init == "A":
        drawn = pair.a
        zeroed = pair.b
        units = reading.fan_in
        if reading.kind == "embedding":  # its input is one-hot
            units = 1.0
    digest = hashlib.sha256(f"{seed}:{pair.layer}.{drawn.name}".encode()).digest()
    # torch's CPU generator takes 32 bits
    number = int.from_bytes(digest[:4], "big")
    source = torch.Generator().manual_seed(number)
    values = torch.randn(
        drawn.shape, generator=source, dtype=torch.float32, device="cpu"
    )
    drawn.tensor.copy_(values * math.sqrt(1 / units))
    zeroed.tensor.zero_()
    marks = {**getattr(pair.owner, INIT_MARK, {}), pair.adapter: init}
    setattr(pair.owner, INIT_MARK, marks)
