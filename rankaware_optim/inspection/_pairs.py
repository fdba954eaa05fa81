"""LoRA pairs in a model: the modules that own them, by which convention, and what they declare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .._checks import is_number, shown
from ..errors import InspectionError
from ._conventions import LAYOUTS, Convention, Layout, Reading, Shape, conventions

if TYPE_CHECKING:  # files are read without it
    import torch
    from torch import nn

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# Attributes for fan-in and fan-out.
_FANS = (
    ("in_features", "in_dim", "in_channels", "num_embeddings", "nx"),
    ("out_features", "out_dim", "out_channels", "embedding_dim", "nf"),
)

Modules = list["tuple[str, nn.Module]"]
Parameters = list["tuple[str, nn.Parameter]"]


class Walk(NamedTuple):
    """A model's modules and parameters by name. They are collected once, since this takes most of
    the time.
    """

    modules: Modules
    parameters: Parameters


class Half(NamedTuple):
    """One of a pair's two tensors, with its name relative to the owner."""

    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def is_shard(self) -> bool:
        """Whether it is the shard of one process: flat under FSDP1, empty under ZeRO-3."""
        return len(self.tensor.shape) < 2 or 0 in self.tensor.shape


class Pair(NamedTuple):
    """Two factors of a module: the module and its name, the adapter's, the convention, A and B."""

    owner: nn.Module
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

    @property
    def is_sharded(self) -> bool:
        return self.a.is_shard or self.b.is_shard

    @property
    def kind(self) -> str:
        """The layer's kind by its module, where neither row nor layout determines it."""
        if is_embedding(self.owner):
            return "embedding"
        base = getattr(self.owner, "base_layer", self.owner)
        is_conv = len(self.a.shape) > 2 or hasattr(base, "kernel_size")
        return "conv" if is_conv else "linear"


def canonical_name(name: str) -> str:
    """Return a parameter's name without prefixes of DDP, FSDP, torch.compile and checkpointing."""
    for wrapper in _WRAPPERS:
        name = name.replace(f"{wrapper}.", "")
    return name.removeprefix("module.")


def walk(model: nn.Module | Sequence[nn.Module]) -> Walk:
    """Return the modules and parameters of a model, or of several, by canonical names, or by their
    own if these are not unique.
    """
    from ._models import as_one_model

    whole = as_one_model(model)
    if not hasattr(whole, "named_modules"):
        raise InspectionError(
            f"{shown(model)} is not a model.", "Give an nn.Module, or a list of them."
        )
    modules = list(whole.named_modules())
    clean = [
        (canonical_name(f"{name}.").removesuffix("."), module)
        for name, module in modules
    ]
    parameters = _parameters_of(clean)
    # They are not unique if a submodule of the user is called "module".
    if len({name for name, _ in parameters}) == len(parameters):
        return Walk(clean, parameters)
    return Walk(modules, _parameters_of(modules))


def _parameters_of(modules: Modules) -> Parameters:
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, module in modules:
        for local, param in module._parameters.items():
            if param is not None and id(param) not in named:
                named[id(param)] = f"{prefix}.{local}" if prefix else local, param
    return list(named.values())


# --- finding --------------------------------------------------------------------------------------


def pairs_of(modules: Modules) -> Iterator[Pair]:
    """Yield every pair by the first row that fits its owner, in the model's order. Tied ones occur
    for each owner.
    """
    rows = conventions()
    firsts = {row.a for row in rows}
    for layer, module in modules:
        members: dict[str, Any] = {**module._modules, **module._parameters}
        if firsts.isdisjoint(members):
            continue
        pairs: dict[tuple[int, int], Pair] = {}
        for row in rows:
            in_a = _halves(members.get(row.a), row.a, row.container)
            if not in_a or not all(hasattr(module, name) for name in row.where):
                continue
            in_b = _halves(members.get(row.b), row.b, row.container)
            for adapter in filter(in_b.__contains__, in_a):
                a, b = in_a[adapter], in_b[adapter]
                key = id(a.tensor), id(b.tensor)
                pairs.setdefault(key, Pair(module, layer, adapter, row, a, b))
        yield from pairs.values()


def _halves(member: Any, attribute: str, by_adapter: bool) -> dict[str, Half]:
    """Return the tensors of a module's `attribute` by adapter: a parameter, a module's weight, or a
    dict of these if `by_adapter`.
    """
    import torch
    from torch import nn

    halves: dict[str, Half] = {}
    if isinstance(member, (nn.ModuleDict, nn.ParameterDict)) is not by_adapter:
        return halves
    for key, value in member.items() if by_adapter else [("", member)]:
        name = f"{attribute}.{key}" if by_adapter else attribute
        if not isinstance(value, torch.Tensor):
            name, value = f"{name}.weight", getattr(value, "weight", None)
        if isinstance(value, torch.Tensor):
            halves[key] = Half(name, value)
    return halves


# --- declared numbers -----------------------------------------------------------------------------


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
        if hasattr(value, "numel") and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if is_number(value):
            return value
    return None


