"""Inspection of a model: a `Survey` of its trainable LoRA factors, by duck typing and the table of
conventions.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import filterfalse
from typing import TYPE_CHECKING, Any, get_args

from .._checks import check_choice, check_init
from .._types import Factor, Init, Method, Role
from ..errors import InspectionError
from ._conventions import INITS, Reading
from ._pairs import (
    Pair,
    Walk,
    is_embedding,
    reading_of,
    scaling_of,
    walk,
)
from ._peft_config import XLORA, declared_around, other_methods
from ._record import LAWLESS, Survey

if TYPE_CHECKING:
    import torch
    from torch import nn

_ROLES: tuple[Role, Role] = "A", "B"
# Values of PEFT's init_lora_weights with B = 0 at the start, besides True. With other strings
# neither factor is zero.
_ZERO_B = {"gaussian", "eva"}
INIT_MARK = "_rankaware_init"
"""The attribute of a pair's owner in which `initialize` records the init, by adapter."""


def inspect_model(
    model: nn.Module | Sequence[nn.Module],
    *,
    method: Method = "lora",
    init: Init | None = None,
) -> Survey:
    """Find what a model trains: its LoRA pairs, or every weight of two or more dimensions in full
    finetuning.

    Only parameters that require a gradient count, and tied ones count once. The model is not
    changed. A model sharded by `fully_shard` must be inspected by all its processes at once.

    A pair's rank is the declared one, checked against its global shapes. For flat or empty shards
    (FSDP1) declared values are used without a check. The scaling is the declared one, or 1 with a
    note. The init is the declared one (PEFT's `init_lora_weights`). Otherwise it is read from the
    factors, or is "unknown" (meta tensors).

    Args:
        model: the model, or several as a list, such as [unet, text_encoder].
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: the init of all pairs, if it cannot be read: "A" (B starts at zero, as in PEFT), "B"
            (A starts at zero), "other" or "unknown".

    Raises:
        InspectionError: declared rank and shapes disagree, a scaling is not positive, or there is
            no LoRA pair, or none that trains; or there is one although method="full".
    """
    return survey_of(walk(model), method=method, init=init)


def survey_of(
    walked: Walk,
    *,
    method: Method = "lora",
    init: Init | None = None,
    also: Container[Any] = (),
) -> Survey:
    """Do as `inspect_model`, for a model that was walked already. Frozen parameters in `also`
    count too.
    """
    check_choice(method, get_args(Method), "The method is")
    check_init(init, known=INITS)
    survey = read_survey(walked, method=method, init=init, also=also)
    total = len(walked.parameters)
    if method == "full" and not survey.factors:
        raise InspectionError(
            f"None of the model's {total} parameters is a weight of two or more dimensions that"
            " trains.",
            "Set requires_grad on the weights that full finetuning should train. FSDP1 flattens"
            " all weights, so shard with FSDP2 (fully_shard) instead.",
        )
    if survey.frozen and not survey.has_adapter:
        raise InspectionError(
            f"The model has {len(survey.frozen)} LoRA matrices, all frozen.",
            "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True), or set"
            " requires_grad on the matrices to train.",
        )
    if not survey.has_adapter:
        raise _no_adapter(walked)
    return survey


def _no_adapter(walked: Walk) -> InspectionError:
    """Return the error for a model in which nothing trains that looks like an adapter."""
    found = (
        f"No trainable LoRA pair was found among {len(walked.parameters)} parameters"
    )
    methods = other_methods(walked.modules)
    if methods:
        return InspectionError(
            f"{found}: the model's PEFT method is {' and '.join(methods)}, which has none.",
            "Train such an adapter with a plain optimizer.",
        )
    return InspectionError(
        f"{found}.",
        "If the model has no adapters yet, call peft.get_peft_model first. If they were merged,"
        " build the optimizer before merging. For full finetuning pass method='full'. For adapters"
        " of another layout, such as layers called A and B or two pairs on one module, call"
        " register_convention(): docs/extend/convention.md has an example.",
    )


def read_survey(
    walked: Walk,
    *,
    method: Method = "lora",
    init: Init | None = None,
    also: Container[Any] = (),
) -> Survey:
    """Return the survey of a model or a file, which may be empty."""
    trainable = {
        param: name
        for name, param in walked.parameters
        if param.requires_grad or param in also
    }
    halves = factor_tensors(walked)
    notes = list[str]()
    if method == "lora":
        factors = tuple(_lora_factors(walked, trainable, init, notes))
    elif halves.isdisjoint(trainable):
        factors = tuple(_full_factors(walked, trainable))
    else:
        raise InspectionError(
            "The model has a trainable LoRA pair, so this is not full finetuning.",
            "Leave method='full' out, or merge the adapters into the weights first.",
        )
    names = {f.name for f in factors}
    other = filterfalse(names.__contains__, trainable.values())
    idle = halves.difference(trainable)
    frozen = (name for name, param in walked.parameters if param in idle)
    return Survey(factors, tuple(other), tuple(notes), tuple(frozen))


