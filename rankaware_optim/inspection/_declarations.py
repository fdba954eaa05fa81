"""The declarations of a pair's rank, scaling and alpha, and PEFT's configuration: read them and set
them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, NamedTuple

from ..errors import InspectionError
from ._pairs import Modules, Pair, Place, declared_number, number_of, place_of

# Relative tolerance of a declared number in its buffer: bfloat16 has eight bits.
_ROUNDING = 2.0**-8

Declaration = tuple[Pair, Place, float]
"""A pair, a place where it declares a number, and the number to write there."""


def declare(declarations: Iterable[Declaration]) -> None:
    """Write all numbers, or none if one of the places does not accept its value."""
    declarations = list(declarations)
    for _, place, value in declarations:
        _write(place, value)
    for pair, place, value in declarations:
        if not math.isclose(number_of(_value_at(place)) or 0.0, value, rel_tol=_ROUNDING):
            for _, changed, _ in declarations:
                _write(changed, changed.number)
            raise InspectionError(
                f"{pair.where} cannot be changed: its {place.key!r} does not accept the value"
                f" {value:g}.",
                "Rebuild the adapter with that scaling and rank, or keep the values that it"
                " declares.",
            )


def _value_at(place: Place) -> Any:
    holder, key = place.holder, place.key
    return holder[key] if isinstance(holder, Mapping) else getattr(holder, key)


def _write(place: Place, value: float) -> None:
    """Write a value. A read-only place keeps its own, which `declare` sees."""
    import torch  # not at the top: an adapter's file is read without it

    current = _value_at(place)
    with suppress(AttributeError, TypeError):
        if isinstance(current, torch.Tensor):
            current.copy_(torch.as_tensor(value))
        elif isinstance(place.holder, MutableMapping):
            place.holder[place.key] = _like(current, value)
        else:
            setattr(place.holder, place.key, _like(current, value))


def _like(current: object, value: float) -> float:
    """Return `value` as an int if it is whole and the current one is, such as PEFT's alpha."""
    return int(value) if isinstance(current, int) and float(value).is_integer() else value


def declarations_of(pair: Pair, rank: int, scaling: float, new_rank: int) -> Iterator[Declaration]:
    """Yield the places where a pair of `rank` declares rank, multiplier and alpha, with the values
    for `scaling` at `new_rank`.
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
        rooted = multiplier is not None and _is_rooted(pair, alpha.number, multiplier.number, rank)
        yield pair, alpha, scaling * (math.sqrt(new_rank) if rooted else new_rank)


def rank_declarations(pair: Pair, rank: int, new_rank: int) -> Iterator[Declaration]:
    """Yield all places where a pair declares its `rank`, with the new one."""
    for attribute in pair.convention.rank:
        place = place_of(pair, (attribute,))
        if place is not None and math.isclose(place.number, rank, rel_tol=_ROUNDING):
            yield pair, place, new_rank


def _is_rooted(pair: Pair, alpha: float, scaling: float, rank: int) -> bool:
    """Return whether the multiplier is alpha / √r, by PEFT's flag, or else because only this fits
    the numbers.
    """
    flags = getattr(pair.owner, "use_rslora", None)
    if isinstance(flags, Mapping) and pair.adapter in flags:
        return bool(flags[pair.adapter])
    if math.isclose(alpha, scaling * rank, rel_tol=_ROUNDING):
        return False
    return math.isclose(alpha, scaling * math.sqrt(rank), rel_tol=_ROUNDING)


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
        if pair.adapter != self.adapter:
            return None
        fitting = [prefix for prefix in self.prefixes if f"{pair.layer}.".startswith(prefix)]
        return max(fitting, key=len, default=None)

    def holds(self, pair: Pair) -> bool:
        return self.prefix_of(pair) is not None

    def name(self, pair: Pair) -> str:
        """Return the pair's name for PEFT's patterns: as in the base model, or the parameter's name
        for experts.
        """
        name = pair.layer.removeprefix(self.prefix_of(pair) or "").split(".base_layer")[0]
        parameter = getattr(pair.owner, "parameter_name", None)
        return f"{name}.{parameter}" if parameter else name


def configs_of(modules: Modules) -> Iterable[Config]:
    """Return each of PEFT's LoRA configurations once, at the innermost modules that hold it."""
    by_id: dict[int, Config] = {}
    for layer, module in modules:
        configs = module.__dict__.get("peft_config")
        for adapter, config in configs.items() if isinstance(configs, Mapping) else ():
            is_dict = isinstance(config, MutableMapping)
            fields: Any = config if is_dict else getattr(config, "__dict__", {})
            if "lora_alpha" not in fields or "r" not in fields:
                continue
            prefix = f"{layer}." if layer else ""
            outer = by_id[id(config)].prefixes if id(config) in by_id else ()
            others = (other for other in outer if not prefix.startswith(other))
            by_id[id(config)] = Config((*others, prefix), adapter, fields)
    return by_id.values()


def redeclare(configs: Iterable[Config], pairs: Iterable[Pair]) -> None:
    """Change PEFT's configurations so that their patterns give each pair the rank and the alpha that
    it declares. A pattern gets the value of the first pair that it matches, trainable ones first.
    """
    pairs = sorted(pairs, key=lambda pair: not pair.trains)
    for config in configs:
        chosen = [pair for pair in pairs if config.holds(pair)]
        if chosen and chosen[0].trains:
            ranks = list(config.fields.get("rank_pattern") or {})
            _set_patterns(config, chosen, "r", "rank_pattern", ranks)
            _set_patterns(config, chosen, "lora_alpha", "alpha_pattern", ranks)


def _set_patterns(
    config: Config, pairs: Iterable[Pair], default: str, field: str, keys: Iterable[str]
) -> None:
    """Set a configuration's default and its patterns: `keys`, those that it has, and full names."""
    patterns = config.fields.get(field) or {}
    keys = dict.fromkeys([*keys, *patterns])
    values, odd = dict[str, Any](patterns), dict[str, Any]()
    matched = set[str]()
    for pair in pairs:
        name, number = config.name(pair), declared_number(pair, (default,))
        if number is None:
            continue
        value = int(number) if float(number).is_integer() else number
        # PEFT's rule.
        key = next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), "")
        if key not in matched:
            matched.add(key)
            values[key] = value
        elif values[key] != value:
            odd[f"^{re.escape(name)}"] = value
    config.fields[default] = values.pop("", config.fields[default])
    config.fields[field] = odd | {key: values[key] for key in keys if key in values}
