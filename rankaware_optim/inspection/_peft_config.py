"""PEFT's configurations: adapter_config.json, a diffusers file's copy, and those in a model."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from .._files import read_bytes
from ..errors import InspectionError
from ._pairs import Modules, Pair
from ._safetensors import one_line, parse_json, shown

_LIMIT = 10_000_000  # bytes of a file
_PATTERN_LIMIT = 1000  # characters of a pattern
_PARTS_LIMIT = 16  # parts of a pipeline
_PEFT_PREFIX = "base_model.model."
LORA_TYPES = (None, "LORA", "ADALORA")  # a configuration without a type is for LoRA
_FROM_PEFT = "Give a folder saved by PEFT."

_Rank = Annotated[int, Meta(ge=1, lt=2**31)]
# its quotient by a rank is a float too
_Alpha = Annotated[float, Meta(ge=1e-30, le=1e30)]
_KIND = Annotated[str, Meta(pattern=r"^[A-Z0-9_]{1,40}\Z")] | None
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
    """A checked configuration. where: its file, "" if there is none. values: its entries. prefix:
    the layers to which it applies.
    """

    where: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = _PEFT_PREFIX

    @property
    def is_adalora(self) -> bool:
        return self.values.get("peft_type") == "ADALORA"

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
        names = {path: stacks.get(path, [path]) for path in paths}
        every = list(chain.from_iterable(names.values()))
        ranks = self._by_pattern("r", "rank_pattern", every)
        alphas = self._by_pattern("lora_alpha", "alpha_pattern", every)
        declared: dict[str, Declared] = {}
        for layer, path in zip(layers, paths, strict=True):
            numbers = {(ranks[name], alphas[name]) for name in names[path]}
            if len(numbers) > 1:
                raise InspectionError(
                    f"{self.where}: its patterns give {layer} several ranks or alphas, and the file"
                    " does not say which of the target_parameters it adapts.",
                    "Inspect the model itself with inspect_model.",
                )
            rank, alpha = numbers.pop()
            scaling = None
            if rank and alpha and self.values.get("use_rslora"):
                scaling = alpha / math.sqrt(rank)
            declared[layer] = Declared(rank, alpha, scaling, path in stacks, self)
        return declared

    def _by_pattern(
        self, default: str, key: str, names: Sequence[str]
    ) -> dict[str, Any]:
        """Return the value of the first pattern that matches, else the default, by name."""
        numbers = dict.fromkeys(names, self.values.get(default))
        patterns = self.values.get(key)
        if not patterns or not names or self.is_adalora:  # AdaLoRA's are masks
            return numbers
        try:
            first = first_matches(list(patterns), names)
        except ValueError as error:
            raise InspectionError(
                f"{self.where} has no usable pattern: {error}. @ {key}", _FROM_PEFT
            ) from error
        values = list(patterns.values())
        for name, index in zip(names, first, strict=True):
            if index is not None:
                numbers[name] = values[index]
        return numbers


class Declared(NamedTuple):
    """A configuration's declarations for one layer: rank, alpha, the multiplier with `use_rslora`,
    and whether it is a `target_parameters` stack.
    """

    rank: int | None
    alpha: float | None
    scaling: float | None
    experts: bool
    config: AdapterConfig


def _targeted(targets: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters targeted by entries such as "experts.gate_up_proj", by those of `paths`
    that have any.
    """
    by_module: dict[str, list[str]] = defaultdict(list)
    for target in dict.fromkeys(targets):
        module, _, name = target.rpartition(".")
        by_module[module].append(name)
    stacks: dict[str, list[str]] = {}
    for path in paths if by_module else ():
        parts = path.split(".")[::-1]
        for end in accumulate(parts, lambda end, part: f"{part}.{end}"):
            if end in by_module:
                names = [f"{path}.{name}" for name in by_module[end]]
                stacks.setdefault(path, []).extend(names)
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
    wrapped = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    few = len(patterns) <= _PATTERNS and len(patterns) * len(names) <= _PAIRS
    if not few or not set("*+?{([").isdisjoint("".join(patterns)):
        return _matched_apart(wrapped, names)
    try:
        compiled = [re.compile(pattern) for pattern in wrapped]
    except re.error as error:
        raise ValueError(one_line(str(error))) from error

    def first(name: str) -> int | None:
        matching = (i for i, pattern in enumerate(compiled) if pattern.match(name))
        return next(matching, None)

    return list(map(first, names))


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
    values = read_object(str(path), lambda: read_bytes(path, _LIMIT), _FROM_PEFT)
    return _checked(str(path), values)


