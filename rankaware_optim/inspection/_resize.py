"""Adapters at another rank, in place: new factors replace the original ones, and the modules
declare the new rank.

PEFT's own `add_adapter` cannot take this place. It gives the new factors another name, and so other
rates, draws and copies of the heads. It unties them, unfreezes frozen ones, and refuses a second
adapter with `bias`.

The original factors are never written. They are kept outside the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from itertools import product
from typing import Any, Literal

import torch
from torch import nn

from .._types import Init, scaling_factor
from ..errors import InspectionError
from ._conventions import Shape
from ._initialize import (
    DrawnInit,
    Start,
    Variance,
    check_starts,
    is_merged,
    memory_of,
    refuse_residual,
    start_of,
    write_starts,
)
from ._pairs import (
    Declaration,
    Half,
    Pair,
    Walk,
    declarations_of,
    declare,
    pairs_of,
    read_as,
    reading_of,
    scaling_of,
)
from ._peft_config import configs_of, redeclare
from ._survey import other_kind, survey_of

ScalingRule = Literal["fixed", "alpha", "rslora"]
# Other parts of an adapter whose shape does not depend on the rank.
_PARTS = {"DoRA magnitude", "LoRA bias"}
_RANKLESS = {*_PARTS, "new tokens", "whole copy (modules_to_save)", "LyCORIS scalar"}
# Attributes in which a factor's module declares the sizes of its weight, with their axes.
_SIZES = {"out_features": 0, "out_channels": 0, "in_features": 1, "in_channels": 1}


class Adapters:
    """The trainable pairs of a model, which can be made at another rank.

    Ranks keep their proportions. If the model's most common rank is 8 and `rank_pattern` gives some
    layers 16, a trial at rank 4 gives them 4 and 8. The scalings s follow `rule`, as
    `scaling_rule` of `calibrate_in_place`.

    Raises:
        InspectionError: a pair cannot be made at one of `ranks`. Nothing was changed.
    """

    def __init__(
        self,
        walked: Walk,
        ranks: Collection[int],
        *,
        init: DrawnInit | None = None,
        variance: Variance | None = None,
        rule: ScalingRule = "fixed",
    ) -> None:
        survey = survey_of(walked, init=init)
        for name, kind in survey.unsupported.items():
            if kind not in _RANKLESS:
                raise InspectionError(
                    f"{name} belongs to an adapter ({kind}) that cannot be made at another rank in"
                    " place.",
                    "Freeze it, or build the model in each trial with ra.calibrate.",
                )
        self.rank = survey.dominant().rank or 1
        self._walked, self._rule = walked, rule
        self._pairs = list(pairs_of(walked.modules))
        self._configs = configs_of(walked.modules)
        inits = {(f.layer, f.adapter): f.init for f in survey.factors}
        wanted = []
        for pair in filter(lambda pair: pair.trains, self._pairs):
            refuse_residual(pair, self._configs)
            pair_init = inits[pair.layer, pair.adapter]
            wanted.append((pair, *_wanted_init(pair, pair_init, init, variance)))
        self._originals = check_starts(wanted)
        _refuse_views(original.pair for original in self._originals)
        for original in self._originals:
            for rank in {self.rank, *ranks}:
                self._at(original, rank)
            if rule != "fixed":
                list(declarations_of(original.pair, original.rank, 1.0, original.rank))

    @property
    def factors(self) -> list[torch.Tensor]:
        """The original factors."""
        pairs = [original.pair for original in self._originals]
        return [half.tensor for pair in pairs for half in (pair.a, pair.b)]

    @property
    def declarations(self) -> list[Any]:
        """The configurations' fields, which `remake` changes."""
        return list(self._configs.values())

    @property
    def base_weights(self) -> list[tuple[str, Any]]:
        """The weights that the pairs adapt, each with its layer's name. None for a weight that is
        not a parameter.
        """
        return [(pair.where, _base_weight(pair)) for pair, *_ in self._originals]

    @torch.no_grad()
    def remake(self, rank: int, seed: int) -> list[nn.Parameter]:
        """Replace the original factors by new ones at `rank`, drawn with `seed`, and return these.

        The model must be in its original state.
        """
        declarations: list[Declaration] = []
        factors: dict[int, nn.Parameter] = {}
        wanted = []
        for original in self._originals:
            pair = original.pair
            new_rank, of_a, of_b = self._at(original, rank)
            scaling = scaling_of(pair, original.rank)
            if scaling is not None:
                scaling *= scaling_factor(self._rule, original.rank, new_rank)
            declarations += declarations_of(pair, original.rank, scaling, new_rank)
            a = _replace(pair.owner, pair.a, of_a, factors)
            b = _replace(pair.owner, pair.b, of_b, factors)
            wanted.append((pair._replace(a=a, b=b), *original.asked))
        declare(declarations)
        write_starts([start_of(*each) for each in wanted], seed)
        redeclare(self._configs, self._pairs)
        return list(factors.values())

    def disable(self, factors: Iterable[nn.Parameter]) -> None:
        """Freeze new `factors` and the other parts of the adapters, and switch PEFT's layers off:
        with DoRA even a zero pair changes the output.
        """
        named = self._walked.parameters
        parts = [param for name, param in named if other_kind(name) in _PARTS]
        for param in (*factors, *parts):
            param.requires_grad_(False)
        for pair, *_ in self._originals:
            if hasattr(pair.owner, "_disable_adapters"):
                vars(pair.owner)["_disable_adapters"] = True

    def _at(self, original: Start, rank: int) -> tuple[int, Shape, Shape]:
        """Return the rank of a pair in a trial at `rank`, and the shapes of A and B there."""
        new_rank, rest = divmod(original.rank * rank, self.rank)
        if rest:
            raise InspectionError(
                f"{original.pair.where} has rank {original.rank} where most have {self.rank}, so"
                f" in a trial at rank {rank} it would have {original.rank * rank / self.rank:g}.",
                "Leave that rank out, or give all layers one rank.",
            )
        return new_rank, *_shapes(original, new_rank)


