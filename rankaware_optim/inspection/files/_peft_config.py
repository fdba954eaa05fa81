"""The declarations in a configuration: PEFT's adapter_config.json, or the copy in a diffusers file."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import InspectionError
from ._safetensors import one_line, parse_json, shown

_LIMIT = 10_000_000  # bytes of a file
_PATTERN_LIMIT = 1000  # characters of a pattern
_LIST_LIMIT = 1000  # entries of a list
_PARTS_LIMIT = 16  # parts of a pipeline
_PEFT_PREFIX = "base_model.model."
LORA_TYPES = (None, "LORA", "ADALORA")  # a configuration without a type is for LoRA
_FROM_PEFT = "Give a folder saved by PEFT."

Check = Callable[[Any], bool]


@dataclass(frozen=True)
class AdapterConfig:
    """A checked configuration. where: its file. values: its entries. prefix: the layers to which it
    applies.
    """

    where: str
    values: Mapping[str, Any]
    prefix: str = _PEFT_PREFIX

    @property
    def is_adalora(self) -> bool:
        return self.values.get("peft_type") == "ADALORA"

    @property
    def enabled(self) -> int:
        """The number of adapted matrices of a fused layer (`enable_lora` of loralib and litgpt); 0
        if unknown.
        """
        return sum(self.values.get("enable_lora") or ())

    def scaling(self, alpha: float, rank: float) -> float:
        """Return alpha / rank, or alpha / √rank with `use_rslora`."""
        return alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank)

    def declared(self, layers: Sequence[str]) -> dict[str, Declared]:
        """Return the declarations for each of these layers, whose names are those in the file.

        Raises:
            InspectionError: a pattern is not a regex or takes too long, or a stack's rank is
                ambiguous.
        """
        paths = {
            layer: layer.removeprefix(self.prefix).partition(".base_layer")[0] for layer in layers
        }
        stacks = _targeted(self.values.get("target_parameters") or [], paths.values())
        names = [name for path, found in stacks.items() for name in found or [path]]
        ranks, alphas = (
            self._by_pattern("rank_pattern", names),
            self._by_pattern("alpha_pattern", names),
        )
        r, alpha = (
            self.values.get("init_r" if self.is_adalora else "r"),
            self.values.get("lora_alpha"),
        )
        made: dict[str, Declared] = {}
        for layer, path in paths.items():
            said = {
                (ranks.get(name, r), alphas.get(name, alpha)) for name in stacks[path] or [path]
            }
            if len(said) > 1:
                raise InspectionError(
                    f"{self.where}: its patterns give {layer} several ranks or alphas, and the file"
                    " does not say which of the target_parameters it adapts.",
                    "Inspect the model itself with inspect_model.",
                )
            made[layer] = Declared(*said.pop(), bool(stacks[path]), self)
        return made

    def _by_pattern(self, key: str, names: Sequence[str]) -> dict[str, Any]:
        patterns: dict[str, Any] = (
            {} if self.is_adalora else self.values.get(key) or {}
        )  # AdaLoRA's are masks
        values = list(patterns.values())
        try:
            first = first_matches(list(patterns), names)
        except ValueError as error:
            raise InspectionError(
                f"{self.where} has no usable pattern: {error}. @ {key}", _FROM_PEFT
            ) from error
        return {name: values[i] for name, i in zip(names, first, strict=True) if i is not None}


class Declared(NamedTuple):
    """A configuration's declarations for one layer: rank, alpha, and whether it is a
    `target_parameters` stack.
    """

    rank: int | None = None
    alpha: float | None = None
    experts: bool = False
    config: AdapterConfig | None = None


def _targeted(targets: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Return, by module in `paths`, the parameters targeted by entries such as
    "experts.gate_up_proj".
    """
    by_module: dict[str, list[str]] = {}
    for module, _, name in (target.rpartition(".") for target in dict.fromkeys(targets)):
        by_module.setdefault(module, []).append(name)
    made: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")[::-1] if by_module else ()
        ends = accumulate(parts, lambda end, part: f"{part}.{end}")
        made[path] = [f"{path}.{name}" for end in ends for name in by_module.get(end, ())]
    return made


# --- patterns -------------------------------------------------------------------------------------

