"""Adapters at another rank, in place: new factors replace the original ones, and the modules
declare the new rank.

The original factors are never written. They are kept outside the model until `ModelState` restores
them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from .._scaling_rule import scaling_factor
from .._types import Init
from ..errors import InspectionError
from ._declarations import Config, Declaration, configs_of, declare, place_of, scaling_places
from ._initialize import (
    check_start,
    is_merged,
    refuse_opposite_ties,
    refuse_residual,
    start_of,
    write_starts,
)
from ._pairs import Half, Pair, Walk, pairs_of, read_as, reading_of, scaling_of
from ._survey import survey_of
from ._unsupported import other_kind

ScalingRule = Literal["fixed", "alpha", "rslora"]
Variance = Literal["mua", "peft"]
# Other parts of an adapter whose shape does not depend on the rank.
_RANKLESS = {
    "DoRA magnitude",
    "LoRA bias",
    "new tokens",
    "whole copy (modules_to_save)",
    "LyCORIS scalar",
}
# Attributes in which a factor's module declares the sizes of its weight, by axis.
_FIELDS = {0: ("out_features", "out_channels"), 1: ("in_features", "in_channels")}


class FoundPair(NamedTuple):
    """An original pair: its rank and effective multiplier, and the init and variance of new
    factors.
    """

    pair: Pair
    rank: int
    scaling: float | None
    init: Literal["A", "B"]
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
        init: Literal["A", "B"] | None = None,
        variance: Variance | None = None,
        rule: ScalingRule = "fixed",
    ) -> None:
        survey = survey_of(walked, init=init)
        for name in survey.other:
            kind = other_kind(name)
            if kind is not None and kind not in _RANKLESS:
                raise InspectionError(
                    f"{name} belongs to an adapter ({kind}) that cannot be made at another rank in"
                    " place.",
                    "Freeze it, or build the model in each trial with ra.calibrate.",
                )
        pairs = [
            p
            for p in pairs_of(walked.modules)
            if p.a.tensor.requires_grad or p.b.tensor.requires_grad
        ]
        self.rank = survey.dominant().rank or 1
        self._rule = rule
        self._configs = [c for c in configs_of(walked.modules) if any(map(c.holds, pairs))]
        inits = {(f.layer, f.adapter): f.init for f in survey.factors}
        self.found = [
            _found(pair, inits[pair.layer, pair.adapter], init is not None, variance, self._configs)
            for pair in pairs
        ]
        refuse_opposite_ties(check_start(f.pair, f.init, f.variance) for f in self.found)
        _refuse_views(self.found)
        for rank, found in product({self.rank, *ranks}, self.found):
            _shapes(found, self._rank_of(found, rank))
        for found in self.found if rule != "fixed" else ():
            list(scaling_places(found.pair, found.rank, 1.0))

    @property
    def factors(self) -> list[torch.Tensor]:
        """Return the original factors."""
        return [half.tensor for found in self.found for half in (found.pair.a, found.pair.b)]

    @property
    def declarations(self) -> list[Any]:
        """Return the configurations' fields, which `remake` changes."""
        return [config.fields for config in self._configs]

    @torch.no_grad()
    def remake(self, rank: int, seed: int) -> list[nn.Parameter]:
        """Replace the original factors by new ones at `rank`, drawn with `seed`, and return these.

        The model must be in its original state.
        """
        ranks = [self._rank_of(found, rank) for found in self.found]
        declared = [
            place
            for found, own in zip(self.found, ranks, strict=True)
            for place in self._declared(found, own)
        ]
        made: dict[int, nn.Parameter] = {}
        starts = []
        for found, own in zip(self.found, ranks, strict=True):
            pair, (a, b) = found.pair, _shapes(found, own)
            resized = pair._replace(
                a=_resized(pair, pair.a, a, made), b=_resized(pair, pair.b, b, made)
            )
            starts.append((resized, found.init, found.variance))
        declare(declared)
        write_starts([start_of(*start) for start in starts], seed)
        for config in self._configs:
            self._redeclare(config, rank)
        return list(made.values())

    def _rank_of(self, found: FoundPair, rank: int) -> int:
        own, rest = divmod(found.rank * rank, self.rank)
        if rest:
            raise InspectionError(
                f"{found.pair.where} has rank {found.rank} where most have {self.rank}, so in a"
                f" trial at rank {rank} it would have {found.rank * rank / self.rank:g}.",
                "Leave that rank out, or give all layers one rank.",
            )
        return own

    def _declared(self, found: FoundPair, rank: int) -> Iterator[Declaration]:
        """Yield what the pair must declare at `rank`. Call it before the pair is changed."""
        pair = found.pair
        for attribute in pair.convention.rank:
            place = place_of(pair, (attribute,))
            if place is not None and place.holds(found.rank):
                yield pair, place, rank
        if found.scaling is not None:
            scaling = found.scaling * scaling_factor(self._rule, found.rank, rank)
            yield from scaling_places(pair, found.rank, scaling, at=rank)

    def _redeclare(self, config: Config, rank: int) -> None:
        """Write the new ranks and alphas into a configuration. All of them change by one factor."""
        fields, grown = config.fields, rank / self.rank
        alpha = scaling_factor(self._rule, self.rank, rank) * grown ** (
            0.5 if fields.get("use_rslora") else 1.0
        )
        for name, factor in {"r": grown, "lora_alpha": alpha}.items():
            fields[name] = _scaled(fields[name], factor)
        for name, factor in {"rank_pattern": grown, "alpha_pattern": alpha}.items():
            if fields.get(name):
                fields[name] = {key: _scaled(value, factor) for key, value in fields[name].items()}


