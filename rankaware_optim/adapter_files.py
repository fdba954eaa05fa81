"""Surveys of adapter files by their headers alone: a PEFT folder, or a .safetensors file; no tensor data is loaded."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from .adapters import Factor, Reference, Survey
from .errors import InspectionError
from .groups import Assignment, check_lr, make_plan
from .inspection import declared_init

__all__ = ["inspect_file", "survey_report"]

_HEADER_LIMIT = 100_000_000  # bytes, the safetensors format's own
_KEY = re.compile(
    r"^(?P<layer>.*?)\.?(?P<a>lora_embedding_A|lora_A|lora_a|lora_down)(?P<tail>(\.[^.]+)?\.weight|\.[^.]+)?$"
)
_SECOND = {"lora_embedding_A": "lora_embedding_B", "lora_A": "lora_B", "lora_a": "lora_b", "lora_down": "lora_up"}
_CONVENTION = {"lora_embedding_A": "peft-embedding", "lora_a": "lora_a/lora_b", "lora_down": "lora_down/lora_up"}


def inspect_file(path: Path) -> Survey:
    """Survey an adapter folder (PEFT's adapter_config.json with its safetensors) or one .safetensors file.

    Rank, fan-in and fan-out come from the shapes; scaling from the PEFT configuration or the file's `alpha`
    entries, else 1 with a note. An adapter on disk is trained as a rule, so its init is the one declared or unknown.

    Raises:
        InspectionError: naming the file and the key that is missing, damaged or at odds.
    """
    config: Mapping[str, Any] = {}
    if path.is_dir():
        config = _read_config(path / "adapter_config.json")
        path = path / "adapter_model.safetensors"
    header = _read_header(path)
    shapes = {key: tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"}
    alphas = {
        key: _scalar(path, key) for key, shape in shapes.items() if key.endswith(".alpha") and shape in ((), (1,))
    }
    notes: list[str] = []
    factors = [f for key in shapes for f in _pair(key, shapes, alphas, config, path, notes)]
    if not factors:
        raise InspectionError(
            f"{path} holds no LoRA pair among {len(shapes)} tensors.", "Give an adapter's file, not a base model's."
        )
    known = {f.name for f in factors} | set(alphas)
    other = tuple(key for key in shapes if key not in known)
    return Survey(tuple(factors), other, tuple(dict.fromkeys(notes)), looked_at=len(shapes))


def _pair(
    key: str,
    shapes: Mapping[str, tuple[int, ...]],
    alphas: Mapping[str, float],
    config: Mapping[str, Any],
    path: Path,
    notes: list[str],
) -> list[Factor]:
    match = _KEY.match(key)
    if match is None:
        return []
    layer, first = match["layer"], match["a"]
    second = f"{key[: match.start('a')]}{_SECOND[first]}{match['tail'] or ''}"
    if second not in shapes:
        return []
    a, b = shapes[key], shapes[second]
    if len(a) < 2 or len(b) < 2 or 0 in (*a, *b) or a[0] % b[1]:
        raise InspectionError(
            f"{path}: {key} has shape {a} and {second} {b}, which is no LoRA pair.", "Save the adapter again."
        )
    rank = a[0]
    scaling = _scaling(layer, rank, alphas, config, path)
    if scaling is None:
        notes.append("No alpha in the file or beside it: scaling 1 is assumed.")
    kind = "embedding" if first == "lora_embedding_A" else "conv" if len(a) > 2 else "linear"
    declared = config.get("init_lora_weights")
    shared: dict[str, Any] = {
        "rank": rank,
        "fan_in": float(math.prod(a[1:])),
        "fan_out": float(b[0]),
        "scaling": 1.0 if scaling is None else scaling,
        "init": "unknown" if declared is None else declared_init(declared, kind),
        "kind": kind,
        "layer": layer,
        "convention": _CONVENTION.get(first, "peft" if config else "lora_A/lora_B"),
    }
    return [Factor(key, "A", **shared), Factor(second, "B", **shared)]


def _scaling(layer: str, rank: int, alphas: Mapping[str, float], config: Mapping[str, Any], path: Path) -> float | None:
    alpha: Any = alphas.get(f"{layer}.alpha")
    if alpha is None and config:
        patterns = config.get("alpha_pattern") or {}  # checked by _read_config
        matched = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", layer)]
        alpha = matched[0] if matched else config.get("lora_alpha")
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise InspectionError(f"{path}: alpha of {layer} is {alpha!r}.", "Save the adapter with a positive alpha.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InspectionError(f"{path} cannot be read: {error}.", "Give a folder saved by PEFT.") from error
    rank = config.get("r", 1) if isinstance(config, dict) else None
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InspectionError(f"{path} has no usable rank. @ r", "Give a folder saved by PEFT.")
    try:
        for pattern in dict(config.get("alpha_pattern") or {}):
            re.compile(pattern)
    except (TypeError, ValueError, re.error) as error:
        raise InspectionError(
            f"{path} has no usable pattern: {error}. @ alpha_pattern", "Give a folder saved by PEFT."
        ) from error
    return dict(config)


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors file's header: eight bytes of length, then JSON; checked against the file's size."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, path.stat().st_size - 8):
                raise InspectionError(f"{path} is no whole safetensors file.", "Copy it again, or give another.")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InspectionError):
            raise
        raise InspectionError(
            f"{path} cannot be read: {error}.", "Give a PEFT folder or a .safetensors file."
        ) from error
    for key, entry in header.items() if isinstance(header, dict) else [("its header", None)]:
        if key != "__metadata__" and not _is_entry(entry):
            raise InspectionError(f"{path}: {key} has no usable shape or place.", "Save the adapter again.")
    end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
    if 8 + length + end != path.stat().st_size:
        raise InspectionError(
            f"{path} is no whole safetensors file: {end} bytes of tensors belong after its header.", "Copy it again."
        )
    return dict(header)


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    return _are_counts(shape) and _are_counts(place) and len(place) == 2 and place[0] <= place[1]


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _scalar(path: Path, key: str) -> float:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return float(file.get_tensor(key))
    except (SafetensorError, OSError, ValueError) as error:
        raise InspectionError(f"{path}: {key} cannot be read: {error}.", "Copy the file again.") from error


# --- printing -------------------------------------------------------------------------------------------------------


def survey_report(survey: Survey, *, lr: float | None = None, law: str = "mua", tuned_at: str | None = None) -> str:
    """A table of what a survey holds, alike factors on one line; with `lr` their rates too."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    reference = None if tuned_at is None else parse_reference(tuned_at)
    plan = None if lr is None else make_plan(survey, law=law, tuned_at=reference)
    base = None if lr is None else check_lr(lr)
    headings = ["convention", "kind", "role", "rank", "scaling", "init", "fan-in", "fan-out", "tensors"]
    table = Table(*headings, *(["multiplier", "lr"] if plan else []), box=box.SIMPLE_HEAD)
    for row, count in Counter(_line(f, plan.assign(f.name, f) if plan else None, base) for f in survey.factors).items():
        table.add_row(*row[:8], str(count), *row[8:])
    console = Console(width=140, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
        console.print(f"{len(survey.other)} other tensors" + (f", such as {survey.other[0]}" if survey.other else ""))
        for note in survey.notes if plan is None else plan.notes:
            console.print(f"note: {note}", soft_wrap=True)
    return capture.get().rstrip()


def _line(factor: Factor, assignment: Assignment | None, lr: float | None) -> tuple[str, ...]:
    f = factor
    shown = (f.convention, f.kind, f.role, str(f.rank), f"{f.scaling:g}", f.init, f"{f.fan_in:g}", f"{f.fan_out:g}")
    if assignment is None or lr is None:
        return shown
    return (*shown, f"{assignment.multiplier:.4g}", f"{lr * assignment.multiplier:.3g}")


def parse_reference(text: str) -> Reference:
    """A reference from words such as "r=16,alpha=32,rslora,init=B", or "full".

    >>> str(parse_reference("r=16,alpha=32"))
    'rank 16, alpha 32, Init[A]'
    """
    if text.strip() == "full":
        return Reference(method="full")
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        key, _, value = part.partition("=")
        try:
            values |= {"rslora": True} if part == "rslora" else _reference_entry(key, value)
        except (KeyError, ValueError) as error:
            raise InspectionError(
                f"{part!r} is no part of a reference.", 'Write it as "r=16,alpha=32", with rslora, init=B, fan_in=4096.'
            ) from error
    return Reference(**values)


def _reference_entry(key: str, value: str) -> dict[str, Any]:
    if key in ("r", "rank"):
        return {"rank": int(value)}
    return {"init": value} if key == "init" else {{"alpha": "alpha", "fan_in": "fan_in"}[key]: float(value)}
