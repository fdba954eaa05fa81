"""LoRA pairs in the header of a safetensors file, by the names of three dialects: PEFT's, kohya's
(LyCORIS's too) and the former one of diffusers.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from .._checks import is_positive, shown
from .._types import Factor, Init
from ..errors import InspectionError
from ._conventions import Reading, Shape, rows_of, tucker_of
from ._pairs import checked_scaling, layout_reading, misfit, refuse_either_way
from ._peft_config import AdapterConfig, Declared
from ._survey import declared_init, factors_of

# Groups of each pattern: the layer, the factor and the adapter's name, if there is one. DyLoRA's
# slices, which are no pair, have names such as lora_A.0.
_ADAPTER = r"(?:\.(?P<adapter>(?!\d+$|bias$|weight$)[^.]+))?(?:\.weight)?"
_DIALECTS = {
    "lora_A/lora_B": rf"(?:(?P<layer>.+?)\.)?lora_(?P<factor>[AB]){_ADAPTER}",
    "peft-embedding": rf"(?:(?P<layer>.+?)\.)?lora_embedding_(?P<factor>[AB]){_ADAPTER}",
    "lora_down/lora_up": rf"(?:(?P<layer>.+?)\.)?lora_(?P<factor>down|up){_ADAPTER}",
    "diffusers-legacy": (
        r"(?:(?P<layer>.+)(?:\.|_(?=lora\.)))?lora(?:_linear_layer)?\."
        r"(?P<factor>down|up)(?P<adapter>)\.weight"
    ),
}
_PATTERNS = {name: re.compile(pattern) for name, pattern in _DIALECTS.items()}
_ROLES = {"A": "A", "down": "A", "B": "B", "up": "B"}


# --- the header -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """The contents of a file: shapes by name, in the file's order, its table of strings, and the
    values of entries of one element that are called `alpha`.
    """

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    alphas: Mapping[str, float]


def read_header(path: Path) -> Header:
    """Read a file's header and its alphas. The other tensors are not loaded.

    Raises:
        InspectionError: the file is not regular, is cut short, has another format, or its header
            does not describe it.
    """
    if not os.path.isfile(path):  # a named pipe would be waited for
        raise InspectionError(
            f"There is no file {path}.", "Give a PEFT folder or a .safetensors file."
        )
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
        alphas = _alphas(path, slices)
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise InspectionError(
            f"{path} is not a complete safetensors file, or has no usable header:"
            f" {why[:200]}.",
            "Copy it again, or give another file.",
        ) from error
    return Header(path, shapes, metadata, alphas)


def _alphas(path: Path, slices: Mapping[str, Any]) -> dict[str, float]:
    names = [n for n, each in slices.items() if each.get_shape() in ([], [1])]
    names = [name for name in names if name.rpartition(".")[2] == "alpha"]
    dtypes = {slices[name].get_dtype() for name in names}
    # NumPy has no bfloat16, and torch is slow to import
    with safe_open(path, framework="pt" if "BF16" in dtypes else "np") as file:
        return {name: float(file.get_tensor(name).item()) for name in names}


# --- names ----------------------------------------------------------------------------------------


class FilePair(NamedTuple):
    """A pair in a file: its layer, the adapter's name, the convention, and the names of A and B."""

    layer: str
    adapter: str
    convention: str
    a: str
    b: str

    def entry(self, name: str) -> str:
        """Return the name of another tensor of the layer."""
        return f"{self.layer}.{name}".removeprefix(".")


def file_pairs(header: Header) -> Iterator[FilePair]:
    """Yield every pair, by the names of tensors.

    Raises:
        InspectionError: one half is missing, or two tensors have the same place.
    """
    halves: dict[tuple[str, str, str], dict[str, str]] = defaultdict(dict)
    for name in header.shapes:
        for convention, pattern in _PATTERNS.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            place = (match["layer"] or "", match["adapter"] or "", convention)
            first = halves[place].setdefault(_ROLES[match["factor"]], name)
            if first != name:
                raise _collision(header, first, name)
    for place, names in halves.items():
        if len(names) < 2:
            raise InspectionError(
                f"{header.path}: {next(iter(names.values()))} lacks the other half of its LoRA"
                " pair.",
                "Save the adapter again.",
            )
        yield FilePair(*place, names["A"], names["B"])


def refuse_collisions(header: Header, pairs: Iterable[FilePair]) -> None:
    """Raise if two pairs belong to the same adapter of one layer, also if their prefixes or markers
    differ. An adapter without a name is that of any name.
    """
    by_layer: dict[str, list[FilePair]] = defaultdict(list)
    for pair in pairs:
        others = by_layer[pair.layer.removeprefix("base_model.model.")]
        for other in others:
            if not (pair.adapter and other.adapter) or pair.adapter == other.adapter:
                raise _collision(header, other.a, pair.a)
        others.append(pair)