def _scaled(value: float, factor: float) -> float:
    """Return the product, as an int if it is whole and `value` was an int."""
    new = value * factor
    return (
        round(new)
        if math.isclose(new, round(new), rel_tol=1e-12) and isinstance(value, int)
        else new
    )


def base_weight(pair: Pair) -> torch.Tensor | None:
    """Return the weight that a pair adapts, from the pair's owner or the layer it wraps; None if
    there is none.
    """
    base: Any = pair.owner
    while isinstance(getattr(base, "base_layer", None), nn.Module):
        base = base.base_layer
    for holder in (base, getattr(base, "conv", None)):
        weight = getattr(holder, getattr(pair.owner, "parameter_name", "weight"), None)
        if isinstance(weight, nn.Parameter):
            return weight
    return None


# --- the original adapters ------------------------------------------------------------------------


def _found(
    pair: Pair, seen: Init, given: bool, variance: Variance | None, configs: Iterable[Config]
) -> FoundPair:
    """Return a pair with the init and variance of its new factors.

    Args:
        pair: the original pair.
        seen: its init.
        given: whether the user gave the init. Otherwise it was read from the pair.
        variance: as in `calibrate_in_place`. By default an embedding with Init[B] has B ~ N(0, 1),
            as in PEFT and loralib.
        configs: the adapters' configurations.
    """
    refuse_residual(pair, configs)
    if seen not in ("A", "B"):
        raise InspectionError(
            f"The init of {pair.where} cannot be read, so new factors cannot be drawn.",
            "Give init='A' (B starts at zero, as in PEFT) or init='B' (A starts at zero).",
        )
    if is_merged(pair):
        raise InspectionError(
            f"{pair.where} is merged into its base weight.", "Unmerge the adapters first."
        )
    is_embedding = reading_of(pair).kind == "embedding"
    init, drawn = seen, variance or ("mua" if is_embedding else "peft")
    if seen == "B":
        init, drawn = (
            ("A", "peft") if is_embedding and not given and variance != "mua" else ("B", "mua")
        )
    start = check_start(pair, init, drawn)
    for half in (pair.a, pair.b):
        if not isinstance(half.tensor, nn.Parameter):
            raise InspectionError(
                f"{half.name} of {pair.where} is not a parameter.", "Make both factors parameters."
            )
    return FoundPair(pair, start.rank, scaling_of(pair, start.rank), init, drawn)


