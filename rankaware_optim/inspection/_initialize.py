"""Initialisation of every trainable LoRA pair at Init[A] or Init[B], without a change of the
model's function.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

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
from ._peft_config import Configs, config_of, configs_of
from ._survey import INIT_MARK, inspect_model

Variance = Literal["mua", "peft"]
DrawnInit = Literal["A", "B"]
# Values of PEFT's init_lora_weights that subtract the initial product of the factors from the base
# weight.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Start(NamedTuple):
    """The new init of one pair: its rank, the init that it gets, which factor is drawn, with which
    variance, and whether uniform or normal.
    """

    pair: Pair
    rank: int
    init: DrawnInit
    drawn: Half
    zeroed: Half
    variance: float
    uniform: bool


def initialize(
    model: nn.Module,
    init: DrawnInit,
    *,
    seed: int = 0,
    variance: Variance = "mua",
    force: bool = False,
) -> Survey:
    """Initialise every trainable LoRA pair of a model, without a change of the model's function.

    Init[A] sets B = 0 and draws A, as in PEFT. Init[B] sets A = 0 and draws B ~ N(0, 1/r). Here r
    is the number of inner features that one output sums: r·k in loralib's convolutions, r/groups
    with a grouped B. Init[B] with alpha = rank is closest to full finetuning (Chen, Villar, Hayou,
    arXiv 2602.06204).

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
        variance: variance of A under Init[A]. "mua" draws from N(0, 1/fan_in), with fan-in 1 for an
            embedding. "peft" is uniform with variance 1/(3·fan_in) as in PEFT, and draws B ~ N(0,
            1) with A = 0 for embeddings.
        force: whether to initialise trained pairs too, which changes the function. DoRA's
            magnitudes, and base weights that PiSSA or similar inits changed, are kept.

    Returns:
        The survey of the model afterwards.

    Raises:
        InspectionError: an argument is impossible, there is no trainable pair, or a pair cannot be
            initialised. It was trained already or started with both factors drawn (unless
            force=True), is merged and not zero, is sharded, has no values yet, needs its own init
            (AdaLoRA), or could not learn from this init. Nothing was changed.
    """
    _check_arguments(init, variance, seed)
    walked = walk(model)
    chosen = [pair for pair in pairs_of(walked.modules) if pair.trains]
    if not chosen:
        raise InspectionError(
            f"No trainable LoRA pair among {len(walked.parameters)} parameters.",
            "Add adapters with requires_grad, and initialise before sharding, which hides them.",
        )
    configs = configs_of(walked.modules)
    with torch.no_grad():
        starts = _check_starts(chosen, init, variance)
        for pair in () if force else filter(_adds, chosen):
            _refuse_residual(pair, configs)
            raise InspectionError(
                f"{pair.where} was trained already, or started with both factors drawn: its B·A is"
                " not zero.",
                "Rebuild the adapter, or give force=True to discard its weights.",
            )
        _write_starts(starts, seed)
    return inspect_model(model)


# --- checks ---------------------------------------------------------------------------------------


def _check_arguments(init: str, variance: str, seed: int) -> None:
    check_init(init, "An adapter is initialised at")
    if variance not in ("mua", "peft") or (variance == "peft" and init == "B"):
        raise InspectionError(
            f"init={init!r} has no variance {variance!r}.",
            "Give 'mua' or 'peft' for init='A', 'mua' for init='B'.",
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InspectionError(
            f"The seed {seed!r} is not a whole number.", "Give a whole number."
        )


def _check_starts(
    pairs: Iterable[Pair], init: DrawnInit, variance: Variance
) -> list[Start]:
    """Return the new inits of pairs. Raise an `InspectionError` if one cannot have it."""
    starts = []
    for pair in pairs:
        if pair.convention.init is not None:
            raise InspectionError(
                f"{pair.where} needs the init of its convention {pair.convention.name!r}.",
                "Freeze its adapter to initialise the others.",
            )
        _refuse_unwritable(pair, pair.a)
        _refuse_unwritable(pair, pair.b)
        start = _start_of(pair, init, variance)
        starts.append(start)
        scaling_of(pair, start.rank)
        if not start.zeroed.tensor.requires_grad:
            other = {"A": "B", "B": "A"}[start.init]
            raise InspectionError(
                f"{start.zeroed.name} of {pair.where} is frozen, so the pair could not learn if it"
                " is zero.",
                f"Unfreeze it, or use init={other!r}.",
            )
        if declared_number(pair, ("scalar",)) == 0:
            raise InspectionError(
                f"{pair.where} multiplies its adapter by a `scalar` of zero, so with a zero factor"
                " it could not learn.",
                "Build it without the scalar (use_scalar=False).",
            )
        if _is_merged(pair) and _adds(pair):
            raise InspectionError(
                f"{pair.where} is merged into its base weight, and unmerging it needs its present"
                " factors.",
                "Unmerge the adapters first.",
            )
    drawn = {_memory_of(start.drawn) for start in starts}
    for start in starts:
        if _memory_of(start.zeroed) in drawn:
            raise InspectionError(
                f"{start.zeroed.name} of {start.pair.where} is tied to a factor that must be"
                " drawn.",
                "Untie the adapters, or freeze one of the two.",
            )
    return starts


def _start_of(pair: Pair, init: DrawnInit, variance: Variance) -> Start:
    """Return the pair's new init for `init` and `variance`."""
    reading = reading_of(pair)
    rank, uniform = int(reading.rank_a), False
    if init == "B":
        square = 1 / (rank * reading.inner)
    elif reading.kind == "embedding":  # its input is one-hot
        init, square = "A" if variance == "mua" else "B", 1.0
    elif variance == "peft":
        square, uniform = 1 / (3 * reading.fan_in), True
    else:
        square = 1 / reading.fan_in
    drawn, zeroed = (pair.a, pair.b) if init == "A" else (pair.b, pair.a)
    return Start(pair, rank, init, drawn, zeroed, square, uniform)


