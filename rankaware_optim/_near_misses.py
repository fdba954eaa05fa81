"""Calls that nearly fit, and the call that was meant.

Every public function answers them here: an argument by another library's name or with a typing
mistake, the model and the optimizer in each other's place, and "full" as a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, TypeVar

from .errors import CallError

_P = ParamSpec("_P")
_R = TypeVar("_R")

# What people call our arguments: other libraries' names, and names that come to mind. Of the
# names behind one, the first that the function has is meant.
_MEANT: Mapping[str, tuple[str, ...]] = {
    "learning_rate": ("lr",),
    "base_lr": ("lr",),
    "lora_alpha": ("alpha",),
    "lora_r": ("rank", "ranks"),
    "r": ("rank", "ranks"),
    "rank": ("ranks",),
    "use_rslora": ("rslora",),
    "batch_size": ("batch",),
    "n_trials": ("trials",),
    "reference": ("tuned_at",),
    "tuned": ("tuned_at",),
    "tuned_on": ("tuned_at",),
}
_CLOSE = 0.8  # difflib's ratio for one wrong letter. "eps" and "steps" have 0.75.


def explain_near_misses(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a public function so that a call that nearly fits raises a `CallError`, which names
    the call that was meant. All other calls reach the function unchanged.
    """
    known = signature(function).parameters
    name = function.__qualname__.removesuffix(".__new__").removesuffix(".__init__")
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in known.values())

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = {**dict(zip(known, args, strict=False)), **kwargs}
        _check_values(name, list(known), given)
        if not takes_any:
            check_names(name, kwargs, known)
        return function(*args, **kwargs)

    return call


def check_names(
    call: str, names: Iterable[str], known: Collection[str], also: Any = None
) -> None:
    """Raise a `CallError` if one of these names is nearly an argument of a function.

    Args:
        call: the function's name.
        names: the names of the arguments that it was called with.
        known: the names of its own arguments.
        also: the class that gets the other arguments.
    """
    theirs = {} if also is None else signature(also).parameters
    for name in names:
        if name in known or name in theirs:
            continue
        if meant := _meant(name, known):
            other = "" if also is None else f", and neither has {also.__name__}"
            raise CallError(f"{call} has no argument {name}={other}.", f"Use {meant}.")


def _meant(name: str, known: Collection[str]) -> str:
    """Return the argument that was meant by another name, in words; "" if none is near."""
    if name == "workers" and "storage" in known:
        return "storage=, and make the same call in several processes"
    for meant in (*_MEANT.get(name, ()), *get_close_matches(name, known, 1, _CLOSE)):
        if meant in known:
            return f"{meant}="
    return ""


def _check_values(
    call: str, known: Collection[str], given: Mapping[str, object]
) -> None:
    """Raise a `CallError` if values stand in each other's place."""
    if {"rank", "method"} <= {*known} and given.get("rank") == "full":
        raise CallError(
            f"{call} got 'full' as the rank, which is a whole number.",
            "For full finetuning use method='full'.",
        )
    if "optimizer" not in given:
        return
    first = next(name for name in known if name not in ("self", "cls"))
    model, optimizer = given.get(first), given["optimizer"]
    names_class = isinstance(model, (str, type))
    is_class = optimizer is None or isinstance(optimizer, (str, type))
    if names_class and not is_class:
        raise CallError(
            f"{call} got {model!r} as {first}, and a {type(optimizer).__name__} as optimizer.",
            f"Swap them: {call}({first}, optimizer, ...).",
        )
