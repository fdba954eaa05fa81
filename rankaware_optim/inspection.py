"""Inspection: from a model to a `Survey` of its trainable LoRA factors, by duck typing and the table of conventions."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapters import CONVENTIONS, Convention, Factor, Init, Method, Survey
from .errors import InspectionError

__all__ = ["canonical_name", "inspect_model"]

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")
_WRAPPED = tuple(wrapper.removesuffix(".") for wrapper in _WRAPPERS)
_SAMPLE = 1024
# PEFT's init_lora_weights values under which B starts at zero; True too, and every other string starts both non-zero.
_ZERO_B = {"gaussian", "eva"}


Modules = list[tuple[str, nn.Module]]
"""A model's modules by name, as `list(model.named_modules())`: walked once, since the walk is what costs."""
Parameters = list[tuple[str, nn.Parameter]]


class Walk(NamedTuple):
    """A model walked once, since the walk is what costs: its modules and parameters by name."""

    modules: Modules
    parameters: Parameters


class _Half(NamedTuple):
    name: str  # local to the owner
    tensor: torch.Tensor


def inspect_model(model: nn.Module, *, method: Method = "lora", init: Init | None = None) -> Survey:
    """Survey what `model` trains: its LoRA pairs, or with method="full" every weight of two or more dimensions.

    Only parameters that require a gradient count, tied ones once. A pair's rank is the declared one, checked against
    its (global) shapes; of flat or empty shards (FSDP1) it is believed, and the fans are those that modules declare.
    Its scaling is the declared one, or 1 with a note. Its init is the one declared (PEFT's `init_lora_weights`), else
    read from at most 1,024 strided entries a factor, else "unknown" (meta tensors); `init` overrides all of it.
    Nothing about the model is changed. One sharded by `fully_shard` is to be inspected by all its processes at once.

    Raises:
        InspectionError: declared rank and shapes disagree, a scaling is not positive, no pair was found, or one was
            where method="full" expects none.
    """
    return survey_of(walk(model), method=method, init=init)


def survey_of(walked: Walk, *, method: Method = "lora", init: Init | None = None, also: Container[int] = ()) -> Survey:
    """`inspect_model` of a model that was walked already; parameters whose id is in `also` count though frozen."""
    if method not in ("lora", "full"):
        raise InspectionError(f"The method is 'lora' or 'full', not {method!r}.", "Give one of the two.")
    modules, parameters = walked
    trainable = {id(p): name for name, p in parameters if p.requires_grad or id(p) in also}
    notes: list[str] = []
    if method == "full":
        _refuse_pairs(modules, trainable)
    found = _full_factors(modules, trainable) if method == "full" else _lora_factors(modules, trainable, init, notes)
    factors = tuple(found)
    known = {f.name for f in factors}
    survey = Survey(
        factors=factors,
        other=tuple(name for name in trainable.values() if name not in known),
        notes=tuple(dict.fromkeys(notes)),
        looked_at=len(parameters),
        tried=tuple(c.name for c in CONVENTIONS),
    )
    if not factors:
        raise _nothing_found(survey, method)
    return survey


def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes that DDP, FSDP, torch.compile and checkpointing put into it."""
    for wrapper in _WRAPPERS[:-1]:
        name = name.replace(wrapper, "")
    return name.removeprefix(_WRAPPERS[-1])


def walk(model: nn.Module) -> Walk:
    """The model's modules and parameters under canonical names, or their own where canonical ones would coincide."""
    modules = list(model.named_modules())
    if not any(prefix.endswith(_WRAPPED) for prefix, _ in modules):  # the usual case: no name to clean
        return Walk(modules, _parameters_of(modules))
    clean = [(canonical_name(f"{prefix}.").removesuffix("."), module) for prefix, module in modules]
    parameters = _parameters_of(clean)
    if len({name for name, _ in parameters}) < len(parameters):  # a submodule of the user's own is called "module"
        return Walk(modules, _parameters_of(modules))
    return Walk(clean, parameters)


