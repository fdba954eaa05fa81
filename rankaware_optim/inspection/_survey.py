"""Inspection of a model: a `Survey` of its trainable LoRA factors, by duck typing and the table of
conventions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, filterfalse
from typing import TYPE_CHECKING, Any, get_args

from .._checks import check_choice, check_init
from .._types import Factor, Init, Method, Role
from ..errors import InspectionError
from ._conventions import INITS, Reading
from ._pairs import (
    Modules,
    Pair,
    Walk,
    is_embedding,
    pairs_of,
    reading_of,
    scaling_of,
    walk,
)
from ._peft_config import config_of, configs_of
from ._record import LAWLESS, Survey

if TYPE_CHECKING:
    import torch
    from torch import nn

_SAMPLE = 1024  # entries by which a factor is seen to be zero: by hand
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
    note. The init is the declared one (PEFT's `init_lora_weights`). Otherwise it is read from at
    most 1024 entries per factor, or is "unknown" (meta tensors).

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
    also: Container[int] = (),
) -> Survey:
    """Do as `inspect_model`, for a model that was walked already. Frozen parameters with an id in
    `also` count too.
    """
    check_choice(method, get_args(Method), "The method is")
    check_init(init, known=INITS)
    trainable = {
        id(param): name
        for name, param in walked.parameters
        if param.requires_grad or id(param) in also
    }
    if method == "full":
        survey = Survey(tuple(_full_factors(walked, trainable)))
        if not survey.factors:
            raise InspectionError(
                f"None of {len(walked.parameters)} parameters is a trainable weight of two or more"
                " dimensions.",
                "Set requires_grad on what full finetuning should train; FSDP1 flattens every"
                " weight, FSDP2 does not.",
            )
    else:
        survey = _lora_survey(walked, trainable, init)
    names = {f.name for f in survey.factors}
    other = tuple(filterfalse(names.__contains__, trainable.values()))
    return replace(
        survey,
        other=other,
        looked_at=len(walked.parameters),
        unsupported=unsupported(other),
    )


def _full_factors(walked: Walk, trainable: Mapping[int, str]) -> Iterator[Factor]:
    for pair in pairs_of(walked.modules):
        if not trainable.keys().isdisjoint((id(pair.a.tensor), id(pair.b.tensor))):
            raise InspectionError(
                f"{pair.where} has a trainable LoRA pair, so this is not full finetuning.",
                "Leave method='full' out, or merge the adapters into the weights first.",
            )
    left = dict(trainable)
    for prefix, module in walked.modules:
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
    # transformers': (in, out)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return shape[0], shape[1]
    if getattr(module, "transposed", False):  # torch's ConvTranspose: (in, out, k…)
        return math.prod(shape) / shape[1], shape[1]
    if hasattr(module, "kernel_size") or len(shape) == 2:
        return math.prod(shape[1:]), shape[0]
    return shape[-1], shape[-2]


def _lora_survey(
    walked: Walk,
    trainable: Mapping[int, str],
    init: Init | None,
) -> Survey:
    configs, left = configs_of(walked.modules), dict(trainable)
    factors, notes = list[Factor](), dict[str, None]()
    frozen: dict[int, str] = {}  # a tied factor has its first name
    mixed = tuple(_mixtures(walked.modules))
    for pair in pairs_of(walked.modules):
        names = []
        for half in (pair.a, pair.b):
            key = id(half.tensor)
            names.append(left.pop(key, None))
            if key not in trainable:
                frozen.setdefault(key, f"{pair.layer}.{half.name}".removeprefix("."))
        if not any(names):
            continue
        _refuse_merged(pair)
        reading = reading_of(pair)
        scaling = scaling_of(pair, reading.rank_a)
        if scaling is None:
            notes[f"{pair.where} declares no scaling: 1 is assumed."] = None
        declared = config_of(pair, configs).get("init_lora_weights")
        found = init or init_of(pair, declared, reading.kind)
        if pair.layer.startswith(mixed):
            reading = reading._replace(kind="xlora")
        factors += factors_of(pair, reading, scaling, found, names)
    if not factors and not any(map(is_other_adapter, trainable.values())):
        refuse_frozen(walked)
        raise InspectionError(
            f"No trainable LoRA pair among {len(walked.parameters)} parameters.",
            "Call peft.get_peft_model first, and train before adapters are merged. Full finetuning"
            " is method='full'. Adapters of another layout, such as layers called A and B, or two"
            " pairs on one module, are read by register_convention(): docs/extend/convention.md has"
            " an example.",
        )
    return Survey(
        tuple(factors),
        notes=tuple(notes),
        frozen=tuple(frozen.values()),
    )


def _refuse_merged(pair: Pair) -> None:
    if getattr(pair.owner, "merged_adapters", None):  # PEFT's
        raise InspectionError(
            f"{pair.where} is merged into its base weight, where it does not train.",
            "Train before merging, or call unmerge_adapter().",
        )


def _mixtures(modules: Modules) -> Iterator[str]:
    """Yield the names of X-LoRA models, whose classifier scales the pairs inside by token."""
    for name, module in modules:
        if "internal_xlora_classifier" in module._modules:
            yield name and f"{name}."


def factor_tensors(walked: Walk) -> set[torch.Tensor]:
    """Return both factors of every pair."""
    pairs = pairs_of(walked.modules)
    return {half.tensor for pair in pairs for half in (pair.a, pair.b)}


def refuse_frozen(walked: Walk) -> None:
    """Raise if a model has LoRA factors and none of them trains."""
    tensors = factor_tensors(walked)
    if tensors and not any(tensor.requires_grad for tensor in tensors):
        raise InspectionError(
            f"{len(tensors)} LoRA factors found, all frozen.",
            "Load with is_trainable=True (PeftModel.from_pretrained), or set requires_grad on those"
            " to train.",
        )


def factors_of(
    pair: Pair,
    reading: Reading,
    scaling: float | None,
    init: Init,
    names: Sequence[str | None] = (),
) -> Iterator[Factor]:
    """Yield a pair's factors A and B. names: their parameters', None for one that does not train,
    by default their own.

    The init of a kind without a law is "other", since no init is covered there.
    """
    roles: tuple[Role, Role] = "A", "B"
    for role, name in zip(roles, names or (pair.a.name, pair.b.name), strict=True):
        if name is None:
            continue
        yield Factor(
            name,
            role,
            int(reading.rank_a),
            float(reading.fan_in),
            float(reading.fan_out),
            scaling=1.0 if scaling is None else float(scaling),
            init="other" if reading.kind in LAWLESS else init,
            kind=reading.kind,
            layer=pair.layer,
            adapter=pair.adapter,
            convention=pair.convention.name,
        )


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

    A factor of zeros overrides PEFT's declaration if they contradict. With a declared B = 0, A is
    never all zero. If it is, the pair was set to A = 0 by hand. Shards differ between processes,
    which must all get the same rate, so their zeros are not used.
    """
    marks: Mapping[str, Init] = getattr(pair.owner, INIT_MARK, {})
    recorded = pair.convention.init or marks.get(pair.adapter)
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
        drawn = a if expected == "A" else b
        if expected == "other" or pair.is_sharded or not is_zero(drawn):
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


