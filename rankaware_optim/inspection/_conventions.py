"""The table of conventions: how each library stores a LoRA pair in a model and in a file. One row
per convention.

A row has the attributes of the module that owns a pair and the layout of its two tensors. The
libraries are not imported. A row is matched by attributes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, get_args

from .._checks import check_init
from .._registry import Registry
from .._types import Init
from .._warn import warn
from ..errors import InspectionError

INITS = (*get_args(Init), None)
Shape = tuple[int, ...]
Halves = dict[tuple[str, str], Any]  # factors by attribute and adapter


class StoredLayer:
    """A layer of a file, which owns pairs as a module does. What is stored or declared of it is an
    attribute.

    where: its name in error messages. halves: its factors.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.halves: Halves = {}


class Reading(NamedTuple):
    """What a layout reads from two shapes.

    rank_a, rank_b: the rank from A and from B, equal if they fit. fan_in, fan_out: those of the
    layer. inner: number of inner features that one output sums per unit of rank. kind: the layer's
    kind, if the layout determines it.
    """

    rank_a: float
    rank_b: float
    fan_in: float
    fan_out: float
    inner: float = 1.0
    kind: str = ""


Layout = Callable[[Any, Shape, Shape], Reading]
"""Maps the owner and the shapes of A and B to a `Reading`.

A LookupError, AttributeError, TypeError, ValueError or ArithmeticError means that the layout does
not fit. An InspectionError is raised to the user.
"""


