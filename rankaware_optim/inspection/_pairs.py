"""LoRA pairs in a model: the modules that own them, by which convention, and what they declare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from .._checks import is_number
from ..errors import InspectionError
from ._conventions import LAYOUTS, Convention, Layout, Reading, conventions

if TYPE_CHECKING:  # files are read without it
    import torch
    from torch import nn

_WRAPPERS = (
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_orig_mod",
    "module",
)
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
    """One of a pair's two tensors, with its name relative to the owner. In a file: its full name,
    and only a shape.
    """

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

    @property
    def is_sharded(self) -> bool:
        return self.a.is_shard or self.b.is_shard


def canonical_name(name: str) -> str:
    """Return a parameter's name without prefixes of DDP, FSDP, torch.compile and checkpointing."""
    for wrapper in _WRAPPERS[:-1]:
        name = name.replace(f"{wrapper}.", "")
    return name.removeprefix("module.")


def walk(model: nn.Module) -> Walk:
    """Return the model's modules and parameters by canonical names, or by their own if these are
    not unique.
    """
    modules = list(model.named_modules())
    if any(prefix.endswith(_WRAPPERS) for prefix, _ in modules):
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
        if not (
            firsts.isdisjoint(module._modules) and firsts.isdisjoint(module._parameters)
        ):
            yield from _pairs_in(layer, module, rows)


def _pairs_in(
    layer: str, module: nn.Module, rows: Iterable[Convention]
) -> Iterable[Pair]:
    from torch import nn

    pairs: dict[tuple[int, int], Pair] = {}
    members: dict[str, Any] = {**module._modules, **module._parameters}
    is_dict = {
        name: isinstance(member, (nn.ModuleDict, nn.ParameterDict))
        for name, member in members.items()
    }
    for row in rows:
        fits = is_dict.get(row.a) is is_dict.get(row.b) is row.container
        if not fits or not all(hasattr(module, name) for name in row.where):
            continue
        firsts, seconds = (
            _halves(members[name], name, row.container) for name in (row.a, row.b)
        )
        for adapter, a in firsts.items():
            if adapter in seconds:
                b = seconds[adapter]
                key = id(a.tensor), id(b.tensor)
                pairs.setdefault(key, Pair(module, layer, adapter, row, a, b))
    return pairs.values()


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


# --- declared numbers -----------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a number is declared: an attribute of an object, or an entry of a dict by adapter."""

    holder: Any
    key: str
    number: float


def place_of(pair: Pair, attributes: Iterable[str]) -> Place | None:
    """Return the place of the first of the owner's `attributes` that is a number, also in a dict by
    adapter or a small tensor.
    """
    for attribute in attributes:
        *path, key = attribute.split(".")
        holder = pair.owner
        for part in path:
            holder = getattr(holder, part, None)
        value = getattr(holder, key, None)
        if isinstance(value, Mapping):
            holder, key, value = value, pair.adapter, value.get(pair.adapter)
        number = number_of(value)
        if number is not None:
            return Place(holder, key, number)
    return None


def number_of(value: Any) -> float | None:
    """Return a number, also of a tensor of one element; None for anything else."""
    if hasattr(value, "numel") and value.numel() == 1 and not value.is_meta:
        value = value.item()
    return value if is_number(value) else None


def declared_number(pair: Pair, attributes: Iterable[str]) -> float | None:
    place = place_of(pair, attributes)
    return None if place is None else place.number


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


# --- reading --------------------------------------------------------------------------------------


def reading_of(pair: Pair) -> Reading:
    """Return rank, fan-in, fan-out and kind, by the first of the row's layouts that fits the shapes
    and the rank.

    The shape of a shard is not checked. Its declared rank and its modules' declared fan-in and
    fan-out are used.

    Raises:
        InspectionError: no layout fits the shapes and the declared rank.
    """
    rank = declared_number(pair, pair.convention.rank)
    by_shapes = (read_as(layout, pair) for layout in pair.convention.layouts)
    for reading in _shard_readings(pair, rank) if pair.is_sharded else by_shapes:
        if reading is None or reading.rank_a != reading.rank_b:
            continue
        if rank in (None, reading.rank_a):
            return reading
    what = "declares no rank" if rank is None else f"declares rank {rank:g}"
    raise InspectionError(
        f"{pair.where} {what} but {pair.a.name} has shape {pair.a.shape} and {pair.b.name}"
        f" {pair.b.shape}.",
        "Rebuild the adapter so that A has `rank` rows and B `rank` columns, set the declared rank"
        " right, or register its layout with register_convention().",
    )


def read_as(layout: str | Layout, pair: Pair) -> Reading | None:
    """Return a layout's reading if its ranks are positive and whole, else None."""
    if pair.a.is_shard or pair.b.is_shard:
        return None
    read = layout if callable(layout) else LAYOUTS[layout]
    try:
        reading = read(pair.owner, pair.a.shape, pair.b.shape)
        ranks = reading.rank_a, reading.rank_b
        is_whole = all(rank >= 1 and float(rank).is_integer() for rank in ranks)
        if not is_whole or min(reading.fan_in, reading.fan_out) <= 0:
            return None
    except InspectionError:  # the layout has a more specific message
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError):
        return None
    return reading._replace(kind=pair.convention.kind or reading.kind or _kind(pair))


def _kind(pair: Pair) -> str:
    if is_embedding(pair.owner):
        return "embedding"
    base = getattr(pair.owner, "base_layer", pair.owner)
    return "conv" if len(pair.a.shape) > 2 or hasattr(base, "kernel_size") else "linear"


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module, or the one that it adapts, is an embedding."""
    base = getattr(module, "base_layer", module)
    if isinstance(
        base, SimpleNamespace
    ):  # a layer of a file, which is read without torch
        return False
    from torch import nn

    return isinstance(base, (nn.Embedding, nn.EmbeddingBag))


def _shard_readings(pair: Pair, rank: float | None) -> Iterator[Reading]:
    if rank is None and not pair.b.is_shard:
        rank = pair.b.shape[1]
    elif rank is None and not pair.a.is_shard:
        rank = pair.a.shape[0]
    if rank is not None and rank >= 1:
        fan_in = (
            _shard_fan(pair, pair.a, 0)
            if pair.a.is_shard
            else math.prod(pair.a.shape[1:])
        )
        fan_out = _shard_fan(pair, pair.b, 1) if pair.b.is_shard else pair.b.shape[0]
        yield Reading(
            rank, rank, fan_in, fan_out, kind=pair.convention.kind or _kind(pair)
        )


def _shard_fan(pair: Pair, half: Half, side: int) -> float:
    """Return the layer's fan-in (side 0) or fan-out (1) from a module's attribute."""
    inner = half.name.rpartition(".")[0]
    base = getattr(pair.owner, "base_layer", pair.owner)
    for module in (base, pair.owner, pair.owner.get_submodule(inner)):
        sizes: Sequence[Any] = [getattr(module, name, None) for name in _FANS[side]]
        size = next((size for size in sizes if isinstance(size, int)), None)
        if size is not None:
            kernel = getattr(module, "kernel_size", ()) if side == 0 else ()
            return float(size * math.prod(kernel))
    raise InspectionError(
        f"{pair.where} is sharded, and neither the shape {half.shape} of {half.name}"
        f" nor a module has its fan-{('in', 'out')[side]}.",
        "Set in_features and out_features on the module that owns the pair, or shard with"
        " fully_shard.",
    )
