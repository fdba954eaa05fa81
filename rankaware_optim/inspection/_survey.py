"""Inspection of a model: finds the parameters that train and describes the LoRA matrices among
them. Libraries are recognised by the attributes of their modules, and are not imported.
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
# With these strings for PEFT's init_lora_weights, B starts at zero, as with True. With other
# strings neither A nor B does.
_ZERO_B = {"gaussian", "eva"}
INIT_MARK = "_rankaware_init"
"""The attribute of the module that owns a pair in which `initialize` notes the init by adapter."""


def inspect_model(
    model: nn.Module | Sequence[nn.Module],
    *,
    method: Method = "lora",
    init: Init | None = None,
) -> Survey:
    """Find the parameters that train in a model: its LoRA matrices, or every weight of two or more
    dimensions for full finetuning.

    Only parameters that require a gradient count, and tied ones count once. The model is not
    changed. All processes must inspect a model that is sharded by `fully_shard` at the same time.

    How a LoRA pair is read:

    - Its rank is the declared one, which must agree with the shapes. For flat or empty shards
      (FSDP1, ZeRO-3) the declared values are used unchecked.
    - Its scaling is the declared one. Otherwise 1 is assumed, with a note.
    - Its init is the declared one (PEFT's `init_lora_weights`) or is read from the values. On the
      meta device, without values, it is "unknown".

    Args:
        model: the model, or several as a list, such as [unet, text_encoder].
        method: "lora", or "full" for full finetuning of a model without adapters.
        init: the init of all pairs, if it cannot be read from them: "A" (B starts at zero,
            as in PEFT), "B" (A starts at zero), "other" or "unknown".

    Returns:
        The survey of the parameters that train.

    Raises:
        InspectionError: the declared rank and the shapes of a pair disagree, or a scaling is not
            positive. The model lacks LoRA pairs, or all of them are frozen. With method="full": a
            LoRA pair trains, or no weight does.
    """
    return survey_of(walk(model), method=method, init=init)


def survey_of(
    walked: Walk,
    *,
    method: Method = "lora",
    init: Init | None = None,
    also: Container[object] = (),
) -> Survey:
    """Inspect a model as `inspect_model` does, from its walk.

    also: frozen parameters that count as if they trained.
    """
    check_choice(method, get_args(Method), "The method must be")
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
    """Return the error for a model without a trainable adapter."""
    found = (
        f"No trainable LoRA pair was found among {len(walked.parameters)} parameters"
    )
    methods = other_methods(walked.modules)
    if methods:
        return InspectionError(
            f"{found}, because the model's PEFT method is {' and '.join(methods)}.",
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
    also: Container[object] = (),
) -> Survey:
    """Return the survey of a model or a file. It may be empty."""
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
            "method='full' was passed, but the model has a trainable LoRA pair.",
            "Remove method='full', or merge the adapters into the weights first.",
        )
    # Every parameter that trains is a factor or other. Frozen matrices are listed beside them.
    names = {f.name for f in factors}
    other = filterfalse(names.__contains__, trainable.values())
    idle = halves.difference(trainable)
    frozen = (name for name, param in walked.parameters if param in idle)
    return Survey(factors, tuple(other), tuple(notes), tuple(frozen))


def _full_factors(
    walked: Walk, trainable: Mapping[nn.Parameter, str]
) -> Iterator[Factor]:
    """Yield the weights that full finetuning trains, without embeddings, biases and norms."""
    left = dict(trainable)
    for prefix, module in walked.modules:
        for local, param in module.named_parameters(recurse=False):
            name = left.pop(param, None)
            # Biases and norms have one dimension. An embedding's fan-in says nothing.
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
    """Return fan-in and fan-out of a weight. Its shape is (out, in), in a convolution (out, in,
    k…), and (…, out, in) for stacked tensors, as in experts.
    """
    shape = tuple(map(float, param.shape))
    # Conv1D of transformers has the shape (in, out).
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return shape[0], shape[1]
    if getattr(module, "transposed", False):  # torch's ConvTranspose: (in, out, k…)
        return math.prod(shape) / shape[1], shape[1]
    # In a convolution every entry of the kernel is an input.
    if hasattr(module, "kernel_size") or len(shape) == 2:
        return math.prod(shape[1:]), shape[0]
    return shape[-1], shape[-2]


def _lora_factors(
    walked: Walk,
    trainable: Mapping[nn.Parameter, str],
    init: Init | None,
    notes: list[str],
) -> Iterator[Factor]:
    """Yield both matrices of every LoRA pair that trains. Assumptions are added to `notes`."""
    declared = declared_around(walked.modules)
    left = dict(trainable)
    for pair in walked.pairs:
        # A tied matrix belongs to the pair that comes first, and has its name there.
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
    """Return the description that both matrices of a pair share."""
    if getattr(pair.owner, "merged_adapters", None):  # PEFT's
        raise InspectionError(
            f"The adapter of {pair.where} is merged into the base weight, so it cannot train.",
            "Call unmerge_adapter(), or train before merging.",
        )
    reading = reading_of(pair)
    scaling = scaling_of(pair, reading.rank_a)
    if scaling is None and not notes:  # one note for all
        notes.append(
            f"{pair.where} declares no scaling, so 1 is assumed, as for all others without one."
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
    """Return the kind of a pair's layer, or the name of the method that makes it a pair without a
    law.
    """
    if XLORA in declared:
        return "xlora"
    # MiCA trains A from zero beside a frozen, orthonormal B. No law was derived for that.
    if str(declared.get(adapter)).lower() == "mica":
        return "mica"
    return reading.kind


def factor_tensors(walked: Walk) -> set[torch.Tensor]:
    """Return A and B of every pair, whether they train or not."""
    return {half.tensor for pair in walked.pairs for half in pair.halves}


def declared_init(declared: object, kind: str) -> Init:
    """Return the init that a value of PEFT's `init_lora_weights` stands for.

    PEFT's embeddings are the other way round than its other layers: B is drawn and A starts at
    zero.
    """
    if declared is not True and str(declared).lower() not in _ZERO_B:
        return "other"
    return "B" if kind == "embedding" else "A"


def init_of(pair: Pair, declared: object, kind: str) -> Init:
    """Return the init of a pair, from the first of these that knows it: the convention, the note of
    `initialize`, the values if exactly one matrix is zero, and PEFT's declaration.

    Zeros come before the declaration, because the user may have set A to zero. Each process sees
    another shard, but all must get the same learning rate, so zeros of shards are not used.

    Raises:
        InspectionError: the pair is sharded and nothing declares its init.
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
            f"{pair.where} is sharded and declares no init, so its init cannot be read.",
            "Pass init='A' if B started at zero, as in PEFT, or init='B' if A did.",
        )
    return "other" if zeros == (False, False) else "unknown"


def is_zero(tensor: torch.Tensor) -> bool | None:
    """Return whether all entries of a tensor are zero, None for a tensor without readable entries.
    A DTensor is read across all processes, so that they get the same result.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return None
    any_value: Any = tensor.detach().ne(0).any()
    if hasattr(any_value, "full_tensor"):
        any_value = any_value.full_tensor()
    return not bool(any_value)
