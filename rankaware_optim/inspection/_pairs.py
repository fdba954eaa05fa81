"""LoRA pairs in a model: finds the modules that own them, and reads rank, scaling and fans.

A file is read by the same code: its layers stand in for modules (`StoredLayer`).
"""

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
    Halves,
    Layout,
    Owner,
    Reading,
    Shape,
    StoredLayer,
    conventions,
)

if TYPE_CHECKING:  # a file is read without importing torch
    from torch import nn

_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# Names of attributes for the fan-in and the fan-out.
_FANS = (
    ("in_features", "in_dim", "in_channels", "num_embeddings", "nx"),
    ("out_features", "out_dim", "out_channels", "embedding_dim", "nf"),
)

Modules = list["tuple[str, nn.Module]"]
Parameters = list["tuple[str, nn.Parameter]"]


@dataclass(frozen=True)
class Walk:
    """The modules and parameters of a model by name, and its LoRA pairs. They are collected once,
    because collecting them takes most of the time of an inspection.
    """

    modules: Modules
    parameters: Parameters

    @cached_property
    def pairs(self) -> list[Pair]:
        """All pairs, in the model's order. Matrices that several modules share occur in each."""
        return list(_pairs_of(self.modules))


class Half(NamedTuple):
    """A or B of a pair, with its name relative to the module that owns it, or in a file."""

    name: str
    tensor: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def is_shard(self) -> bool:
        """Whether the tensor is one process's shard: flat under FSDP1, empty under ZeRO-3."""
        return not self.tensor.is_meta and (len(self.shape) < 2 or 0 in self.shape)


class Pair(NamedTuple):
    """A and B of one adapter of a module.

    owner: the module. layer: its name. adapter: the adapter's name. convention: the row of
    the table that describes the module.
    """

    owner: Owner
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
        """The layer's kind, judged by its module, if convention and layout leave it open."""
        if is_embedding(self.owner):
            return "embedding"
        base = getattr(self.owner, "base_layer", self.owner)
        is_conv = len(self.a.shape) > 2 or hasattr(base, "kernel_size")
        return "conv" if is_conv else "linear"


def canonical_name(name: str) -> str:
    """Return a parameter's name without the prefixes that DDP, FSDP, torch.compile and activation
    checkpointing add.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(f"{wrapper}.", "")
    return name.removeprefix("module.")


def walk(model: nn.Module | Sequence[nn.Module]) -> Walk:
    """Collect the modules and parameters of a model, or of several, by canonical names. If these
    are not unique, names are used as they are.

    Raises:
        InspectionError: it is not a model.
    """
    from ._models import as_one_model  # it imports torch

    whole = as_one_model(model)
    if not hasattr(whole, "named_modules"):
        raise InspectionError(
            f"{_in_words(model)} is not a model.",
            "Pass an nn.Module, or a list of them. If you passed parameters, groups or an"
            " optimizer, add the model that holds them as model=. For a trainer call"
            " ra.attach(trainer, 'adamw', ...).",
        )
    modules = list(whole.named_modules())
    # The dot lets the prefix of a wrapper be removed where it is the whole name.
    clean = [
        (canonical_name(f"{name}.").removesuffix("."), module)
        for name, module in modules
    ]
    parameters = _parameters_of(clean)
    # Canonical names are not unique if one of the user's own submodules is called "module".
    names = {name for name, _ in parameters}
    if len(names) == len(parameters):
        return Walk(clean, parameters)
    return Walk(modules, _parameters_of(modules))


def _in_words(value: object) -> str:
    """Describe a value that was passed in place of a model, by its repr if that is short, else by
    its type.
    """
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(each).__name__ for each in value})
        return f"A {type(value).__name__} of {' and '.join(kinds) or 'nothing'}"
    text = shown(value)
    is_short = len(text) < 60 and "\n" not in text
    return text if is_short else f"A {type(value).__name__}"


def _parameters_of(modules: Modules) -> Parameters:
    """Return every parameter once, by its first name."""
    named: dict[nn.Parameter, str] = {}
    for prefix, module in modules:
        for local, param in module.named_parameters(recurse=False):
            named.setdefault(param, f"{prefix}.{local}".removeprefix("."))
    return [(name, param) for param, name in named.items()]


# --- finding --------------------------------------------------------------------------------------


def _pairs_of(modules: Modules) -> Iterator[Pair]:
    """Yield the LoRA pairs of all modules. A pair is read by the first convention that fits."""
    rows = conventions()
    names = {name for row in rows for name in (row.a, row.b)}
    for layer, module in modules:
        halves = _halves(module, names)
        pairs: dict[tuple[object, object], Pair] = {}
        # Most modules have no attribute of such a name, so their rows need not be tried.
        for row in rows if halves else ():
            for adapter, a, b in row.pairs_in(module, halves):
                pair = Pair(module, layer, adapter, row, a, b)
                # The first row that fits a pair wins, so the order of the table matters.
                pairs.setdefault((a.tensor, b.tensor), pair)
        yield from pairs.values()


def _halves(module: Owner, names: set[str]) -> Halves[Half]:
    """Return those attributes of a module that may be A or B, by attribute and adapter.

    An attribute is a parameter, a module with a weight, or a dict of these by adapter. names: the
    attributes that some convention uses for A or B.
    """
    if isinstance(module, StoredLayer):
        return module.halves
    # Not by getattr, which may run a property of the user's module.
    members = {**module._modules, **module._parameters}
    halves: Halves[Half] = {}
    for attribute in names.intersection(members):
        member = members[attribute]
        is_dict = hasattr(member, "items")
        for adapter, value in member.items() if is_dict else [("", member)]:
            name = f"{attribute}.{adapter}" if is_dict else attribute
            if not hasattr(value, "is_meta"):  # a module, not a tensor
                name = f"{name}.weight"
                value = getattr(value, "weight", None)
            if hasattr(value, "is_meta"):
                halves[attribute, adapter] = Half(name, value)
    return halves


# --- declared numbers -----------------------------------------------------------------------------


def declared_number(pair: Pair, attributes: Iterable[str]) -> float | None:
    """Return the first of the owner's `attributes` that is a number. It may also be a tensor of one
    element, or a dict of numbers by adapter.
    """
    for attribute in attributes:
        value: Any = pair.owner
        for part in attribute.split("."):  # such as lora_config.lora_r
            value = getattr(value, part, None)
        if isinstance(value, Mapping):
            value = value.get(pair.adapter)
        if hasattr(value, "numel") and value.numel() == 1 and not value.is_meta:
            value = value.item()
        if is_number(value):
            return value
    return None


def scaling_of(pair: Pair, rank: float) -> float | None:
    """Return the scaling of a pair: the declared one, else the declared alpha / rank, else None.

    Raises:
        InspectionError: it is not a positive finite number.
    """
    value = declared_number(pair, pair.convention.scaling)
    if value is None:
        alpha = declared_number(pair, pair.convention.alpha)
        value = None if alpha is None else alpha / rank
    if value is not None and not 0 < value < math.inf:
        raise InspectionError(
            f"{pair.where} has the scaling {value:g}, so its adapter has no effect or is"
            " undefined.",
            "Set a positive finite alpha. To disable an adapter, freeze or delete it.",
        )
    return value


# --- reading --------------------------------------------------------------------------------------


def reading_of(pair: Pair) -> Reading:
    """Read rank, fan-in, fan-out and kind of a pair, by the first layout of its convention that
    agrees with the shapes and the declared rank.

    The shapes of a shard cannot be compared. There the declared rank and fans are used unchecked.

    Raises:
        InspectionError: no layout agrees with them, or no rank is declared and two would fit.
    """
    rank = declared_number(pair, pair.convention.rank)
    a = pair.a.shape
    b = pair.b.shape
    layouts = pair.convention.layouts
    # A generator: later layouts are not tried once one fits.
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
        "Rebuild the adapter so that A has `rank` rows and B has `rank` columns, correct the"
        " declared rank, or describe another layout with register_convention().",
    )


def _refuse_either_way(pair: Pair, reading: Reading) -> None:
    """Raise an error if the rank of a pair that declares none cannot be told from its shapes.

    A (64, 16) and B (16, 64) are rank 64 on a layer of 16 × 16, or, if they are stored transposed,
    rank 16 on a layer of 64 × 64. A name in a file that ends in ".weight" belongs to a module, and
    modules never store weights transposed.
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
            "Set the rank as attribute `r` of the module that owns the pair. For a file, put PEFT's"
            " adapter_config.json beside it.",
        )


