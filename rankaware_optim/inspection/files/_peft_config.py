"""What a configuration declares of its layers: PEFT's adapter_config.json, or the copy in a diffusers file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import InspectionError
from ._patterns import first_matches
from ._safetensors import parse_json, shown

__all__ = ["UNSAID", "AdapterConfig", "Declared", "embedded_configs", "is_alpha", "read_config"]

_LIMIT = 10_000_000  # bytes
_PATTERN_LIMIT = 1000  # characters
_LIST_LIMIT = 1000  # entries
_PARTS_LIMIT = 16  # of a pipeline
_WHOLE = (1, 2**31 - 1)
_PEFT_PREFIX = "base_model.model."
_LORA = ("LORA", "ADALORA")


class Declared(NamedTuple):
    """What a configuration says of one layer: its rank, its alpha, and whether it is a `target_parameters` stack."""

    rank: int | None = None
    alpha: float | None = None
    experts: bool = False


UNSAID = Declared()


@dataclass(frozen=True)
class AdapterConfig:
    """A checked configuration: `where` is its file, `values` its entries; it holds for layers under `prefix`."""

    where: str
    values: Mapping[str, Any]
    prefix: str = _PEFT_PREFIX

    @property
    def is_lora(self) -> bool:
        """Whether it configures LoRA, or AdaLoRA; an absent `peft_type` counts as LoRA."""
        return self.values.get("peft_type") in (None, *_LORA)

    @property
    def is_adalora(self) -> bool:
        return self.values.get("peft_type") == "ADALORA"

    @property
    def enabled(self) -> int:
        """How many matrices of a fused layer are adapted (`enable_lora` of loralib and litgpt); 0 if unsaid."""
        return sum(self.values.get("enable_lora") or ())

    def scaling(self, alpha: float, rank: int) -> float:
        """alpha / rank, or alpha / √rank under `use_rslora`."""
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def declared(self, layers: Sequence[str]) -> dict[str, Declared]:
        """What is declared of each of these layers, called as in the file.

        Raises:
            InspectionError: a pattern is no regex or takes too long, or a stack's rank cannot be told.
        """
        paths = {layer: layer.removeprefix(self.prefix).partition(".base_layer")[0] for layer in layers}
        targets = _by_module(self.values.get("target_parameters") or [])
        stacks = {path: _held(path, targets) for path in paths.values()}
        keys = {path: [f"{path}.{name}" for name in found] or [path] for path, found in stacks.items()}
        names = [key for found in keys.values() for key in found]
        ranks, alphas = self._by_pattern("rank_pattern", names), self._by_pattern("alpha_pattern", names)
        r, alpha = self.values.get("init_r" if self.is_adalora else "r"), self.values.get("lora_alpha")
        said = {key: (ranks.get(key, r), alphas.get(key, alpha)) for key in names}
        return {
            layer: Declared(*self._one(layer, {said[key] for key in keys[path]}), experts=bool(stacks[path]))
            for layer, path in paths.items()
        }

    def _one(self, layer: str, found: set[tuple[int | None, float | None]]) -> tuple[int | None, float | None]:
        if len(found) > 1:
            raise InspectionError(
                f"{self.where}: its patterns give {layer} several ranks or alphas, and which of the target_parameters "
                "it adapts is not saved.",
                "Inspect the model itself with inspect_model.",
            )
        return found.pop()

    def _by_pattern(self, key: str, names: Sequence[str]) -> dict[str, Any]:
        patterns: dict[str, Any] = {} if self.is_adalora else self.values.get(key) or {}  # AdaLoRA's are masks
        values = list(patterns.values())
        try:
            first = first_matches(list(patterns), names)
        except ValueError as error:
            raise InspectionError(
                f"{self.where} has no usable pattern: {error}. @ {key}", "Give a folder saved by PEFT."
            ) from error
        return {name: values[i] for name, i in zip(names, first, strict=True) if i is not None}


def _by_module(targets: Iterable[str]) -> dict[str, list[str]]:
    """The names of parameters by the end of their module's name, from entries such as "experts.gate_up_proj"."""
    made: dict[str, list[str]] = {}
    for module, _, name in (target.rpartition(".") for target in dict.fromkeys(targets)):
        made.setdefault(module, []).append(name)
    return made


def _held(path: str, targets: Mapping[str, list[str]]) -> list[str]:
    """The targeted parameters of the module `path`."""
    parts = path.split(".") if targets else []
    return [name for i in range(len(parts)) for name in targets.get(".".join(parts[i:]), ())]