_SECONDS = 5.0
_PATTERNS = 1000  # most patterns that are matched in this process
_PAIRS = 200_000  # most patterns × names that are matched in this process
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
first = [next((i for i, pattern in enumerate(compiled) if pattern.match(name)), None) for name in names]
json.dump(first, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> Sequence[int | None]:
    """Return, for each name, the index of the first key of `rank_pattern` or `alpha_pattern` that
    PEFT would use.

    That is the first key for which the regex (.*\\.)?(key)$ matches. Keys are untrusted, and
    matching a regex can take very long. Keys with groups, classes or repeats are matched in a
    separate process, which is stopped after five seconds. The others take a time linear in the
    length of the name.

    Raises:
        ValueError: a pattern is not a regex, or they take more than five seconds.
    """
    if not patterns or not names:
        return [None] * len(names)
    wrapped = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    few = len(patterns) <= _PATTERNS and len(patterns) * len(names) <= _PAIRS
    if not few or any(character in pattern for pattern in patterns for character in "*+?{(["):
        return _matched_apart(wrapped, names)
    try:
        compiled = [re.compile(pattern) for pattern in wrapped]
    except re.error as error:
        raise ValueError(one_line(str(error))) from error
    return [
        next((i for i, pattern in enumerate(compiled) if pattern.match(name)), None)
        for name in names
    ]


def _matched_apart(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD]
    text = json.dumps([patterns, names])
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the patterns take more than {_SECONDS:g} seconds to match") from error
    except OSError as error:
        raise ValueError(f"no process could be started to match them: {error}") from error
    if done.returncode:
        raise ValueError(
            one_line(done.stderr) or f"matching them ended with code {done.returncode}"
        )
    found: list[int | None] = json.loads(done.stdout)
    return found


# --- reading --------------------------------------------------------------------------------------


def read_config(path: Path) -> AdapterConfig:
    """Read PEFT's adapter_config.json.

    Raises:
        InspectionError: it is missing, not a JSON object, or an entry that is used has the wrong
            type.
    """
    if not os.path.isfile(path):
        raise InspectionError(f"There is no file {path}.", _FROM_PEFT)
    try:
        with path.open("rb") as file:
            text = file.read(_LIMIT + 1)
        if len(text) > _LIMIT:
            raise ValueError(f"it is longer than {_LIMIT} bytes")
        values = parse_json(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InspectionError(f"{path} cannot be read: {error}.", _FROM_PEFT) from error
    return _checked(str(path), values)


def embedded_configs(path: Path, metadata: Mapping[str, str]) -> list[AdapterConfig]:
    """Return the configurations in a diffusers file, one for each part of the model ("unet.r",
    "text_encoder.r").
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return []
    where = f"{path}: lora_adapter_metadata"
    try:
        values = parse_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise InspectionError(
            f"{where} cannot be read: {error}.", "Save the adapter again."
        ) from error
    if not isinstance(values, dict):
        raise InspectionError(f"{where} is no JSON object.", "Save the adapter again.")
    prefixes = sorted(
        {key[:-1] for key in values if key == "r" or key.endswith(".r")}, key=len, reverse=True
    )
    if len(prefixes) > _PARTS_LIMIT:
        raise InspectionError(
            f"{where} configures {len(prefixes)} parts.",
            f"Save at most {_PARTS_LIMIT} in one file.",
        )
    parts = {
        p: {k.removeprefix(p): value for k, value in values.items() if k.startswith(p)}
        for p in prefixes
    }
    return [_checked(where, part, prefix) for prefix, part in parts.items()]


def _checked(where: str, values: object, prefix: str = _PEFT_PREFIX) -> AdapterConfig:
    if not isinstance(values, dict):
        raise InspectionError(f"{where} is no JSON object.", _FROM_PEFT)
    kind = values.get("peft_type")
    if kind is not None and not (isinstance(kind, str) and re.fullmatch(r"[A-Z0-9_]{1,40}", kind)):
        raise InspectionError(f"{where} has the peft_type {shown(kind)}. @ peft_type", _FROM_PEFT)
    if kind not in LORA_TYPES:
        return AdapterConfig(where, {"peft_type": kind}, prefix)  # nothing else is read
    checks = {"init_r" if kind == "ADALORA" else "r": ("rank", _is_rank), **_CHECKS}
    for key, (what, is_good) in checks.items():
        _require(what, where, key, values.get(key), is_good)
    _check_patterns("alpha", where, "alpha_pattern", values.get("alpha_pattern"), is_alpha)
    if kind != "ADALORA":
        _check_patterns("rank", where, "rank_pattern", values.get("rank_pattern"), _is_rank)
    return AdapterConfig(where, values, prefix)


def _check_patterns(what: str, where: str, key: str, patterns: Any, is_good: Check) -> None:
    _require(
        "table of patterns",
        where,
        key,
        patterns,
        lambda found: not found or isinstance(found, dict),
    )
    for pattern, value in (patterns or {}).items():
        _require(what, where, f"{key}.{shown(pattern)}", value, is_good)
        if len(pattern) > _PATTERN_LIMIT:
            raise InspectionError(
                f"{where} has a pattern of {len(pattern)} characters, above this reader's"
                f" {_PATTERN_LIMIT}. @ {key}",
                "Give an adapter as PEFT saves it.",
            )


def _require(what: str, where: str, key: str, value: Any, is_good: Check) -> None:
    if not is_good(value):
        raise InspectionError(
            f"{where} has no usable {what}: it is {shown(value)}. @ {key}",
            "Give an adapter as PEFT saves it.",
        )


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def is_alpha(value: object) -> bool:
    """Return whether `value` is a positive number whose quotient by a rank is within a float's
    range.
    """
    return type(value) in (int, float) and 1e-30 <= value <= 1e30  # type: ignore[operator]


def _is_list_of(kind: type, value: Any) -> bool:
    good = (
        isinstance(value, list)
        and len(value) <= _LIST_LIMIT
        and all(isinstance(entry, kind) for entry in value)
    )
    return not value or good


_CHECKS: Mapping[str, tuple[str, Check]] = {
    "lora_alpha": ("alpha", lambda value: value is None or is_alpha(value)),
    "use_rslora": ("truth value", lambda value: isinstance(value, (bool, type(None)))),
    "use_dora": ("truth value", lambda value: isinstance(value, (bool, type(None)))),
    "init_lora_weights": ("init", lambda value: isinstance(value, (bool, str, type(None)))),
    "target_parameters": ("list", lambda value: _is_list_of(str, value)),
    "enable_lora": ("list", lambda value: _is_list_of(bool, value)),
}