def scaling_of(pair: Pair, rank: float) -> float | None:
    """Return the declared multiplier of B·A, else declared alpha / rank, else None. Raise if it is
    impossible.
    """
    value = declared_number(pair, pair.convention.scaling)
    if value is None:
        alpha = declared_number(pair, pair.convention.alpha)
        value = None if alpha is None else alpha / rank
    return checked_scaling(pair.where, value)


def checked_scaling(where: str, scaling: float | None) -> float | None:
    """Return a scaling, checked to be positive and finite if there is one."""
    if scaling is not None and not 0 < scaling < math.inf:
        raise InspectionError(
            f"{where} has the scaling {scaling:g}, so its adapter has no effect or is undefined.",
            "Give a positive finite alpha. To disable an adapter, freeze or delete it.",
        )
    return scaling


# --- reading --------------------------------------------------------------------------------------


def reading_of(pair: Pair) -> Reading:
    """Return rank, fan-in, fan-out and kind, by the first of the row's layouts that fits the shapes
    and the rank.

    The shape of a shard is not checked. Its declared rank and its modules' declared fan-in and
    fan-out are used.

    Raises:
        InspectionError: no layout fits the shapes and the declared rank, or none is declared and
            two ranks fit.
    """
    rank = declared_number(pair, pair.convention.rank)
    a, b = pair.a.shape, pair.b.shape
    layouts = pair.convention.layouts
    readings = (layout_reading(layout, pair.owner, a, b) for layout in layouts)
    for reading in [_shard_reading(pair, rank)] if pair.is_sharded else readings:
        if reading is not None and rank in (None, reading.rank_a):
            if rank is None:
                refuse_either_way(
                    pair.where, reading, (pair.a.name, a), (pair.b.name, b)
                )
            kind = pair.convention.kind or reading.kind or pair.kind
            return reading._replace(kind=kind)
    raise misfit(pair.where, rank, (pair.a.name, a), (pair.b.name, b))


def misfit(
    where: str, rank: float | None, a: tuple[str, Shape], b: tuple[str, Shape]
) -> InspectionError:
    """Return the error for a pair whose declared rank and two named shapes do not fit."""
    what = "declares no rank" if rank is None else f"declares rank {rank:g}"
    return InspectionError(
        f"{where} {what} but {a[0]} has shape {a[1]} and {b[0]} {b[1]}.",
        "Rebuild the adapter so that A has `rank` rows and B `rank` columns, set the declared rank"
        " right, or register its layout with register_convention().",
    )


def refuse_either_way(
    where: str, reading: Reading, a: tuple[str, Shape], b: tuple[str, Shape]
) -> None:
    """Raise if the named shapes of a pair without a declared rank also fit a larger square layer,
    at a lower rank and with A and B transposed.
    """
    rank, side = reading.rank_a, reading.fan_in
    if side == reading.fan_out < rank:
        raise InspectionError(
            f"{where} declares no rank, and {a[0]} has shape {a[1]} and {b[0]} {b[1]}, so the rank"
            f" may be {rank:g} or {side:g}.",
            "Declare it, such as by `r` on the module that owns the pair, or by PEFT's"
            " configuration of a file.",
        )


def layout_reading(
    layout: str | Layout, owner: Any, a: Shape, b: Shape
) -> Reading | None:
    """Return a layout's reading if its ranks are one positive whole number, else None."""
    if min(len(a), len(b)) < 2 or 0 in (*a, *b):
        return None
    try:
        read = layout if callable(layout) else LAYOUTS[layout]
        reading = read(owner, a, b)
        rank = reading.rank_a
        is_whole = rank == reading.rank_b and rank >= 1 and float(rank).is_integer()
        return (
            reading if is_whole and min(reading.fan_in, reading.fan_out) > 0 else None
        )
    except InspectionError:  # the layout has a more specific message
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module, or the one that it adapts, is an embedding."""
    base = getattr(module, "base_layer", module)
    from torch import nn

    return isinstance(base, (nn.Embedding, nn.EmbeddingBag))


def _shard_reading(pair: Pair, rank: float | None) -> Reading | None:
    a, b = pair.a, pair.b
    if rank is None and not (a.is_shard and b.is_shard):
        rank = b.shape[1] if a.is_shard else a.shape[0]
    if rank is None or rank < 1:
        return None
    return Reading(rank, rank, _fan(pair, a, 0), _fan(pair, b, 1))


def _fan(pair: Pair, half: Half, side: int) -> float:
    """Return the layer's fan-in (side 0) or fan-out (1), for a shard from a module's attribute."""
    if not half.is_shard:
        return (math.prod(half.shape[1:]), half.shape[0])[side]
    inner = half.name.rpartition(".")[0]
    base = getattr(pair.owner, "base_layer", pair.owner)
    for module in (base, pair.owner, pair.owner.get_submodule(inner)):
        kernel = getattr(module, "kernel_size", ()) if side == 0 else ()
        for name in _FANS[side]:
            size = getattr(module, name, None)
            if isinstance(size, int):
                return float(size * math.prod(kernel))
    raise InspectionError(
        f"{pair.where} is sharded, and neither the shape {half.shape} of {half.name}"
        f" nor a module has its fan-{('in', 'out')[side]}.",
        "Set in_features and out_features on the module that owns the pair, or shard with"
        " fully_shard.",
    )
