"""LoRA pairs in a file's header, by their names and the table of conventions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ...errors import InspectionError
from .._conventions import CONVENTIONS, Convention, conventions
from .._pairs import Pair
from ._safetensors import Header


class NamedPair(NamedTuple):
    """Two tensors by their names `a` and `b`, with their layer and adapter, and the rows with such
    names.
    """

    layer: str
    adapter: str
    rows: list[Convention]
    a: str
    b: str


class _Spelling(NamedTuple):
    """How rows name a pair's tensors. says_lora: a name with "lora" in it always belongs to an
    adapter.
    """

    a: str
    b: str
    keys: tuple[str, ...]
    says_lora: bool
    by_adapter: bool


def named_pairs(header: Header) -> list[NamedPair]:
    """Return every pair, by names only.

    Raises:
        InspectionError: one half is missing, or two tensors have the same place.
    """
    rows: dict[_Spelling, list[Convention]] = {}
    for row in conventions():
        says_lora = "lora" in f"{row.a} {row.keys}"
        spelling = _Spelling(row.a, row.b, row.keys, says_lora, says_lora or row.container)
        rows.setdefault(spelling, []).append(row)
    patterns: dict[str, list[tuple[_Spelling, re.Pattern[str]]]] = {}
    for spelling in rows:
        for factor in (spelling.a, spelling.b):
            known = patterns.setdefault(factor, [])
            known += [(spelling, _pattern(key, factor, spelling)) for key in spelling.keys]

    places: dict[tuple[_Spelling, str, str], dict[str, str]] = {}
    for name in header.tensors:
        for factor in name.split("."):
            for spelling, pattern in patterns.get(factor, ()):
                match = pattern.match(name)
                if match is not None:
                    held = places.setdefault(
                        (spelling, match["layer"] or "", match["adapter"] or ""), {}
                    )
                    if held.setdefault(factor, name) != name:
                        raise _collision(header, held[factor], name)

    pairs: list[NamedPair] = []
    taken = set[str]()
    for (spelling, layer, adapter), held in places.items():
        if len(held) == 2 and taken.isdisjoint(held.values()):
            taken.update(held.values())
            pairs.append(
                NamedPair(layer, adapter, rows[spelling], held[spelling.a], held[spelling.b])
            )
    for (spelling, *_), held in places.items():
        if spelling.says_lora and not taken.issuperset(held.values()):
            lone = next(name for name in held.values() if name not in taken)
            raise InspectionError(
                f"{header.path}: {lone} lacks the other half of its LoRA pair.",
                "Save the adapter again.",
            )
    return pairs


def _pattern(key: str, factor: str, spelling: _Spelling) -> re.Pattern[str]:
    """Return a regex for the names of `factor` by `key`, with the layer before it and possibly an
    adapter's name.
    """
    before, _, after = key.partition("{}")
    joint = "" if key.startswith("_") else r"\."
    adapter = r"(?P<adapter>)"
    if spelling.by_adapter:  # DyLoRA's slices have names such as lora_A.0
        adapter = rf"(?:\.(?P<adapter>{'' if after else r'(?!(?:[0-9]+|bias|weight)$)'}[^.]+))?"
    return re.compile(
        rf"(?:(?P<layer>.+?){joint})?{re.escape(before)}{factor}{adapter}{re.escape(after)}$"
    )


def refuse_collisions(header: Header, pairs: Iterable[Pair]) -> None:
    """Raise if two pairs belong to the same adapter of one layer, also if their prefixes or markers
    differ.

    A layer may have pairs of several rows if these are registered or read stacks, since their owner
    adapts several matrices.
    """
    seen: dict[tuple[str, str], dict[str, Pair]] = {}
    for pair in pairs:
        row = pair.convention
        rival = "rows" in row.layouts and row in CONVENTIONS
        there = seen.setdefault(
            (pair.layer.removeprefix("base_model.model."), "" if rival else row.name), {}
        )
        twin = there.get(pair.adapter) or there.get("")
        if twin is not None or (there and not pair.adapter):
            raise _collision(header, (twin or next(iter(there.values()))).a.name, pair.a.name)
        there[pair.adapter] = pair


def _collision(header: Header, one: str, other: str) -> InspectionError:
    return InspectionError(
        f"{header.path}: {one} and {other} collide: both belong to one layer's pair.",
        "Save the adapter again.",
    )
