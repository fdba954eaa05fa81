"""LoRA pairs in a model: the modules that own them, by which convention, and what they declare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from .._checks import is_number, shown
from ..errors import InspectionError
from ._conventions import (
    LAYOUTS,
    Convention,
    Layout,
    Reading,
    Shape,
    StoredLayer,
    conventions,
)

if TYPE_CHECKING:  # files are read without it
    from torch import nn

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# Attributes for fan-in and fan-out.
_FANS = (
    ("in_features", "in_dim", "in_channels", "num_embeddings", "nx"),
    ("out_features", "out_dim", "out_channels", "embedding_dim", "nf"),
)

Modules = list["tuple[str, nn.Module]"]
Parameters = list["tuple[str, nn.Parameter]"]


@dataclass(frozen=True)
class Walk:
    """A model's modules and parameters by name, and its pairs. They are collected once, since this
    takes most of the time.
    """

    modules: Modules
    parameters: Parameters

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every pair by the first row that fits its owner, in the model's order. Tied ones occur
        for each owner.
        """
        return list(_pairs_of(self.modules))


class Half(NamedTuple):
    """One of a pair's two tensors, with its name relative to the owner, or in a file."""

    name: str
    tensor: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def is_shard(self) -> bool:
        """Whether it is the shard of one process: flat under FSDP1, empty under ZeRO-3."""
        return not self.tensor.is_meta and (len(self.shape) < 2 or 0 in self.shape)


class Pair(NamedTuple):
    """Two factors of a module: the module and its name, the adapter's, the convention, A and B."""

    owner: Any
    layer: str
    adapter: str
    convention: Convention
    a: Half
    b: Half

    @property
    def where(self) -> str:
        """The pair's name in error messages."""
        if isinstance(self.owner, StoredLayer):
            return self.owner.where
        return self.layer or type(self.owner).__name__

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.a, self.b

    @property
    def shapes(self) -> str:
        (a, _), (b, _) = self.a, self.b
        return f"{a} has shape {self.a.shape} and {b} {self.b.shape}"

    @property
    def trains(self) -> bool:
        return any(half.tensor.requires_grad for half in self.halves)

    @property
    def is_sharded(self) -> bool:
        return any(half.is_shard for half in self.halves)

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
            f"{_in_words(model)} is not a model.",
            "Pass an nn.Module, or a list of them. If you passed parameters, groups or an"
            " optimizer, add the model that holds them as model=. For a trainer call"
            " ra.attach(trainer, 'adamw', ...).",
        )
    modules = list(whole.named_modules())
    clean = [
        (canonical_name(f"{name}.").removesuffix("."), module)
        for name, module in modules
    ]
    parameters = _parameters_of(clean)
    # They are not unique if a submodule of the user is called "module".
    names = {name for name, _ in parameters}
    if len(names) == len(parameters):
        return Walk(clean, parameters)
    return Walk(modules, _parameters_of(modules))


def _in_words(value: object) -> str:
    """Return what was passed in place of a model: its repr if that is short, else its type."""
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(each).__name__ for each in value})
        return f"A {type(value).__name__} of {' and '.join(kinds) or 'nothing'}"
    text = shown(value)
    is_short = len(text) < 60 and "\n" not in text
    return text if is_short else f"A {type(value).__name__}"


def _parameters_of(modules: Modules) -> Parameters:
    named: dict[nn.Parameter, str] = {}
    for prefix, module in modules:
        for local, param in module.named_parameters(recurse=False):
            named.setdefault(param, f"{prefix}.{local}".removeprefix("."))
    return [(name, param) for param, name in named.items()]


# --- finding --------------------------------------------------------------------------------------


def _pairs_of(modules: Modules) -> Iterator[Pair]:
    rows = conventions()
    names = {name for row in rows for name in (row.a, row.b)}
    for layer, module in modules:
        halves = _halves(module, names)
        pairs: dict[tuple[Any, Any], Pair] = {}
        for row in rows if halves else ():
            for adapter, a, b in row.pairs_in(module, halves):
                pair = Pair(module, layer, adapter, row, a, b)
                pairs.setdefault((a.tensor, b.tensor), pair)
        yield from pairs.values()


