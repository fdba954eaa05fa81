"""Inspection of a model: a `Survey` of its trainable LoRA factors, by duck typing and the table of
conventions.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from .._checks import check_init
from .._types import Factor, Init, Method, Role, Survey
from .._warn import warn
from ..errors import InspectionError
from ._conventions import Reading, conventions
from ._declarations import Configs, config_of, configs_of
from ._pairs import (
    Modules,
    Pair,
    Walk,
    declared_number,
    is_embedding,
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
"""The attribute of a pair's owner in which `initialize` records the init, by adapter."""


def inspect_model(
    model: nn.Module, *, method: Method = "lora", init: Init | None = None
) -> Survey:
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
    walked: Walk,
    *,
    method: Method = "lora",
    init: Init | None = None,
    also: Container[int] = (),
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
    trainable = {
        id(p): name for name, p in parameters if p.requires_grad or id(p) in also
    }
    pairs, notes = list(pairs_of(modules)), dict[str, None]()
    frozen: Iterable[str] = ()
    unadapted: Iterable[str] = ()
    if method == "full":
        factors = tuple(_full_factors(modules, pairs, trainable))
    else:
        factors = tuple(_lora_factors(modules, pairs, trainable, init, notes))
        frozen, unadapted = _frozen_factors(pairs, trainable), _unadapted(walked)
    names = {f.name for f in factors}
    other = tuple(name for name in trainable.values() if name not in names)
    tried = tuple(dict.fromkeys(row.name for row in conventions()))
    if not factors:
        _refuse_empty(method, other, len(parameters), tried)
    return Survey(
        factors=factors,
        other=other,
        notes=tuple(notes),
        looked_at=len(parameters),
        tried=tried,
        frozen=tuple(frozen),
        unadapted=tuple(unadapted),
        unsupported=unsupported(other),
    )


def _refuse_empty(
    method: Method, other: Iterable[str], count: int, tried: Iterable[str]
) -> None:
    if method == "full":
        raise InspectionError(
            f"None of {count} parameters is a trainable weight of two or more dimensions.",
            "Set requires_grad on what full finetuning should train; FSDP1 flattens every weight,"
            " FSDP2 does not.",
        )
    if not any(map(is_other_adapter, other)):
        raise InspectionError(
            f"No trainable LoRA pair among {count} parameters (conventions tried:"
            f" {', '.join(tried)}).",
            "Add adapters with requires_grad, or give method='full' for full finetuning.",
        )


def _full_factors(
    modules: Modules, pairs: Iterable[Pair], trainable: Mapping[int, str]
) -> Iterator[Factor]:
    for pair in pairs:
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
    shape = tuple(map(float, param.shape))
    if type(module).__name__ == "Conv1D" and hasattr(
        module, "nf"
    ):  # transformers': (in, out)
        return shape[0], shape[1]
    if getattr(module, "transposed", False):  # torch's ConvTranspose: (in, out, k…)
        return math.prod(shape) / shape[1], shape[1]
    if hasattr(module, "kernel_size") or len(shape) == 2:
        return math.prod(shape[1:]), shape[0]
    return shape[-1], shape[-2]


def _lora_factors(
    modules: Modules,
    pairs: Iterable[Pair],
    trainable: Mapping[int, str],
    init: Init | None,
    notes: dict[str, None],
) -> Iterator[Factor]:
    configs, left = configs_of(modules), dict(trainable)
    for pair in pairs:
        a, b = id(pair.a.tensor), id(pair.b.tensor)
        if a not in left and b not in left:
            continue
        reading = reading_of(pair)
        _warn_of_transposed(pair, reading)
        scaling = scaling_of(pair, reading.rank_a)
        if scaling is None:
            notes[f"{pair.where} declares no scaling: 1 is assumed."] = None
        pair_init = init or init_of(pair, declared_for(pair, configs), reading.kind)
        names = left.pop(a, None), left.pop(b, None)
        yield from factors_of(pair, names, reading, scaling, pair_init)


