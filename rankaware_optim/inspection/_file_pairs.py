"""LoRA pairs in a file's header, by their names and the table of conventions."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, product
from types import SimpleNamespace
from typing import Any, NamedTuple

from .._checks import is_positive
from ..errors import InspectionError
from ._conventions import CONVENTIONS, KEYS, Convention, conventions
from ._pairs import Half, Pair, declared_number
from ._peft_config import AdapterConfig, Declared, embedded_configs
from ._safetensors import Header, shown


class _Spelling(NamedTuple):
    """How rows name a pair's tensors."""

    a: str
    b: str
    keys: tuple[str, ...]
    by_adapter: bool

    @property
    def says_lora(self) -> bool:
        """Whether its names have "lora" in them, and so always belong to an adapter."""
        return "lora" in f"{self.a} {self.keys}"

    def pattern(self, key: str, factor: str) -> re.Pattern[str]:
        """Return a regex for the names of `factor` by `key`, with the layer before it and possibly
        an adapter's name.
        """
        before, _, after = key.partition("{}")
        joint = "" if key.startswith("_") else r"\."
        adapter = r"(?P<adapter>)"
        if self.by_adapter:  # DyLoRA's slices have names such as lora_A.0
            name = "[^.]+" if after else r"(?!(?:[0-9]+|bias|weight)$)[^.]+"
            adapter = rf"(?:\.(?P<adapter>{name}))?"
        return re.compile(
            rf"(?:(?P<layer>.+?){joint})?{re.escape(before)}{factor}{adapter}{re.escape(after)}$"
        )


class _Slot(NamedTuple):
    """One layer's pair of an adapter, as a spelling names it."""

    spelling: _Spelling
    layer: str
    adapter: str


class FilePair(Pair):
    """A pair in a file. Its owner has the attributes of its rows that the file or the configuration
    contains, and the words `where` for errors.
    """

    is_sharded = False

    @property
    def where(self) -> str:
        return str(self.owner.where)


def file_pairs(
    header: Header, config: AdapterConfig | None
) -> tuple[list[tuple[FilePair, Declared]], set[str]]:
    """Return every pair, by names, with what the configuration declares for it. The second value
    has the entries that are numbers of pairs.

    Raises:
        InspectionError: one half is missing, two tensors or pairs have the same place, or a
            configuration or a number cannot be read.
    """
    rows: dict[_Spelling, list[Convention]] = defaultdict(list)
    for row in conventions():
        spelling = _Spelling(row.a, row.b, row.keys, False)
        rows[spelling._replace(by_adapter=spelling.says_lora or row.container)].append(
            row
        )
    named = _paired(header, _slots(header, rows))
    declared = _declared(
        header, list(dict.fromkeys(slot.layer for slot in named)), config
    )
    pairs: list[tuple[FilePair, Declared]] = []
    numbers, tensors = set[str](), dict[str, Any](header.tensors)
    for slot, (a, b) in named.items():
        of_layer = declared[slot.layer]
        owner = _owner(of_layer, tensors[a].shape, tensors[b].shape)
        numbers |= _read_entries(header, slot, rows[slot.spelling], owner)
        convention = _row(slot, rows[slot.spelling], owner, of_layer)
        if convention is not None:
            halves = Half(a, tensors[a]), Half(b, tensors[b])
            pair = FilePair(owner, slot.layer, slot.adapter, convention, *halves)
            _declare(header, pair, of_layer)
            pairs.append((pair, of_layer))
    _refuse_collisions(header, [pair for pair, _ in pairs])
    return pairs, numbers


# --- names ----------------------------------------------------------------------------------------


def _slots(
    header: Header, spellings: Iterable[_Spelling]
) -> dict[_Slot, dict[str, str]]:
    """Return, for every pair or half of one, its tensors by factor."""
    patterns: dict[str, list[tuple[_Spelling, re.Pattern[str]]]] = defaultdict(list)
    for spelling in spellings:
        for factor in (spelling.a, spelling.b):
            patterns[factor] += [
                (spelling, spelling.pattern(k, factor)) for k in spelling.keys
            ]
    slots: dict[_Slot, dict[str, str]] = defaultdict(dict)
    for name in header.tensors:
        for factor in name.split("."):
            for spelling, pattern in patterns.get(factor, ()):
                match = pattern.match(name)
                if match is None:
                    continue
                names = slots[
                    _Slot(spelling, match["layer"] or "", match["adapter"] or "")
                ]
                if names.setdefault(factor, name) != name:
                    raise _collision(header, names[factor], name)
    return slots


def _paired(
    header: Header, slots: Mapping[_Slot, Mapping[str, str]]
) -> dict[_Slot, tuple[str, str]]:
    """Return the tensors A and B of whole pairs. A tensor belongs to the first of its slots."""
    paired: dict[_Slot, tuple[str, str]] = {}
    taken = set[str]()
    for slot, names in slots.items():
        if len(names) == 2 and taken.isdisjoint(names.values()):
            taken.update(names.values())
            paired[slot] = names[slot.spelling.a], names[slot.spelling.b]
    for slot, names in slots.items():
        lone = [name for name in names.values() if name not in taken]
        if lone and slot.spelling.says_lora:
            raise InspectionError(
                f"{header.path}: {lone[0]} lacks the other half of its LoRA pair.",
                "Save the adapter again.",
            )
    return paired


