"""This module explains calls of public functions that are almost correct.

It recognizes misspelled argument names, argument names from other libraries, a model and an
optimizer in the wrong order, and the string "full" as a rank.
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

# Names that people use for our arguments, for example because another library uses them.
# If several of our arguments are listed, the function's first matching argument is suggested.
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
# The lowest similarity, as computed by difflib, at which a name counts as misspelled. It
# allows for one wrong letter. "eps" and "steps" are less similar (0.75).
_CLOSE = 0.8


def explain_near_misses(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function so that almost correct calls raise a helpful `CallError`.

    The error message contains the call that the user probably meant. A correct call is passed to
    the function unchanged.
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
    function: str, names: Iterable[str], known: Collection[str], also: Any = None
) -> None:
    """Raise a `CallError` if a function was called with a misspelled argument name.

    Args:
        function: the name of the function.
        names: the argument names in the call.
        known: the argument names that the function accepts.
        also: the class that receives all other arguments.
    """
    theirs = {} if also is None else signature(also).parameters
    for name in names:
        if name in known or name in theirs:
            continue
        if meant := _meant(name, known):
            if also is None:
                raise CallError(
                    f"{function} does not accept the argument {name}=.",
                    f"Use {meant} instead.",
                )
            optimizer = also.__name__
            raise CallError(
                f"Neither {function} nor {optimizer} accepts the argument {name}=.",
                f"Use {meant} instead.",
            )


def _meant(name: str, known: Collection[str]) -> str:
    """Return the argument that the user probably meant, or "" if no name is similar."""
    if name == "workers" and "storage" in known:
        return "storage=, and make the same call in several processes"
    for meant in (*_MEANT.get(name, ()), *get_close_matches(name, known, 1, _CLOSE)):
        if meant in known:
            return f"{meant}="
    return ""


def _check_values(
    function: str, known: Collection[str], given: Mapping[str, object]
) -> None:
    """Raise a `CallError` if the values of two arguments were swapped, or a rank is "full"."""
    if {"rank", "method"} <= {*known} and given.get("rank") == "full":
        raise CallError(
            f"The rank passed to {function} must be a whole number, not 'full'.",
            "For full finetuning, remove the rank and pass method='full'.",
        )
    if "optimizer" not in given:
        return
    first = next(name for name in known if name not in ("self", "cls"))
    model, optimizer = given.get(first), given["optimizer"]
    names_class = isinstance(model, (str, type))
    is_class = optimizer is None or isinstance(optimizer, (str, type))
    if names_class and not is_class:
        kind = type(optimizer).__name__
        raise CallError(
            f"The arguments {first}= and optimizer= of {function} are probably swapped, because"
            f" {first}= is {model!r} and optimizer= is an object of class {kind}.",
            f"Call {function}({first}, optimizer, ...).",
        )
