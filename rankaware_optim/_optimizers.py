"""Optimizers: the table of their properties by a class's name, and torch classes by a text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from .errors import OptimizerError

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Known(NamedTuple):
    """The known properties of an optimizer class.

    family: its kind of update, which chooses the laws' form. relation: how its best rate follows
    from AdamW's, a key of `suggest_lr`'s rules, "" if nothing is published. one_rate: why it cannot
    have a rate per group, "" if it can. needs_decay: whether it scales by norms only the parameters
    that it decays. steps: public methods other than `step` that move parameters.
    """

    family: str = "unknown"
    relation: str = ""
    one_rate: str = ""
    needs_decay: bool = False
    steps: tuple[str, ...] = ()


_ESTIMATES = "estimates one rate for all groups itself"
_IN_BACKWARD = "steps inside the backward pass with one rate"
# Names in lower case. Variants with a quantized or paged state have the row of their base, see
# `_VARIANT`.
_ROWS = {
    "adam adamw": Known("sign-like", "as AdamW"),
    "nadam nadamw radam": Known("sign-like", "steps of AdamW's size"),
    "lion": Known("sign-like", "Lion's rule"),
    "adamwschedulefree": Known("sign-like", "schedule-free's rule"),
    "adamax sparseadam rmsprop rprop adabelief adabound adamod adamp adopt": Known(
        "sign-like"
    ),
    "diffgrad yogi qhadam madgrad ranger adan": Known("sign-like"),
    "sgd asgd sgdw sgdp accsgd aggmo qhm pid sgdschedulefree": Known("gradient-like"),
    "muon": Known("spectral"),
    "lamb": Known("relative-scale"),
    "adafactor": Known("floored-scale"),
    "lars": Known("first-step", needs_decay=True),
    "prodigy dadaptadam dadaptsgd dadaptadagrad dadaptlion dadaptadan": Known(
        one_rate=_ESTIMATES
    ),
    "lbfgs": Known(one_rate="takes one parameter group only"),
    "lorarite lorafaoptimizer": Known(
        one_rate="steps A and B as one pair out of one group"
    ),
    "bsam": Known(steps=("third_step",)),
    "lomo adalomo": Known(one_rate=_IN_BACKWARD),
}
_KNOWN = {name: row for names, row in _ROWS.items() for name in names.split()}
_VARIANT = re.compile(r"(?:paged)?(.+?)(?:(?:4|8|32)bit|fp8)?")


def known_name(name: str) -> str:
    """Return the name of an optimizer in the table, "" if it is not there.

    >>> known_name("PagedAdamW8bit"), known_name("AdamW"), known_name("Unheard")
    ('adamw', 'adamw', '')
    """
    match = _VARIANT.fullmatch(name.lower())
    return match[1] if match and match[1] in _KNOWN else ""


def known_optimizer(optimizer: type | str) -> tuple[str, Known]:
    """Return name and row of the first class in the table along a class's bases, or of a name; else
    ("", Known()).
    """
    if isinstance(optimizer, str):
        names = [known_name(optimizer)]
    else:
        names = [known_name(base.__name__) for base in optimizer.__mro__]
    name = next(filter(None, names), "")
    return name, _KNOWN.get(name, Known())


def optimizer_family(
    optimizer_class: type, settings: Mapping[str, Any] | None = None
) -> str:
    """Return the family of an optimizer, "unknown" if no class along its bases is known.

    Adafactor with `scale_parameter=False` (of transformers and fairseq) is sign-like. torch's has
    no such setting. torch_optimizer's LARS without weight decay is SGD, since it scales by norms
    only what it decays.
    """
    name, row = known_optimizer(optimizer_class)
    settings = settings or {}
    if name == "adafactor" and settings.get("scale_parameter") is False:
        return "sign-like"
    scales_decayed_only = optimizer_class.__module__.startswith("torch_optimizer")
    if row.needs_decay and scales_decayed_only and not settings.get("weight_decay"):
        return "gradient-like"
    return row.family


# --- torch classes --------------------------------------------------------------------------------

# The base class and our wrapper, which are not optimizers by themselves.
_NO_CLASS = ("Optimizer", "RankAwareOptimizer")


def get_optimizer_class(optimizer: type[Optimizer] | str) -> type[Optimizer]:
    """Return a torch optimizer class.

    Args:
        optimizer: the class, a name in torch.optim in upper or lower case, "package:Class", or
            "module.Class" as in a recipe.

    Raises:
        OptimizerError: there is no such class.

    >>> [get_optimizer_class(name).__name__ for name in ("adamw", "torch.optim.AdamW")]
    ['AdamW', 'AdamW']
    """
    kind: Any = _class_named(optimizer) if isinstance(optimizer, str) else optimizer
    if not _is_optimizer(kind) or kind.__name__ in _NO_CLASS:
        raise OptimizerError(
            f"{kind!r} is not a torch optimizer class.",
            "Give a class such as torch.optim.AdamW.",
        )
    return kind


def _class_named(text: str) -> type[Optimizer]:
    package, _, name = text.rpartition(":" if ":" in text else ".")
    package = package or "torch.optim"
    try:
        module = import_module(package)
    except (Exception, SystemExit) as error:  # a third-party module may raise anything
        raise OptimizerError(
            f"The package {package!r} cannot be imported: {error}.",
            "Install it, or fix it.",
        ) from error
    classes = {
        key.lower(): value
        for key, value in vars(module).items()
        if _is_optimizer(value)
    }
    if name.lower() not in classes:
        known = ", ".join(
            sorted({kind.__name__ for kind in classes.values()} - {"Optimizer"})
        )
        raise OptimizerError(
            f"Unknown optimizer {name!r} in {package}.",
            f"Give one of {known}, or 'package:Class'.",
        )
    return classes[name.lower()]


def _is_optimizer(value: object) -> TypeGuard[type[Optimizer]]:
    from torch.optim import Optimizer

    return isinstance(value, type) and issubclass(value, Optimizer)


def defaults_of(function: Any) -> dict[str, Any]:
    """Return the default values of a function's or class's arguments; empty if its signature cannot
    be read.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {
        name: p.default for name, p in parameters.items() if p.default is not p.empty
    }