def _full_factors(walked: Walk, trainable: Mapping[Any, str]) -> Iterator[Factor]:
    left = dict(trainable)
    for prefix, module in walked.modules:
        for local, param in module.named_parameters(recurse=False):
            name = left.pop(param, None)
            if name is None or param.dim() < 2 or is_embedding(module):
                continue
            fan_in, fan_out = _full_fans(module, param)
            kind = "conv" if param.dim() > 2 and local == "weight" else "linear"
            yield Factor(
                name,
                "full",
                None,
                fan_in,
                fan_out,
                kind=kind,
                layer=prefix,
                dtype=str(param.dtype).removeprefix("torch."),
            )


def _full_fans(module: nn.Module, param: torch.Tensor) -> tuple[float, float]:
    """Return fan-in and fan-out of a weight: (out, in), (out, in, k…) in a convolution, (…, in) for
    stacked tensors.
    """
    shape = tuple(map(float, param.shape))
    # transformers': (in, out)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return shape[0], shape[1]
    if getattr(module, "transposed", False):  # torch's ConvTranspose: (in, out, k…)
        return math.prod(shape) / shape[1], shape[1]
    if hasattr(module, "kernel_size") or len(shape) == 2:
        return math.prod(shape[1:]), shape[0]
    return shape[-1], shape[-2]


def _lora_factors(
    walked: Walk, trainable: Mapping[Any, str], init: Init | None, notes: list[str]
) -> Iterator[Factor]:
    """Yield both factors of every pair. What is assumed of them is added to `notes`."""
    declared = declared_around(walked.modules)
    left = dict(trainable)
    for pair in walked.pairs:
        # a tied factor has its first name
        tensors = [half.tensor for half in pair.halves]
        names = [left.pop(tensor, None) for tensor in tensors]
        if not any(names):
            continue
        factor = _factor_of(pair, declared[pair.layer], init, notes)
        for role, name in zip(_ROLES, names, strict=True):
            if name is not None:
                yield replace(factor, name=name, role=role)


def _factor_of(
    pair: Pair, declared: Mapping[str, object], init: Init | None, notes: list[str]
) -> Factor:
    """Return what both factors of a pair have."""
    if getattr(pair.owner, "merged_adapters", None):  # PEFT's
        raise InspectionError(
            f"{pair.where} is merged into its base weight, where it does not train.",
            "Train before merging, or call unmerge_adapter().",
        )
    reading = reading_of(pair)
    scaling = scaling_of(pair, reading.rank_a)
    if scaling is None and not notes:
        notes.append(
            f"{pair.where} declares no scaling: 1 is assumed there, and wherever none is."
        )
    kind = _kind_of(reading, declared, pair.adapter)
    if kind in LAWLESS:  # whatever init is declared
        init = "other"
    return Factor(
        "",
        "A",
        int(reading.rank_a),
        float(reading.fan_in),
        float(reading.fan_out),
        scaling=1.0 if scaling is None else float(scaling),
        init=init or init_of(pair, declared.get(pair.adapter), kind),
        kind=kind,
        layer=pair.layer,
        adapter=pair.adapter,
        convention=pair.convention.name,
    )


def _kind_of(reading: Reading, declared: Mapping[str, object], adapter: str) -> str:
    """Return the kind of a pair's layer, or the name of what makes it a pair without a law."""
    if XLORA in declared:
        return "xlora"
    # MiCA trains A from zero beside a frozen, orthonormal B. No law was derived for that.
    if str(declared.get(adapter)).lower() == "mica":
        return "mica"
    return reading.kind


def factor_tensors(walked: Walk) -> set[torch.Tensor]:
    """Return both factors of every pair."""
    return {half.tensor for pair in walked.pairs for half in pair.halves}


def declared_init(declared: object, kind: str) -> Init:
    """Return the init for a value of PEFT's `init_lora_weights`. Its embeddings draw B where other
    layers draw A.
    """
    if declared is not True and str(declared).lower() not in _ZERO_B:
        return "other"
    return "B" if kind == "embedding" else "A"


def init_of(pair: Pair, declared: object, kind: str) -> Init:
    """Return the init by the row, else as `initialize` recorded it, else by a factor of zeros
    beside one that is drawn, else by PEFT's declaration.

    Zeros go before the declaration, since A may be set to zero by hand. Shards differ between
    processes, which must all get the same rate, so their zeros are not used.
    """
    marks: Mapping[str, Init] = getattr(pair.owner, INIT_MARK, {})
    recorded = pair.convention.init or marks.get(pair.adapter)
    if recorded is not None:
        return recorded
    zeros: tuple[bool | None, bool | None] = None, None
    if not pair.is_sharded:
        zeros = is_zero(pair.a.tensor), is_zero(pair.b.tensor)
    if zeros in ((False, True), (True, False)):
        return "A" if zeros[1] else "B"
    if declared is not None:
        return declared_init(declared, kind)
    if pair.is_sharded:
        raise InspectionError(
            f"{pair.where} is sharded, so its factors do not show their init, and none is"
            " declared.",
            "Give init='A' (B starts at zero, as in PEFT) or init='B' (A starts at zero).",
        )
    return "other" if zeros == (False, False) else "unknown"


def is_zero(tensor: torch.Tensor) -> bool | None:
    """Return whether a tensor is all zero; None if there is nothing to read. A DTensor is read over
    all its processes, so that they get the same result.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return None
    any_value: Any = tensor.detach().ne(0).any()
    if hasattr(any_value, "full_tensor"):
        any_value = any_value.full_tensor()
    return not bool(any_value)