def _frozen_factors(
    pairs: Iterable[Pair], trainable: Mapping[int, str]
) -> Iterable[str]:
    """Return the names of factors that do not train. A tied one has its first name."""
    names: dict[int, str] = {}
    for pair in pairs:
        for half in (pair.a, pair.b):
            if id(half.tensor) not in trainable:
                name = f"{pair.layer}.{half.name}".removeprefix(".")
                names.setdefault(id(half.tensor), name)
    return names.values()


def _warn_of_transposed(pair: Pair, reading: Reading) -> None:
    """Warn if an undeclared rank is ambiguous because the factors may be stored transposed: (64, 4)
    and (4, 64).
    """
    rank, other = reading.rank_a, reading.fan_in
    is_square = pair.a.shape == pair.b.shape[::-1] == (rank, other)
    if (
        is_square
        and rank > other
        and declared_number(pair, pair.convention.rank) is None
    ):
        warn(
            f"{pair.where} declares no rank: its factors are read as rank {rank:g} on a layer of"
            f" width {other:g}. If they are stored transposed, the rank is {other:g} and the width"
            f" {rank:g}: set the rank's attribute."
        )


def factors_of(
    pair: Pair,
    names: tuple[str | None, str | None],
    reading: Reading,
    scaling: float | None,
    init: Init,
) -> Iterator[Factor]:
    """Yield a pair's factors A and B, if they have names."""
    sizes = int(reading.rank_a), float(reading.fan_in), float(reading.fan_out)
    scaling = 1.0 if scaling is None else float(scaling)
    kind = reading.kind
    belongs = pair.layer, pair.adapter, pair.convention.name
    roles: tuple[Role, Role] = "A", "B"
    for role, name in zip(roles, names, strict=True):
        if name is not None:
            yield Factor(name, role, *sizes, scaling, init, kind, *belongs)


def _unadapted(walked: Walk) -> Iterator[str]:
    """Yield frozen stacks of expert weights that no pair adapts, because only target_modules was
    given.
    """
    adapted = [
        (f"{name}.", f".{module.parameter_name}")
        for name, module in walked.modules
        if hasattr(module, "parameter_name")
    ]
    for name, param in walked.parameters:
        if param.dim() != 3 or "expert" not in name or param.requires_grad:
            continue
        if not any(
            name.startswith(start) and name.endswith(end) for start, end in adapted
        ):
            yield name


def declared_for(pair: Pair, configs: Configs) -> object:
    """Return `init_lora_weights` of the innermost of PEFT's configurations for a pair; None if
    there is none.
    """
    config = config_of(pair, configs)
    return None if config is None else config[1].get("init_lora_weights")


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
    marks = getattr(pair.owner, INIT_MARK, {})
    recorded: Init | None = pair.convention.init or marks.get(pair.adapter)
    if recorded is not None:
        return recorded
    if declared is None and pair.is_sharded:
        raise InspectionError(
            f"{pair.where} is sharded, so its factors do not show their init, and none is"
            " declared.",
            "Give init='A' (B starts at zero, as in PEFT) or init='B' (A starts at zero).",
        )
    a, b = pair.a.tensor, pair.b.tensor
    if declared is not None:
        expected = declared_init(declared, kind)
        if expected == "other" or pair.is_sharded:
            return expected
        if is_zero(a if expected == "A" else b) is not True:
            return expected
    inits: dict[object, Init] = {
        (False, True): "A",
        (True, False): "B",
        (False, False): "other",
    }
    return inits.get((is_zero(a), is_zero(b)), "unknown")


def is_zero(tensor: torch.Tensor) -> bool | None:
    """Return whether a strided sample of at most 1024 entries is all zero; None if there is nothing
    to read.

    A DTensor is read completely, over all its processes, so that they get the same result.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return None
    if hasattr(tensor, "full_tensor"):
        any_value: Any = tensor.detach().ne(0).any()
        return not bool(any_value.full_tensor())
    flat = tensor.detach().reshape(-1)
    return not bool(flat[:: max(1, -(-flat.numel() // _SAMPLE))].any())
