"""This module finds the LoRA layers of a model and reads their rank, scaling and sizes.

The module also reads the LoRA layers of adapter files. In an adapter file, each layer
is a `StoredLayer` instead of a torch module.
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
    """The named modules and parameters of a model, and its LoRA pairs.

    Modules and parameters are collected only once, because this takes most of the time
    of an inspection.
    """

    modules: Modules
    parameters: Parameters

    @cached_property
    def pairs(self) -> list[Pair]:
        """All LoRA pairs, in the order of the model's modules.

        If several modules share a matrix, each of these modules has a pair that
        contains the shared matrix.
        """
        return list(_pairs_of(self.modules))


class Half(NamedTuple):
    """One of the two matrices of a LoRA pair, together with its name.

    In a model, the name is relative to the LoRA layer, for example
    "lora_A.default.weight". In a file, the name is the full name of the tensor.
    """

    name: str
    tensor: Any

    @property
    def shape(self) -> Shape:
        return tuple(self.tensor.shape)

    @property
    def is_shard(self) -> bool:
        """Return whether this process holds only one shard of the tensor.

        FSDP1 flattens a tensor before it is sharded, and ZeRO-3 replaces a sharded
        tensor with an empty tensor.
        """
        return not self.tensor.is_meta and (len(self.shape) < 2 or 0 in self.shape)


class Pair(NamedTuple):
    """The matrices A and B that one adapter adds to one layer.

    Args:
        owner: the module that contains A and B.
        layer: the name of that module in the model.
        adapter: the name of the adapter, such as "default".
        convention: describes how the adapter's library stores A and B.
        a: the matrix A.
        b: the matrix B.
    """

    owner: Owner
    layer: str
    adapter: str
    convention: Convention
    a: Half
    b: Half

    @property
    def where(self) -> str:
        """The name of the LoRA layer, as it appears in error messages."""
        if isinstance(self.owner, StoredLayer):
            return self.owner.where
        return self.layer or type(self.owner).__name__

    @property
    def halves(self) -> tuple[Half, Half]:
        return self.a, self.b

    @property
    def shapes(self) -> str:
        (a, _), (b, _) = self.a, self.b
        return f"{a} has shape {self.a.shape} and {b} has shape {self.b.shape}"

    @property
    def trains(self) -> bool:
        return any(half.tensor.requires_grad for half in self.halves)

    @property
    def is_sharded(self) -> bool:
        return any(half.is_shard for half in self.halves)

    @property
    def kind(self) -> str:
        """The type of the layer: "embedding", "conv" or "linear".

        This property derives the type of the layer only from the module and the shape
        of A. The property is used if neither the convention nor the layout determines
        the type of the layer.
        """
        if is_embedding(self.owner):
            return "embedding"
        base = getattr(self.owner, "base_layer", self.owner)
        is_conv = len(self.a.shape) > 2 or hasattr(base, "kernel_size")
        return "conv" if is_conv else "linear"


def canonical_name(name: str) -> str:
    """Remove the prefixes that wrappers add to a parameter's name.

    Such wrappers are added by DDP, FSDP, torch.compile and activation checkpointing.
    """
    for wrapper in _WRAPPERS:
        name = name.replace(f"{wrapper}.", "")
    return name.removeprefix("module.")


def walk(model: nn.Module | Sequence[nn.Module]) -> Walk:
    """Collect the modules and parameters of one or several models, together with their
    names.

    The prefixes of wrappers such as DDP are removed from the names, unless two
    parameters would then have the same name.

    Raises:
        InspectionError: the value is not a model.
    """
    from ._models import as_one_model  # it imports torch

    whole = as_one_model(model)
    if not hasattr(whole, "named_modules"):
        value = _in_words(model)
        raise InspectionError(
            f"A model was expected, but {value} was passed.",
            "Pass an nn.Module or a list of them. If you passed parameters, parameter groups or"
            " an optimizer, also pass the model that contains the parameters as model=. For a"
            " trainer, call ra.attach(trainer, 'adamw', ...).",
        )
    modules = list(whole.named_modules())
    # A wrapper's prefix ends with a dot. With a dot added to the module's name, the
    # prefix is also found if it is the whole name.
    clean = [
        (canonical_name(f"{name}.").removesuffix("."), module)
        for name, module in modules
    ]
    parameters = _parameters_of(clean)
    # Names can collide if the user's model has a submodule that is called "module",
    # which is also DDP's prefix.
    names = {name for name, _ in parameters}
    if len(names) == len(parameters):
        return Walk(clean, parameters)
    return Walk(modules, _parameters_of(modules))


def _in_words(value: object) -> str:
    """Describe a value for an error message.

    The description is the repr of the value, or the type of the value if the repr is
    long.
    """
    if isinstance(value, (list, tuple)):
        kinds = sorted({type(each).__name__ for each in value})
        return f"a {type(value).__name__} of {' and '.join(kinds) or 'nothing'}"
    text = shown(value)
    is_short = len(text) < 60 and "\n" not in text
    return text if is_short else f"a value of type {type(value).__name__}"


def _parameters_of(modules: Modules) -> Parameters:
    """Return every parameter once, with the first of its names."""
    named: dict[nn.Parameter, str] = {}
    for prefix, module in modules:
        for local, param in module.named_parameters(recurse=False):
            named.setdefault(param, f"{prefix}.{local}".removeprefix("."))
    return [(name, param) for param, name in named.items()]


# --- finding --------------------------------------------------------------------------------------


def _pairs_of(modules: Modules) -> Iterator[Pair]:
    """Yield the LoRA pairs of all modules.

    If several conventions fit a pair, the first convention in the table is used.
    """
    rows = conventions()
    names = {name for row in rows for name in (row.a, row.b)}
    for layer, module in modules:
        halves = _halves(module, names)
        pairs: dict[tuple[object, object], Pair] = {}
        # Most modules have no attribute with the name of an A or B matrix. Skipping
        # them here makes the inspection of a large model much faster.
        for row in rows if halves else ():
            for adapter, a, b in row.pairs_in(module, halves):
                pair = Pair(module, layer, adapter, row, a, b)
                # `setdefault` keeps the first convention that fits. The table therefore
                # lists the special conventions before the general ones.
                pairs.setdefault((a.tensor, b.tensor), pair)
        yield from pairs.values()


def _halves(module: Owner, names: set[str]) -> Halves[Half]:
    """Collect the tensors of a module that may be A or B, by attribute and adapter.

    An attribute can contain a parameter, a module with a weight, or a dict that maps
    adapter names to parameters or modules.

    Args:
        module: the module to search.
        names: the attribute names that any convention uses for A or B.
    """
    if isinstance(module, StoredLayer):
        return module.halves
    # We don't use getattr here because it could execute a property of the user's
    # module.
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
    """Return the first of several attributes of a LoRA layer that contains a number.

    The attribute may also be a tensor with one element, or a dict that maps adapter
    names to numbers. If none of the attributes contains a number, None is returned.
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
    """Return the scaling of a LoRA pair, or None if the layer declares none.

    If the layer declares alpha but no scaling, alpha / rank is returned.

    Raises:
        InspectionError: the scaling is not a positive finite number.
    """
    value = declared_number(pair, pair.convention.scaling)
    if value is None:
        alpha = declared_number(pair, pair.convention.alpha)
        value = None if alpha is None else alpha / rank
    if value is not None and not 0 < value < math.inf:
        layer = pair.where
        raise InspectionError(
            f"The LoRA layer {layer} has the scaling {value:g}, but a scaling must be positive and"
            " finite.",
            "Set alpha to a positive number. To disable the adapter, freeze or delete it.",
        )
    return value