# --- adapters without a law -----------------------------------------------------------------------

# Other finetuning methods, by the names of their parameters.
_ADAPTERS = {
    "LoHa": r"hada_[wt]\d",
    "LoKr": r"lokr_[wt]\d",
    "PVeRA": r"pvera_lambda_",
    "VeRA": r"vera_lambda_",
    "VB-LoRA": r"vblora_",
    "RandLoRA": r"randlora_",
    "Poly": r"poly_lora_",
    "DyLoRA": r"lora_[AB]\.\d+$|(^|\.)(up|down)_list\.\d+$",
    "GLoRA": r"(^|\.)([ab][12]|bm)\.weight$|glora_[A-E]\.",
    "T-LoRA": r"(^|\.)lambda_layer$",
    "GraLoRA": r"gralora_[AB]",
    "DeLoRA": r"delora_(A|B|lambda)",
    "HiRA": r"hira_(embedding_)?[AB]",
    "Lily": r"lily_(A|B|router)",
    "TinyLoRA": r"tinylora_v",
    "Uni-LoRA": r"unilora_theta",
    "AdaMSS": r"adamss_[AB]",
    "PEANuT": r"peanut_",
    "FRoD": r"frod_lambda_",
    "DEFT": r"deft_[PR]\.",
    "OSF": r"osf_svd_params",
    "SuperTuning": r"supertuning_",
    "RoAd": r"road_(theta|alpha)",
    "BEFT": r"beft_bias",
    "LN tuning": r"ln_tuning_layers",
    "IA³": r"ia3_l(\.|$)",
    "BOFT": r"boft_[Rs]",
    "PSOFT": r"psoft_R",
    "OFT": r"(^|\.)oft_",
    "HRA": r"hra_u",
    "MiSS": r"(bone|miss)_block|(^|\.)bone_",
    "SHiRA": r"shira_weight",
    "C³A": r"c3a_kernel",
    "FourierFT": r"fourierft_spectrum",
    "WaveFT": r"waveft_spectrum",
    "prompt tuning": r"prompt_(encoder|embeddings)",
}
# Parameters that train in addition to a pair.
_PARTS = {
    "AdaLoRA's singular values": r"(^|\.)lora_E(\.|$)",
    "KaSA's singular values": r"(^|\.)lora_diag(\.|$)",
    "X-LoRA's classifier": r"internal_xlora_classifier",
    "MonteCLoRA's sampler": r"lora_monteclora_sampler",
    "DoRA magnitude": r"lora_magnitude|dora_scale|(^|\.)(weight_)?magnitude(\.|$)",
    "Tucker core": r"lora_mid\.",
    "LoRA bias": r"(lora_[ABab]|lora_up|lora_down)\.(.*\.)?bias$",
    "LyCORIS scalar": r"(^|\.)scalar$",
    "new tokens": r"trainable_tokens_",
    "whole copy (modules_to_save)": r"modules_to_save\.",
}
_KINDS = {kind: re.compile(pattern) for kind, pattern in (_ADAPTERS | _PARTS).items()}