def read_object(where: str, read: Callable[[], bytes], cure: str) -> dict[str, Any]:
    """Return the JSON object that `read` returns as text."""
    try:
        values = parse_json(read())
    except (OSError, ValueError, RecursionError) as error:
        raise InspectionError(f"{where} cannot be read: {error}.", cure) from error
    if not isinstance(values, dict):
        raise InspectionError(f"{where} is no JSON object.", cure)
    return values


def embedded_configs(path: Path, metadata: Mapping[str, str]) -> list[AdapterConfig]:
    """Return the configurations in a diffusers file, one for each part of the model ("unet.r",
    "text_encoder.r").
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return []
    where = f"{path}: lora_adapter_metadata"
    values = read_object(where, text.encode, "Save the adapter again.")
    prefixes = {key[:-1] for key in values if f".{key}".endswith(".r")}
    if len(prefixes) > _PARTS_LIMIT:
        raise InspectionError(
            f"{where} configures {len(prefixes)} parts.",
            f"Save at most {_PARTS_LIMIT} in one file.",
        )
    configs = []
    for prefix in sorted(prefixes, key=len, reverse=True):
        part = {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix)
        }
        configs.append(_checked(where, part, prefix))
    return configs


def _checked(
    where: str, values: Mapping[str, Any], prefix: str = _PEFT_PREFIX
) -> AdapterConfig:
    kind = values.get("peft_type")
    if not _fits(kind, _KIND):
        raise InspectionError(
            f"{where} has the peft_type {shown(kind)}. @ peft_type", _FROM_PEFT
        )
    if kind not in LORA_TYPES:
        return AdapterConfig(where, {"peft_type": kind}, prefix)  # nothing else is read
    entries = dict(_ENTRIES)
    if kind == "ADALORA":  # its rank is `init_r`, which it prunes, by masks
        entries["init_r"] = entries.pop("r")
        del entries["rank_pattern"]
    read: dict[str, Any] = {key: values.get(key) for key in ("peft_type", *entries)}
    for key, (what, hint) in entries.items():
        _require(what, where, key, read[key], hint)
    for key, (what, hint) in _PATTERNS_OF.items():
        for pattern, value in (read.get(key) or {}).items():
            _require(what, where, f"{key}.{shown(pattern)}", value, hint)
            if len(pattern) > _PATTERN_LIMIT:
                raise InspectionError(
                    f"{where} has a pattern of {len(pattern)} characters, above this reader's"
                    f" {_PATTERN_LIMIT}. @ {key}",
                    "Give an adapter as PEFT saves it.",
                )
    return AdapterConfig(where, read, prefix)


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


# --- the configurations of a model ----------------------------------------------------------------

Fields = Mapping[str, Any]
Configs = Mapping[tuple[str, str], Fields]
"""The fields of configurations, by the name of a module that holds them and the adapter's name."""


def configs_of(modules: Modules) -> Configs:
    """Return all of PEFT's LoRA configurations in a model."""
    configs: dict[tuple[str, str], Fields] = {}
    for layer, module in modules:
        by_adapter = module.__dict__.get("peft_config")
        if not isinstance(by_adapter, Mapping):
            continue
        for adapter, config in by_adapter.items():
            is_dict = isinstance(config, Mapping)
            fields: Any = config if is_dict else getattr(config, "__dict__", {})
            if "lora_alpha" in fields and "r" in fields:
                configs[layer, adapter] = fields
    return configs


def config_of(pair: Pair, configs: Configs) -> tuple[str, Fields]:
    """Return the innermost module around a pair with a configuration of its adapter, and this, {}
    if there is none.
    """
    layer = pair.layer
    while layer and (layer, pair.adapter) not in configs:
        layer = layer.rpartition(".")[0]
    return layer, configs.get((layer, pair.adapter), {})