def _parameters_of(modules: Modules) -> Parameters:
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules:
        for local, param in module._parameters.items():
            if param is not None and id(param) not in found:
                found[id(param)] = f"{prefix}.{local}" if prefix else local, param
    return list(found.values())


def _refuse_pairs(modules: Modules, trainable: Mapping[int, str]) -> None:
    for prefix, module, convention in _candidates(modules):
        if any(id(a.tensor) in trainable or id(b.tensor) in trainable for _, a, b in _pairs(module, convention)):
            raise InspectionError(
                f"{prefix or type(module).__name__} holds a trainable LoRA pair, so this is no full finetuning.",
                "Leave method='full' out, or merge the adapters into the weights first.",
            )


def _nothing_found(survey: Survey, method: Method) -> InspectionError:
    if method == "full":
        return InspectionError(
            f"None of {survey.looked_at} parameters is a trainable weight of two or more dimensions.",
            "Set requires_grad on what full finetuning should train; FSDP1 flattens every weight, FSDP2 does not.",
        )
    return InspectionError(
        f"No trainable LoRA pair among {survey.looked_at} parameters (conventions tried: {', '.join(survey.tried)}).",
        "Add adapters and let them require a gradient, or say method='full' for full finetuning.",
    )


def _full_factors(modules: Modules, trainable: Mapping[int, str]) -> Iterator[Factor]:
    left = dict(trainable)
    for prefix, module in modules:
        for local, param in module.named_parameters(recurse=False):
            name = left.pop(id(param), None)
            if name is None or param.dim() < 2 or _is_embedding(module):
                continue
            fan_in, fan_out = _full_fans(module, param)
            kind = "conv" if param.dim() > 2 and local == "weight" else "linear"
            yield Factor(name, "full", None, fan_in, fan_out, kind=kind, layer=prefix)


def _full_fans(module: nn.Module, param: torch.Tensor) -> tuple[float, float]:
    """Fan-in and fan-out of a whole weight: (out, in), (out, in, k…) for a conv, (…, in) for bare stacked tensors."""
    shape = tuple(param.shape)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' Conv1D stores (in, out)
        return float(shape[0]), float(shape[1])
    if getattr(module, "transposed", False):  # torch's ConvTranspose stores (in, out, k…)
        return float(math.prod(shape) / shape[1]), float(shape[1])
    if hasattr(module, "kernel_size") or len(shape) == 2:
        return float(math.prod(shape[1:])), float(shape[0])
    return float(shape[-1]), float(shape[-2])


def _is_embedding(module: nn.Module) -> bool:
    base = getattr(module, "base_layer", module)
    return isinstance(base, (nn.Embedding, nn.EmbeddingBag))


def _lora_factors(
    modules: Modules, trainable: Mapping[int, str], init: Init | None, notes: list[str]
) -> Iterator[Factor]:
    declared = _declared_inits(modules)
    left = dict(trainable)
    for prefix, module, convention in _candidates(modules):
        for adapter, a, b in _pairs(module, convention):
            if id(a.tensor) in left or id(b.tensor) in left:
                pair = _read_pair(module, prefix, convention, adapter, a, b, notes)
                pair_init = init or _init_of(a, b, declared.get(adapter), pair["kind"], prefix)
                for role, half in (("A", a), ("B", b)):
                    name = left.pop(id(half.tensor), None)
                    if name is not None:
                        yield Factor(name=name, role=role, init=pair_init, **pair)  # type: ignore[arg-type]


def _candidates(modules: Modules) -> Iterator[tuple[str, nn.Module, Convention]]:
    """The modules that own something named as a convention's A, with that convention."""
    firsts = {convention.a for convention in CONVENTIONS}
    for prefix, module in modules:
        if not (firsts.isdisjoint(module._modules) and firsts.isdisjoint(module._parameters)):
            for convention in CONVENTIONS:
                if convention.a in module._modules or convention.a in module._parameters:
                    yield prefix, module, convention


def _pairs(module: nn.Module, convention: Convention) -> Iterator[tuple[str, _Half, _Half]]:
    """The (adapter, A, B) triples that `module` owns under `convention`; none if it owns only one of the two."""
    a = _owned(module, convention.a, convention.container)
    b = _owned(module, convention.b, convention.container) if a else {}
    for adapter, half in a.items():
        if adapter in b:
            yield adapter, half, b[adapter]


