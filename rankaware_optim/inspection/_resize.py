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
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .._types import Init, Survey, scaling_factor
from ..errors import InspectionError
from ._initialize import (
    DrawnInit,
    Variance,
    check_starts,
    is_merged,
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
    rank_declarations,
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
# Attributes in which a factor's module declares the sizes of its weight, by axis.
_SIZES = {0: ("out_features", "out_channels"), 1: ("in_features", "in_channels")}


class _Original(NamedTuple):
    """An original pair and its rank, and the init and variance of new factors."""

    pair: Pair
    rank: int
    init: DrawnInit
    variance: Variance


class Adapters:
    """The trainable pairs of a model, which can be made at another rank.

    Ranks keep their proportions. If the model's most common rank is 8 and `rank_pattern` gives some
    layers 16, a trial at rank 4 gives them 4 and 8. Effective multipliers s follow `rule`, as
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
        _refuse_other_parts(survey)
        self.rank = survey.dominant().rank or 1
        self._walked, self._rule = walked, rule
        self._pairs = list(pairs_of(walked.modules))
        self._configs = configs_of(walked.modules)
        inits = {(f.layer, f.adapter): f.init for f in survey.factors}
        wanted = []
        for pair in filter(lambda pair: pair.trains, self._pairs):
            refuse_residual(pair, self._configs)
            wanted.append(
                (
                    pair,
                    *_wanted_init(
                        pair, inits[pair.layer, pair.adapter], init, variance
                    ),
                )
            )
        starts = check_starts(wanted)
        self._originals = [
            _Original(pair, start.rank, pair_init, drawn)
            for (pair, pair_init, drawn), start in zip(wanted, starts, strict=True)
        ]
        _refuse_views(self._halves())
        for original in self._originals:
            for rank in {self.rank, *ranks}:
                _shapes(original, self._rank_at(original, rank))
            if rule != "fixed":
                list(declarations_of(original.pair, original.rank, 1.0, original.rank))

    @property
    def factors(self) -> list[torch.Tensor]:
        """The original factors."""
        return [half.tensor for _, half in self._halves()]

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

    def _halves(self) -> list[tuple[Pair, Half]]:
        return [
            (pair, half) for pair, *_ in self._originals for half in (pair.a, pair.b)
        ]

    @torch.no_grad()
    def remake(self, rank: int, seed: int) -> list[nn.Parameter]:
        """Replace the original factors by new ones at `rank`, drawn with `seed`, and return these.

        The model must be in its original state.
        """
        declarations: list[Declaration] = []
        for original in self._originals:
            declarations += self._declarations_at(
                original, self._rank_at(original, rank)
            )
        factors: dict[int, nn.Parameter] = {}
        wanted = []
        for original in self._originals:
            pair, shapes = (
                original.pair,
                _shapes(original, self._rank_at(original, rank)),
            )
            a, b = (
                _replace(pair.owner, half, shape, factors)
                for half, shape in zip((pair.a, pair.b), shapes, strict=True)
            )
            wanted.append((pair._replace(a=a, b=b), original.init, original.variance))
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

    def _rank_at(self, original: _Original, rank: int) -> int:
        """Return the rank of a pair in a trial at `rank`."""
        new_rank, rest = divmod(original.rank * rank, self.rank)
        if rest:
            raise InspectionError(
                f"{original.pair.where} has rank {original.rank} where most have {self.rank}, so"
                f" in a trial at rank {rank} it would have {original.rank * rank / self.rank:g}.",
                "Leave that rank out, or give all layers one rank.",
            )
        return new_rank

    def _declarations_at(
        self, original: _Original, new_rank: int
    ) -> Iterator[Declaration]:
        pair, rank = original.pair, original.rank
        yield from rank_declarations(pair, rank, new_rank)
        scaling = scaling_of(pair, rank)
        if scaling is not None:
            scaling *= scaling_factor(self._rule, rank, new_rank)
            yield from declarations_of(pair, rank, scaling, new_rank)


# --- the original adapters ------------------------------------------------------------------------


def _refuse_other_parts(survey: Survey) -> None:
    for name, kind in survey.unsupported.items():
        if kind not in _RANKLESS:
            raise InspectionError(
                f"{name} belongs to an adapter ({kind}) that cannot be made at another rank in"
                " place.",
                "Freeze it, or build the model in each trial with ra.calibrate.",
            )


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


def _refuse_views(halves: Iterable[tuple[Pair, Half]]) -> None:
    """Raise if different parameters share memory, since it is not known how new factors should
    share it.
    """
    by_memory: dict[tuple[Any, int], torch.Tensor] = {}
    for pair, half in halves:
        memory = half.tensor.device, half.tensor.data_ptr()
        if by_memory.setdefault(memory, half.tensor) is not half.tensor:
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


def _shapes(original: _Original, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B at another rank. The same layout must read them, with equal
    fan-in and fan-out.
    """
    pair = original.pair
    growth = rank / original.rank
    for layout in pair.convention.layouts:
        reading = read_as(layout, pair)
        if reading is None or {reading.rank_a, reading.rank_b} != {original.rank}:
            continue
        wanted = reading._replace(rank_a=rank, rank_b=rank)
        for a, b in product(_grown(pair.a.shape, growth), _grown(pair.b.shape, growth)):
            halves = [Half("", torch.empty(shape, device="meta")) for shape in (a, b)]
            if read_as(layout, pair._replace(a=halves[0], b=halves[1])) == wanted:
                return a, b
    raise InspectionError(
        f"{pair.where} cannot be made at rank {rank}: its shapes {pair.a.shape} and "
        f"{pair.b.shape} at rank {original.rank} cannot be scaled to it.",
        "Leave that rank out: a grouped convolution or a block-diagonal factor allows only"
        " multiples.",
    )


def _grown(shape: tuple[int, ...], growth: float) -> Iterator[tuple[int, ...]]:
    """Yield the shapes with one axis times `growth`, for each axis whose size stays whole."""
    for axis, size in enumerate(shape):
        new = round(size * growth)
        if new > 0 and math.isclose(new, size * growth):
            yield *shape[:axis], new, *shape[axis + 1 :]


def _replace(
    owner: Any, half: Half, shape: tuple[int, ...], factors: dict[int, Any]
) -> Half:
    """Replace a factor in the model by an empty one of another shape. A tied factor is made once.

    The module of a factor declares its new sizes, and gets a bias of the new length.
    """
    original, sizes = half.tensor, half.shape
    if id(original) not in factors:
        factors[id(original)] = _empty_like(original, shape)
    inner, _, local = half.name.rpartition(".")
    module = owner.get_submodule(inner)
    module._parameters[local] = factors[id(original)]
    for axis, names in _SIZES.items() if inner else ():
        for name in names:
            size = getattr(module, name, None)
            if isinstance(size, int):
                setattr(module, name, size * shape[axis] // sizes[axis])
    bias = module._parameters.get("bias") if inner else None
    if bias is not None and shape[0] != sizes[0]:
        length = len(bias) * shape[0] // sizes[0]
        module._parameters["bias"] = _empty_like(bias, (length,))
    return half._replace(tensor=factors[id(original)])


def _empty_like(tensor: torch.Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    empty = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    new = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(new).update(vars(tensor))
    return new
