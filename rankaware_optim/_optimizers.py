"""Optimizers: the table of their properties by a class's name, and torch classes by a text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from .errors import OptimizerError

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Switch(NamedTuple):
    """A setting of a parameter group that puts it into another family.

    value: the setting's value; None stands for zero or missing. package: that of the classes that
    read it so, "" for all.
    """

    setting: str
    value: object
    family: str
    package: str = ""

    def applies(self, optimizer_class: type, settings: Mapping[str, Any]) -> bool:
        if not optimizer_class.__module__.startswith(self.package):
            return False
        value = settings.get(self.setting)
        return not value if self.value is None else bool(value == self.value)


class Known(NamedTuple):
    """The known properties of an optimizer class.

    family: its kind of update, which chooses the laws' form. relation: how its best rate follows
    from AdamW's, a key of `suggest_lr`'s rules, "" if nothing is published. one_rate: why it cannot
    have a rate per group, "" if it can. switches: settings of a group that change its family, the
    first that applies. own_rate: a setting by which the class makes its rates itself, so that those
    given train nothing, and the value at which it does not.
    thin_to_adam: whether it hands thin matrices to its Adam, see `goes_to_adam`. packages: those
    whose classes have the row by their bare name, since others have another optimizer of that
    name; () for all.
    """

    family: str = "unknown"
    relation: str = ""
    one_rate: str = ""
    switches: tuple[Switch, ...] = ()
    own_rate: tuple[str, object] | None = None
    thin_to_adam: bool = False
    packages: tuple[str, ...] = ()


RANK_AWARE = "rank-aware"  # its own rule moves the updates with the rank
_ESTIMATES = "estimates one rate for all groups itself"
_IN_BACKWARD = "steps inside the backward pass with one rate"
_PAIRS = "steps A and B as one pair out of one group"
# How the spellings of Muon with an auxiliary Adam name a group of the latter: timm's; Keller
# Jordan's, pytorch_optimizer's and Moonlight's; adv_optm's; Dion's.
_TO_ADAM = (
    Switch("use_fallback", True, "sign-like"),
    Switch("use_muon", False, "sign-like"),
    Switch("optim_type", "adam", "sign-like"),
    Switch("algorithm", "adamw", "sign-like"),
    Switch("algorithm", "lion", "sign-like"),
)
# It divides an update by its spectral norm and multiplies it by √(n_out / n_in), or 1 for A. The
# second is that of Muon's Adam.
_NORMALIZED = Switch("spectral_normalization", True, RANK_AWARE, "adv_optm")
_ADAM_NORMALIZED = Switch("adam_spectral_normalization", True, RANK_AWARE, "adv_optm")
# Names in lower case, with the package in front where another has another optimizer of that name.
# Variants have the row of their base, see `_VARIANT`. Those of the second part are known by a
# coordinate check (benchmarks/results/optimizers.md) of these packages' classes, and only there.
# The others are known by their update rule, which the name stands for everywhere.
_CHECKED = (
    *(
        "torch",
        "torch_optimizer",
        "pytorch_optimizer",
        "pytorch_ranger",
        "timm",
        "optimi",
    ),
    *("adv_optm", "bitsandbytes", "came_pytorch", "nadir", "heavyball", "kron_torch"),
)
_ROWS = {
    "adam adamw": Known("sign-like", "as AdamW"),
    "nadam nadamw radam": Known("sign-like", "steps of AdamW's size"),
    "lion": Known("sign-like", "Lion's rule"),
    "adamwschedulefree schedulefreeadamw radamschedulefree schedulefreeradam": Known(
        "sign-like", "schedule-free's rule"
    ),
    "adamax sparseadam rmsprop rprop adabelief adabound adamod adamp adopt": Known(
        "sign-like"
    ),
    "diffgrad yogi qhadam ranger adan signsgd tiger timm.adafactor": Known("sign-like"),
    "sgd asgd sgdw sgdp accsgd aggmo qhm pid": Known("gradient-like"),
    "sgdschedulefree schedulefreesgd": Known("gradient-like"),
    "muon muonwithauxadam singledevicemuon singledevicemuonwithauxadam muonclip": Known(
        "spectral", switches=_TO_ADAM
    ),
    "normuon distributedmuon dion dion2": Known("spectral", switches=_TO_ADAM),
    "timm.muon adv_optm.muon": Known("spectral", switches=_TO_ADAM, thin_to_adam=True),
    "mars": Known(
        "sign-like",
        switches=(*_TO_ADAM, Switch("mars_type", "shampoo", "spectral")),
    ),
    "lamb": Known(
        "relative-scale",
        switches=(
            Switch("adam", True, "sign-like"),
            Switch("weight_decay", None, "sign-like", "timm"),
        ),
    ),
    "adafactor": Known(
        "floored-scale",
        switches=(Switch("scale_parameter", False, "sign-like"),),
        own_rate=("relative_step", False),
    ),
    "lars": Known(
        "first-step",
        switches=(
            Switch("weight_decay", None, "gradient-like", "torch_optimizer"),
            Switch("weight_decay", None, "gradient-like", "timm"),
        ),
    ),
    "prodigy dadaptadam dadaptsgd dadaptadagrad dadaptlion dadaptadan": Known(
        one_rate=_ESTIMATES
    ),
    "prodigyplusschedulefree": Known(one_rate="estimates its learning rates itself"),
    "lbfgs": Known(one_rate="takes one parameter group only"),
    "lorarite lorafaoptimizer": Known(one_rate=_PAIRS),
    # arXiv 2606.12921: its best rate is the same at every rank, width and depth
    "loramuon": Known(RANK_AWARE),
    # The class that PEFT derives from AdamW or another: it multiplies the gradients of A and B by
    # r × r matrices first. Its paper (arXiv 2402.02347) says nothing of ranks.
    "riemannianpreconditionedoptimizer": Known(),
    "lomo adalomo": Known(one_rate=_IN_BACKWARD),
    "torch_optimizer.radam": Known(one_rate="keeps one step size for all groups"),
    "a2gradexp a2gradinc a2graduni": Known(one_rate="never reads its groups' rates"),
    "pytorch_optimizer.asgd": Known(one_rate="measures its rates itself"),
    # Their warm-up, or warm-down, goes from or to one rate for all groups.
    "torch_optimizer.apollo": Known("gradient-like", own_rate=("warmup", 0)),
    "apollodqn": Known("gradient-like", own_rate=("warmup_steps", 0)),
    "ranger21": Known("sign-like", own_rate=("disable_lr_scheduler", True)),
}
_SIGN, _SPECTRAL, _GRADIENT, _SCALE = (
    Known(family, packages=_CHECKED)
    for family in ("sign-like", "spectral", "gradient-like", "relative-scale")
)
_ROWS |= {
    "adagrad adadelta ademamix simplifiedademamix laprop cadamw grams": _SIGN,
    "adagc adanorm adapnm adasmooth adatam adamc adams adamwsn aida alice ano": _SIGN,
    "bcos came conda exadam emofact emolynx emonavi fadam focus fira galore": _SIGN,
    "grokfastadamw pytorch_optimizer.apollo rangerqh rangerva rose": _SIGN,
    "kron sara sinksgd sm3 spam stableadamw stablespam vsgd": _SIGN,
    # By how far they move an output at rank 64 and at rank 4, with gradients that agree and that
    # do not (optimizers.md): AdaMuon's entries are divided by their second moments, Shampoo and
    # SpectralSphere take polar factors. adv_optm's AdaMuon moves as none.
    "adamuon": _SIGN,
    "shampoo spectralsphere": _SPECTRAL,
    "adago": _SPECTRAL._replace(switches=_TO_ADAM),
    "adv_optm.adamuon": Known(switches=_TO_ADAM, thin_to_adam=True),
    "fromage": _SCALE,
    "adai msvag pnm tam": _GRADIENT,
}
_KNOWN = {name: row for names, row in _ROWS.items() for name in names.split()}
# Settings, of a group or of the optimizer, by which a class loses no step that a weight's dtype
# rounds away, and the dtypes in which it keeps them: Kahan summation, more bits for a weight, and
# stochastic rounding. None lets the class choose, which keeps them then.
_KEEPS_SMALL_STEPS = {
    "kahan_sum": (
        "bfloat16",
        "float16",
    ),  # torch-optimi's, pytorch_optimizer's StableAdamW
    "master_byte_width": ("bfloat16", "float16"),  # pytorch_optimizer's FlashAdamW
    "bf16_stochastic_round": ("bfloat16",),  # torchao's
    "bf16_sr": ("bfloat16",),  # pytorch_optimizer's ROSE
    "stochastic_rounding": ("bfloat16",),  # adv_optm's
}
# Quantized, paged, factored or compiled state, and other ways to call the same step.
_VARIANT = re.compile(
    r"(?:paged)?_?(.+?)(?:_adv|closure|reference|paper|legacy|(?:4|8|32)bit|fp8)*"
)
_SAME_AS = {"fusedadam": "adamw", "deepspeedcpuadam": "adamw", "flashadamw": "adamw"}


def known_name(name: str) -> str:
    """Return the name of an optimizer in the table, "" if it is not there.

    >>> known_name("PagedAdamW8bit"), known_name("AdamW"), known_name("Unheard")
    ('adamw', 'adamw', '')
    >>> known_name("FusedAdam"), known_name("torch_optimizer.Apollo")
    ('adamw', 'torch_optimizer.apollo')
    """
    match = _VARIANT.fullmatch(name.lower())
    base = match[1] if match else ""
    base = _SAME_AS.get(base, base)
    return base if base in _KNOWN else ""


def known_optimizer(optimizer: type | str) -> tuple[str, Known]:
    """Return name and row of the first class in the table along a class's bases, or of a name; else
    ("", Known()). A class of another package than its row's is not in it.
    """
    if isinstance(optimizer, str):
        name = known_name(optimizer)
        return name, _KNOWN.get(name, Known())
    for base in optimizer.__mro__:
        package = base.__module__.partition(".")[0]
        for text in (f"{package}.{base.__name__}", base.__name__):
            name = known_name(text)
            row = _KNOWN.get(name, Known())
            if name and (not row.packages or package in row.packages):
                return name, row
    return "", Known()


def optimizer_family(
    optimizer_class: type, settings: Mapping[str, Any] | None = None
) -> str:
    """Return the family of a parameter group, "unknown" if no class along the optimizer's bases is
    known.

    Args:
        optimizer_class: the optimizer's class.
        settings: the group's settings, which may put it into another family than its class's. What
            is not among them has the class's default.

    >>> from torch.optim import Adafactor
    >>> optimizer_family(Adafactor), optimizer_family(Adafactor, {"scale_parameter": False})
    ('floored-scale', 'sign-like')
    """
    row = known_optimizer(optimizer_class)[1]
    settings = in_force(optimizer_class, settings)
    family = row.family
    for switch in row.switches:
        if switch.applies(optimizer_class, settings):
            family = switch.family
            break
    to_adam = family != row.family
    normalized = _ADAM_NORMALIZED if to_adam else _NORMALIZED
    if normalized.applies(optimizer_class, settings):
        return normalized.family
    return family


def in_force(
    optimizer: type | str, settings: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return a class's defaults, none for a name, with the settings that were given."""
    return {**defaults_of(optimizer), **(settings or {})}


