"""Where a pair's rank, multiplier and alpha are declared, and PEFT's configuration: read, and set to other values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from functools import reduce
from typing import Any, NamedTuple

import torch

from ..errors import InspectionError
from ._pairs import Modules, Pair, declared_number

# What a declared number may lose in the buffer that holds it: bfloat16 keeps eight bits.
_ROUNDING = 2.0**-8

Declaration = tuple[Pair, "Place", float]
"""A pair, one of the places where it declares a number, and the number that is to stand there."""


class Place(NamedTuple):
    """Where a number is declared: an attribute of an object, or an entry of a dict by adapter."""

    holder: Any
    key: str

    @property
    def held(self) -> Any:
        return self.holder[self.key] if isinstance(self.holder, Mapping) else getattr(self.holder, self.key)

    def put(self, value: Any) -> None:
        """Declare `value`; what is read-only stays, which `holds` then tells."""
        with suppress(AttributeError, TypeError):
            if isinstance(self.held, torch.Tensor):
                self.held.copy_(torch.as_tensor(value))
            elif isinstance(self.holder, Mapping):
                self.holder[self.key] = _like(self.held, value)  # type: ignore[index]
            else:
                setattr(self.holder, self.key, _like(self.held, value))

    def holds(self, value: float) -> bool:
        return math.isclose(float(self.held), value, rel_tol=_ROUNDING)


def _like(old: object, value: float) -> float:
    """A whole number stays an int where the old one was: PEFT's alpha is one."""
    return int(value) if isinstance(old, int) and float(value).is_integer() else value


def declare(todo: Iterable[Declaration]) -> None:
    """Set every number, or none where one of the places does not take its value."""
    todo = list(todo)
    held = [place.held for _, place, _ in todo]
    before = [value.detach().clone() if isinstance(value, torch.Tensor) else value for value in held]
    for _, place, value in todo:
        place.put(value)
    for pair, place, value in todo:
        if not place.holds(value):
            for (_, changed, _), old in zip(todo, before, strict=True):
                changed.put(old)
            raise InspectionError(
                f"{pair.where} cannot be set anew: its {place.key!r} does not take the value {value:g}.",
                "Rebuild the adapter with that scaling and rank, or ask for what it declares.",
            )


def scaling_places(pair: Pair, rank: int, scaling: float, at: int | None = None) -> Iterator[Declaration]:
    """Where a pair of `rank` declares its multiplier and its alpha, with the values that say `scaling`.

    at: the rank that the pair is going to have, where that is another.
    """
    row = pair.convention
    multiplier = place_of(pair, row.scaling)
    alpha = place_of(pair, [name for name in row.alpha if name not in row.scaling])
    if multiplier is None and alpha is None:
        raise InspectionError(
            f"{pair.where} declares no scaling, so none can be set.",
            "Leave scaling= out, or name the attribute that the layer reads in register_convention().",
        )
    if multiplier is not None:
        yield pair, multiplier, scaling
    if alpha is not None:
        rooted = multiplier is not None and _is_rooted(pair, float(alpha.held), float(multiplier.held), rank)
        at = rank if at is None else at
        yield pair, alpha, scaling * (math.sqrt(at) if rooted else at)


def place_of(pair: Pair, attributes: Iterable[str]) -> Place | None:
    """The place that `declared_number` reads."""
    for attribute in attributes:
        if declared_number(pair, (attribute,)) is not None:
            *path, name = attribute.split(".")
            place = Place(reduce(getattr, path, pair.owner), name)
            return Place(place.held, pair.adapter) if isinstance(place.held, Mapping) else place
    return None


def _is_rooted(pair: Pair, alpha: float, scaling: float, rank: int) -> bool:
    """Whether the multiplier is alpha / √r: as PEFT says, else where the numbers do and alpha / r does not fit."""
    flags = getattr(pair.owner, "use_rslora", None)
    if isinstance(flags, Mapping) and pair.adapter in flags:
        return bool(flags[pair.adapter])
    plain, rooted = (math.isclose(alpha, scaling * by, rel_tol=_ROUNDING) for by in (rank, math.sqrt(rank)))
    return rooted and not plain


# --- PEFT's configuration -------------------------------------------------------------------------------------------


class Config(NamedTuple):
    """An adapter's configuration and the prefix of the model that it describes."""

    prefix: str
    adapter: str
    fields: MutableMapping[str, Any]

    def holds(self, pair: Pair) -> bool:
        return pair.adapter == self.adapter and f"{pair.layer}.".startswith(self.prefix)

    def name(self, pair: Pair) -> str:
        """The name by which PEFT's patterns know the pair: as in the bare model, its parameter's for experts."""
        name = pair.layer.removeprefix(self.prefix).split(".base_layer")[0]
        parameter = getattr(pair.owner, "parameter_name", None)
        return f"{name}.{parameter}" if parameter else name


def configs_of(modules: Modules) -> Iterator[Config]:
    """Each of PEFT's LoRA configurations once, at the innermost module that holds it."""
    found: dict[int, Config] = {}
    for layer, module in modules:
        configs = module.__dict__.get("peft_config")
        for adapter, config in configs.items() if isinstance(configs, Mapping) else ():
            fields: Any = config if isinstance(config, MutableMapping) else vars(config)
            if "lora_alpha" in fields and "r" in fields:
                found[id(config)] = Config(f"{layer}." if layer else "", adapter, fields)
    yield from found.values()


def redeclare(config: Config, pairs: Iterable[Pair], chosen: Iterable[Pair], scaling: float) -> None:
    """Make an adapter's configuration give every pair the alpha that it has now, as PEFT will match names to it."""
    if not any(config.holds(pair) for pair in chosen):
        return
    fields, rooted = config.fields, bool(config.fields.get("use_rslora"))
    ranks = {"": fields["r"], **(fields.get("rank_pattern") or {})}
    alphas = {key: _like(rank, scaling * (math.sqrt(rank) if rooted else rank)) for key, rank in ranks.items()}
    default, odd = alphas.pop(""), dict[str, Any]()
    for pair in filter(config.holds, pairs):
        name, alpha = config.name(pair), declared_number(pair, ("lora_alpha",))
        matched = (value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", name))  # PEFT's rule
        if alpha not in (None, next(matched, default)):
            odd[f"^{re.escape(name)}"] = alpha
    fields.update(lora_alpha=default, alpha_pattern=odd | alphas)
