"""The table of conventions: how each library stores a LoRA pair, in a model and in a file.

Each row names the attributes of the module that owns a pair, and the layout of the two tensors. A
module is recognised by its attributes, so no library is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar, get_args

from .._checks import check_init
from .._registry import Registry
from .._types import Init
from .._warn import warn
from ..errors import InspectionError

INITS = (*get_args(Init), None)
Shape = tuple[int, ...]
# A module of any library, or a `StoredLayer` that stands in for one. Its attributes are read, and
# its class is not known.
Owner = Any
T = TypeVar("T")  # of tensors, in a model or in a file
Halves = dict[tuple[str, str], T]  # A and B by attribute and adapter


class StoredLayer:
    """A layer of a file, which stands in for the module that owns the pairs. Numbers that the file
    stores or its configuration declares are attributes of it.

    name: the layer's name in the file. where: its name in error messages. halves: its A and B.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.halves: Halves[Any] = {}


class Reading(NamedTuple):
    """What a layout reads from the shapes of A and B.

    Args:
        rank_a: the rank that follows from A.
        rank_b: the rank that follows from B. The layout fits if both are equal.
        fan_in: number of inputs of the adapted layer.
        fan_out: number of outputs of the adapted layer.
        inner: number of inner features that are summed into one output, per unit of rank.
        kind: the layer's kind, if the layout determines it.
    """

    rank_a: float
    rank_b: float
    fan_in: float
    fan_out: float
    inner: float = 1.0
    kind: str = ""


Layout = Callable[[Owner, Shape, Shape], Reading]
"""A function from the module that owns a pair, the shape of A and the shape of B to a `Reading`.

If it raises a LookupError, AttributeError, TypeError, ValueError or ArithmeticError, the layout
does not fit and the next one is tried. An InspectionError reaches the user.
"""


