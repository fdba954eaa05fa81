"""LoRA pairs in a model: the modules that own them, by which convention, and what they declare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import InspectionError
from ._conventions import LAYOUTS, Convention, Layout, Reading, conventions

if TYPE_CHECKING:  # files are read without it
    import torch
    from torch import nn

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")

Modules = list["tuple[str, nn.Module]"]
Parameters = list["tuple[str, nn.Parameter]"]


class Walk(NamedTuple):
    """A model's modules and parameters by name. They are collected once, since this takes most of
    the time.
    """

    modules: Modules
    parameters: Parameters


class Half(NamedTuple):
    """One of a pair's two tensors, with its name relative to the owner. In a file: its full name,
    and only a shape.
    """

    name: str
    tensor: torch.Tensor


class Pair(NamedTuple):
    """Two factors of a module: the module, its name, the adapter's name, the convention, A and B.

    For a file the owner is a namespace with the file's entries.
    """

    owner: Any
    layer: str
    adapter: str
    convention: Convention
    a: Half
    b: Half

    @property
    def where(self) -> str:
        """The pair's name in error messages."""
        return self.layer or type(self.owner).__name__

    @property
    def trains(self) -> bool:
        return self.a.tensor.requires_grad or self.b.tensor.requires_grad


def canonical_name(name: str) -> str:
    """Return a parameter's name without the prefixes of DDP, FSDP, torch.compile and checkpointing."""
    for wrapper in _WRAPPERS[:-1]:
        name = name.replace(f"{wrapper}.", "")
    return name.removeprefix("module.")


def walk(model: nn.Module) -> Walk:
    """Return the model's modules and parameters by canonical names, or by their own if these are
    not unique.
    """
    modules = list(model.named_modules())
    if not any(
        prefix.endswith(_WRAPPERS) for prefix, _ in modules
    ):  # the usual case: no prefix to remove
        return Walk(modules, _parameters_of(modules))
    clean = [(canonical_name(f"{prefix}.").removesuffix("."), module) for prefix, module in modules]
    parameters = _parameters_of(clean)
    if len({name for name, _ in parameters}) < len(
        parameters
    ):  # a submodule of the user is called "module"
        return Walk(modules, _parameters_of(modules))
    return Walk(clean, parameters)


def _parameters_of(modules: Modules) -> Parameters:
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules:
        for local, param in module._parameters.items():
            if param is not None and id(param) not in found:
                found[id(param)] = f"{prefix}.{local}" if prefix else local, param
    return list(found.values())


# --- finding --------------------------------------------------------------------------------------


def pairs_of(modules: Modules) -> Iterator[Pair]:
    """Yield every pair by the first row that fits its owner, in the model's order. Tied ones occur
    for each owner.
    """
    from torch import nn

    rows = conventions()
    firsts = {row.a for row in rows}
    for layer, module in modules:
        if not (firsts.isdisjoint(module._modules) and firsts.isdisjoint(module._parameters)):
            found: dict[tuple[int, int], Pair] = {}
            members: dict[str, Any] = {**module._modules, **module._parameters}
            dicts = {
                name: isinstance(own, (nn.ModuleDict, nn.ParameterDict))
                for name, own in members.items()
            }
            for row in rows:
                fits = dicts.get(row.a) is dicts.get(row.b) is row.container
                if fits and all(hasattr(module, name) for name in row.where):
                    first, second = (
                        _halves(members[name], name, row.container) for name in (row.a, row.b)
                    )
                    for adapter in filter(second.__contains__, first):
                        a, b = first[adapter], second[adapter]
                        found.setdefault(
                            (id(a.tensor), id(b.tensor)), Pair(module, layer, adapter, row, a, b)
                        )
            yield from found.values()


def _halves(member: Any, attribute: str, by_adapter: bool) -> dict[str, Half]:
    """Return the tensors of a module's `attribute` by adapter: a parameter, a module's weight, or a
    dict of these.
    """
    import torch

    halves: dict[str, Half] = {}
    for key, value in member.items() if by_adapter else [("", member)]:
        name = f"{attribute}.{key}" if by_adapter else attribute
        if isinstance(value, torch.Tensor):
            halves[key] = Half(name, value)
        elif isinstance(getattr(value, "weight", None), torch.Tensor):
            halves[key] = Half(f"{name}.weight", value.weight)
    return halves


# --- reading --------------------------------------------------------------------------------------


def reading_of(pair: Pair) -> Reading:
    """Return rank, fan-in, fan-out and kind, by the first of the row's layouts that fits the shapes
    and the rank.

    The shape of a shard is not checked. Its declared rank and its modules' declared fan-in and
    fan-out are used.

    Raises:
        InspectionError: no layout fits the shapes and the declared rank.
    """
    declared = declared_number(pair, pair.convention.rank)
    a, b = pair.a, pair.b
    readings = (read_as(layout, pair) for layout in pair.convention.layouts)
    for reading in [_shard_reading(pair, declared)] if is_shard(a) or is_shard(b) else readings:
        rank = reading.rank_a if reading is not None and declared is None else declared
        if reading is not None and reading.rank_a == reading.rank_b == rank:
            return reading
    what = "declares no rank" if declared is None else f"declares rank {declared:g}"
    raise InspectionError(
        f"{pair.where} {what} but {a.name} has shape {tuple(a.tensor.shape)} and {b.name}"
        f" {tuple(b.tensor.shape)}.",
        "Rebuild the adapter so that A has `rank` rows and B `rank` columns, set the declared rank"
        " right, or register its layout with register_convention().",
    )