def _halves(module: Any, names: set[str]) -> dict[tuple[str, str], Half]:
    """Return the tensors of a module's attributes of these names, by attribute and adapter: a
    parameter, a module's weight, or a dict of these.
    """
    if isinstance(module, StoredLayer):
        return module.halves
    members = {**module._modules, **module._parameters}
    halves: dict[tuple[str, str], Half] = {}
    for attribute in names.intersection(members):
        member = members[attribute]
        is_dict = hasattr(member, "items")
        for adapter, value in member.items() if is_dict else [("", member)]:
            name = f"{attribute}.{adapter}" if is_dict else attribute
            if not hasattr(value, "is_meta"):  # a module
                name = f"{name}.weight"
                value = getattr(value, "weight", None)
            if hasattr(value, "is_meta"):
                halves[attribute, adapter] = Half(name, value)
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
        InspectionError: no layout fits the shapes and the declared rank, or none is declared and
            two ranks fit.
    """
    rank = declared_number(pair, pair.convention.rank)
    a = pair.a.shape
    b = pair.b.shape
    layouts = pair.convention.layouts
    readings = (_layout_reading(layout, pair.owner, a, b) for layout in layouts)
    for reading in [_shard_reading(pair, rank)] if pair.is_sharded else readings:
        if reading is not None and rank in (None, reading.rank_a):
            if rank is None:
                _refuse_either_way(pair, reading)
            kind = pair.convention.kind or reading.kind or pair.kind
            return reading._replace(kind=kind)
    what = "declares no rank" if rank is None else f"declares rank {rank:g}"
    raise InspectionError(
        f"{pair.where} {what} but {pair.shapes}.",
        "Rebuild the adapter so that A has `rank` rows and B `rank` columns, set the declared rank"
        " right, or register its layout with register_convention().",
    )


def _refuse_either_way(pair: Pair, reading: Reading) -> None:
    """Raise if the shapes of a pair without a declared rank also fit a larger square layer, at a
    lower rank and with A and B transposed. A module's weight in a file is (out, in).
    """
    rank = reading.rank_a
    side = reading.fan_in
    is_stored = isinstance(pair.owner, StoredLayer)
    if is_stored and pair.a.name.endswith(".weight"):
        return
    if side == reading.fan_out < rank:
        raise InspectionError(
            f"{pair.where} declares no rank, and {pair.shapes}, so the rank may be {rank:g} or"
            f" {side:g}.",
            "Declare it, such as by `r` on the module that owns the pair, or by PEFT's"
            " configuration of a file.",
        )


def _layout_reading(
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
        fits = is_whole and min(reading.fan_in, reading.fan_out) > 0
        return reading if fits else None
    except InspectionError:  # the layout has a more specific message
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def is_embedding(module: Any) -> bool:
    """Return whether a module, or the one that it adapts, is an embedding of torch. A file is read
    without torch.
    """
    kinds = type(getattr(module, "base_layer", module)).__mro__
    return any(k.__module__ == "torch.nn.modules.sparse" for k in kinds)


def _shard_reading(pair: Pair, rank: float | None) -> Reading | None:
    if rank is None or rank < 1:
        return None
    fan_in = _fan(pair, pair.a, 0)
    fan_out = _fan(pair, pair.b, 1)
    return Reading(rank, rank, fan_in, fan_out)


def _fan(pair: Pair, half: Half, side: int) -> float:
    """Return the layer's fan-in (side 0) or fan-out (1), from a module's attribute."""
    inner = half.name.rpartition(".")[0]
    base = getattr(pair.owner, "base_layer", pair.owner)
    own = pair.owner.get_submodule(inner)
    for module in (base, pair.owner, own):
        kernel = getattr(module, "kernel_size", ()) if side == 0 else ()
        for name in _FANS[side]:
            size = getattr(module, name, None)
            if isinstance(size, int):
                return float(size * math.prod(kernel))
    raise InspectionError(
        f"{pair.where} is sharded, and no module has its fan-{('in', 'out')[side]}.",
        "Set in_features and out_features on the module that owns the pair, or shard with"
        " fully_shard.",
    )