def rows(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (r, in, k…), B (out, r, 1…): the usual layout. B of a grouped convolution may have r /
    groups columns.
    """
    base = getattr(owner, "base_layer", owner)
    groups = getattr(base, "groups", 1)
    if isinstance(owner, StoredLayer):
        groups = a[0] // b[1]
    if math.prod(b[2:]) != 1:
        raise ValueError("B has a kernel")
    if len(b) == 2 or b[1] * groups != a[0]:
        groups = 1
    rank_b = b[1] * groups
    fan_in = math.prod(a[1:])
    return Reading(a[0], rank_b, fan_in, b[0], inner=1 / groups)


def blocks(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (r, in), B (out, r / n): PEFT's `use_bdlora` with a block-diagonal B, n = `nblocks` of its
    module.
    """
    modules = owner.lora_B.values()
    n = max(getattr(module, "nblocks", 0) for module in modules)
    return Reading(a[0], b[1] * n, a[1], b[0], inner=1 / n)


def columns(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (…, in, r), B (…, r, out): transposed, with or without a leading axis of experts."""
    kind = "experts" if len(a) > 2 else ""
    return Reading(a[-1], b[-2], a[-2], b[-1], kind=kind)


def experts(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (E, r, in), B (E, out, r): one pair for each of E experts."""
    return Reading(a[-2], b[-1], a[-1], b[-2], kind="experts")


def stacked(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (r·E, in), B (out, r·E): PEFT's `target_parameters`, with E = `num_experts`."""
    base = getattr(owner, "get_base_layer", lambda: owner)()
    # Set by transformers. Older versions do not have it.
    rows_first = getattr(base, "is_transposed", True) is False
    if (
        rows_first
        and owner.num_experts > 1
        and not hasattr(owner, "_did_swap_in_out_features")
    ):
        raise InspectionError(
            "This PEFT swaps A and B of experts stored as (experts, out, in), such as"
            f" {type(base).__name__}'s.",
            "Install PEFT 0.19 or later, and train such adapters again.",
        )
    rank_a = a[0] / owner.num_experts
    rank_b = b[1] / owner.num_experts
    return Reading(rank_a, rank_b, a[1], b[0], kind="experts")


def merged(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (r·m, in), B (out, r): one A for each of the m matrices of a fused layer that `enable_lora`
    selects.
    """
    adapted = sum(map(bool, owner.enable_lora))
    rank_a = a[0] / max(1, adapted)
    return Reading(rank_a, b[1], a[1], b[0])


def kernel(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (r·k, in·k), B (out/groups·k, r·k): loralib's convolutions. B·A is reshaped to the
    kernel.
    """
    conv = owner.conv
    k = conv.kernel_size[0]
    fan_in = math.prod(conv.weight.shape[1:])
    fan_out = conv.out_channels
    return Reading(a[0] / k, b[1] / k, fan_in, fan_out, inner=k, kind="conv")


def tucker(owner: Any, a: Shape, b: Shape) -> Reading:
    """A (r, in, 1…), a core (r, r, k…), B (out, r, 1…). The core has the kernel and keeps the base
    rate.
    """
    middle = owner.lora_mid.weight
    core = tuple(middle.shape)
    kernels = *a[2:], *b[2:]
    if core[:2] != (a[0], b[1]) or math.prod(kernels) != 1:
        raise ValueError("the core does not fit")
    fan_in = a[1] * math.prod(core[2:])
    return Reading(a[0], b[1], fan_in, b[0], kind="conv")


_NAMED = (rows, blocks, columns, experts, stacked, merged, kernel, tucker)
LAYOUTS: Mapping[str, Layout] = {layout.__name__: layout for layout in _NAMED}


@dataclass(frozen=True)
class Convention:
    """How one library stores a LoRA pair on the module that owns it.

    Args:
        name: the convention's name.
        a: the owner's attribute for A, the input side: a parameter, or a module with a `weight`.
        b: the same for B.
        container: whether `a` and `b` are dicts by adapter name. In a file the name may be left
            out.
        kind: the layer's kind, if all layers of the convention have the same one.
        where: attributes that the owner must have.
        without: attributes that it must not have, such as the gate of a block whose weights are
            called `up` and `down`.
        file: a regex of the owner's name in a file, in place of `where`. By default the names in
            `where` must be among its tensors.
        layouts: names of `LAYOUTS` or functions. The first one that agrees with the declared rank
            is used.
        rank: attributes that may declare the rank, with dots for nested ones. The first that exists
            is used. They may be dicts by adapter name.
        scaling: the same for s.
        alpha: the same for alpha.
        init: the init, if it cannot be read from the factors: "A" (B starts at zero, as in PEFT),
            "B" (A starts at zero), "other" or "unknown".

    >>> row = Convention("mine", a="reduce", b="expand", layouts=("columns",), scaling=("gain",))
    >>> register_convention(row)
    >>> register_convention(row, remove=True)
    """

    name: str
    a: str
    b: str
    container: bool = False
    kind: str | None = None
    where: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    file: str = ""
    layouts: tuple[str | Layout, ...] = ("rows",)
    rank: tuple[str, ...] = ("r", "rank", "lora_dim")
    scaling: tuple[str, ...] = ("scaling", "scale")
    alpha: tuple[str, ...] = ("lora_alpha", "alpha")
    init: Init | None = None

    def fits(self, owner: Any) -> bool:
        """Return whether the owner of a pair, a module or a layer of a file, is of this library."""
        if any(hasattr(owner, name) for name in self.without):
            return False
        if self.file and isinstance(owner, StoredLayer):
            return re.fullmatch(self.file, owner.name) is not None
        return all(hasattr(owner, name) for name in self.where)

    def pairs_in(self, owner: Any, halves: Halves) -> Iterator[tuple[str, Any, Any]]:
        """Yield the adapter, A and B of every pair that the owner has by this convention."""
        for (attribute, adapter), a in halves.items():
            b = halves.get((self.b, adapter))
            is_named = attribute == self.a and (self.container or not adapter)
            if b and is_named and self.fits(owner):
                yield adapter, a, b


_LORA = ("lora_A", "lora_B")


CONVENTIONS: tuple[Convention, ...] = (
    # AdaLoRA is B·diag(E)·A with E zero. `scaling` is alpha, and ranks are pruned during training.
    # No law covers it.
    Convention(
        "peft-adalora",
        *_LORA,
        container=True,
        kind="adalora",
        where=("lora_E",),
        scaling=(),
        alpha=("scaling",),
        init="other",
    ),
    # KaSA is B·diag(d)·A with d drawn. It also cuts the base weight.
    Convention(
        "peft-kasa",
        *_LORA,
        container=True,
        kind="kasa",
        where=("lora_diag",),
        init="other",
    ),
    Convention(
        "peft-experts",
        *_LORA,
        container=True,
        where=("num_experts", "parameter_name"),
        layouts=("stacked",),
    ),
    Convention("merged", *_LORA, where=("enable_lora", "r"), layouts=("merged",)),
    Convention("loralib-conv", *_LORA, where=("conv",), layouts=("kernel",)),
    Convention(
        "minLoRA",
        *_LORA,
        where=("lora_dropout_mask",),
        layouts=("rows", "columns"),
    ),
    Convention("automodel", *_LORA, where=("dim", "scale"), rank=("dim",)),
    Convention("lora_A/lora_B", *_LORA),
    Convention("lora_a/lora_b", "lora_a", "lora_b"),
    Convention(
        "locon-tucker", "lora_down", "lora_up", where=("lora_mid",), layouts=("tucker",)
    ),
    Convention("lora_down/lora_up", "lora_down", "lora_up"),
    *(
        Convention(
            f"automodel-{part}",
            f"lora_{part}_A",
            f"lora_{part}_B",
            layouts=("columns",),
            rank=("lora_dim", "dim"),
        )
        for part in ("gate_and_up", "down")
    ),
    Convention(
        "megatron",
        "linear_in",
        "linear_out",
        where=("dim",),
        layouts=("rows", "experts"),
        rank=("dim",),
    ),
    Convention(
        "deepspeed-chat",
        "lora_right_weight",
        "lora_left_weight",
        layouts=("columns",),
        scaling=("lora_scaling",),
    ),
    Convention(
        "deepspeed-linear",
        "lora_weight_1",
        "lora_weight_2",
        rank=("lora_config.lora_r",),
        scaling=("lora_scaling_factor",),
    ),
    Convention(
        "diffusers-legacy",
        "down",
        "up",
        where=("network_alpha", "rank"),
        file=r"(?:.*[._])?lora(?:_linear_layer)?",
        alpha=("network_alpha", "alpha"),
    ),
    # Last, since a file of a plain library has the same names.
    Convention("peft", *_LORA, container=True, layouts=("rows", "blocks")),
    Convention(
        "peft-embedding",
        "lora_embedding_A",
        "lora_embedding_B",
        container=True,
        kind="embedding",
    ),
)
"""Tried in this order on every module, after registered ones. The first that matches is used."""


# --- registration ---------------------------------------------------------------------------------

_CONVENTIONS = Registry(
    Convention,
    "rankaware_optim.conventions",
    {row.name: row for row in CONVENTIONS},
    InspectionError,
)


def register_convention(convention: Convention, *, remove: bool = False) -> None:
    """Add a convention to inspection. It is tried before the built-in ones.

    A package can register a convention for its users by an entry point in the group
    "rankaware_optim.conventions" whose object is a `Convention`. `check_convention` tests a
    convention.

    Args:
        convention: the convention. The same one may be registered again.
        remove: whether to remove the convention instead.

    Raises:
        InspectionError: it is no convention, or another one has its name.
    """
    _CONVENTIONS.checked(convention)
    what = f"The init of the convention {convention.name!r} is"
    check_init(convention.init, what, known=INITS)
    _CONVENTIONS.register(convention, remove=remove)


def conventions() -> tuple[Convention, ...]:
    """Return all rows in the order in which they are tried: registered, from installed packages,
    built-in.
    """
    return (*_CONVENTIONS.registered.values(), *_installed(), *CONVENTIONS)


@cache
def _installed() -> tuple[Convention, ...]:
    """Return the rows of installed packages. What is none gives a warning once, since the user may
    not know the package.
    """
    rows: list[Convention] = []
    for point in entry_points(group=_CONVENTIONS.group):
        try:
            rows.append(_CONVENTIONS.load(point))
        except InspectionError as error:
            warn(
                f"The plug-in {point.name!r} ({point.value}) is left out. {error.cause}"
            )
    return tuple(rows)