def _refuse_collisions(header: Header, pairs: Iterable[Pair]) -> None:
    """Raise if two pairs belong to the same adapter of one layer, also if their prefixes or markers
    differ.

    A layer may have pairs of several rows if these are registered or read stacks, since their owner
    adapts several matrices.
    """
    by_layer: dict[tuple[str, str], dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        row = pair.convention
        family = "" if "rows" in row.layouts and row in CONVENTIONS else row.name
        others = by_layer[pair.layer.removeprefix("base_model.model."), family]
        rival = others.get(pair.adapter) or others.get("")
        if rival is None and others and not pair.adapter:
            rival = next(iter(others.values()))
        if rival is not None:
            raise _collision(header, rival.a.name, pair.a.name)
        others[pair.adapter] = pair


def _collision(header: Header, one: str, other: str) -> InspectionError:
    return InspectionError(
        f"{header.path}: {one} and {other} collide: both belong to one layer's pair.",
        "Save the adapter again.",
    )


# --- declarations ---------------------------------------------------------------------------------


def _declared(
    header: Header, layers: Sequence[str], config: AdapterConfig | None
) -> dict[str, Declared]:
    """Return what the configuration declares for each layer."""
    declared = dict.fromkeys(layers, Declared())
    if config is not None:
        return declared | config.declared(layers)
    # The longest prefix is last and takes precedence.
    for part in reversed(embedded_configs(header.path, header.metadata)):
        declared |= part.declared(
            [layer for layer in layers if layer.startswith(part.prefix)]
        )
    return declared


def _read_entries(
    header: Header, slot: _Slot, rows: Iterable[Convention], owner: object
) -> set[str]:
    """Set the attributes of the rows that the file has for a pair. Return those entries that are
    numbers.
    """
    start = f"{slot.layer}." if slot.layer else ""
    ends = ["", ".weight"]
    if slot.adapter:
        ends += [f".{slot.adapter}", f".{slot.adapter}.weight"]
    attributes = chain.from_iterable(
        (*r.where, *r.rank, *r.scaling, *r.alpha) for r in rows
    )
    numbers = set[str]()
    for attribute, end in product(dict.fromkeys(attributes), ends):
        entry = f"{start}{attribute}{end}"
        if header.is_scalar(entry):
            numbers.add(entry)
            setattr(owner, attribute, header.number(entry))
        elif entry in header.tensors:
            tensor = header.tensors[entry]
            is_weight = entry.endswith(".weight")
            setattr(
                owner,
                attribute,
                SimpleNamespace(weight=tensor) if is_weight else tensor,
            )
    return numbers


def _declare(header: Header, pair: FilePair, declared: Declared) -> None:
    """Set what the configuration or kohya's metadata declare, where the file has no number."""
    owner, row, config = pair.owner, pair.convention, declared.config
    owner.where = f"{header.path}: {pair.layer}" + (
        f", with {config.where}," if config else ""
    )
    if declared_number(pair, row.rank) is None:
        _set_first(owner, row.rank, declared.rank)
    if declared_number(pair, (*row.scaling, *row.alpha)) is not None:
        return
    alpha = declared.alpha
    if (
        config is None and row.a.endswith("down") and len(pair.a.shape) == 2
    ):  # not conv_alpha
        alpha = _network_alpha(header)
    _set_first(owner, row.alpha, alpha)
    _set_first(owner, row.scaling, declared.scaling)


def _set_first(owner: object, attributes: Sequence[str], value: float | None) -> None:
    if attributes and value is not None:
        setattr(owner, attributes[0], value)


def _network_alpha(header: Header) -> float | None:
    text = header.metadata.get("ss_network_alpha")
    if text in (None, "None", "Dynamic"):  # kohya's words for a missing alpha
        return None
    alpha = math.nan
    with suppress(ValueError):
        alpha = float(text)
    if not is_positive(alpha):
        raise InspectionError(
            f"{header.path}: ss_network_alpha in its metadata is {shown(text)}.",
            "Save the adapter with a positive alpha.",
        )
    return alpha


def _owner(declared: Declared, a: Sequence[int], b: Sequence[int]) -> SimpleNamespace:
    """Return an owner with the attributes that follow from the configuration and the shapes."""
    owner, config = SimpleNamespace(), declared.config
    if len(a) < 2 or len(b) < 2 or 0 in (*a, *b):
        return owner
    owner.base_layer = SimpleNamespace(groups=max(1, a[0] // b[1]))
    if (
        declared.experts
        and declared.rank
        and a[0] == b[1]
        and a[0] % declared.rank == 0
    ):
        owner.parameter_name, owner.num_experts = None, a[0] // declared.rank
    if config is None:
        return owner
    if config.is_adalora:
        owner.lora_E = None
    if config.enabled and a[0] == b[1] * config.enabled:
        owner.r, owner.enable_lora = b[1], [True] * config.enabled
    return owner


def _row(
    slot: _Slot, rows: Iterable[Convention], owner: object, declared: Declared
) -> Convention | None:
    """Return the first row whose other attributes the owner has. Names or a configuration show a
    dict by adapter.
    """
    by_adapter = slot.adapter or declared.config is not None
    fallback = None
    for row in rows:
        if row.keys == KEYS and not all(hasattr(owner, name) for name in row.where):
            continue
        if by_adapter or row.where or not row.container:
            return row
        fallback = fallback or row
    return fallback
