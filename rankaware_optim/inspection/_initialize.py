"""Initialisation: every trainable LoRA pair put at Init[A] or Init[B], and its multiplier set, the function kept."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .._checks import check_init, is_positive
from .._types import Survey
from ..errors import InspectionError
from ._declarations import Config, configs_of, declare, redeclare, scaling_places
from ._pairs import Half, Pair, declared_number, is_shard, pairs_of, reading_of, scaling_of, walk
from ._survey import INIT_MARK, inspect_model

# PEFT's init_lora_weights values that take the first product of the factors out of the base weight.
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Start(NamedTuple):
    """What becomes of one pair: which factor is drawn, with which variance and shape of the distribution."""

    pair: Pair
    rank: int
    init: Literal["A", "B"]
    drawn: Half
    zeroed: Half
    variance: float
    uniform: bool


def initialize(
    model: nn.Module,
    init: Literal["A", "B"],
    *,
    seed: int = 0,
    scaling: float | None = None,
    variance: Literal["mua", "peft"] = "mua",
    force: bool = False,
) -> Survey:
    """Put every trainable LoRA pair of `model` at Init[A] or Init[B]; the survey afterwards.

    Init[B] draws B ~ N(0, 1/r) and zeroes A; r counts the inner features that one output sums: r·k in loralib's
    convolutions, r/groups behind a grouped B. Init[A] zeroes B and draws A: variance="mua" from N(0, 1/fan_in), where
    an embedding's one-hot input has fan-in 1; variance="peft" as PEFT does, uniform with variance 1/(3·fan_in), and
    for embeddings B ~ N(0, 1) with A zero, which the survey then calls Init[B]. Init[B] with `scaling=1` is the
    set-up closest to full finetuning (Chen, Villar, Hayou, arXiv 2602.06204).

    `scaling` sets the effective multiplier s on B·A wherever the pairs declare it: `scaling` or `scale`, `lora_alpha`
    or the `alpha` buffer, and PEFT's configuration, so that a saved adapter comes back with it. Hand over the whole
    model for that, not a part of it.

    The model's function stays the same to the last bit, since a zero factor makes B·A zero before and after. Each
    draw follows from `seed` and the factor's name alone, on the CPU in float32: the same on every device, and other
    layers' draws do not move when one is added. Tied factors are drawn once. Frozen pairs (another adapter's) and all
    other parameters stay, and so do gradients, modes and the global random state; a bias of the factors is zeroed.
    The init is noted on the model, so that `inspect_model` still knows it after training; a fresh process that loads
    a trained adapter has to be given, by `init=` of `inspect_model` or by initialising before it loads the weights.

    Call it before the optimizer is built: a `RankAwareOptimizer` keeps the rates of the init and scaling it found.
    `force=True` starts trained pairs over, which changes the function; DoRA's magnitudes and weights that PiSSA and
    its kin changed stay as they are.

    Raises:
        InspectionError: before anything was changed: an impossible argument; no trainable pair; a pair that was
            trained already or started with both factors drawn (unless force=True), is merged while not zero, is
            sharded or has no values yet, has an init of its own (AdaLoRA), could never learn from that start, or
            declares no scaling where one is to be set.
    """
    check_init(init, "An adapter is initialised at")
    if variance not in ("mua", "peft") or (variance == "peft" and init == "B"):
        raise InspectionError(
            f"Init[{init}] has no variance {variance!r}.", "Init[A] knows 'mua' and 'peft', Init[B] only 'mua'."
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InspectionError(f"The seed {seed!r} is no whole number.", "Give a whole number.")
    if scaling is not None and not is_positive(scaling):
        raise InspectionError(
            f"The scaling {scaling!r} is no positive finite number.", "Give one, or None to keep what is declared."
        )
    walked = walk(model)
    pairs = list(pairs_of(walked.modules))
    chosen = [pair for pair in pairs if pair.trains]
    if not chosen:
        raise InspectionError(
            f"No trainable LoRA pair among {len(walked.parameters)} parameters.",
            "Add adapters and let them require a gradient, and initialise before sharding, which hides them.",
        )
    configs = list(configs_of(walked.modules))
    with torch.no_grad():
        starts = [check_start(pair, init, variance) for pair in chosen]
        refuse_opposite_ties(starts)
        for pair in () if force else filter(_adds, chosen):
            refuse_residual(pair, configs)
            raise InspectionError(
                f"{pair.where} was trained already, or started with both factors drawn: its adapter adds something.",
                "Rebuild the adapter, or give force=True to throw away what it holds.",
            )
        if scaling is not None:
            declare(place for start in starts for place in scaling_places(start.pair, start.rank, float(scaling)))
            for config in configs:
                redeclare(config, pairs, chosen, float(scaling))
        write_starts(starts, seed)
    return inspect_model(model)


# --- what is refused ------------------------------------------------------------------------------------------------


def check_start(pair: Pair, init: Literal["A", "B"], variance: str) -> Start:
    """The pair's new start, where it can have one."""
    if pair.convention.init is not None:
        raise InspectionError(
            f"{pair.where} has an init of its own, which the convention {pair.convention.name!r} needs.",
            "Freeze its adapter if the others are to be initialised.",
        )
    for half in (pair.a, pair.b):
        _refuse_unwritable(pair, half)
    start = start_of(pair, init, variance)
    scaling_of(pair, start.rank)
    zeroed = start.zeroed
    if not zeroed.tensor.requires_grad:
        raise InspectionError(
            f"{zeroed.name} of {pair.where} is frozen, so with zeros the pair could never learn.",
            f"Unfreeze it, or use Init[{'B' if start.init == 'A' else 'A'}].",
        )
    if declared_number(pair, ("scalar",)) == 0:
        raise InspectionError(
            f"{pair.where} multiplies its adapter by a `scalar` of zero, so beside a zero factor it could never learn.",
            "Build it without the scalar (use_scalar=False).",
        )
    if is_merged(pair) and _adds(pair):
        raise InspectionError(
            f"{pair.where} is merged into its base weight, and unmerging it needs the factors as they are.",
            "Unmerge the adapters first.",
        )
    return start


