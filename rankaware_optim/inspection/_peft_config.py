"""The declarations in a configuration: PEFT's adapter_config.json, or a diffusers file's copy."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from .._files import read_bytes
from ..errors import InspectionError
from ._safetensors import one_line, parse_json, shown

_LIMIT = 10_000_000  # bytes of a file
_PATTERN_LIMIT = 1000  # characters of a pattern
_PARTS_LIMIT = 16  # parts of a pipeline
_PEFT_PREFIX = "base_model.model."
LORA_TYPES = (None, "LORA", "ADALORA")  # a configuration without a type is for LoRA
_FROM_PEFT = "Give a folder saved by PEFT."

_Rank = Annotated[int, Meta(ge=1, lt=2**31)]
_Alpha = Annotated[
    float, Meta(ge=1e-30, le=1e30)
]  # its quotient by a rank is a float too
_Short = Meta(max_length=1000)
# The names and types of entries. AdaLoRA's rank is `init_r`.
_ENTRIES: dict[str, tuple[str, Any]] = {
    "r": ("rank", _Rank),
    "lora_alpha": ("alpha", _Alpha | None),
    "use_rslora": ("truth value", bool | None),
    "use_dora": ("truth value", bool | None),
    "init_lora_weights": ("init", bool | str | None),
    "target_parameters": ("list", Annotated[list[str], _Short] | None),
    "enable_lora": ("list", Annotated[list[bool], _Short] | None),
    "alpha_pattern": ("table of patterns", dict[str, Any] | None),
    "rank_pattern": ("table of patterns", dict[str, Any] | None),
}
_PATTERNS_OF = {"alpha_pattern": ("alpha", _Alpha), "rank_pattern": ("rank", _Rank)}


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

    def declared(self, layers: Sequence[str]) -> dict[str, Declared]:
        """Return the declarations for each of these layers, whose names are those in the file.

        Raises:
            InspectionError: a pattern is not a regex or takes too long, or a stack's rank is
                ambiguous.
        """
        paths = [
            layer.removeprefix(self.prefix).partition(".base_layer")[0]
            for layer in layers
        ]
        stacks = _targeted(self.values.get("target_parameters") or [], paths)
        names = {path: stacks[path] or [path] for path in paths}
        every = [name for of_path in names.values() for name in of_path]
        ranks = self._by_pattern("rank_pattern", every)
        alphas = self._by_pattern("alpha_pattern", every)
        rank = (
            None if self.is_adalora else self.values.get("r")
        )  # AdaLoRA prunes its `init_r`
        alpha = self.values.get("lora_alpha")
        declared: dict[str, Declared] = {}
        for layer, path in zip(layers, paths, strict=True):
            numbers = {
                (ranks.get(name, rank), alphas.get(name, alpha)) for name in names[path]
            }
            if len(numbers) > 1:
                raise InspectionError(
                    f"{self.where}: its patterns give {layer} several ranks or alphas, and the file"
                    " does not say which of the target_parameters it adapts.",
                    "Inspect the model itself with inspect_model.",
                )
            declared[layer] = Declared(*numbers.pop(), bool(stacks[path]), self)
        return declared

    def _by_pattern(self, key: str, names: Sequence[str]) -> dict[str, Any]:
        """Return the value of the first pattern that matches, by name."""
        patterns = self.values.get(key)
        if not patterns or self.is_adalora:  # AdaLoRA's are masks
            return {}
        values = list(patterns.values())
        try:
            first = first_matches(list(patterns), names)
        except ValueError as error:
            raise InspectionError(
                f"{self.where} has no usable pattern: {error}. @ {key}", _FROM_PEFT
            ) from error
        return {
            name: values[i]
            for name, i in zip(names, first, strict=True)
            if i is not None
        }


class Declared(NamedTuple):
    """A configuration's declarations for one layer: rank, alpha, and whether it is a
    `target_parameters` stack.
    """

    rank: int | None = None
    alpha: float | None = None
    experts: bool = False
    config: AdapterConfig | None = None

    @property
    def scaling(self) -> float | None:
        """The multiplier alpha / √rank, with `use_rslora`."""
        is_rooted = self.config is not None and self.config.values.get("use_rslora")
        if not is_rooted or self.rank is None or self.alpha is None:
            return None
        return self.alpha / math.sqrt(self.rank)


def _targeted(targets: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Return, by module in `paths`, the parameters targeted by entries such as
    "experts.gate_up_proj".
    """
    by_module: dict[str, list[str]] = defaultdict(list)
    for target in dict.fromkeys(targets):
        module, _, name = target.rpartition(".")
        by_module[module].append(name)
    stacks: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")[::-1] if by_module else ()
        ends = accumulate(parts, lambda end, part: f"{part}.{end}")
        stacks[path] = [
            f"{path}.{name}" for end in ends for name in by_module.get(end, ())
        ]
    return stacks


