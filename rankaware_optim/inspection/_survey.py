"""Inspection of a model: a `Survey` of its trainable LoRA factors, by duck typing and the table of
conventions.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, get_args

from .._checks import check_init
from .._types import Factor, Init, Method, Role, Survey
from .._warn import warn
from ..errors import InspectionError
from ._conventions import Reading, conventions
from ._declarations import Config, configs_of
from ._pairs import (
    Modules,
    Pair,
    Walk,
    declared_number,
    is_embedding,
    is_shard,
    pairs_of,
    reading_of,
    scaling_of,
    walk,
)
from ._unsupported import is_other_adapter, unsupported

if TYPE_CHECKING:
    import torch
    from torch import nn

_SAMPLE = 1024
# Values of PEFT's init_lora_weights with B = 0 at the start, besides True. With other strings
# neither factor is zero.
_ZERO_B = {"gaussian", "eva"}
INIT_MARK = "_rankaware_init"
"""The attribute in which `initialize` records the init, by adapter name, on the module that owns a pair."""


def inspect_model(model: nn.Module, *, method: Method = "lora", init: Init | None = None) -> Survey:
    """Find what a model trains: its LoRA pairs, or every weight of two or more dimensions in full
    finetuning.

    Only parameters that require a gradient count, and tied ones count once. The model is not
    changed. A model sharded by `fully_shard` must be inspected by all its processes at once.

    A pair's rank is the declared one, checked against its global shapes. For flat or empty shards
    (FSDP1) declared values are used without a check. The scaling is the declared one, or 1 with a
    note. The init is the declared one (PEFT's `init_lora_weights`). Otherwise it is read from at
    most 1024 entries per factor, or is "unknown" (meta tensors).

    Args:
        model: the model.
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: the init of all pairs, if it cannot be read: "A" (B starts at zero, as in PEFT), "B"
            (A starts at zero), "other" or "unknown".

    Raises:
        InspectionError: declared rank and shapes disagree, a scaling is not positive, or there is
            no LoRA pair; or there is one although method="full".
    """
    return survey_of(walk(model), method=method, init=init)


def survey_of(
    walked: Walk, *, method: Method = "lora", init: Init | None = None, also: Container[int] = ()
) -> Survey:
    """Do as `inspect_model`, for a model that was walked already. Frozen parameters with an id in
    `also` count too.
    """
    if method not in ("lora", "full"):
        raise InspectionError(
            f"The method is 'lora' or 'full', not {method!r}.", "Give one of them."
        )
    check_init(init, known=(*get_args(Init), None))
    modules, parameters = walked
    trainable = {id(p): name for name, p in parameters if p.requires_grad or id(p) in also}
    notes: list[str] = []
    frozen: list[str] = []
    if method == "full":
        factors = tuple(_full_factors(modules, trainable))
    else:
        factors = tuple(_lora_factors(modules, trainable, init, notes, frozen))
    known = {f.name for f in factors}
    other = tuple(name for name in trainable.values() if name not in known)
    tried = tuple(dict.fromkeys(row.name for row in conventions()))
    if not factors and method == "full":
        raise InspectionError(
            f"None of {len(parameters)} parameters is a trainable weight of two or more"
            " dimensions.",
            "Set requires_grad on what full finetuning should train; FSDP1 flattens every weight,"
            " FSDP2 does not.",
        )
    if not factors and not any(map(is_other_adapter, other)):
        raise InspectionError(
            f"No trainable LoRA pair among {len(parameters)} parameters (conventions tried:"
            f" {', '.join(tried)}).",
            "Add adapters with requires_grad, or give method='full' for full finetuning.",
        )
    return Survey(
        factors=factors,
        other=other,
        notes=tuple(dict.fromkeys(notes)),
        looked_at=len(parameters),
        tried=tried,
        frozen=tuple(frozen),
        unadapted=_unadapted(walked) if method == "lora" else (),
        unsupported=unsupported(other),
    )


def _full_factors(modules: Modules, trainable: Mapping[int, str]) -> Iterator[Factor]:
    for pair in pairs_of(modules):
        if id(pair.a.tensor) in trainable or id(pair.b.tensor) in trainable:
            raise InspectionError(
                f"{pair.where} has a trainable LoRA pair, so this is not full finetuning.",
                "Leave method='full' out, or merge the adapters into the weights first.",
            )
    left = dict(trainable)
    for prefix, module in modules:
        for local, param in module.named_parameters(recurse=False):
            name = left.pop(id(param), None)
            if name is None or param.dim() < 2 or is_embedding(module):
                continue
            fan_in, fan_out = _full_fans(module, param)
            kind = "conv" if param.dim() > 2 and local == "weight" else "linear"
            yield Factor(name, "full", None, fan_in, fan_out, kind=kind, layer=prefix)


def _full_fans(module: nn.Module, param: torch.Tensor) -> tuple[float, float]:
    """Return fan-in and fan-out of a weight: (out, in), (out, in, k…) in a convolution, (…, in) for
    stacked tensors.
    """
    shape = tuple(param.shape)
    if type(module).__name__ == "Conv1D" and hasattr(
        module, "nf"
    ):  # transformers' Conv1D stores (in, out)
        return float(shape[0]), float(shape[1])
    if getattr(module, "transposed", False):  # torch's ConvTranspose stores (in, out, k…)
        return float(math.prod(shape) / shape[1]), float(shape[1])
    if hasattr(module, "kernel_size") or len(shape) == 2:
        return float(math.prod(shape[1:])), float(shape[0])
    return float(shape[-1]), float(shape[-2])


def _lora_factors(
    modules: Modules,
    trainable: Mapping[int, str],
    init: Init | None,
    notes: list[str],
    frozen: list[str],
) -> Iterator[Factor]:
    configs = list(configs_of(modules))
    left, seen = dict(trainable), set[int]()
    for pair in pairs_of(modules):
        ids = [id(pair.a.tensor), id(pair.b.tensor)]
        if not left.keys().isdisjoint(ids):
            reading = reading_of(pair)
            _warn_of_transposed(pair, reading)
            scaling = scaling_of(pair, reading.rank_a)
            if scaling is None:
                notes.append(f"{pair.where} declares no scaling: 1 is assumed.")
            found = init or init_of(pair, declared_for(pair, configs), reading.kind or "linear")
            roles: tuple[Role, Role] = "A", "B"
            for role, key in zip(roles, ids, strict=True):
                name = left.pop(key, None)
                if name is not None:
                    yield factor_of(pair, role, name, reading, scaling, found)
        halves = [
            half
            for half in (pair.a, pair.b)
            if id(half.tensor) not in trainable and id(half.tensor) not in seen
        ]
        frozen += [f"{pair.layer}.{half.name}".removeprefix(".") for half in halves]
        seen.update(ids)


def _warn_of_transposed(pair: Pair, reading: Reading) -> None:
    """Warn if an undeclared rank is ambiguous because the factors may be stored transposed: (64, 4)
    and (4, 64).
    """
    rank, other = reading.rank_a, reading.fan_in
    square = tuple(pair.a.tensor.shape) == tuple(pair.b.tensor.shape)[::-1] == (rank, other)
    if square and rank > other and declared_number(pair, pair.convention.rank) is None:
        warn(
            f"{pair.where} declares no rank: its factors are read as rank {rank:g} on a layer of"
            f" width {other:g}. If they are stored transposed, the rank is {other:g} and the width"
            f" {rank:g}: set the rank's attribute."
        )


def factor_of(
    pair: Pair, role: Role, name: str, reading: Reading, scaling: float | None, init: Init
) -> Factor:
    rank, fan_in, fan_out = int(reading.rank_a), float(reading.fan_in), float(reading.fan_out)
    scaling, kind = 1.0 if scaling is None else scaling, reading.kind or "linear"
    belongs = pair.layer, pair.adapter, pair.convention.name
    return Factor(name, role, rank, fan_in, fan_out, scaling, init, kind, *belongs)


def _unadapted(walked: Walk) -> tuple[str, ...]:
    """Return frozen stacks of expert weights that no pair adapts, because only target_modules was
    given.
    """
    adapted = [
        (f"{name}.", f".{m.parameter_name}")
        for name, m in walked.modules
        if hasattr(m, "parameter_name")
    ]
    stacks = [
        n for n, p in walked.parameters if p.dim() == 3 and "expert" in n and not p.requires_grad
    ]
    return tuple(
        n for n in stacks if not any(n.startswith(a) and n.endswith(b) for a, b in adapted)
    )


def declared_for(pair: Pair, configs: Iterable[Config]) -> object:
    """Return `init_lora_weights` of the innermost of PEFT's configurations for a pair; None if
    there is none.
    """
    fitting = [
        (len(prefix), c.fields) for c in configs if (prefix := c.prefix_of(pair)) is not None
    ]
    return max(fitting, key=itemgetter(0))[1].get("init_lora_weights") if fitting else None


def declared_init(declared: object, kind: str) -> Init:
    """Return the init for a value of PEFT's `init_lora_weights`. Its embeddings draw B where other
    layers draw A.
    """
    if declared is not True and str(declared).lower() not in _ZERO_B:
        return "other"
    return "B" if kind == "embedding" else "A"


def init_of(pair: Pair, declared: object, kind: str) -> Init:
    """Return the init by the row, else as `initialize` recorded it, else by PEFT's declaration,
    else by the zeros.

    A factor of zeros overrides PEFT's declaration if they contradict. With a declared Init[A], A is
    never all zero. If it is, the pair was set to Init[B] by hand. Shards differ between processes,
    which must all get the same rate, so their zeros are not used.
    """
    own: Init | None = pair.convention.init or getattr(pair.owner, INIT_MARK, {}).get(pair.adapter)
    if own is not None:
        return own
    a, b = pair.a.tensor, pair.b.tensor
    sharded = is_shard(pair.a) or is_shard(pair.b)
    if declared is None and sharded:
        raise InspectionError(
            f"{pair.where} is sharded, so its factors do not show their init, and none is"
            " declared.",
            "Give init='A' (B starts at zero, as in PEFT) or init='B' (A starts at zero).",
        )
    if declared is not None:
        expected = declared_init(declared, kind)
        if expected == "other" or sharded or is_zero(a if expected == "A" else b) is not True:
            return expected
    known: dict[object, Init] = {(False, True): "A", (True, False): "B", (False, False): "other"}
    return known.get((is_zero(a), is_zero(b)), "unknown")


def is_zero(tensor: torch.Tensor) -> bool | None:
    """Return whether a strided sample of at most 1024 entries is all zero; None if there is nothing
    to read.

    A DTensor is read completely, over all its processes, so that they get the same result.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return None
    if hasattr(tensor, "full_tensor"):
        found: Any = tensor.detach().ne(0).any()
        return not bool(found.full_tensor())
    flat = tensor.detach().reshape(-1)
    return not bool(flat[:: max(1, -(-flat.numel() // _SAMPLE))].any())