def other_kind(name: str) -> str | None:
    """Return the kind of adapter without a law to which a parameter belongs, by its name; None for
    other parameters.

    >>> other_kind("blocks.0.q.vera_lambda_b.default"), other_kind("head.weight")
    ('VeRA', None)
    """
    return next(
        (kind for kind, pattern in _KINDS.items() if pattern.search(name)), None
    )


def is_other_adapter(name: str) -> bool:
    """Return whether a parameter belongs, by its name, to an adapter that is not a LoRA pair, such
    as LoHa or IA³.
    """
    return other_kind(name) in _ADAPTERS


def unsupported(names: Iterable[str]) -> dict[str, str]:
    """Return the kind of every parameter in `names` that belongs to an adapter without a law, by
    name.
    """
    return {name: kind for name in names if (kind := other_kind(name))}


def unread_lora(survey: Survey) -> list[str]:
    """Return those of `survey.other` that are LoRA's by their names, and no known part of an
    adapter: "lora" is in the name of a module, or of the parameter, in which no factor was read.
    """
    rest = [name for name in survey.other if _called_lora(name)]
    read = {path for f in survey.factors for path in _called_lora(f.name)}
    return [n for n in rest if n not in survey.unsupported and _called_lora(n) - read]


def _called_lora(name: str) -> set[str]:
    """Return the paths to a parameter, of its modules and its own, whose last part has "lora"."""
    paths = accumulate(name.split("."), "{}.{}".format)
    return {path for path in paths if "lora" in path.rpartition(".")[2].lower()}
