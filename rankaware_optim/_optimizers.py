"""This module knows the properties of many optimizers and finds torch classes by name."""

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
    """A setting of an optimizer that changes how a learning rate must be scaled, that is, the
    optimizer's family.

    value: the value that changes the family. If `value` is None, a setting that is zero
    or missing changes the optimizer's family.

    package: the package whose classes interpret the setting this way, or "" if all classes
    do.
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

    family: the type of update, which determines the equations of the scaling law.

    relation: the name of the rule that converts the best learning rate of AdamW to this
    optimizer, or "" if no rule has been published. `suggest_lr` uses the rule.

    one_rate: the reason why the optimizer does not support a learning rate per parameter
    group, or "" if it does.

    switches: settings of a parameter group that change its family. If several settings would change
    the optimizer's family, the first of these settings determines the family.

    own_rate: the name of a setting that makes the class compute its own learning rates and
    ignore the ones it is given, and the value that turns this off.

    thin_to_adam: whether the class trains thin matrices with Adam (see `goes_to_adam`).

    packages: the packages that this row applies to, because other packages use the same
    class name for a different optimizer. () means all packages.
    """

    family: str = "unknown"
    relation: str = ""
    one_rate: str = ""
    switches: tuple[Switch, ...] = ()
    own_rate: tuple[str, object] | None = None
    thin_to_adam: bool = False
    packages: tuple[str, ...] = ()


RANK_AWARE = "rank-aware"  # the optimizer itself adapts its updates to the rank
_ESTIMATES = "estimates one rate for all groups itself"
_IN_BACKWARD = "steps inside the backward pass with one rate"
_PAIRS = "steps A and B as one pair out of one group"
# Some versions of Muon train a part of the parameters with Adam. The settings that mark
# such a parameter group come, in this order, from timm; from Keller Jordan,
# pytorch_optimizer and Moonlight; from adv_optm; and from Dion.
_TO_ADAM = (
    Switch("use_fallback", True, "sign-like"),
    Switch("use_muon", False, "sign-like"),
    Switch("optim_type", "adam", "sign-like"),
    Switch("algorithm", "adamw", "sign-like"),
    Switch("algorithm", "lion", "sign-like"),
)
# This setting divides an update by its spectral norm and multiplies it by √(n_out / n_in),
# or by 1 for A. The second setting does the same in the Adam that belongs to Muon.
_NORMALIZED = Switch("spectral_normalization", True, RANK_AWARE, "adv_optm")
_ADAM_NORMALIZED = Switch("adam_spectral_normalization", True, RANK_AWARE, "adv_optm")
# The names are in lower case. A name begins with the package if another package uses the
# same name for a different optimizer. A variant, such as AdamW8bit, uses the row of its
# base (see `_VARIANT`). The rows in the first part of the table follow from the update
# rule, which is the same in every package. The rows in the second part (from `_SIGN` on)
# come from a coordinate check (benchmarks/results/optimizers.md), so they only apply to
# the classes of the packages that were checked.
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
    # Its paper (arXiv 2606.12921) reports the same best learning rate at every rank, width
    # and depth.
    "loramuon": Known(RANK_AWARE),
    # PEFT derives this class from AdamW or another optimizer. It first multiplies the
    # gradients of A and B by r × r matrices. Its paper (arXiv 2402.02347) does not study how
    # the best learning rate depends on the rank.
    "riemannianpreconditionedoptimizer": Known(),
    "lomo adalomo": Known(one_rate=_IN_BACKWARD),
    "torch_optimizer.radam": Known(one_rate="keeps one step size for all groups"),
    "a2gradexp a2gradinc a2graduni": Known(one_rate="never reads its groups' rates"),
    "pytorch_optimizer.asgd": Known(one_rate="measures its rates itself"),
    # The warm-up or warm-down of these classes starts or ends at a single learning rate for
    # all parameter groups.
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
    # The coordinate check measured how much these optimizers change an output at rank 64 and
    # at rank 4, with gradients that agree and with gradients that do not (optimizers.md).
    # AdaMuon divides each entry by its second moment. Shampoo and SpectralSphere use polar
    # factors. The AdaMuon in adv_optm does not behave like any known family.
    "adamuon": _SIGN,
    "shampoo spectralsphere": _SPECTRAL,
    "adago": _SPECTRAL._replace(switches=_TO_ADAM),
    "adv_optm.adamuon": Known(switches=_TO_ADAM, thin_to_adam=True),
    "fromage": _SCALE,
    "adai msvag pnm tam": _GRADIENT,
}
_KNOWN = {name: row for names, row in _ROWS.items() for name in names.split()}
# In bfloat16 or float16, a step that is small relative to the weight is lost to rounding.
# These settings of a parameter group or an optimizer prevent the loss in the given dtypes,
# by Kahan summation, by more bits per weight, or by stochastic rounding. If a setting is
# None, the class decides, and these classes then prevent the loss.
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
# Variants that compute the same step, for example with quantized, paged or factored state.
_VARIANT = re.compile(
    r"(?:paged)?_?(.+?)(?:_adv|closure|reference|paper|legacy|(?:4|8|32)bit|fp8)*"
)
_SAME_AS = {"fusedadam": "adamw", "deepspeedcpuadam": "adamw", "flashadamw": "adamw"}