def _layout_reading(
    layout: str | Layout, owner: Owner, a: Shape, b: Shape
) -> Reading | None:
    """Read the shapes by one layout. None if it does not fit: A and B must have one whole rank."""
    if min(len(a), len(b)) < 2 or 0 in (*a, *b):
        return None
    try:
        read = layout if callable(layout) else LAYOUTS[layout]
        reading = read(owner, a, b)
        # Ranks come from divisions, as by the number of experts, so they may be fractions.
        rank = reading.rank_a
        is_whole = rank == reading.rank_b and rank >= 1 and float(rank).is_integer()
        fits = is_whole and min(reading.fan_in, reading.fan_out) > 0
        return reading if fits else None
    except InspectionError:  # the layout fits, and explains a mistake
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def is_embedding(module: Owner) -> bool:
    """Return whether a module, or the module that it adapts, is one of torch's embeddings. It looks
    at class names, because files are read without importing torch.
    """
    kinds = type(getattr(module, "base_layer", module)).__mro__
    return any(k.__module__ == "torch.nn.modules.sparse" for k in kinds)


def _shard_reading(pair: Pair, rank: float | None) -> Reading | None:
    """Read a sharded pair from the values that its modules declare, None without a rank."""
    if rank is None or rank < 1:
        return None
    fan_in = _fan(pair, pair.a, 0)
    fan_out = _fan(pair, pair.b, 1)
    return Reading(rank, rank, fan_in, fan_out)


def _fan(pair: Pair, half: Half, side: int) -> float:
    """Return the fan-in (side 0) or fan-out (side 1) that the modules of a pair declare."""
    inner = half.name.rpartition(".")[0]
    base = getattr(pair.owner, "base_layer", pair.owner)
    own = pair.owner.get_submodule(inner)
    # The base layer knows best. In kohya's modules it is elsewhere, and A and B are modules.
    for module in (base, pair.owner, own):
        kernel = getattr(module, "kernel_size", ()) if side == 0 else ()
        for name in _FANS[side]:
            size = getattr(module, name, None)
            if isinstance(size, int):
                return float(size * math.prod(kernel))
    raise InspectionError(
        f"{pair.where} is sharded, and no module says its fan-{('in', 'out')[side]}.",
        "Set in_features and out_features on the module that owns the pair, or shard with"
        " fully_shard.",
    )