def _refuse_views(pairs: Iterable[FoundPair]) -> None:
    """Raise if different parameters share memory, since it is not known how new factors should
    share it.
    """
    halves = [(found.pair, half) for found in pairs for half in (found.pair.a, found.pair.b)]
    owners = {(half.tensor.device, half.tensor.data_ptr()): half.tensor for _, half in halves}
    for pair, half in halves:
        if owners[half.tensor.device, half.tensor.data_ptr()] is not half.tensor:
            raise InspectionError(
                f"{half.name} of {pair.where} shares its memory with another factor.",
                "Tie factors by making them the same parameter, or untie them.",
            )


# --- the new adapters -----------------------------------------------------------------------------


def _shapes(found: FoundPair, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B at another rank. The same layout must read them, with equal
    fan-in and fan-out.
    """
    pair = found.pair
    for layout in pair.convention.layouts:
        read = read_as(layout, pair)
        if read is None or {read.rank_a, read.rank_b} != {found.rank}:
            continue
        wanted = read._replace(rank_a=rank, rank_b=rank)
        options = (_axes_scaled(half.tensor.shape, rank / found.rank) for half in (pair.a, pair.b))
        for a, b in product(*options):
            empty = [torch.empty(shape, device="meta") for shape in (a, b)]
            resized = pair._replace(a=Half(pair.a.name, empty[0]), b=Half(pair.b.name, empty[1]))
            if read_as(layout, resized) == wanted:
                return a, b
    raise InspectionError(
        f"{pair.where} cannot be made at rank {rank}: its shapes {tuple(pair.a.tensor.shape)} and "
        f"{tuple(pair.b.tensor.shape)} at rank {found.rank} cannot be scaled to it.",
        "Leave that rank out: a grouped convolution or a block-diagonal factor allows only"
        " multiples.",
    )


def _axes_scaled(shape: tuple[int, ...], factor: float) -> list[tuple[int, ...]]:
    """Return the shapes with one axis multiplied by `factor`, for each axis whose size stays whole."""
    grown = [(axis, size * factor) for axis, size in enumerate(shape)]
    whole = [
        (axis, round(size))
        for axis, size in grown
        if math.isclose(size, round(size)) and round(size) > 0
    ]
    return [(*shape[:axis], size, *shape[axis + 1 :]) for axis, size in whole]


def _resized(pair: Pair, half: Half, shape: tuple[int, ...], made: dict[int, nn.Parameter]) -> Half:
    """Replace a factor in the model by an empty one of another shape. A tied factor is made once."""
    found = half.tensor
    if id(found) not in made:
        made[id(found)] = _like(found, shape)
    inner, _, local = half.name.rpartition(".")
    holder = pair.owner.get_submodule(inner)
    holder._parameters[local] = made[id(found)]
    if inner:
        _resize_holder(holder, tuple(found.shape), shape)
    return half._replace(tensor=made[id(found)])


def _like(found: torch.Tensor, shape: tuple[int, ...]) -> nn.Parameter:
    new = nn.Parameter(
        torch.empty(shape, dtype=found.dtype, device=found.device),
        requires_grad=found.requires_grad,
    )
    vars(new).update(vars(found))
    return new


def _resize_holder(holder: Any, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Set the declared sizes of a factor's module, and give it a bias of the new length."""
    for axis, names in _FIELDS.items():
        for name in names:
            size = getattr(holder, name, None)
            if isinstance(size, int):
                setattr(holder, name, size * shape[axis] // found[axis])
    bias = holder._parameters.get("bias")
    if bias is not None and shape[0] != found[0]:
        holder._parameters["bias"] = _like(bias, (len(bias) * shape[0] // found[0],))