def read_as(layout: str | Layout, pair: Pair) -> Reading | None:
    """Return a layout's reading if its ranks are positive and whole, else None."""
    read = layout if callable(layout) else LAYOUTS[layout]
    try:
        reading = read(pair.owner, tuple(pair.a.tensor.shape), tuple(pair.b.tensor.shape))
        whole = all(
            rank >= 1 and float(rank).is_integer() for rank in (reading.rank_a, reading.rank_b)
        )
    except InspectionError:  # the layout has a more specific message
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError):
        return None
    return (
        reading._replace(kind=pair.convention.kind or reading.kind or _kind(pair))
        if whole
        else None
    )


def _shard_reading(pair: Pair, rank: float | None) -> Reading | None:
    whole = pair.b if is_shard(pair.a) else pair.a
    if rank is None and not is_shard(whole):
        rank = whole.tensor.shape[1 if whole is pair.b else 0]
    if rank is None or rank < 1:
        return None
    fan_in, fan_out = _declared_fan(pair, pair.a, 0), _declared_fan(pair, pair.b, 1)
    return Reading(rank, rank, fan_in, fan_out, kind=pair.convention.kind or _kind(pair))


def _kind(pair: Pair) -> str:
    base = getattr(pair.owner, "base_layer", pair.owner)
    conv = len(pair.a.tensor.shape) > 2 or hasattr(base, "kernel_size")
    return "embedding" if is_embedding(pair.owner) else "conv" if conv else "linear"


def is_shard(half: Half) -> bool:
    """Return whether a factor is the shard of one process: flat under FSDP1, empty under ZeRO-3."""
    return len(half.tensor.shape) < 2 or 0 in half.tensor.shape


# Attributes for fan-in and fan-out.
_FANS = (
    ("in_features", "in_dim", "in_channels", "num_embeddings", "nx"),
    ("out_features", "out_dim", "out_channels", "embedding_dim", "nf"),
)


def _declared_fan(pair: Pair, half: Half, side: int) -> float:
    """Return the layer's fan-in (side 0) or fan-out (1), from an unsharded factor or from a
    module's attribute.
    """
    if not is_shard(half):
        shape = half.tensor.shape
        return float(math.prod(shape[1:]) if side == 0 else shape[0])
    inner = half.name.rpartition(".")[0]
    for owner in (
        getattr(pair.owner, "base_layer", pair.owner),
        pair.owner,
        pair.owner.get_submodule(inner),
    ):
        for name in _FANS[side]:
            value = getattr(owner, name, None)
            if isinstance(value, int):
                return float(
                    value * (math.prod(getattr(owner, "kernel_size", ())) if side == 0 else 1)
                )
    raise InspectionError(
        f"{pair.where} is sharded, and neither the shape {tuple(half.tensor.shape)} of {half.name}"
        f" nor a module has its fan-{('in', 'out')[side]}.",
        "Set in_features and out_features on the module that owns the pair, or shard with"
        " fully_shard.",
    )


def scaling_of(pair: Pair, rank: float) -> float | None:
    """Return the declared multiplier of B·A, else declared alpha / rank, else None. Raise if it is
    impossible.
    """
    value = declared_number(pair, pair.convention.scaling)
    if value is None:
        alpha = declared_number(pair, pair.convention.alpha)
        value = None if alpha is None else alpha / rank
    if value is not None and not 0 < value < math.inf:
        raise InspectionError(
            f"{pair.where} has the scaling {value:g}, so its adapter has no effect or is"
            " undefined.",
            "Give a positive finite alpha. To disable an adapter, freeze or delete it.",
        )
    return value


def declared_number(pair: Pair, attributes: Iterable[str]) -> float | None:
    """Return the first of the owner's `attributes` that is a number, also in a dict by adapter or a
    small tensor.
    """
    for attribute in attributes:
        value: Any = pair.owner
        for part in attribute.split("."):
            value = getattr(value, part, None)
        if isinstance(value, Mapping):
            value = value.get(pair.adapter)
        if hasattr(value, "numel") and value.numel() == 1 and not value.is_meta:  # a tensor
            value = value.item()
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module, or the one that it adapts, is an embedding."""
    base = getattr(module, "base_layer", module)
    if isinstance(
        base, SimpleNamespace
    ):  # what a file says about a layer: it is not a module, and torch is not needed
        return False
    from torch import nn

    return isinstance(base, (nn.Embedding, nn.EmbeddingBag))
