"""The declarations of a pair's rank, scaling and alpha, and PEFT's configuration: read them and set
them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from functools import reduce
from typing import Any, NamedTuple

from ..errors import InspectionError
from ._pairs import Modules, Pair, declared_number

# Relative tolerance of a declared number in its buffer: bfloat16 has eight bits.
_ROUNDING = 2.0**-8

Declaration = tuple[Pair, "Place", float]
"""A pair, a place where it declares a number, and the number to write there."""


class Place(NamedTuple):
    """The place where a number is declared: an attribute of an object, or an entry of a dict by
    adapter.
    """

    holder: Any
    key: str

    @property
    def held(self) -> Any:
        return (
            self.holder[self.key]
            if isinstance(self.holder, Mapping)
            else getattr(self.holder, self.key)
        )

    def put(self, value: Any) -> None:
        """Write `value`. A read-only place keeps its value, which `holds` shows."""
        import torch  # not at the top: an adapter's file is read without it

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
    """Return `value` as an int if it is whole and the old value was an int, such as PEFT's alpha."""
    return int(value) if isinstance(old, int) and float(value).is_integer() else value


def declare(todo: Iterable[Declaration]) -> None:
    """Write all numbers, or none if one of the places does not accept its value."""
    import torch

    todo = list(todo)
    held = [place.held for _, place, _ in todo]
    before = [
        value.detach().clone() if isinstance(value, torch.Tensor) else value for value in held
    ]
    for _, place, value in todo:
        place.put(value)
    for pair, place, value in todo:
        if not place.holds(value):
            for (_, changed, _), old in zip(todo, before, strict=True):
                changed.put(old)
            raise InspectionError(
                f"{pair.where} cannot be changed: its {place.key!r} does not accept the value"
                f" {value:g}.",
                "Rebuild the adapter with that scaling and rank, or keep the values that it"
                " declares.",
            )


def scaling_places(
    pair: Pair, rank: int, scaling: float, at: int | None = None
) -> Iterator[Declaration]:
    """Yield the places where a pair of `rank` declares its multiplier and alpha, with the values
    for `scaling`.

    at: the rank that the pair will have, if it changes.
    """
    row = pair.convention
    multiplier = place_of(pair, row.scaling)
    alpha = place_of(pair, [name for name in row.alpha if name not in row.scaling])
    if multiplier is None and alpha is None:
        raise InspectionError(
            f"{pair.where} declares no scaling, so none can be set.",
            "Leave scaling= out, or give the attribute that the layer reads to"
            " register_convention().",
        )
    if multiplier is not None:
        yield pair, multiplier, scaling
    if alpha is not None:
        rooted = multiplier is not None and _is_rooted(
            pair, float(alpha.held), float(multiplier.held), rank
        )
        at = rank if at is None else at
        yield pair, alpha, scaling * (math.sqrt(at) if rooted else at)


def place_of(pair: Pair, attributes: Iterable[str]) -> Place | None:
    """Return the place that `declared_number` reads."""
    for attribute in attributes:
        if declared_number(pair, (attribute,)) is not None:
            *path, name = attribute.split(".")
            place = Place(reduce(getattr, path, pair.owner), name)
            return Place(place.held, pair.adapter) if isinstance(place.held, Mapping) else place
    return None


def _is_rooted(pair: Pair, alpha: float, scaling: float, rank: int) -> bool:
    """Return whether the multiplier is alpha / √r, by PEFT's flag, or else because only this fits
    the numbers.
    """
    flags = getattr(pair.owner, "use_rslora", None)
    if isinstance(flags, Mapping) and pair.adapter in flags:
        return bool(flags[pair.adapter])
    plain, rooted = (
        math.isclose(alpha, scaling * by, rel_tol=_ROUNDING) for by in (rank, math.sqrt(rank))
    )
    return rooted and not plain


# --- PEFT's configuration -------------------------------------------------------------------------


class Config(NamedTuple):
    """An adapter's configuration, and the prefixes of its parts of the model. Two PEFT models may
    share one.
    """

    prefixes: tuple[str, ...]
    adapter: str
    fields: MutableMapping[str, Any]

    def prefix_of(self, pair: Pair) -> str | None:
        """Return the longest prefix that fits a pair; None if it has another configuration."""
        fitting = (prefix for prefix in self.prefixes if f"{pair.layer}.".startswith(prefix))
        return max(fitting, key=len, default=None) if pair.adapter == self.adapter else None

    def holds(self, pair: Pair) -> bool:
        return self.prefix_of(pair) is not None

    def name(self, pair: Pair) -> str:
        """Return the pair's name for PEFT's patterns: as in the base model, or the parameter's name
        for experts.
        """
        name = pair.layer.removeprefix(self.prefix_of(pair) or "").split(".base_layer")[0]
        parameter = getattr(pair.owner, "parameter_name", None)
        return f"{name}.{parameter}" if parameter else name


def configs_of(modules: Modules) -> Iterator[Config]:
    """Yield each of PEFT's LoRA configurations once, at the innermost modules that hold it."""
    found: dict[int, Config] = {}
    for layer, module in modules:
        configs = module.__dict__.get("peft_config")
        for adapter, config in configs.items() if isinstance(configs, Mapping) else ():
            fields: Any = (
                config if isinstance(config, MutableMapping) else getattr(config, "__dict__", {})
            )
            if "lora_alpha" in fields and "r" in fields:
                prefix, known = f"{layer}." if layer else "", found.get(id(config))
                others = (
                    () if known is None else (p for p in known.prefixes if not prefix.startswith(p))
                )
                found[id(config)] = Config((*others, prefix), adapter, fields)
    yield from found.values()


def redeclare(
    config: Config, pairs: Iterable[Pair], chosen: Iterable[Pair], scaling: float
) -> None:
    """Change an adapter's configuration so that PEFT's patterns give every pair its present alpha."""
    if not any(config.holds(pair) for pair in chosen):
        return
    fields, rooted = config.fields, bool(config.fields.get("use_rslora"))
    ranks = {"": fields["r"], **(fields.get("rank_pattern") or {})}
    alphas = {
        key: _like(rank, scaling * (math.sqrt(rank) if rooted else rank))
        for key, rank in ranks.items()
    }
    default, odd = alphas.pop(""), dict[str, Any]()
    for pair in filter(config.holds, pairs):
        name, alpha = config.name(pair), declared_number(pair, ("lora_alpha",))
        matched = (
            value for key, value in alphas.items() if re.match(rf"(.*\.)?({key})$", name)
        )  # PEFT's rule
        if alpha not in (None, next(matched, default)):
            odd[f"^{re.escape(name)}"] = alpha
    fields.update(lora_alpha=default, alpha_pattern=odd | alphas)
