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
    """How rows name a pair's tensors. says_lora: whether its names have "lora" in them, and so
    always belong to an adapter.
    """

    a: str
    b: str
    keys: tuple[str, ...]
    says_lora: bool
    by_adapter: bool

    def pattern(self, key: str, factor: str) -> re.Pattern[str]:
        """Return a regex for the names of `factor` by `key`. Its groups are the layer before it and
        the adapter's name, if there is one.
        """
        before, _, after = map(re.escape, key.partition("{}"))
        joint = "" if key.startswith("_") else r"\."
        adapter = "()"
        if self.by_adapter:  # DyLoRA's slices have names such as lora_A.0
            name = "[^.]+" if after else r"(?!(?:[0-9]+|bias|weight)$)[^.]+"
            adapter = rf"(?:\.({name}))?"
        return re.compile(rf"(?:(.+?){joint})?{before}{factor}{adapter}{after}$")


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
    unscaled = "The file and its folder have no alpha: scaling 1 is assumed."

    @property
    def where(self) -> str:
        return str(self.owner.where)


def file_pairs(
    header: Header, config: AdapterConfig
) -> tuple[list[FilePair], set[str]]:
    """Return every pair, by names, and the entries that are numbers of pairs.

    Raises:
        InspectionError: one half is missing, two tensors or pairs have the same place, or a
            configuration or a number cannot be read.
    """
    rows: dict[_Spelling, list[Convention]] = defaultdict(list)
    for row in conventions():
        is_lora = "lora" in f"{row.a} {row.keys}"
        by_adapter = is_lora or row.container
        rows[_Spelling(row.a, row.b, row.keys, is_lora, by_adapter)].append(row)
    named = _paired(header, _slots(header, rows))
    declared = _declared(header, [slot.layer for slot in named], config)
    pairs: list[FilePair] = []
    numbers, tensors = set[str](), dict[str, Any](header.tensors)
    for slot, names in named.items():
        a, b = (Half(name, tensors[name]) for name in names)
        of_layer = declared[slot.layer]
        owner = _owner(of_layer, a, b)
        numbers |= _read_entries(header, slot, rows[slot.spelling], owner)
        convention = _row(slot, rows[slot.spelling], owner, of_layer)
        if convention is not None:
            pair = FilePair(owner, slot.layer, slot.adapter, convention, a, b)
            _declare(header, pair, of_layer)
            pairs.append(pair)
    _refuse_collisions(header, pairs)
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
                names = slots[_Slot(spelling, *match.groups(""))]
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
        if not pair.adapter:
            rival = next(iter(others.values()), None)
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
    header: Header, layers: Sequence[str], config: AdapterConfig
) -> dict[str, Declared]:
    """Return what the configuration declares for each layer, else the file's own ones."""
    declared = config.declared(layers)
    parts = [] if config.where else embedded_configs(header.path, header.metadata)
    # The longest prefix is last and takes precedence.
    for part in reversed(parts):
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
        value: Any = header.tensors.get(entry)
        if value is None:
            continue
        if header.is_scalar(entry):
            numbers.add(entry)
            value = header.number(entry)
        elif end.endswith(".weight"):
            value = SimpleNamespace(weight=value)
        setattr(owner, attribute, value)
    return numbers


def _declare(header: Header, pair: FilePair, declared: Declared) -> None:
    """Set what the configuration or kohya's metadata declare, where the file has no number."""
    owner, row, where = pair.owner, pair.convention, declared.config.where
    owner.init_lora_weights = declared.config.values.get("init_lora_weights")
    owner.where = f"{header.path}: {pair.layer}" + (f", with {where}," if where else "")
    numbers: list[tuple[Sequence[str], float | None]] = []
    if declared_number(pair, row.rank) is None:
        numbers.append((row.rank, declared.rank))
    if declared_number(pair, (*row.scaling, *row.alpha)) is None:
        alpha = declared.alpha
        # A convolution has conv_alpha.
        if not where and row.a.endswith("down") and len(pair.a.shape) == 2:
            alpha = _network_alpha(header)
        numbers += [(row.alpha, alpha), (row.scaling, declared.scaling)]
    for attributes, number in numbers:
        if attributes and number is not None:
            setattr(owner, attributes[0], number)


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


def _owner(declared: Declared, a: Half, b: Half) -> SimpleNamespace:
    """Return an owner with the attributes that follow from the configuration and the shapes."""
    owner, config = SimpleNamespace(), declared.config
    if a.is_shard or b.is_shard:
        return owner
    rows, columns = a.shape[0], b.shape[1]
    owner.base_layer = SimpleNamespace(groups=max(1, rows // columns))
    count, rest = divmod(rows, declared.rank or rows + 1)
    if declared.experts and rows == columns and not rest:
        owner.parameter_name, owner.num_experts = None, count
    if config.is_adalora:
        owner.lora_E = None
    enabled = config.values.get("enable_lora")
    if enabled and rows == columns * sum(enabled):
        owner.r, owner.enable_lora = columns, enabled
    return owner


def _row(
    slot: _Slot, rows: Iterable[Convention], owner: object, declared: Declared
) -> Convention | None:
    """Return the first row whose other attributes the owner has. Names or a configuration show a
    dict by adapter.
    """
    by_adapter = slot.adapter or declared.config.where
    known = vars(owner).keys()
    fits = [row for row in rows if row.keys != KEYS or known >= set(row.where)]
    if not by_adapter:
        fits.sort(key=lambda row: row.container and not row.where)
    return fits[0] if fits else None
