"""The declarations of a pair's rank, scaling and alpha, and PEFT's configuration: read them and set
them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

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
        if not math.isclose(
            number_of(_value_at(place)) or 0.0, value, rel_tol=_ROUNDING
        ):
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
    return (
        int(value) if isinstance(current, int) and float(value).is_integer() else value
    )


def declarations_of(
    pair: Pair, rank: int, scaling: float, new_rank: int
) -> Iterator[Declaration]:
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
        rooted = multiplier is not None and _is_rooted(
            pair, alpha.number, multiplier.number, rank
        )
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


Fields = MutableMapping[str, Any]
Configs = Mapping[tuple[str, str], Fields]
"""The fields of configurations, by the name of a module that holds them and the adapter's name."""


def configs_of(modules: Modules) -> Configs:
    """Return all of PEFT's LoRA configurations in a model."""
    configs: dict[tuple[str, str], Fields] = {}
    for layer, module in modules:
        by_adapter = module.__dict__.get("peft_config")
        for adapter, config in (
            by_adapter.items() if isinstance(by_adapter, Mapping) else ()
        ):
            is_dict = isinstance(config, MutableMapping)
            fields: Any = config if is_dict else getattr(config, "__dict__", {})
            if "lora_alpha" in fields and "r" in fields:
                configs[layer, adapter] = fields
    return configs


def config_of(pair: Pair, configs: Configs) -> tuple[str, Fields] | None:
    """Return the innermost module around a pair with a configuration of its adapter, and this."""
    layer = pair.layer
    while (layer, pair.adapter) not in configs:
        if not layer:
            return None
        layer = layer.rpartition(".")[0]
    return layer, configs[layer, pair.adapter]


def redeclare(configs: Configs, pairs: Iterable[Pair]) -> None:
    """Change PEFT's configurations so that their patterns give each pair the rank and the alpha
    that it declares. A pattern gets the value of the first pair that it matches, trainable ones
    first.
    """
    groups: dict[int, tuple[Fields, dict[str, Pair]]] = {}
    for pair in sorted(pairs, key=lambda pair: not pair.trains):
        config = config_of(pair, configs)
        if config is not None and (pair.trains or id(config[1]) in groups):
            names = groups.setdefault(id(config[1]), (config[1], {}))[1]
            names[_name_for_patterns(pair, config[0])] = pair
    for fields, named in groups.values():
        ranks = list(fields.get("rank_pattern") or {})
        _set_patterns(fields, named, "r", "rank_pattern", ranks)
        _set_patterns(fields, named, "lora_alpha", "alpha_pattern", ranks)


def _name_for_patterns(pair: Pair, prefix: str) -> str:
    """Return a pair's name as in the base model, or the parameter's name for experts."""
    name = pair.layer.removeprefix(prefix).removeprefix(".").split(".base_layer")[0]
    parameter = getattr(pair.owner, "parameter_name", None)
    return f"{name}.{parameter}" if parameter else name


def _set_patterns(
    fields: Fields,
    named: Mapping[str, Pair],
    default: str,
    field: str,
    keys: Iterable[str],
) -> None:
    """Set a configuration's default and its patterns: `keys`, those that it has, and full names."""
    patterns = fields.get(field) or {}
    keys = dict.fromkeys([*keys, *patterns])
    matched, odd = dict[str, Any](), dict[str, Any]()
    for name, pair in named.items():
        number = declared_number(pair, (default,))
        if number is None:
            continue
        value = int(number) if float(number).is_integer() else number
        # PEFT's rule.
        key = next((key for key in keys if re.match(rf"(.*\.)?({key})$", name)), "")
        if matched.setdefault(key, value) != value:
            odd[f"^{re.escape(name)}"] = value
    fields[default] = matched.pop("", fields[default])
    values = patterns | matched
    fields[field] = odd | {key: values[key] for key in keys if key in values}