# --- the original adapters ------------------------------------------------------------------------


def _wanted_init(
    pair: Pair, init: Init, asked: DrawnInit | None, variance: Variance | None
) -> tuple[DrawnInit, Variance]:
    """Return the init and variance of a pair's new factors.

    Args:
        pair: the original pair.
        init: its init.
        asked: the init for all pairs, if the user gave one.
        variance: as in `calibrate_in_place`. By default an embedding with Init[B] has B ~ N(0, 1),
            as in PEFT and loralib.
    """
    if init not in ("A", "B"):
        raise InspectionError(
            f"The init of {pair.where} cannot be read, so new factors cannot be drawn.",
            "Give init='A' (B starts at zero, as in PEFT) or init='B' (A starts at zero).",
        )
    if is_merged(pair):
        raise InspectionError(
            f"{pair.where} is merged into its base weight.",
            "Unmerge the adapters first.",
        )
    for half in (pair.a, pair.b):
        if not isinstance(half.tensor, nn.Parameter):
            raise InspectionError(
                f"{half.name} of {pair.where} is not a parameter.",
                "Make both factors parameters.",
            )
    is_embedding = reading_of(pair).kind == "embedding"
    if init == "A":
        return "A", variance or ("mua" if is_embedding else "peft")
    if is_embedding and asked is None and variance != "mua":
        return "A", "peft"
    return "B", "mua"


def _refuse_views(pairs: Iterable[Pair]) -> None:
    """Raise if different parameters share memory, since it is not known how new factors should
    share it.
    """
    by_memory: dict[tuple[torch.device, int], torch.Tensor] = {}
    for pair in pairs:
        for half in (pair.a, pair.b):
            if by_memory.setdefault(memory_of(half), half.tensor) is not half.tensor:
                raise InspectionError(
                    f"{half.name} of {pair.where} shares its memory with another factor.",
                    "Tie factors by making them the same parameter, or untie them.",
                )


def _base_weight(pair: Pair) -> nn.Parameter | None:
    """Return the weight that a pair adapts, from the pair's owner or the layer it wraps."""
    base: Any = pair.owner
    while isinstance(getattr(base, "base_layer", None), nn.Module):
        base = base.base_layer
    name = getattr(pair.owner, "parameter_name", "weight")
    for module in (base, getattr(base, "conv", None)):
        weight = getattr(module, name, None)
        if isinstance(weight, nn.Parameter):
            return weight
    return None


# --- the new adapters -----------------------------------------------------------------------------


def _shapes(original: Start, rank: int) -> tuple[Shape, Shape]:
    """Return the shapes of A and B at another rank. The same layout must read them, with equal
    fan-in and fan-out.
    """
    pair = original.pair
    growth = rank / original.rank
    for layout in pair.convention.layouts:
        reading = read_as(layout, pair.owner, pair.a.shape, pair.b.shape)
        if reading is None or reading.rank_a != original.rank:
            continue
        wanted = reading._replace(rank_a=rank, rank_b=rank)
        for a, b in product(_grown(pair.a.shape, growth), _grown(pair.b.shape, growth)):
            if read_as(layout, pair.owner, a, b) == wanted:
                return a, b
    raise InspectionError(
        f"{pair.where} cannot be made at rank {rank}: its shapes {pair.a.shape} and "
        f"{pair.b.shape} at rank {original.rank} cannot be scaled to it.",
        "Leave that rank out: a grouped convolution or a block-diagonal factor allows only"
        " multiples.",
    )


def _grown(shape: Shape, growth: float) -> Iterator[Shape]:
    """Yield the shapes with one axis times `growth`, for each axis whose size stays whole."""
    for axis, size in enumerate(shape):
        new = round(size * growth)
        if new > 0 and math.isclose(new, size * growth):
            yield *shape[:axis], new, *shape[axis + 1 :]


def _replace(owner: Any, half: Half, shape: Shape, factors: dict[int, Any]) -> Half:
    """Replace a factor in the model by an empty one of another shape. A tied factor is made once.

    The module of a factor declares its new sizes, and gets a bias of the new length.
    """
    original, sizes = half.tensor, half.shape
    if id(original) not in factors:
        factors[id(original)] = _empty_like(original, shape)
    new = half._replace(tensor=factors[id(original)])
    inner, _, local = half.name.rpartition(".")
    module = owner.get_submodule(inner)
    module._parameters[local] = new.tensor
    if not inner:
        return new
    for name, axis in _SIZES.items():
        size = getattr(module, name, None)
        if isinstance(size, int):
            setattr(module, name, size * shape[axis] // sizes[axis])
    bias = module._parameters.get("bias")
    if bias is not None and shape[0] != sizes[0]:
        length = len(bias) * shape[0] // sizes[0]
        module._parameters["bias"] = _empty_like(bias, (length,))
    return new


def _empty_like(tensor: torch.Tensor, shape: Shape) -> nn.Parameter:
    new = nn.Parameter(tensor.new_empty(shape), requires_grad=tensor.requires_grad)
    vars(new).update(vars(tensor))
    return new