def known_name(name: str) -> str:
    """Return the name under which the table lists an optimizer, or "" if it is unknown.

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
    """Return the name and the properties of an optimizer that is in the table.

    If the class itself is not in the table, the function looks up its base classes in order.
    If a row of the table lists packages, the row only applies to classes from these packages.

    Args:
        optimizer: the optimizer's class, or its name.

    Returns:
        The name and the row in the table, or ("", Known()) if the optimizer is unknown.
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
    """Return the optimizer family of a parameter group, or "unknown".

    The family is "unknown" if the table contains neither the optimizer's class nor any of
    its base classes.

    Args:
        optimizer_class: the class of the optimizer.
        settings: the settings of the parameter group, which can change the family. For
            settings that are missing, the defaults of the class apply.

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
    """Return the given settings together with the optimizer's defaults for all others.

    If only the optimizer's name is known, its defaults are unknown, and the function returns
    the given settings alone.
    """
    return {**defaults_of(optimizer), **(settings or {})}


def goes_to_adam(row: Known, settings: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Return whether a Muon optimizer trains a parameter of this shape with Adam.

    Muon always trains vectors with Adam. Some Muon classes also use Adam for thin matrices:
    those with a side shorter than 4, or with one side more than 128 times as long as the
    other. The settings of the parameter group can override this choice for matrices.

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
    """Return the names of the dtypes in which an optimizer does not lose small steps.

    Without Kahan summation, stochastic rounding or a similar setting, rounding removes small
    steps of weights in bfloat16 or float16.

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

# The abstract base class and this package's wrapper cannot train parameters by themselves.
_NO_CLASS = ("Optimizer", "RankAwareOptimizer")


def get_optimizer_class(
    optimizer: type[Optimizer] | str | None,
) -> type[Optimizer]:
    """Return the torch optimizer class for an argument that is a class or a name.

    Args:
        optimizer: the class itself, or a string: a name in torch.optim in upper or lower
            case, "package:Class", or "module.Class" as in recipes.

    Raises:
        OptimizerError: the class does not exist or is not a torch optimizer.

    >>> [get_optimizer_class(name).__name__ for name in ("adamw", "torch.optim.AdamW")]
    ['AdamW', 'AdamW']
    """
    kind: Any = _class_named(optimizer) if isinstance(optimizer, str) else optimizer
    if not _is_optimizer(kind) or kind.__name__ in _NO_CLASS:
        raise OptimizerError(
            f"The optimizer must be a torch optimizer class, not {kind!r:.80}.",
            "Pass a class such as torch.optim.AdamW. To wrap an existing optimizer, call"
            " RankAwareOptimizer(optimizer, model=model).",
        )
    return kind


def _class_named(text: str) -> type[Optimizer]:
    package, _, name = text.rpartition(":" if ":" in text else ".")
    package = package or "torch.optim"
    try:
        module = import_module(package)
    except (Exception, SystemExit) as error:  # a third-party module may raise anything
        raise OptimizerError(
            f"The optimizer {text!r} cannot be found, because the package {package!r} cannot be"
            f" imported: {error}.",
            "Install the package, or correct its name. Write the optimizer as 'package:Class'.",
        ) from error
    classes = {k: v for k, v in vars(module).items() if _is_optimizer(v)}
    for key, kind in classes.items():
        if key.lower() == name.lower():
            return kind
    choices = ", ".join(sorted(classes))
    raise OptimizerError(
        f"Unknown optimizer {name!r}: the package {package} has no optimizer of this name.",
        f"Choose one of {choices}. To use an optimizer from another package, pass"
        " 'package:Class'.",
    )


def _is_optimizer(value: object) -> TypeGuard[type[Optimizer]]:
    from torch.optim import Optimizer

    return isinstance(value, type) and issubclass(value, Optimizer)


def defaults_of(function: Any) -> dict[str, Any]:
    """Return the default values of the arguments of a function or class.

    The result is empty if Python cannot read the signature of the function, for example because the
    function is written in C.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {
        name: p.default for name, p in parameters.items() if p.default is not p.empty
    }
