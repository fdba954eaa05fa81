"""LoRA pairs in a file's header: which names belong together, and the rank, fans and kind that their shapes say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from ...errors import InspectionError
from ._peft_config import UNSAID, AdapterConfig, Declared
from ._safetensors import Header, Shape

__all__ = ["FilePair", "FileReading", "file_pairs", "file_reading"]

_MARKERS = {  # the first factor's marker in a name: the second's, and the convention
    "lora_embedding_A": ("lora_embedding_B", "peft-embedding"),
    "lora_A": ("lora_B", "lora_A/lora_B"),
    "lora_a": ("lora_b", "lora_a/lora_b"),
    "lora_down": ("lora_up", "lora_down/lora_up"),
    "lora.down": ("lora.up", "diffusers-legacy"),
    "lora_linear_layer.down": ("lora_linear_layer.up", "diffusers-legacy"),
}
_FIRST = {second: first for first, (second, _) in _MARKERS.items()}
_KEY = re.compile(
    r"^(?:(?P<layer>.+?)(?:\.|_(?=lora\.)))?"  # the oldest diffusers files say to_q_lora.down.weight
    rf"(?P<marker>{'|'.join(map(re.escape, [*_MARKERS, *_FIRST]))})"
    r"(?:(?:\.(?P<adapter>[^.]+))?\.weight|\.(?P<bare>(?!\d+$|bias$)[^.]+))?$"
)


class FilePair(NamedTuple):
    """Two tensors by their names `a` and `b`: the layer and adapter they belong to, and the first one's marker."""

    layer: str
    adapter: str
    marker: str
    a: str
    b: str


class FileReading(NamedTuple):
    """What the shapes say: rank, the layer's fans, its kind, and the convention that the pair follows."""

    rank: int
    fan_in: int
    fan_out: int
    kind: str
    convention: str


def file_pairs(header: Header) -> list[FilePair]:
    """Every pair, by the names alone.

    Raises:
        InspectionError: one half is missing, or two pairs claim one place.
    """
    halves: dict[tuple[str, str, str], dict[str, str]] = {}
    for name in header.tensors:
        match = _KEY.match(name) if "lora" in name else None
        if match is None or (match["marker"] in ("lora_a", "lora_b") and not name.endswith(".weight")):
            continue  # MLX writes a bare lora_a, transposed
        first = _FIRST.get(match["marker"], match["marker"])
        found = halves.setdefault((match["layer"] or "", match["adapter"] or match["bare"] or "", first), {})
        if found.setdefault(match["marker"], name) != name:
            raise _collision(header, found[match["marker"]], name)
    pairs = [_whole(header, *place, found) for place, found in halves.items()]
    _refuse_collisions(header, pairs)
    return pairs


def _whole(header: Header, layer: str, adapter: str, first: str, found: dict[str, str]) -> FilePair:
    if len(found) < 2:
        raise InspectionError(
            f"{header.path}: {next(iter(found.values()))} lacks the other half of its LoRA pair.",
            "Save the adapter again.",
        )
    return FilePair(layer, adapter, first, found[first], found[_MARKERS[first][0]])


def _refuse_collisions(header: Header, pairs: Iterable[FilePair]) -> None:
    """No two pairs may be the same adapter of one layer, be it with and without PEFT's prefix or a name."""
    seen: dict[str, dict[str, FilePair]] = {}
    for pair in pairs:
        there = seen.setdefault(pair.layer.removeprefix("base_model.model."), {})
        twin = there.get(pair.adapter) or there.get("")
        if twin is not None or (there and not pair.adapter):
            raise _collision(header, (twin or next(iter(there.values()))).a, pair.a)
        there[pair.adapter] = pair


def _collision(header: Header, one: str, other: str) -> InspectionError:
    return InspectionError(
        f"{header.path}: {one} and {other} collide: both belong to one layer's pair.", "Save the adapter again."
    )


# --- shapes ---------------------------------------------------------------------------------------------------------


def file_reading(
    header: Header, pair: FilePair, config: AdapterConfig | None = None, declared: Declared = UNSAID
) -> FileReading:
    """The reading of a pair on which both shapes and the declared rank agree.

    Raises:
        InspectionError: no reading fits the shapes, or the configuration declares another rank.
    """
    a, b = header.tensors[pair.a].shape, header.tensors[pair.b].shape
    read = None
    if len(a) > 1 and len(b) > 1 and 0 not in (*a, *b) and math.prod(b[2:]) == 1:
        middle = header.tensors.get(f"{pair.layer}.lora_mid.weight")
        read = _rows(pair, a, b, config) if middle is None else _tucker(a, b, middle.shape)
        read = _stacked(a, b, config, declared) or read
    if read is None:
        raise InspectionError(
            f"{header.path}: {pair.a} has shape {a} and {pair.b} {b}, which is no LoRA pair.", "Save the adapter again."
        )
    pruned = read.kind == "adalora" and read.rank < (declared.rank or 0)
    if config is not None and declared.rank not in (None, read.rank) and not pruned:
        raise InspectionError(
            f"{header.path}: {pair.a} has rank {read.rank} by its shape {a}, but {config.where} declares "
            f"{declared.rank}. @ r",
            "Put the configuration and the file of one adapter together.",
        )
    return read


def _rows(pair: FilePair, a: Shape, b: Shape, config: AdapterConfig | None) -> FileReading | None:
    """A (r, in, k…), B (out, r, 1…); a grouped convolution's B holds r / groups."""
    if a[0] != b[1] and (len(a) < 3 or a[0] % b[1]):
        return None
    kind = "conv" if len(a) > 2 else "embedding" if pair.marker == "lora_embedding_A" else "linear"
    convention = _MARKERS[pair.marker][1]
    if config is not None and pair.marker == "lora_A":
        kind, convention = ("adalora", "peft-adalora") if config.is_adalora else (kind, "peft")
    return FileReading(a[0], math.prod(a[1:]), b[0], kind, convention)


def _tucker(a: Shape, b: Shape, core: Shape) -> FileReading | None:
    """A (r, in, 1…), a core (r, r, k…), B (out, r, 1…)."""
    if len(core) < 2 or {a[0], b[1], *core[:2]} != {a[0]} or math.prod(a[2:]) != 1 or 0 in core:
        return None
    return FileReading(a[0], a[1] * math.prod(core[2:]), b[0], "conv", "locon-tucker")


def _stacked(a: Shape, b: Shape, config: AdapterConfig | None, declared: Declared) -> FileReading | None:
    """Pairs whose rank is not A's first dimension, told by the configuration alone."""
    rank, fan_in = declared.rank, math.prod(a[1:])
    if declared.experts and rank and a[0] == b[1] and a[0] % rank == 0:  # A (r·E, in), B (out, r·E)
        return FileReading(rank, fan_in, b[0], "experts", "peft-experts")
    if config is not None and config.enabled and a[0] == b[1] * config.enabled:  # A (r·m, in), B (out, r)
        return FileReading(b[1], fan_in, b[0], "linear", "merged")
    return None