# --- reading --------------------------------------------------------------------------------------


def reading_of(pair: Pair) -> Reading:
    """Read the rank, the fan-in, the fan-out and the layer type of a LoRA pair.

    The layouts of the pair's convention are tried in order, until one agrees with the
    shapes of A and B and with the declared rank. If A and B are shards, their shapes
    cannot be checked, and the declared values are used unchanged.

    Raises:
        InspectionError: no layout agrees with the shapes and the declared rank. Or no
            rank is declared, and the shapes allow two different ranks.
    """
    rank = declared_number(pair, pair.convention.rank)
    a = pair.a.shape
    b = pair.b.shape
    layouts = pair.convention.layouts
    # This is a generator, so no further layouts are tried after the first that fits.
    readings = (_layout_reading(layout, pair.owner, a, b) for layout in layouts)
    for reading in [_shard_reading(pair, rank)] if pair.is_sharded else readings:
        if reading is not None and rank in (None, reading.rank_a):
            if rank is None:
                _refuse_either_way(pair, reading)
            kind = pair.convention.kind or reading.kind or pair.kind
            return reading._replace(kind=kind)
    layer = pair.where
    shapes = pair.shapes
    if rank is None:
        raise InspectionError(
            f"The LoRA layer {layer} declares no rank, and no rank can be read from its matrices:"
            f" {shapes}.",
            "Create the adapter again with `rank` rows in A and `rank` columns in B. If its library"
            " stores A and B differently, describe the layout with register_convention().",
        )
    raise InspectionError(
        f"The LoRA layer {layer} declares rank {rank:g}, but {shapes}.",
        "Correct the declared rank, or create the adapter again with `rank` rows in A and `rank`"
        " columns in B. If its library stores A and B differently, describe the layout with"
        " register_convention().",
    )