def _refuse_unwritable(pair: Pair, half: Half) -> None:
    tensor = half.tensor
    if tensor.is_meta:
        problem, cure = (
            "is on the meta device",
            "Materialise the model (to_empty) first.",
        )
    elif hasattr(tensor, "full_tensor") or half.is_shard:
        problem, cure = "is sharded", "Initialise before sharding, on the whole model."
    elif not tensor.is_leaf or not tensor.is_floating_point():
        problem = (
            "cannot be drawn: it is computed from other tensors or does not have a floating-point"
            " dtype"
        )
        cure = "Remove its parametrization, or keep the factors in a floating dtype."
    elif tensor.is_inference() and not torch.is_inference_mode_enabled():
        problem, cure = (
            "is an inference tensor",
            "Build the model outside torch.inference_mode().",
        )
    else:
        return
    raise InspectionError(f"{half.name} of {pair.where} {problem}.", cure)


def _memory_of(half: Half) -> tuple[torch.device, int]:
    """Return a key of a factor's memory. Tied factors may be two parameters with the same memory,
    one transposed.
    """
    return half.tensor.device, half.tensor.data_ptr()


def _refuse_residual(pair: Pair, configs: Configs) -> None:
    """Raise if the declared init subtracted the product of the factors from the base weight."""
    declared = config_of(pair, configs).get("init_lora_weights")
    if isinstance(declared, str) and declared.lower().startswith(_RESIDUAL):
        raise InspectionError(
            f"{pair.where} starts with both factors drawn, and its init {declared!r} subtracted"
            " their product from the base weight.",
            "Rebuild the adapter on the unchanged base with init_lora_weights=True; force=True"
            " would lose that part.",
        )


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


def _is_merged(pair: Pair) -> bool:
    merged: Any = getattr(pair.owner, "merged_adapters", None)
    if merged is not None:
        return pair.adapter in merged
    return getattr(pair.owner, "merged", False) is True


# --- drawing --------------------------------------------------------------------------------------


def _write_starts(starts: Iterable[Start], seed: int) -> None:
    """Draw and zero the factors, and record the inits. A tied factor is drawn once, by its first
    name.
    """
    drawn = set[tuple[torch.device, int]]()
    for start in starts:
        pair, half = start.pair, start.drawn
        if _memory_of(half) not in drawn:
            drawn.add(_memory_of(half))
            name = f"{seed}:{pair.layer}.{half.name}"
            digest = hashlib.sha256(name.encode()).digest()
            # torch's CPU generator takes 32 bits.
            source = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            draw: Any = torch.rand if start.uniform else torch.randn
            values = draw(
                half.shape, generator=source, dtype=torch.float32, device="cpu"
            )
            square = start.variance
            if start.uniform:
                values, square = 2 * values - 1, 3 * square
            half.tensor.copy_(values * math.sqrt(square))
        for tensor in (start.zeroed.tensor, _bias(pair, pair.a), _bias(pair, pair.b)):
            if tensor is not None:
                tensor.zero_()
        marks = {**getattr(pair.owner, INIT_MARK, {}), pair.adapter: start.init}
        setattr(pair.owner, INIT_MARK, marks)
