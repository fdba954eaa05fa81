"""Schedulers that erase the ratios between groups: found, named, and told what to pass instead.

Multiplicative schedules (LambdaLR, StepLR, cosine to zero, warm-up) keep every ratio. Those with an absolute limit do
not where the limit is one number for all groups: a row of `_LIMITS` each.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..errors import OptimizerError


class _Limit(NamedTuple):
    """A scheduler's absolute limit: its class, its argument, how to read it per group, and whether a list is taken."""

    scheduler: str
    argument: str
    read: Callable[[Any, Sequence[dict[str, Any]]], Sequence[float]]
    takes_list: bool = True


def _in_groups(key: str) -> Callable[[Any, Sequence[dict[str, Any]]], Sequence[float]]:
    return lambda scheduler, groups: [float(group.get(key, 0.0)) for group in groups]


def _on_scheduler(attribute: str) -> Callable[[Any, Sequence[dict[str, Any]]], Sequence[float]]:
    def read(scheduler: Any, groups: Sequence[dict[str, Any]]) -> Sequence[float]:
        value = getattr(scheduler, attribute, 0.0)
        values = list(value) if isinstance(value, (list, tuple)) else [value] * len(groups)
        return [float(v) for v in values]

    return read


_LIMITS = (
    _Limit("OneCycleLR", "max_lr", _in_groups("max_lr")),
    _Limit("CyclicLR", "base_lr", _on_scheduler("base_lrs")),
    _Limit("CyclicLR", "max_lr", _on_scheduler("max_lrs")),
    _Limit("SWALR", "swa_lr", _in_groups("swa_lr")),
    _Limit("ReduceLROnPlateau", "min_lr", _on_scheduler("min_lrs")),
    _Limit("CosineAnnealingLR", "eta_min", _on_scheduler("eta_min"), takes_list=False),
    _Limit("CosineAnnealingWarmRestarts", "eta_min", _on_scheduler("eta_min"), takes_list=False),
)


def check_scheduler(opt: Any, scheduler: Any) -> tuple[str, ...]:
    """Sentences on what `scheduler` does to the ratios between `opt`'s groups; none where it keeps them.

    Each names the argument, the group that is flattened most, and what to pass: `opt.scaled(x)` where the scheduler
    takes a list, else zero.

    Raises:
        OptimizerError: the scheduler belongs to another optimizer.
    """
    owner = getattr(scheduler, "optimizer", opt)
    if owner is not opt and getattr(owner, "optimizer", None) is not opt:
        raise OptimizerError("The scheduler was built for another optimizer.", "Build it with this one.")
    return tuple(sentence for inner in _flat(scheduler) for row in _LIMITS for sentence in _violations(opt, inner, row))


def _flat(scheduler: Any) -> Iterator[Any]:
    """The scheduler and those inside it (SequentialLR, ChainedScheduler)."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from _flat(inner)


def _violations(opt: Any, scheduler: Any, row: _Limit) -> Iterator[str]:
    groups = opt.param_groups
    if not any(base.__name__ == row.scheduler for base in type(scheduler).__mro__):
        return
    values = row.read(scheduler, groups)
    units = [value / group.get("lr_multiplier", 1.0) for value, group in zip(values, groups, strict=False)]
    if not units or max(units) <= 0 or max(units) - min(units) <= 1e-6 * max(units):
        return
    worst = max(range(len(units)), key=lambda i: abs(groups[i].get("lr_multiplier", 1.0) - 1.0))
    cure = f"pass {row.argument}=opt.scaled({values[0]:g})" if row.takes_list else f"pass {row.argument}=0"
    name = f"{groups[worst].get('lora_role', 'other')} of rank {groups[worst].get('lora_rank')}"
    yield (
        f"{row.scheduler}'s {row.argument} is the same for every group, so group {worst} ({name}, "
        f"{groups[worst].get('lr_multiplier', 1.0):.3g} times the base rate) loses its ratio: {cure}."
    )


def attached_schedulers(opt: Any) -> list[Any]:
    """The schedulers that hold `opt`, asked of the garbage collector: not every kind leaves a mark on the optimizer."""
    found = {id(owner): owner for owner in _holders(opt) if _is_scheduler(owner, opt)}
    inner = {id(part) for owner in found.values() for part in getattr(owner, "_schedulers", ())}
    return [owner for key, owner in found.items() if key not in inner]


def _holders(opt: Any) -> Iterator[Any]:
    """Objects with an attribute that is `opt`; their attributes may lie in a dict or in the object itself."""
    for holder in gc.get_referrers(opt):
        yield from gc.get_referrers(holder) if isinstance(holder, dict) else (holder,)


def _is_scheduler(owner: Any, opt: Any) -> bool:
    attributes = getattr(owner, "__dict__", None)
    return (
        isinstance(attributes, dict) and attributes.get("optimizer") is opt and callable(getattr(owner, "step", None))
    )