def _owned(module: nn.Module, attribute: str, container: bool) -> dict[str, _Half]:
    member: object = module._parameters.get(attribute)
    member = module._modules.get(attribute) if member is None else member
    if member is None:
        return {}
    if not container:
        half = _tensor_of(attribute, member)
        return {} if half is None else {"": half}
    if not isinstance(member, (nn.ModuleDict, nn.ParameterDict)):
        return {}
    halves = {key: _tensor_of(f"{attribute}.{key}", value) for key, value in member.items()}
    return {key: half for key, half in halves.items() if half is not None}


def _tensor_of(name: str, member: object) -> _Half | None:
    if isinstance(member, torch.Tensor):
        return _Half(name, member)
    weight = getattr(member, "weight", None)
    return _Half(f"{name}.weight", weight) if isinstance(weight, torch.Tensor) else None


def _read_pair(
    module: nn.Module, layer: str, convention: Convention, adapter: str, a: _Half, b: _Half, notes: list[str]
) -> dict[str, Any]:
    """All that the two factors of a pair share."""
    conv = a.tensor.dim() > 2 or hasattr(getattr(module, "base_layer", module), "kernel_size")
    kind = convention.kind or ("embedding" if _is_embedding(module) else "conv" if conv else "linear")
    rank = _rank(module, convention, adapter, a, b, layer)
    scaling = _scaling(module, convention, adapter, rank, layer)
    if scaling is None:
        notes.append(f"{layer or type(module).__name__} declares no scaling: 1 is assumed.")
    return {
        "rank": rank,
        "fan_in": _declared_fan(module, a, 0, layer) if _is_shard(a) else float(math.prod(a.tensor.shape[1:])),
        "fan_out": _declared_fan(module, b, 1, layer) if _is_shard(b) else float(b.tensor.shape[0]),
        "scaling": 1.0 if scaling is None else scaling,
        "kind": kind,
        "layer": layer,
        "adapter": adapter,
        "convention": convention.name,
    }


def _rank(module: nn.Module, convention: Convention, adapter: str, a: _Half, b: _Half, layer: str) -> int:
    """The rank that the declaration and both shapes agree on; of a shard's shape nothing is asked."""
    groups = getattr(getattr(module, "base_layer", module), "groups", 1)
    rows = None if _is_shard(a) else a.tensor.shape[0]
    columns = None if _is_shard(b) else b.tensor.shape[1] * (groups if b.tensor.dim() > 2 else 1)
    declared = _declared(module, convention.rank, adapter)
    told = {int(value) for value in (declared, rows, columns) if value is not None}
    rank = told.pop() if len(told) == 1 else 0
    if rank < 1:
        what = "declares no rank" if declared is None else f"declares rank {int(declared)}"
        raise InspectionError(
            f"{layer or type(module).__name__} {what} but {a.name} has shape {tuple(a.tensor.shape)} and {b.name} "
            f"{tuple(b.tensor.shape)}.",
            "Rebuild the adapter so that A has `rank` rows and B `rank` columns, or set the declared rank right.",
        )
    return rank


def _is_shard(half: _Half) -> bool:
    """Whether a factor's shape is that of one process's share: flat under FSDP1, empty under ZeRO-3."""
    return half.tensor.dim() < 2 or half.tensor.numel() == 0