# --- reading --------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> AdapterConfig:
    """PEFT's adapter_config.json.

    Raises:
        InspectionError: it is missing, no JSON object, or one of the entries that matter is of the wrong kind.
    """
    if not os.path.isfile(path):
        raise InspectionError(f"There is no file {path}.", "Give a folder saved by PEFT.")
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT + 1)
        if len(text) > _LIMIT:
            raise ValueError(f"it is longer than {_LIMIT} bytes")
        values = parse_json(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InspectionError(f"{path} cannot be read: {error}.", "Give a folder saved by PEFT.") from error
    return _checked(str(path), values)


def embedded_configs(path: Path, metadata: Mapping[str, str]) -> list[AdapterConfig]:
    """The configurations in a diffusers file, one for each of the model's parts ("unet.r", "text_encoder.r", "r")."""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return []
    where = f"{path}: lora_adapter_metadata"
    try:
        values = parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise InspectionError(f"{where} cannot be read: {error}.", "Save the adapter again.") from error
    if not isinstance(values, dict):
        raise InspectionError(f"{where} is no JSON object.", "Save the adapter again.")
    prefixes = sorted({key[:-1] for key in values if key == "r" or key.endswith(".r")}, key=len, reverse=True)
    if len(prefixes) > _PARTS_LIMIT:
        raise InspectionError(f"{where} configures {len(prefixes)} parts.", f"Save at most {_PARTS_LIMIT} in one file.")
    return [_checked(where, _under(values, prefix), prefix) for prefix in prefixes]


def _under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _checked(where: str, values: object, prefix: str = _PEFT_PREFIX) -> AdapterConfig:
    if not isinstance(values, dict):
        raise InspectionError(f"{where} is no JSON object.", "Give a folder saved by PEFT.")
    kind = _kind(where, values)
    if kind not in _LORA:
        return AdapterConfig(where, {"peft_type": kind}, prefix)  # nothing else in it is read
    required = "init_r" if kind == "ADALORA" else "r"
    _require(_is_rank(values.get(required)), where, required, "rank", values.get(required))
    if values.get("lora_alpha") is not None:
        _require(is_alpha(values["lora_alpha"]), where, "lora_alpha", "alpha", values["lora_alpha"])
    _check_lora(where, values)
    return AdapterConfig(where, values, prefix)


def _kind(where: str, values: Mapping[str, Any]) -> str:
    kind = values.get("peft_type")
    if kind is None:
        return "LORA"
    if isinstance(kind, str) and re.fullmatch(r"[A-Z0-9_]{1,40}", kind):
        return kind
    raise InspectionError(f"{where} has the peft_type {shown(kind)}. @ peft_type", "Give a folder saved by PEFT.")


def _check_lora(where: str, values: Mapping[str, Any]) -> None:
    for key in ("use_rslora", "use_dora"):
        _require(isinstance(values.get(key), (bool, type(None))), where, key, "truth value", values.get(key))
    declared = values.get("init_lora_weights")
    _require(isinstance(declared, (bool, str, type(None))), where, "init_lora_weights", "init", declared)
    for key, kind in (("target_parameters", str), ("enable_lora", bool)):
        entries = values.get(key) or []
        good = isinstance(entries, list) and all(isinstance(entry, kind) for entry in entries[:_LIST_LIMIT])
        good = good and len(entries) <= _LIST_LIMIT
        _require(good, where, key, "list", entries)
    _check_patterns(where, "alpha_pattern", values.get("alpha_pattern"), is_alpha)
    if values.get("peft_type") != "ADALORA":
        _check_patterns(where, "rank_pattern", values.get("rank_pattern"), _is_rank)


def _check_patterns(where: str, key: str, patterns: object, is_good: Any) -> None:
    _require(not patterns or isinstance(patterns, dict), where, key, "table of patterns", patterns)
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        what = "rank" if key == "rank_pattern" else "alpha"
        _require(is_good(value), where, f"{key}.{shown(pattern)}", what, value)
        if len(pattern) > _PATTERN_LIMIT:
            raise InspectionError(
                f"{where} has a pattern of {len(pattern)} characters, above this reader's {_PATTERN_LIMIT}. @ {key}",
                "Give an adapter as PEFT saves it.",
            )


def _require(good: bool, where: str, key: str, what: str, value: object) -> None:
    if not good:
        raise InspectionError(
            f"{where} has no usable {what}: it is {shown(value)}. @ {key}", "Give an adapter as PEFT saves it."
        )


def _is_rank(value: object) -> bool:
    return type(value) is int and _WHOLE[0] <= value <= _WHOLE[1]


def is_alpha(value: object) -> bool:
    """Whether `value` is a positive number whose quotients by a rank stay well within a float's range."""
    return type(value) in (int, float) and 1e-30 <= value <= 1e30  # type: ignore[operator]
