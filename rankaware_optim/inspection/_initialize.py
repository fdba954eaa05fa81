"""`initialize`: starts every LoRA pair that trains at B = 0 or at A = 0. The model's output is the
same before and after.
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
    """Initialise every LoRA pair that trains, at B = 0 or A = 0. The model's output stays the same.

    "A" sets B = 0 and draws A ~ N(0, 1/fan_in), with fan-in 1 for an embedding. "B" sets A = 0 and
    draws B ~ N(0, 1/r). Here r is the number of inner features that are summed into one output: r·k
    in loralib's convolutions, r/groups with a grouped B. A = 0 with alpha = rank is closest to
    full finetuning (Chen, Villar, Hayou, arXiv 2602.06204).

    The output stays the same to the last bit, because B·A is zero before and after. A draw depends
    only on `seed` and the matrix's name, and is made on the CPU in float32. So it is the same on
    every device and does not change if layers are added. Tied matrices are drawn once. Frozen
    pairs, all other parameters, gradients, modes and the global random state stay unchanged.

    Call it before you build the optimizer: a `RankAwareOptimizer` keeps the learning rates for the
    init and scaling that it found. The init is noted on the model, so that `inspect_model` knows it
    after training. A new process that loads the trained adapter does not have this note. There,
    pass `init=` to `inspect_model`, or call `initialize` before loading the weights.

    Args:
        model: the model with adapters, or several as a list.
        init: "A" (B starts at zero) or "B" (A starts at zero).
        seed: random seed of the draws.

    Returns:
        The survey of the model afterwards.

    Raises:
        InspectionError: the init is impossible, no LoRA pair trains, or a pair cannot be
            initialised: it was trained already, started with A and B drawn, has a bias, is sharded,
            needs an init of its own (AdaLoRA, MiCA), or could not learn from this one. Nothing was
            changed.
    """
    check_init(init, "The init must be")
    walked = walk(model)
    survey = survey_of(walked, init=init)
    pairs = [pair for pair in walked.pairs if pair.trains]
    mica = {f.layer for f in survey.factors if f.kind == "mica"}
    with torch.no_grad():
        for pair in pairs:
            _check(pair, init, has_own_init=pair.layer in mica)
        for pair in reversed(
            pairs
        ):  # so that a tied matrix keeps the draw of its first name
            _write(pair, init, seed)
    return survey


def _check(pair: Pair, init: DrawnInit, *, has_own_init: bool) -> None:
    """Raise an error if a pair cannot have this init."""
    if has_own_init or pair.convention.init is not None:
        raise InspectionError(
            f"{pair.where} needs an init of its own, as AdaLoRA and MiCA do.",
            "Freeze its adapter, and call initialize() for the others.",
        )
    if pair.is_sharded or hasattr(pair.a.tensor, "full_tensor"):
        raise InspectionError(
            f"{pair.where} is sharded, so it cannot be initialised.",
            "Call initialize() on the whole model, before sharding it.",
        )
    zeroed = pair.b if init == "A" else pair.a
    if not zeroed.tensor.requires_grad:
        raise InspectionError(
            f"{zeroed.name} of {pair.where} is frozen. If it were set to zero, the pair could never"
            " learn.",
            f"Set its requires_grad, or use init={'B' if init == 'A' else 'A'!r}.",
        )
    if _has_bias(pair) or (pair.a.tensor.any() and pair.b.tensor.any()):
        raise InspectionError(
            f"The output of the adapter of {pair.where} is not zero: it was trained already, or"
            " started with A and B drawn, or has a bias.",
            "Create the adapter again on the unchanged base model, with B = 0.",
        )


def _has_bias(pair: Pair) -> bool:
    """Return whether A or B is a module with a bias that is not zero."""
    parameters = dict(pair.owner.named_parameters())
    for half in pair.halves:
        name = half.name.removesuffix("weight") + "bias"
        if name in parameters and parameters[name].any():
            return True
    return False


def _write(pair: Pair, init: DrawnInit, seed: int) -> None:
    """Draw one matrix, set the other to zero, and note the init on the module."""
    reading = reading_of(pair)
    drawn = pair.b
    zeroed = pair.a
    units = reading.rank_a * reading.inner
    if init == "A":
        drawn = pair.a
        zeroed = pair.b
        units = reading.fan_in
        if reading.kind == "embedding":  # its input is one-hot: one entry is not zero
            units = 1.0
    digest = hashlib.sha256(f"{seed}:{pair.layer}.{drawn.name}".encode()).digest()
    # torch's CPU generator uses 32 bits of a seed.
    number = int.from_bytes(digest[:4], "big")
    source = torch.Generator().manual_seed(number)
    values = torch.randn(
        drawn.shape, generator=source, dtype=torch.float32, device="cpu"
    )
    drawn.tensor.copy_(values * math.sqrt(1 / units))
    zeroed.tensor.zero_()
    marks = {**getattr(pair.owner, INIT_MARK, {}), pair.adapter: init}
    setattr(pair.owner, INIT_MARK, marks)