def goes_to_adam(row: Known, settings: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Return whether a Muon hands a parameter of this shape to its Adam: a vector, or
    where its class does so, a matrix with a side below 4 or sides that are more than 128 times
    apart, unless its group's settings say what trains it.

    >>> timm = known_optimizer("timm.Muon")[1]
    >>> [goes_to_adam(timm, {}, shape) for shape in ((4, 768), (16, 768))]
    [True, False]
    """
    if len(shape) < 2:
        return True
    says = any(settings.get(key) is not None for key in ("use_muon", "optim_type"))
    if says or not row.thin_to_adam:
        return False
    short, long = sorted((shape[0], prod(shape[1:])))
    return 1 in shape[:2] or short < 4 or long > 128 * short


def kept_dtypes(
    optimizer: Optimizer | type, group: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return the dtypes of weights, by name, in which an optimizer loses no small step of a group.

    >>> from torch import nn, optim
    >>> kept_dtypes(optim.AdamW([nn.Parameter()]), {"kahan_sum": None})
    ('bfloat16', 'float16')
    """
    for setting, dtypes in _KEEPS_SMALL_STEPS.items():
        value = group.get(setting, getattr(optimizer, setting, False))
        if value is None or value:
            return dtypes
    return ()


# --- torch classes --------------------------------------------------------------------------------

# The base class and our wrapper, which are not optimizers by themselves.
_NO_CLASS = ("Optimizer", "RankAwareOptimizer")


def get_optimizer_class(
    optimizer: type[Optimizer] | str | None,
) -> type[Optimizer]:
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
            f"{kind!r:.80} is not a torch optimizer class.",
            "Give a class such as torch.optim.AdamW, and its settings; or wrap what is built:"
            " RankAwareOptimizer(opt, model=model).",
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
    classes = {k: v for k, v in vars(module).items() if _is_optimizer(v)}
    for key, kind in classes.items():
        if key.lower() == name.lower():
            return kind
    raise OptimizerError(
        f"Unknown optimizer {name!r} in {package}.",
        f"Give one of {', '.join(sorted(classes))}, or 'package:Class'.",
    )


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
