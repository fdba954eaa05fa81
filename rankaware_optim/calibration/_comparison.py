"""What must be the same in all trials of a study, so that they compare: as JSON holds it, alike in every process."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch.optim import Optimizer

from .._checks import is_number, plain_lr
from .._types import Factor, Reference
from ..laws import Law, checked_multiplier
from ..optimizer import RankAwareOptimizer

_SAME = 1e-6  # relative, of numbers: about what float32 keeps of one
SAME_RATE = 1e-3  # of a law's multipliers: some are measured
_LAW_AT = Reference(rank=16, alpha=16, fan_in=64)
# What an optimizer is given that the study decides, or that leaves its updates as they are.
_LEFT_OUT = {
    "cls", "self", "params", "optimizer", "model", "lr", "tuned_at", "law", "recipe", "method", "strict",
    "on_rank_change", "native_type", "foreach", "fused", "capturable", "differentiable", "seed", "generator",
}  # fmt: skip


def differences(stored: Mapping[str, Any], mine: Mapping[str, Any], tolerance: float = _SAME) -> str:
    """What both hold and differs, as "steps=10, not 20; batch=8, not 16"; empty where nothing does."""
    both = [(key, stored[key], mine[key]) for key in mine if key in stored]
    return "; ".join(f"{key}={was!r}, not {now!r}" for key, was, now in both if not _is_alike(was, now, tolerance))


def _is_alike(a: Any, b: Any, tolerance: float) -> bool:
    if is_number(a) and is_number(b):
        return a == b or (isinstance(a + b, float) and math.isclose(a, b, rel_tol=tolerance))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_is_alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_alike(a[key], b[key], tolerance) for key in a)
    return bool(a == b)


def law_values(law: Law, optimizer: type[Optimizer], ranks: Iterable[int | None]) -> dict[str, float]:
    """What a law says at a study's ranks, whatever its code: its multipliers from a small layer to a wider one."""
    values = {}
    for rank in ranks:
        for role, init in (("A", "A"), ("B", "A"), ("A", "B"), ("B", "B")) if rank else (("full", "A"), ("full", "B")):
            factor = Factor("", role, rank, 128, 192, 2.0 if rank else 1.0, init)  # type: ignore[arg-type]
            where = f"rank {rank}, {role}" if rank else "full finetuning"
            with suppress(Exception):  # a law need not cover what no trial tries, and trials say what is wrong with it
                values[f"{where}, Init[{init}]"] = checked_multiplier(law.bind(optimizer, {}), factor, _LAW_AT)
    return values


def train_source(train: Any) -> dict[str, str]:
    """A training loop's name, and a hash of its source where that can be read."""
    own = inspect.unwrap(train)
    while isinstance(own, partial):
        own = inspect.unwrap(own.func)
    own = own if hasattr(own, "__qualname__") else type(own)
    found = {"train": own.__qualname__}
    with suppress(OSError, TypeError):
        found["its source's hash"] = hashlib.sha256(inspect.getsource(own).encode()).hexdigest()[:12]
    return found


def built_with(opt: Optimizer, native: type[Optimizer], settings: Mapping[str, Any], at: Reference) -> dict[str, Any]:
    """What decides a trial beside its rank, seed and rate: the model's width, alpha and init, and all settings.

    Settings that were left out have their defaults. Where groups differ in one, it is the list of its values.
    """
    given = {**_defaults(RankAwareOptimizer.__new__), **_defaults(native), **settings}
    made = {name: _plain(value) for name, value in given.items() if name not in _LEFT_OUT}
    for name in opt.defaults.keys() - _LEFT_OUT:
        values = [_plain(group[name]) for group in opt.param_groups]
        apart = [value for i, value in enumerate(values) if value not in values[:i]]
        made[name] = apart if len(apart) > 1 else apart[0]
    return {**made, "width": at.fan_in, "alpha": at.alpha, "init": at.init}


def _defaults(function: Any) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _plain(value: Any) -> Any:
    """A setting as JSON holds it. An object without values of its own is named by its text, without its address."""
    value = plain_lr(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if hasattr(value, "tolist"):  # of torch and numpy
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
