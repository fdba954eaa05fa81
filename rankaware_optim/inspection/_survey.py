"""This module finds the trainable parameters of a model and describes its LoRA
matrices.

It recognises adapter libraries by the attributes of their modules and does not import
the libraries.
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
# If PEFT's init_lora_weights is one of these strings, B starts at zero, as with True.
# With any other string, neither A nor B starts at zero.
_ZERO_B = {"gaussian", "eva"}
INIT_MARK = "_rankaware_init"
"""`initialize` stores the init of each adapter in this attribute of the LoRA layer."""


def inspect_model(
    model: nn.Module | Sequence[nn.Module],
    *,
    method: Method = "lora",
    init: Init | None = None,
) -> Survey:
    """Find and describe the trainable LoRA matrices of a model.

    With method="full", find the weights that full finetuning would train instead.

    Only parameters that require a gradient are included. Tied parameters are included
    once. The model is not changed. If a model was sharded with `fully_shard`, all
    processes must call this function at the same time.

    The description of each LoRA pair is read as follows:

    - The rank is the value that the layer declares, and it must agree with the shapes
      of A and B. If the tensors are flat or empty shards (FSDP1, ZeRO-3), the declared
      values cannot be checked and are used unchanged.
    - The scaling is the value that the layer declares. If the layer declares no
      scaling, 1 is assumed and a note is added to the survey.
    - The init is taken from the values of A and B if exactly one of the two is zero,
      and otherwise from PEFT's `init_lora_weights`. If the tensors have no values (on
      the meta device) and nothing is declared, the init is "unknown".

    Args:
        model: the model, or a list of models such as [unet, text_encoder].
        method: "lora", or "full" for full finetuning of a model without adapters. With
            "full", every trainable weight of two or more dimensions is included, apart
            from embeddings.
        init: the init of all pairs, if it cannot be read from the model: "A" (B starts
            at zero, as in PEFT), "B" (A starts at zero), "other" or "unknown".

    Returns:
        A survey of the trainable parameters.

    Raises:
        InspectionError: the declared rank and the shapes of a pair disagree, or a
            scaling is not positive. The model does not contain LoRA pairs, or all of them are
            frozen. With method="full": a LoRA pair is trainable, or no weight is.
    """
    return survey_of(walk(model), method=method, init=init)


def survey_of(
    walked: Walk,
    *,
    method: Method = "lora",
    init: Init | None = None,
    also: Container[object] = (),
) -> Survey:
    """Do the work of `inspect_model` for a model whose modules and parameters have
    already been collected.

    Args:
        walked: the modules and parameters of the model.
        method: "lora", or "full" for full finetuning.
        init: the init of all pairs, if it cannot be read from the model.
        also: frozen parameters to treat as trainable.
    """
    check_choice(method, get_args(Method), "The method")
    check_init(init, known=INITS)
    survey = read_survey(walked, method=method, init=init, also=also)
    total = len(walked.parameters)
    if method == "full" and not survey.factors:
        raise InspectionError(
            "method='full' needs a trainable weight with two or more dimensions, but none of the"
            f" model's {total} parameters is such a weight.",
            "Set requires_grad=True on the weights to train. If the model is sharded with"
            " FSDP1, which flattens all weights, shard it with FSDP2 (fully_shard) instead.",
        )
    if survey.frozen and not survey.has_adapter:
        count = len(survey.frozen)
        raise InspectionError(
            f"The model has {count} LoRA matrices, but all of them are frozen.",
            "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True), or set"
            " requires_grad=True on the matrices to train.",
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
            f"{found}, because the model's adapter uses the PEFT method"
            f" {' and '.join(methods)}.",
            "Train this adapter with the plain optimizer, without RankAwareOptimizer.",
        )
    return InspectionError(
        f"{found}.",
        "If the model has no adapters yet, call peft.get_peft_model first. If the adapters were"
        " merged, build the optimizer before merging. For full finetuning, pass method='full'."
        " If the adapters have unusual attribute names or two pairs on one module, describe"
        " them with register_convention(), as in docs/extend/convention.md.",
    )


def read_survey(
    walked: Walk,
    *,
    method: Method = "lora",
    init: Init | None = None,
    also: Container[object] = (),
) -> Survey:
    """Survey a model or an adapter file, even if it contains no adapter."""
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
            "method='full' was passed, but the model contains a trainable LoRA pair.",
            "Remove method='full' to train the adapters, or merge them into the weights first.",
        )
    # Every trainable parameter is listed exactly once: as a factor, or under `other`.
    # LoRA matrices that are frozen are listed in addition to these.
    names = {f.name for f in factors}
    other = filterfalse(names.__contains__, trainable.values())
    idle = halves.difference(trainable)
    frozen = (name for name, param in walked.parameters if param in idle)
    return Survey(factors, tuple(other), tuple(notes), tuple(frozen))


def _full_factors(
    walked: Walk, trainable: Mapping[nn.Parameter, str]
) -> Iterator[Factor]:
    """Yield the trainable weights for full finetuning.

    Embeddings, biases and norms are left out.
    """
    left = dict(trainable)
    for prefix, module in walked.modules:
        for local, param in module.named_parameters(recurse=False):
            name = left.pop(param, None)
            # Biases and norms have one dimension. The fan-in of an embedding is the
            # size of the vocabulary, but each output reads a single row of it.
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
    """Return the fan-in and the fan-out of a weight.

    The shape is expected to be (out, in) in a linear layer and (out, in, k…) in a
    convolution. If the weights of several experts are stacked, the shape is (…, out,
    in).
    """
    shape = tuple(map(float, param.shape))
    # Conv1D of transformers has the shape (in, out).
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return shape[0], shape[1]
    if getattr(module, "transposed", False):  # torch's ConvTranspose: (in, out, k…)
        return math.prod(shape) / shape[1], shape[1]
    # In a convolution, each output reads all positions of the kernel, so all dimensions
    # after the first count towards fan-in.
    if hasattr(module, "kernel_size") or len(shape) == 2:
        return math.prod(shape[1:]), shape[0]
    return shape[-1], shape[-2]


def _lora_factors(
    walked: Walk,
    trainable: Mapping[nn.Parameter, str],
    init: Init | None,
    notes: list[str],
) -> Iterator[Factor]:
    """Yield the trainable matrices of every LoRA pair.

    If a layer declares no scaling, a note about this is added to `notes`.
    """
    declared = declared_around(walked.modules)
    left = dict(trainable)
    for pair in walked.pairs:
        # If several layers share a matrix, it is listed once, under the first layer.
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
    """Return a `Factor` for the matrix A of a LoRA pair, with the pair's rank, scaling,
    init and sizes.
    """
    # PEFT lists the merged adapters in this attribute. While an adapter is merged, the
    # forward pass does not use A and B, so they get no gradient.
    if getattr(pair.owner, "merged_adapters", None):
        layer = pair.where
        raise InspectionError(
            f"The adapter of the layer {layer} is merged into the base weight, so the adapter"
            " cannot be trained.",
            "Call model.unmerge_adapter() before you build the optimizer.",
        )
    reading = reading_of(pair)
    scaling = scaling_of(pair, reading.rank_a)
    if scaling is None and not notes:  # one note for all
        notes.append(
            f"{pair.where} declares no scaling, so a scaling of 1 is assumed. The same applies"
            " to any other layer that declares no scaling."
        )
    kind = _kind_of(reading, declared, pair.adapter)
    # No scaling law covers these kinds, so their declared init has no meaning for us.
    if kind in LAWLESS:
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
    """Return the type of the layer, such as "linear".

    If no scaling law covers the PEFT method of the layer, return the name of the method.
    """
    if XLORA in declared:
        return "xlora"
    # MiCA trains A from zero beside a frozen, orthonormal B. No law was derived for
    # that.
    if str(declared.get(adapter)).lower() == "mica":
        return "mica"
    return reading.kind


def factor_tensors(walked: Walk) -> set[torch.Tensor]:
    """Return the tensors A and B of every LoRA pair, including frozen ones."""
    return {half.tensor for pair in walked.pairs for half in pair.halves}


def declared_init(declared: object, kind: str) -> Init:
    """Translate a value of PEFT's `init_lora_weights` into an init.

    In PEFT's embedding layers A starts at zero and B is random, while in all other
    layers B starts at zero and A is random.
    """
    if declared is not True and str(declared).lower() not in _ZERO_B:
        return "other"
    return "B" if kind == "embedding" else "A"


def init_of(pair: Pair, declared: object, kind: str) -> Init:
    """Find out which matrix of a pair started at zero.

    Four sources are tried in this order: the convention, the attribute that
    `initialize` sets, the values of A and B (if exactly one of them is zero), and
    PEFT's `init_lora_weights`. The values come before PEFT's setting because the user
    may have set A to zero after creating the adapter. The values of a shard are not
    used, because they differ between processes and all processes must get the same
    learning rate.

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
        layer = pair.where
        raise InspectionError(
            f"It is unknown whether A or B of the LoRA layer {layer} started at zero. The values of"
            " the matrices do not show it, because they are sharded.",
            "Pass init='A' if B started at zero, as in PEFT, or init='B' if A started at zero.",
        )
    return "other" if zeros == (False, False) else "unknown"


def is_zero(tensor: torch.Tensor) -> bool | None:
    """Return whether a tensor contains only zeros, or None if the tensor has no values.

    The entries of a DTensor are compared on all processes, so that every process gets
    the same result.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return None
    any_value: Any = tensor.detach().ne(0).any()
    if hasattr(any_value, "full_tensor"):
        any_value = any_value.full_tensor()
    return not bool(any_value)