def rows(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (r, in, k…), B (out, r, 1…): the usual layout. In a grouped convolution B may have r /
    groups columns.
    """
    base = getattr(owner, "base_layer", owner)
    groups = getattr(base, "groups", 1)
    if isinstance(owner, StoredLayer):  # a file does not say the groups
        groups = a[0] // b[1]
    # A has the kernel, B is 1 × 1. Otherwise it is another layout.
    if math.prod(b[2:]) != 1:
        raise ValueError("B has a kernel")
    if len(b) == 2 or b[1] * groups != a[0]:
        groups = 1
    rank_b = b[1] * groups
    fan_in = math.prod(a[1:])
    return Reading(a[0], rank_b, fan_in, b[0], inner=1 / groups)


def blocks(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (r, in), B (out, r / n): PEFT's `use_bdlora` with a block-diagonal B of n blocks. n is
    `nblocks` of B's module.
    """
    # Other adapters of the module may have B without blocks.
    modules = owner.lora_B.values()
    n = max(getattr(module, "nblocks", 0) for module in modules)
    return Reading(a[0], b[1] * n, a[1], b[0], inner=1 / n)


def columns(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (…, in, r), B (…, r, out): transposed, optionally with a leading axis of experts."""
    kind = "experts" if len(a) > 2 else ""
    return Reading(a[-1], b[-2], a[-2], b[-1], kind=kind)


def experts(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (E, r, in), B (E, out, r): one pair for each of E experts."""
    return Reading(a[-2], b[-1], a[-1], b[-2], kind="experts")


def stacked(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (r·E, in), B (out, r·E): PEFT's `target_parameters`, with E = `num_experts`."""
    base = getattr(owner, "get_base_layer", lambda: owner)()
    # transformers sets it. Older versions do not, and store (experts, in, out).
    rows_first = getattr(base, "is_transposed", True) is False
    if (
        rows_first
        and owner.num_experts > 1
        and not hasattr(owner, "_did_swap_in_out_features")
    ):
        raise InspectionError(
            "This version of PEFT swaps A and B where experts are stored as (experts, out, in), as"
            f" in {type(base).__name__}.",
            "Install PEFT 0.19 or later, and train such adapters again.",
        )
    rank_a = a[0] / owner.num_experts
    rank_b = b[1] / owner.num_experts
    return Reading(rank_a, rank_b, a[1], b[0], kind="experts")


def merged(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (r·m, in), B (out, r): a fused layer, such as one of queries, keys and values.
    `enable_lora` selects m of its matrices, and each of these has an A of its own.
    """
    adapted = sum(map(bool, owner.enable_lora))
    rank_a = a[0] / max(1, adapted)
    return Reading(rank_a, b[1], a[1], b[0])


def kernel(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (r·k, in·k), B (out/groups·k, r·k): loralib's convolutions, which reshape B·A to the kernel
    of size k.
    """
    conv = owner.conv
    k = conv.kernel_size[0]
    fan_in = math.prod(conv.weight.shape[1:])
    fan_out = conv.out_channels
    return Reading(a[0] / k, b[1] / k, fan_in, fan_out, inner=k, kind="conv")


def tucker(owner: Owner, a: Shape, b: Shape) -> Reading:
    """A (r, in, 1…), a core (r, r, k…), B (out, r, 1…): Tucker's decomposition of a convolution.
    The core has the kernel, and keeps the base learning rate.
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
        a: the attribute that holds A, the matrix on the input side. It is a parameter or a module
            with a `weight`.
        b: the attribute that holds B.
        container: whether `a` and `b` are dicts by adapter name. In a file the name may be missing.
        kind: the layer's kind, if it is the same for all layers of the convention.
        where: attributes that the owner must have.
        without: attributes that the owner must not have. For example, a block with weights `up` and
            `down` that also has a `gate` is not an adapter.
        file: a regular expression for the owner's name in a file, which replaces `where` there. By
            default the names in `where` must be among the owner's tensors.
        layouts: names of `LAYOUTS`, or functions of the same kind. The first that agrees with the
            declared rank is used.
        rank: attributes that may declare the rank, with dots for nested ones. The first that is a
            number is used. They may be dicts by adapter name.
        scaling: attributes that may declare the scaling, in the same way.
        alpha: attributes that may declare alpha, in the same way. Scaling is then alpha / rank.
        init: the init, if values do not show it: "A" (B starts at zero, as in PEFT), "B" (A starts
            at zero), "other" or "unknown".

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

    def fits(self, owner: Owner) -> bool:
        """Return whether a module, or a layer of a file, has the attributes of this library."""
        if any(hasattr(owner, name) for name in self.without):
            return False
        if self.file and isinstance(owner, StoredLayer):
            return re.fullmatch(self.file, owner.name) is not None
        return all(hasattr(owner, name) for name in self.where)

    def pairs_in(self, owner: Owner, halves: Halves[T]) -> Iterator[tuple[str, T, T]]:
        """Yield the adapter's name, A and B of every pair that the owner has by this convention."""
        for (attribute, adapter), a in halves.items():
            b = halves.get((self.b, adapter))
            is_named = attribute == self.a and (self.container or not adapter)
            if b and is_named and self.fits(owner):
                yield adapter, a, b


_LORA = ("lora_A", "lora_B")


CONVENTIONS: tuple[Convention, ...] = (
    # AdaLoRA adds B·diag(E)·A, where E starts at zero. Its `scaling` is alpha, and it lowers ranks
    # during training. No law covers that.
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
    # KaSA adds B·diag(d)·A, where d is drawn at random, and removes small singular values of the
    # base weight. No law covers that.
    Convention(
        "peft-kasa",
        *_LORA,
        container=True,
        kind="kasa",
        where=("lora_diag",),
        init="other",
    ),
    # PEFT's `target_parameters`: one pair for a stack of experts.
    Convention(
        "peft-experts",
        *_LORA,
        container=True,
        where=("num_experts", "parameter_name"),
        layouts=("stacked",),
    ),
    # Fused layers of queries, keys and values in loralib and litgpt.
    Convention("merged", *_LORA, where=("enable_lora", "r"), layouts=("merged",)),
    # loralib keeps the convolution that it adapts as `conv`.
    Convention("loralib-conv", *_LORA, where=("conv",), layouts=("kernel",)),
    # minLoRA's parametrizations. A and B change places where the weight is stored as (in, out).
    Convention(
        "minLoRA",
        *_LORA,
        where=("lora_dropout_mask",),
        layouts=("rows", "columns"),
    ),
    # NeMo Automodel's linear layers call the rank `dim`.
    Convention("automodel", *_LORA, where=("dim", "scale"), rank=("dim",)),
    # The plain names: loralib, litgpt and many copies of them, then torchtune.
    Convention("lora_A/lora_B", *_LORA),
    Convention("lora_a/lora_b", "lora_a", "lora_b"),
    # LyCORIS and kohya's scripts, whose convolutions may have a core between A and B.
    Convention(
        "locon-tucker", "lora_down", "lora_up", where=("lora_mid",), layouts=("tucker",)
    ),
    Convention("lora_down/lora_up", "lora_down", "lora_up"),
    # Automodel's experts store A as (experts, in, rank).
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
    # Megatron-Bridge and NeMo. `linear_in` is a common name, but not together with `dim`.
    Convention(
        "megatron",
        "linear_in",
        "linear_out",
        where=("dim",),
        layouts=("rows", "experts"),
        rank=("dim",),
    ),
    # DeepSpeed-Chat stores A as (in, rank), and DeepSpeed's optimized linear layer as usual.
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
    # diffusers before it used PEFT. In a file `down` and `up` are too common to tell it without the
    # name of the layer around them.
    Convention(
        "diffusers-legacy",
        "down",
        "up",
        where=("network_alpha", "rank"),
        file=r"(?:.*[._])?lora(?:_linear_layer)?",
        alpha=("network_alpha", "alpha"),
    ),
    # PEFT comes last, because in files of simpler libraries the tensors have the same names.
    Convention("peft", *_LORA, container=True, layouts=("rows", "blocks")),
    Convention(
        "peft-embedding",
        "lora_embedding_A",
        "lora_embedding_B",
        container=True,
        kind="embedding",
    ),
)
"""The built-in conventions, in the order in which they are tried, after registered ones."""


# --- registration ---------------------------------------------------------------------------------

_CONVENTIONS = Registry(
    Convention,
    "rankaware_optim.conventions",
    {row.name: row for row in CONVENTIONS},
    InspectionError,
)


def register_convention(convention: Convention, *, remove: bool = False) -> None:
    """Teach inspection how a library stores its LoRA pairs. The convention is tried before the
    built-in ones.

    A package can do this for its users by an entry point in the group
    "rankaware_optim.conventions" that leads to a `Convention`. `testing.check_convention` tests a
    convention against a real layer.

    Args:
        convention: the convention. Registering an equal one again changes nothing.
        remove: whether to remove the convention instead.

    Raises:
        InspectionError: it is not a `Convention`, its init is impossible, or another convention
            has its name.
    """
    _CONVENTIONS.checked(convention)
    what = f"The init of the convention {convention.name!r} must be"
    check_init(convention.init, what, known=INITS)
    _CONVENTIONS.register(convention, remove=remove)


def conventions() -> tuple[Convention, ...]:
    """Return all conventions in the order of trying: registered ones, then ones from installed
    packages, then built-in ones.
    """
    return (*_CONVENTIONS.registered.values(), *_installed(), *CONVENTIONS)


@cache
def _installed() -> tuple[Convention, ...]:
    """Return the conventions of installed packages. One that cannot be loaded is skipped with a
    warning, because the user may not know that package at all.
    """
    rows: list[Convention] = []
    for point in entry_points(group=_CONVENTIONS.group):
        try:
            rows.append(_CONVENTIONS.load(point))
        except InspectionError as error:
            warn(
                f"The plug-in {point.name!r} ({point.value}) was skipped. {error.cause}"
            )
    return tuple(rows)
