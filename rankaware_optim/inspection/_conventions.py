"""This module describes how each adapter library stores its LoRA matrices.

Each convention in the table contains the attribute names of a LoRA layer and the layout
of A and B. LoRA layers are recognised by their attributes, so the libraries themselves
are not imported.
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
# A LoRA layer of any library, or a `StoredLayer` in its place. Only its attributes are
# read, so its class is unknown here.
Owner = Any
T = TypeVar("T")  # of tensors, in a model or in a file
Halves = dict[tuple[str, str], T]  # A and B by attribute and adapter


class StoredLayer:
    """A LoRA layer of an adapter file that can be inspected in the same way as a
    module. Numbers from the file or from its configuration, such as the rank, are set
    as attributes.

    Args:
        name: the name of the layer in the file.
        where: the name of the layer in error messages.
    """

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.halves: Halves[Any] = {}


class Reading(NamedTuple):
    """The rank and the sizes that a layout derives from the shapes of A and B.

    Args:
        rank_a: the rank according to the shape of A.
        rank_b: the rank according to the shape of B. The layout fits only if both ranks
            are equal.
        fan_in: number of inputs of the adapted layer.
        fan_out: number of outputs of the adapted layer.
        inner: number of columns of B that contribute to one output, divided by the
            rank.
        kind: the type of the layer, if the layout determines it.
    """

    rank_a: float
    rank_b: float
    fan_in: float
    fan_out: float
    inner: float = 1.0
    kind: str = ""


Layout = Callable[[Owner, Shape, Shape], Reading]
"""A function that takes a LoRA layer, the shape of A and the shape of B, and returns a
`Reading`.

If the function raises a LookupError, AttributeError, TypeError, ValueError or
ArithmeticError, the layout does not fit and the next layout is tried. An
InspectionError is shown to the user.
"""


def rows(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read the usual layout: A is (r, in, k…) and B is (out, r, 1…).

    In a grouped convolution B may have r / groups columns.
    """
    base = getattr(owner, "base_layer", owner)
    groups = getattr(base, "groups", 1)
    if isinstance(owner, StoredLayer):
        # A file does not contain the number of groups, so it is derived from the
        # shapes.
        groups = a[0] // b[1]
    # In this layout A has the size of the kernel, and B is a 1 × 1 convolution.
    if math.prod(b[2:]) != 1:
        raise ValueError("B has a kernel")
    if len(b) == 2 or b[1] * groups != a[0]:
        groups = 1
    rank_b = b[1] * groups
    fan_in = math.prod(a[1:])
    return Reading(a[0], rank_b, fan_in, b[0], inner=1 / groups)