def start_of(pair: Pair, init: Literal["A", "B"], variance: str) -> Start:
    """What init and variance ask of the pair's factors as they are."""
    reading = reading_of(pair)
    rank, spread = int(reading.rank_a), 1 / reading.fan_in
    if init == "B":
        spread = 1 / (rank * reading.inner)
    elif reading.kind == "embedding":  # its input is one-hot
        init, spread = "A" if variance == "mua" else "B", 1.0
    elif variance == "peft":
        spread = 1 / (3 * reading.fan_in)
    drawn, zeroed = (pair.a, pair.b) if init == "A" else (pair.b, pair.a)
    uniform = variance == "peft" and init == "A"
    return Start(pair, rank, init, drawn, zeroed, spread, uniform)


def _refuse_unwritable(pair: Pair, half: Half) -> None:
    tensor, what = half.tensor, f"{half.name} of {pair.where}"
    if tensor.is_meta:
        raise InspectionError(f"{what} is on the meta device.", "Materialise the model (to_empty) first.")
    if hasattr(tensor, "full_tensor") or is_shard(half):
        raise InspectionError(f"{what} is sharded.", "Initialise before sharding, on the whole model.")
    if not tensor.is_leaf or not tensor.is_floating_point():
        raise InspectionError(
            f"{what} cannot be drawn: it is computed from other tensors or holds no floating-point numbers.",
            "Remove its parametrization, or keep the factors in a floating dtype.",
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise InspectionError(f"{what} is an inference tensor.", "Build the model outside torch.inference_mode().")


def refuse_opposite_ties(starts: Iterable[Start]) -> None:
    drawn = {_memory(start.drawn) for start in starts}
    for start in starts:
        if _memory(start.zeroed) in drawn:
            raise InspectionError(
                f"{start.zeroed.name} of {start.pair.where} is tied to a factor that would be drawn.",
                "Untie the adapters, or freeze one of the two.",
            )


def _memory(half: Half) -> tuple[str, int]:
    """Where a factor lies: tied ones may be two parameters over the same memory, one transposed."""
    return str(half.tensor.device), half.tensor.data_ptr()


def refuse_residual(pair: Pair, configs: Iterable[Config]) -> None:
    """Refuse a pair whose declared init took the product of its factors out of the base weight."""
    declared = next((c.fields.get("init_lora_weights") for c in configs if c.holds(pair)), None)
    if isinstance(declared, str) and declared.lower().startswith(_RESIDUAL):
        raise InspectionError(
            f"{pair.where} starts with both factors drawn, and its init {declared!r} took their product out of the "
            "base weight.",
            "Rebuild the adapter on the unchanged base with init_lora_weights=True; force=True would lose that part.",
        )


def _adds(pair: Pair) -> bool:
    """Whether the pair changes the layer's output: B·(A·x + bias of A) + bias of B is not zero. All is read."""
    inner = _not_zero(pair.a.tensor) or _not_zero(_bias(pair, pair.a))
    return (inner and _not_zero(pair.b.tensor)) or _not_zero(_bias(pair, pair.b))


def _not_zero(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and bool(tensor.detach().ne(0).any())


def _bias(pair: Pair, half: Half) -> torch.Tensor | None:
    """The bias of the module that is a factor, as PEFT's lora_bias adds it."""
    inner, _, last = half.name.rpartition(".")
    bias = getattr(pair.owner.get_submodule(inner), "bias", None) if inner and last == "weight" else None
    return bias if isinstance(bias, torch.Tensor) else None


def is_merged(pair: Pair) -> bool:
    merged: Any = getattr(pair.owner, "merged_adapters", None)
    return pair.adapter in merged if merged is not None else getattr(pair.owner, "merged", False) is True


# --- drawing --------------------------------------------------------------------------------------------------------


def write_starts(starts: Iterable[Start], seed: int) -> None:
    written = set[tuple[str, int]]()
    for start in starts:
        pair = start.pair
        if _memory(start.drawn) not in written:
            written.add(_memory(start.drawn))
            start.drawn.tensor.copy_(_draw(start, seed))
        for tensor in (start.zeroed.tensor, _bias(pair, pair.a), _bias(pair, pair.b)):
            if tensor is not None:
                tensor.zero_()
        setattr(pair.owner, INIT_MARK, {**getattr(pair.owner, INIT_MARK, {}), pair.adapter: start.init})


def _draw(start: Start, seed: int) -> torch.Tensor:
    name = f"{start.pair.layer}.{start.drawn.name}"
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch's CPU generator takes 32 bits
    draw: Callable[..., torch.Tensor] = torch.rand if start.uniform else torch.randn
    values = draw(tuple(start.drawn.tensor.shape), generator=source, dtype=torch.float32, device="cpu")
    if start.uniform:
        return (2 * values - 1) * math.sqrt(3 * start.variance)
    return values * math.sqrt(start.variance)
