"""The table of optimizers: properties of each class, by its name. Plain values, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


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
    """adamax sparseadam rmsprop rprop adabelief adabound adamod adamp adopt diffgrad yogi qhadam madgrad ranger
        adan""": Known("sign-like"),
    "sgd asgd sgdw sgdp accsgd aggmo qhm pid sgdschedulefree": Known("gradient-like"),
    "muon": Known("spectral"),
    "lamb": Known("relative-scale"),
    "adafactor": Known("floored-scale"),
    "lars": Known("first-step", needs_decay=True),
    "prodigy dadaptadam dadaptsgd dadaptadagrad dadaptlion dadaptadan": Known(one_rate=_ESTIMATES),
    "lbfgs": Known(one_rate="takes one parameter group only"),
    "lorarite lorafaoptimizer": Known(one_rate="steps A and B as one pair out of one group"),
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
    names = (
        [optimizer] if isinstance(optimizer, str) else [base.__name__ for base in optimizer.__mro__]
    )
    name = next(filter(None, map(known_name, names)), "")
    return name, _KNOWN.get(name, Known())


def optimizer_family(optimizer_class: type, settings: Mapping[str, Any] | None = None) -> str:
    """Return the family of an optimizer, "unknown" if no class along its bases is known.

    Adafactor with `scale_parameter=False` (of transformers and fairseq) is sign-like. torch's has
    no such setting. torch_optimizer's LARS without weight decay is SGD, since it scales by norms
    only what it decays.
    """
    (name, row), settings = known_optimizer(optimizer_class), settings or {}
    if name == "adafactor" and settings.get("scale_parameter") is False:
        return "sign-like"
    plain = optimizer_class.__module__.startswith("torch_optimizer") and not settings.get(
        "weight_decay"
    )
    return "gradient-like" if row.needs_decay and plain else row.family