def blocks(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read PEFT's `use_bdlora` layout: A is (r, in) and B is (out, r / n).

    The matrix B is block-diagonal and has n blocks. PEFT stores n in the `nblocks`
    attribute of B.
    """
    # A layer can have several adapters, and some of them may have no blocks. The number
    # that we look for is therefore the largest one.
    modules = owner.lora_B.values()
    n = max(getattr(module, "nblocks", 0) for module in modules)
    return Reading(a[0], b[1] * n, a[1], b[0], inner=1 / n)


def columns(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read the transposed layout: A is (…, in, r) and B is (…, r, out).

    If A has more than two dimensions, its leading dimensions count the experts.
    """
    kind = "experts" if len(a) > 2 else ""
    return Reading(a[-1], b[-2], a[-2], b[-1], kind=kind)


def experts(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read stacked pairs of E experts: A is (E, r, in) and B is (E, out, r)."""
    return Reading(a[-2], b[-1], a[-1], b[-2], kind="experts")


def stacked(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read PEFT's `target_parameters` layout: A is (r·E, in) and B is (out,
    r·E).

    E is the number of experts, which the layer stores as `num_experts`.
    """
    base = getattr(owner, "get_base_layer", lambda: owner)()
    # transformers sets `is_transposed` on its experts. Older versions don't, and store
    # the weights of experts as (experts, in, out).
    rows_first = getattr(base, "is_transposed", True) is False
    if (
        rows_first
        and owner.num_experts > 1
        and not hasattr(owner, "_did_swap_in_out_features")
    ):
        layer_class = type(base).__name__
        raise InspectionError(
            "The installed version of PEFT swaps A and B by mistake in layers such as"
            f" {layer_class}, whose expert weights have the shape (experts, out, in).",
            "Install PEFT 0.19 or later, and train this adapter again.",
        )
    rank_a = a[0] / owner.num_experts
    rank_b = b[1] / owner.num_experts
    return Reading(rank_a, rank_b, a[1], b[0], kind="experts")


def merged(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read the layout of fused layers: A is (r·m, in) and B is (out, r).

    A fused layer combines several matrices, such as those for queries, keys and values.
    The layer's `enable_lora` attribute selects m of these matrices, and A contains r
    rows for each of them.
    """
    adapted = sum(map(bool, owner.enable_lora))
    rank_a = a[0] / max(1, adapted)
    return Reading(rank_a, b[1], a[1], b[0])


def kernel(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read loralib's convolutions: A is (r·k, in·k) and B is (out/groups·k,
    r·k).

    loralib reshapes the product B·A to the shape of the convolution's weight. The
    convolution's kernel has the size k.
    """
    conv = owner.conv
    k = conv.kernel_size[0]
    fan_in = math.prod(conv.weight.shape[1:])
    fan_out = conv.out_channels
    return Reading(a[0] / k, b[1] / k, fan_in, fan_out, inner=k, kind="conv")


def tucker(owner: Owner, a: Shape, b: Shape) -> Reading:
    """Read a convolution in Tucker decomposition, with A (r, in, 1…) and B (out, r,
    1…).

    A third tensor between A and B, the core, has the shape (r, r, k…). The core of the
    decomposition trains at the base learning rate.
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
    """A description of how a library stores LoRA matrices in its LoRA layers.

    Args:
        name: the name of the convention.
        a: the attribute that contains A, the matrix on the input side. The attribute
            may be a parameter, or a module with a `weight`.
        b: the attribute that contains B.
        container: whether `a` and `b` are dicts that map adapter names to matrices. In
            a file the adapter name may be missing.
        kind: the type of the layers, if the convention has only one type.
        where: attributes that the LoRA layer must have.
        without: attributes that the LoRA layer must not have. For example, a module
            with weights `up`, `down` and `gate` is an MLP and not an adapter.
        file: a regular expression that the layer's name must match in a file, instead
            of the `where` condition. By default, the names in `where` must be among the
            layer's tensors.
        layouts: names from `LAYOUTS`, or functions like those in `LAYOUTS`. The first
            layout that agrees with the declared rank is used.
        rank: attributes that may declare the rank, such as "r" or, for nested
            attributes, "config.r". The first one that contains a number is used. An
            attribute may also be a dict that maps adapter names to numbers.
        scaling: attributes that may declare the scaling, in the same format.
        alpha: attributes that may declare alpha, in the same format. The scaling is
            then alpha / rank.
        init: the init of all layers, if it cannot be read from the values: "A" (B
            starts at zero, as in PEFT), "B" (A starts at zero), "other" or "unknown".

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
        """Return whether a LoRA layer matches the conditions `where`, `without` and `file`."""
        if any(hasattr(owner, name) for name in self.without):
            return False
        if self.file and isinstance(owner, StoredLayer):
            return re.fullmatch(self.file, owner.name) is not None
        return all(hasattr(owner, name) for name in self.where)

    def pairs_in(self, owner: Owner, halves: Halves[T]) -> Iterator[tuple[str, T, T]]:
        """Yield the LoRA pairs of a layer that match this convention.

        Each pair consists of the name of the adapter, A and B.
        """
        for (attribute, adapter), a in halves.items():
            b = halves.get((self.b, adapter))
            is_named = attribute == self.a and (self.container or not adapter)
            if b and is_named and self.fits(owner):
                yield adapter, a, b


_LORA = ("lora_A", "lora_B")


CONVENTIONS: tuple[Convention, ...] = (
    # AdaLoRA adds B·diag(E)·A, where E starts at zero, and it lowers the ranks during
    # training. No scaling law covers this. Its `scaling` attribute contains alpha.
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
    # KaSA adds B·diag(d)·A with a random d, and removes small singular values from the
    # base weight. No scaling law covers this.
    Convention(
        "peft-kasa",
        *_LORA,
        container=True,
        kind="kasa",
        where=("lora_diag",),
        init="other",
    ),
    # With `target_parameters`, PEFT adds a single LoRA pair to the stacked weights of
    # all experts.
    Convention(
        "peft-experts",
        *_LORA,
        container=True,
        where=("num_experts", "parameter_name"),
        layouts=("stacked",),
    ),
    # Fused layers of queries, keys and values in loralib and litgpt.
    Convention("merged", *_LORA, where=("enable_lora", "r"), layouts=("merged",)),
    # loralib stores the adapted convolution in the attribute `conv`.
    Convention("loralib-conv", *_LORA, where=("conv",), layouts=("kernel",)),
    # minLoRA uses parametrizations of torch. It swaps A and B if the weight of the
    # layer is stored as (in, out).
    Convention(
        "minLoRA",
        *_LORA,
        where=("lora_dropout_mask",),
        layouts=("rows", "columns"),
    ),
    # NeMo Automodel's linear layers call the rank `dim`.
    Convention("automodel", *_LORA, where=("dim", "scale"), rank=("dim",)),
    # loralib, litgpt and many similar libraries use capital letters, torchtune small
    # ones.
    Convention("lora_A/lora_B", *_LORA),
    Convention("lora_a/lora_b", "lora_a", "lora_b"),
    # LyCORIS and kohya's scripts, whose convolutions may have a core between A and B.
    Convention(
        "locon-tucker", "lora_down", "lora_up", where=("lora_mid",), layouts=("tucker",)
    ),
    Convention("lora_down/lora_up", "lora_down", "lora_up"),
    # NeMo Automodel stores the A matrices of its experts as (experts, in, rank).
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
    # Megatron-Bridge and NeMo. Other modules may have a `linear_in` too, but hardly any
    # of them also has a `dim`.
    Convention(
        "megatron",
        "linear_in",
        "linear_out",
        where=("dim",),
        layouts=("rows", "experts"),
        rank=("dim",),
    ),
    # DeepSpeed-Chat stores A as (in, rank). DeepSpeed's optimized linear layer stores
    # it as (rank, in).
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
    # Old versions of diffusers that did not use PEFT yet. In a file, many other layers
    # are called `down` and `up`, so the name of the layer must match as well.
    Convention(
        "diffusers-legacy",
        "down",
        "up",
        where=("network_alpha", "rank"),
        file=r"(?:.*[._])?lora(?:_linear_layer)?",
        alpha=("network_alpha", "alpha"),
    ),
    # PEFT must come last, because simpler libraries use the same tensor names in files.
    Convention("peft", *_LORA, container=True, layouts=("rows", "blocks")),
    Convention(
        "peft-embedding",
        "lora_embedding_A",
        "lora_embedding_B",
        container=True,
        kind="embedding",
    ),
)
"""The built-in conventions in order of preference.

Conventions that the user has registered are tried before these.
"""


# --- registration ---------------------------------------------------------------------------------

_CONVENTIONS = Registry(
    Convention,
    "rankaware_optim.conventions",
    {row.name: row for row in CONVENTIONS},
    InspectionError,
)


def register_convention(convention: Convention, *, remove: bool = False) -> None:
    """Register a convention that describes the LoRA layers of another library.

    The package tries the new convention before its built-in conventions. A package can
    also register a convention for its users. To do so, it declares an entry point in
    the group "rankaware_optim.conventions" that points to a `Convention`. Use
    `testing.check_convention` to test a convention on a real layer.

    Args:
        convention: the convention to register. If an equal convention is already
            registered, nothing changes.
        remove: whether to remove the convention instead of registering it.

    Raises:
        InspectionError: the value is not a `Convention`, its init is invalid, or a
            different convention has the same name.
    """
    _CONVENTIONS.checked(convention)
    argument = f"The init of the convention {convention.name!r}"
    check_init(convention.init, argument, known=INITS)
    _CONVENTIONS.register(convention, remove=remove)


def conventions() -> tuple[Convention, ...]:
    """Return all conventions in order of preference.

    Registered conventions come first, followed by the conventions of installed packages
    and the built-in conventions.
    """
    return (*_CONVENTIONS.registered.values(), *_installed(), *CONVENTIONS)


@cache
def _installed() -> tuple[Convention, ...]:
    """Load the conventions that installed packages declare as entry points.

    If a convention cannot be loaded, it is skipped with a warning. A warning is enough,
    because the user may not even know that the package with the broken convention is
    installed.
    """
    rows: list[Convention] = []
    for point in entry_points(group=_CONVENTIONS.group):
        try:
            rows.append(_CONVENTIONS.load(point))
        except InspectionError as error:
            name = point.name
            source = point.value
            reason = error.cause
            warn(
                f"The convention {name!r} for LoRA layers, which an installed package declares as"
                f" {source}, could not be loaded and is ignored. {reason} Update or uninstall the"
                " package."
            )
    return tuple(rows)
