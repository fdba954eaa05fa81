"""This module initialises the LoRA matrices of a model so that either B or A is zero.

The output of the model does not change, because B·A stays zero.
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
    """Initialise all trainable LoRA pairs of a model at B = 0 or at A = 0.

    With init="A", B is set to zero and A ~ N(0, 1/fan_in) is random. The fan-in of an
    embedding counts as 1. With init="B", A is set to zero and B ~ N(0, 1/r) is random.
    In this formula, r is the number of columns of B that contribute to one output. It
    is r·k in loralib's convolutions, and r/groups if B is grouped. Setting A to zero,
    with alpha equal to the rank, makes LoRA most similar to full finetuning (Chen,
    Villar, Hayou, arXiv 2602.06204).

    The output of the model does not change at all, because B·A is zero before and after
    the call. The random values depend only on `seed` and on the name of the matrix, and
    they are computed on the CPU in float32. The random values are therefore the same on
    every device, even if layers are added to the model. Tied matrices are initialised
    once. The call does not change frozen LoRA pairs, any other parameters, gradients,
    the train or eval mode of modules, or the global random state.

    Call this function before you build the optimizer, because `RankAwareOptimizer`
    chooses the learning rates for the init that it finds. The init is also stored on
    the model, so `inspect_model` still knows the init after training. Adapter files do
    not contain the init. In a new process that loads the trained adapter, pass
    `init=` to `inspect_model`, or call `initialize` before the weights are loaded.

    Args:
        model: the model with adapters, or a list of models.
        init: "A" (B starts at zero) or "B" (A starts at zero).
        seed: the random seed.

    Returns:
        A survey of the initialised model.

    Raises:
        InspectionError: the init is invalid, the model has no trainable LoRA pair, or a
            pair cannot be initialised. This is the case if the pair was already
            trained, has a bias or is sharded, if neither A nor B is zero, if its method
            requires a special init (AdaLoRA, MiCA), or if the matrix that would become
            zero is frozen. If an error is raised, the model has not been changed.
    """
    check_init(init)
    walked = walk(model)
    survey = survey_of(walked, init=init)
    pairs = [pair for pair in walked.pairs if pair.trains]
    mica = {f.layer for f in survey.factors if f.kind == "mica"}
    with torch.no_grad():
        for pair in pairs:
            _check(pair, init, has_own_init=pair.layer in mica)
        # If pairs share a matrix, the last write counts. In reversed order, that is the
        # write for the first layer, whose name the matrix has in the survey.
        for pair in reversed(pairs):
            _write(pair, init, seed)
    return survey


def _check(pair: Pair, init: DrawnInit, *, has_own_init: bool) -> None:
    """Raise an error if a LoRA pair cannot be initialised in the requested way."""
    layer = pair.where
    if has_own_init or pair.convention.init is not None:
        raise InspectionError(
            f"initialize() cannot be used for the adapter of the layer {layer}, because the"
            " adapter's method requires a special init. Examples are AdaLoRA and MiCA.",
            "Freeze this adapter, then call initialize() for the other adapters.",
        )
    if pair.is_sharded or hasattr(pair.a.tensor, "full_tensor"):
        raise InspectionError(
            f"initialize() cannot change the LoRA matrices of the layer {layer}, because they are"
            " sharded.",
            "Call initialize() before you shard the model.",
        )
    zeroed = pair.b if init == "A" else pair.a
    if not zeroed.tensor.requires_grad:
        matrix = zeroed.name
        other = "B" if init == "A" else "A"
        raise InspectionError(
            f"init={init!r} would set the matrix {matrix} of the layer {layer} to zero, but this"
            " matrix is frozen. It would stay zero, so the adapter could never learn.",
            f"Set requires_grad=True on this matrix, or use init={other!r}.",
        )
    if _has_bias(pair):
        raise InspectionError(
            f"initialize() would change the output of the model, because the adapter of the layer"
            f" {layer} has a nonzero bias.",
            "Create the adapter again on the unchanged base model, without a bias.",
        )
    if pair.a.tensor.any() and pair.b.tensor.any():
        raise InspectionError(
            "initialize() would change the output of the model, because the adapter of the layer"
            f" {layer} was already trained or was created with nonzero A and B.",
            "Create the adapter again on the unchanged base model, with B = 0 (PEFT's default).",
        )


def _has_bias(pair: Pair) -> bool:
    """Return whether the A or B module of a pair has a bias that is not zero."""
    parameters = dict(pair.owner.named_parameters())
    for half in pair.halves:
        name = half.name.removesuffix("weight") + "bias"
        if name in parameters and parameters[name].any():
            return True
    return False


def _write(pair: Pair, init: DrawnInit, seed: int) -> None:
    """Fill one matrix of a pair with random values and set the other one to zero.

    The init is also stored in an attribute of the LoRA layer.
    """
    reading = reading_of(pair)
    drawn = pair.b
    zeroed = pair.a
    units = reading.rank_a * reading.inner
    if init == "A":
        drawn = pair.a
        zeroed = pair.b
        units = reading.fan_in
        # The input of an embedding is one-hot, so each output reads only one entry.
        if reading.kind == "embedding":
            units = 1.0
    digest = hashlib.sha256(f"{seed}:{pair.layer}.{drawn.name}".encode()).digest()
    # torch's CPU generator uses only 32 bits of a seed, so 4 bytes of the hash suffice.
    number = int.from_bytes(digest[:4], "big")
    source = torch.Generator().manual_seed(number)
    values = torch.randn(
        drawn.shape, generator=source, dtype=torch.float32, device="cpu"
    )
    drawn.tensor.copy_(values * math.sqrt(1 / units))
    zeroed.tensor.zero_()
    marks = {**getattr(pair.owner, INIT_MARK, {}), pair.adapter: init}
    setattr(pair.owner, INIT_MARK, marks)