def _refuse_either_way(pair: Pair, reading: Reading) -> None:
    """Raise an error if no rank is declared and the shapes allow two different ranks.

    For example, A of shape (64, 16) and B of shape (16, 64) may be a pair of rank 64 on
    a 16 × 16 layer. If A and B are stored transposed, the same shapes belong to a pair
    of rank 16 on a 64 × 64 layer. In a file, the rank is clear if the tensor's name ends
    in ".weight", because then A and B are linear modules, which never store their
    weights transposed.
    """
    rank = reading.rank_a
    side = reading.fan_in
    is_stored = isinstance(pair.owner, StoredLayer)
    if is_stored and pair.a.name.endswith(".weight"):
        return
    if side == reading.fan_out < rank:
        layer = pair.where
        shapes = pair.shapes
        if is_stored:
            raise InspectionError(
                f"The LoRA layer {layer} declares no rank, and {shapes}. The rank could be"
                f" {rank:g} or {side:g}.",
                "Put PEFT's adapter_config.json, which contains the rank, into the same folder.",
            )
        raise InspectionError(
            f"The LoRA layer {layer} declares no rank, and {shapes}. The rank could be {rank:g} or"
            f" {side:g}.",
            "Set the attribute `r` of the LoRA layer to the rank.",
        )


def _layout_reading(
    layout: str | Layout, owner: Owner, a: Shape, b: Shape
) -> Reading | None:
    """Read the rank and the sizes from the shapes of A and B with one layout.

    A layout fits the shapes if A and B then have the same rank, which must be a whole
    number. If the layout does not fit the shapes of A and B, the function returns None.
    """
    if min(len(a), len(b)) < 2 or 0 in (*a, *b):
        return None
    try:
        read = layout if callable(layout) else LAYOUTS[layout]
        reading = read(owner, a, b)
        # Some layouts compute the rank with a division, for example by the number of
        # experts. A fraction shows that the layout does not fit.
        rank = reading.rank_a
        is_whole = rank == reading.rank_b and rank >= 1 and float(rank).is_integer()
        fits = is_whole and min(reading.fan_in, reading.fan_out) > 0
        return reading if fits else None
    except InspectionError:
        # The layout recognised the adapter and found a mistake that the user should
        # see.
        raise
    except (LookupError, AttributeError, TypeError, ValueError, ArithmeticError):
        return None


def is_embedding(module: Owner) -> bool:
    """Return whether a module is a torch embedding or a LoRA layer around one.

    Only class names are compared, because torch is not imported when a file is read.
    """
    kinds = type(getattr(module, "base_layer", module)).__mro__
    return any(k.__module__ == "torch.nn.modules.sparse" for k in kinds)


def _shard_reading(pair: Pair, rank: float | None) -> Reading | None:
    """Read the rank and the sizes of a sharded LoRA pair from the attributes of its modules.

    If the modules do not declare a rank, the function returns None.
    """
    if rank is None or rank < 1:
        return None
    fan_in = _fan(pair, pair.a, 0)
    fan_out = _fan(pair, pair.b, 1)
    return Reading(rank, rank, fan_in, fan_out)


def _fan(pair: Pair, half: Half, side: int) -> float:
    """Return the fan-in or the fan-out that the modules of a LoRA pair declare.

    Args:
        pair: the LoRA pair.
        half: the matrix on that side of the layer: A for fan-in, B for fan-out.
        side: 0 for fan-in, 1 for fan-out.
    """
    inner = half.name.rpartition(".")[0]
    base = getattr(pair.owner, "base_layer", pair.owner)
    own = pair.owner.get_submodule(inner)
    # The base layer's sizes are the most reliable ones. kohya's LoRA modules do not
    # contain the base layer, but there A and B are modules with sizes of their own.
    for module in (base, pair.owner, own):
        kernel = getattr(module, "kernel_size", ()) if side == 0 else ()
        for name in _FANS[side]:
            size = getattr(module, name, None)
            if isinstance(size, int):
                return float(size * math.prod(kernel))
    layer = pair.where
    missing = ("in_features", "out_features")[side]
    raise InspectionError(
        f"The matrices of the LoRA layer {layer} are sharded, and none of its modules has the"
        f" attribute {missing}, so the size of the layer is unknown.",
        "Set in_features and out_features on the LoRA layer, or shard the model with fully_shard.",
    )