# What modules call their fan-in and fan-out.
_FANS = (
    ("in_features", "out_features"),
    ("in_dim", "out_dim"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("nx", "nf"),
)


def _declared_fan(module: nn.Module, half: _Half, side: int, layer: str) -> float:
    """The adapted layer's fan-in (side 0) or fan-out (1) as its base, its owner or the factor's module declares it."""
    inner = half.name.rpartition(".")[0]
    for owner in (getattr(module, "base_layer", module), module, module.get_submodule(inner)):
        for names in _FANS:
            value = getattr(owner, names[side], None)
            if isinstance(value, int):
                return float(value * (math.prod(getattr(owner, "kernel_size", ())) if side == 0 else 1))
    raise InspectionError(
        f"{layer or type(module).__name__} is sharded, and neither the shape {tuple(half.tensor.shape)} of {half.name} "
        f"nor a module tells its fan-{('in', 'out')[side]}.",
        "Set in_features and out_features on the module that owns the pair, or shard with fully_shard.",
    )


def _scaling(module: nn.Module, convention: Convention, adapter: str, rank: int, layer: str) -> float | None:
    """The declared multiplier on B·A, else declared alpha / rank, else None."""
    value = _declared(module, convention.scaling, adapter)
    if value is None:
        alpha = _declared(module, convention.alpha, adapter)
        value = None if alpha is None else alpha / rank
    if value is not None and not 0 < value < math.inf:
        raise InspectionError(
            f"{layer or type(module).__name__} has the scaling {value:g}, so its adapter adds nothing or is undefined.",
            "Give a positive finite alpha; to switch an adapter off, freeze or delete it instead.",
        )
    return value


def _declared(module: nn.Module, attributes: tuple[str, ...], adapter: str) -> float | None:
    """The first of `attributes` that is a number, possibly in a dict by adapter or a one-element tensor."""
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if isinstance(value, Mapping):
            value = value.get(adapter)
        if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def _declared_inits(modules: Modules) -> dict[str, object]:
    """PEFT's `init_lora_weights` by adapter, from whichever module holds the adapters' configurations."""
    for _, module in modules:
        configs = module.__dict__.get("peft_config")
        if isinstance(configs, Mapping):
            inits = {name: _config_value(config) for name, config in configs.items()}
            return {name: value for name, value in inits.items() if value is not None}
    return {}


def _config_value(config: object) -> object:
    if isinstance(config, Mapping):
        return config.get("init_lora_weights")
    return getattr(config, "init_lora_weights", None)


def declared_init(declared: object, kind: str) -> Init:
    """The init that PEFT's `init_lora_weights` declares; its embeddings draw B where other layers draw A."""
    if declared is not True and str(declared).lower() not in _ZERO_B:
        return "other"
    return "B" if kind == "embedding" else "A"


def _init_of(a: _Half, b: _Half, declared: object, kind: str, layer: str) -> Init:
    """Declared first, then the zeros. A declaration falls only to a factor of zeros that it rules out.

    Under a declared Init[A], A is never all zero, trained or not: if it is, the pair was set to Init[B] by hand.
    Shards show other zeros to every process, which must all come to one rate: there the declaration is all there is.
    """
    sharded = _is_shard(a) or _is_shard(b)
    if declared is None and sharded:
        raise InspectionError(
            f"{layer or 'The model'} is sharded so that its factors do not show their init, and none is declared.",
            "Say it: init='A' where B starts at zero (the usual one), init='B' where A does.",
        )
    if declared is None:
        return _sampled_init(a.tensor, b.tensor)
    expected = declared_init(declared, kind)
    if expected == "other" or sharded or _is_zero(a.tensor if expected == "A" else b.tensor) is not True:
        return expected
    return _sampled_init(a.tensor, b.tensor)


def _sampled_init(a: torch.Tensor, b: torch.Tensor) -> Init:
    zeros = _is_zero(a), _is_zero(b)
    known: dict[tuple[bool | None, bool | None], Init] = {
        (False, True): "A",
        (True, False): "B",
        (False, False): "other",
    }
    return known.get(zeros, "unknown")


def _is_zero(tensor: torch.Tensor) -> bool | None:
    """Whether a strided sample of at most 1,024 entries is all zero; None where there is nothing to read.

    A DTensor is read whole, over all its processes, so that they come to the same answer.
    """
    if tensor.is_meta or tensor.numel() == 0:
        return None
    if hasattr(tensor, "full_tensor"):
        found: Any = tensor.detach().ne(0).any()
        return not bool(found.full_tensor())
    flat = tensor.detach().reshape(-1)
    return not bool(flat[:: max(1, -(-flat.numel() // _SAMPLE))].any())