# --- patterns -------------------------------------------------------------------------------------

_SECONDS = 5.0
_PATTERNS = 1000  # most patterns that are matched in this process
_PAIRS = 200_000  # most patterns × names that are matched in this process
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
patterns = [re.compile(pattern) for pattern in patterns]
def first(name):
    return next((i for i, pattern in enumerate(patterns) if pattern.match(name)), None)
json.dump([first(name) for name in names], sys.stdout)
"""


def first_matches(
    patterns: Sequence[str], names: Sequence[str]
) -> Sequence[int | None]:
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
    if not few or not set("*+?{([").isdisjoint("".join(patterns)):
        return _matched_apart(wrapped, names)
    try:
        compiled = [re.compile(pattern) for pattern in wrapped]
    except re.error as error:
        raise ValueError(one_line(str(error))) from error
    first: list[int | None] = []
    for name in names:
        matching = (i for i, pattern in enumerate(compiled) if pattern.match(name))
        first.append(next(matching, None))
    return first


def _matched_apart(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD]
    text = json.dumps([patterns, names])
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"the patterns take more than {_SECONDS:g} seconds to match"
        ) from error
    except OSError as error:
        raise ValueError(
            f"no process could be started to match them: {error}"
        ) from error
    if done.returncode:
        raise ValueError(
            one_line(done.stderr) or f"matching them ended with code {done.returncode}"
        )
    first: list[int | None] = json.loads(done.stdout)
    return first


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
        values = parse_json(read_bytes(path, _LIMIT))
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
    prefixes = {key[:-1] for key in values if key == "r" or key.endswith(".r")}
    if len(prefixes) > _PARTS_LIMIT:
        raise InspectionError(
            f"{where} configures {len(prefixes)} parts.",
            f"Save at most {_PARTS_LIMIT} in one file.",
        )
    configs = []
    for prefix in sorted(prefixes, key=len, reverse=True):
        keys = [key for key in values if key.startswith(prefix)]
        part = {key.removeprefix(prefix): values[key] for key in keys}
        configs.append(_checked(where, part, prefix))
    return configs


def _checked(where: str, values: object, prefix: str = _PEFT_PREFIX) -> AdapterConfig:
    if not isinstance(values, dict):
        raise InspectionError(f"{where} is no JSON object.", _FROM_PEFT)
    kind = values.get("peft_type")
    if kind is not None and not (
        isinstance(kind, str) and re.fullmatch(r"[A-Z0-9_]{1,40}", kind)
    ):
        raise InspectionError(
            f"{where} has the peft_type {shown(kind)}. @ peft_type", _FROM_PEFT
        )
    if kind not in LORA_TYPES:
        return AdapterConfig(where, {"peft_type": kind}, prefix)  # nothing else is read
    entries = dict(_ENTRIES)
    if kind == "ADALORA":
        entries["init_r"] = entries.pop("r")
        del entries["rank_pattern"]  # masks
    for key, (what, hint) in entries.items():
        _require(what, where, key, values.get(key), hint)
    for key in entries.keys() & _PATTERNS_OF.keys():
        what, hint = _PATTERNS_OF[key]
        for pattern, value in (values.get(key) or {}).items():
            _require(what, where, f"{key}.{shown(pattern)}", value, hint)
            if len(pattern) > _PATTERN_LIMIT:
                raise InspectionError(
                    f"{where} has a pattern of {len(pattern)} characters, above this reader's"
                    f" {_PATTERN_LIMIT}. @ {key}",
                    "Give an adapter as PEFT saves it.",
                )
    return AdapterConfig(where, values, prefix)


def _require(what: str, where: str, key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        raise InspectionError(
            f"{where} has no usable {what}: it is {shown(value)}. @ {key}",
            "Give an adapter as PEFT saves it.",
        )


def _fits(value: Any, hint: Any) -> bool:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True