def _collision(header: Header, one: str, other: str) -> InspectionError:
    return InspectionError(
        f"{header.path}: {one} and {other} collide: both belong to one layer's pair.",
        "Save the adapter again.",
    )


# --- reading --------------------------------------------------------------------------------------


def file_factors(
    header: Header,
    pair: FilePair,
    configs: Sequence[AdapterConfig],
    init: Init | None,
    notes: dict[str, None],
) -> Iterator[Factor]:
    """Yield a pair's factors, as the file and the configuration of its layer declare them. `init`:
    that of all pairs, if it is given.

    Raises:
        InspectionError: the shapes do not fit the declared rank, or a scaling is impossible.
    """
    config = next((c for c in configs if pair.layer.startswith(c.prefix)), None)
    where = f"{header.path}: {pair.layer}"
    where += f", with {config.where}," if config else ""
    convention, kind = _row(header, pair, config)
    declared = _declarations(header, pair, config)
    reading = _reading(header, pair, declared.rank, where)
    reading = reading._replace(kind=kind or reading.kind)
    scaling = checked_scaling(where, declared.scaling(reading.rank_a))
    if scaling is None:
        notes["The file and its folder have no alpha: scaling 1 is assumed."] = None
    found: Init = "unknown"
    if declared.init is not None:
        found = declared_init(declared.init, reading.kind)
    belongs = (pair.layer, pair.adapter, convention)
    yield from factors_of((pair.a, pair.b), reading, scaling, init or found, belongs)


def _declarations(
    header: Header, pair: FilePair, config: AdapterConfig | None
) -> Declared:
    """Return what is declared for a pair: by the file's alpha, the configuration, and kohya's
    metadata, in this order.
    """
    declared = config.declared(pair.layer) if config else Declared()
    alpha = header.alphas.get(pair.entry("alpha"))
    is_kohyas = pair.convention == "lora_down/lora_up" and not config
    # a convolution has conv_alpha, which the metadata lack
    if alpha is None and is_kohyas and len(header.shapes[pair.a]) == 2:
        alpha = _network_alpha(header)
    if alpha is None:
        return declared
    return declared._replace(alpha=alpha, rslora=False)


def _reading(header: Header, pair: FilePair, rank: int | None, where: str) -> Reading:
    """Return what the shapes say. Raise if they do not fit each other or the declared rank."""
    a, b = header.shapes[pair.a], header.shapes[pair.b]
    core = header.shapes.get(pair.entry("lora_mid.weight"))

    def layout(_: object, a: Shape, b: Shape) -> Reading:
        return rows_of(a, b, a[0] // b[1]) if core is None else tucker_of(a, b, core)

    reading = layout_reading(layout, None, a, b)
    if reading is None or rank not in (None, reading.rank_a):
        raise misfit(where, rank, (pair.a, a), (pair.b, b))
    if rank is None and not pair.a.endswith(
        ".weight"
    ):  # a module's weight is (out, in)
        refuse_either_way(where, reading, (pair.a, a), (pair.b, b))
    kind = reading.kind or ("conv" if len(a) > 2 else "linear")
    return reading._replace(kind=kind)


def _row(
    header: Header, pair: FilePair, config: AdapterConfig | None
) -> tuple[str, str]:
    """Return the name of a pair's row in the table of conventions, and the kind of its layer if the
    row determines it.
    """
    name = pair.convention
    if name == "peft-embedding":
        return name, "embedding"
    if name == "lora_down/lora_up":
        tucker = pair.entry("lora_mid.weight") in header.shapes
        return "locon-tucker" if tucker else name, ""
    if name != "lora_A/lora_B":
        return name, ""
    if pair.entry("lora_diag") in header.shapes:
        return "peft-kasa", "kasa"
    pruned = pair.entry("lora_E") in header.shapes
    if pruned or (config and config.kind == "ADALORA"):
        return "peft-adalora", "adalora"
    return "peft" if pair.adapter or config else name, ""


def _network_alpha(header: Header) -> float | None:
    text = header.metadata.get("ss_network_alpha")
    if text in (None, "None", "Dynamic"):  # kohya's words for a missing alpha
        return None
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not is_positive(alpha):
        raise InspectionError(
            f"{header.path}: ss_network_alpha in its metadata is {shown(text)}.",
            "Save the adapter with a positive alpha.",
        )
    return alpha
