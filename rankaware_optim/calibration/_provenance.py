"""What a calibration's trials were made with, as JSON values that are equal in every process: the
training loop's code, the law's multipliers, and the model and settings of each trial.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import optuna
from msgspec import ValidationError
from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Factor, Reference, Survey
from .._warn import warn
from ..errors import CalibrationError
from ..laws import Law, checked_multiplier
from ..optimizer import RankAwareOptimizer, effective_lr
from ..recipe import (
    BASE,
    SAME_UPDATES,
    agreed,
    differences,
    name_pattern,
    plain_value,
    settings_of,
)
from ._schedule import Options
from ._trials import Trials

# relative tolerance of a law's multipliers, which a plug-in may measure
_SAME_RATE = 1e-3
_LAW_AT = Reference(rank=16, alpha=16, fan_in=64)
# (role, init) of the factors whose multipliers identify a law's code
_LORA = (("A", "A"), ("B", "A"), ("A", "B"), ("B", "B"))
_FULL = (("full", "A"), ("full", "B"))
# Optimizer settings that the study decides, or that do not change the updates.
_LEFT_OUT = {
    "cls",
    "self",
    "params",
    "optimizer",
    "model",
    "lr",
    "tuned_at",
    "law",
    "recipe",
    "method",
    "steps",
    "seed",
    "generator",
    *SAME_UPDATES,
}
_GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
_PATIENCE_S = 10.0  # timeout for git on a slow disk
_ALWAYS = ("rankaware-optim", "torch", "optuna")


# --- the training loop ----------------------------------------------------------------------------


class Code(NamedTuple):
    """A training loop's code at the start of the calibration, as far as it can be read.

    Args:
        loop: the values by which two loops are compared.
        source: the values that a recipe stores: the function's name, the first twelve digits of its
            source's hash, and the commit of its git repository, with "-dirty" if files were
            changed.
        imports: the top-level modules that its file imports.
    """

    loop: Mapping[str, str]
    source: Mapping[str, str]
    imports: Collection[str]


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}


def train_source(train: Any) -> Code:
    """Return the code of a training loop, without its partials and decorators."""
    function = inspect.unwrap(train)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    if not hasattr(function, "__qualname__"):
        function = type(function)
    digits = ""
    folder = Path.cwd()
    imports: list[str] = []
    # the last two: the file was edited since, and other text stands at the function's line
    with suppress(OSError, TypeError, SyntaxError, TokenError):
        source = inspect.getsource(function)
        digits = hashlib.sha256(source.encode()).hexdigest()[:12]
        file = Path(inspect.getsourcefile(function) or "")
        folder = file.parent if file.is_file() else folder
        imports = [*_imports("".join(inspect.findsource(function)[0]))]
    name = function.__qualname__
    return Code(
        _known({"train": name, "its source's hash": digits}),
        _known({"train": name, "hash": digits, "commit": _commit(folder)}),
        {module.partition(".")[0] for module in imports},
    )


def _imports(source: str) -> Iterator[str]:
    """Yield the modules that a file imports. Yield none if it is not plain Python, such as a
    notebook cell.
    """
    with suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield node.module or ""


def _commit(folder: Path) -> str:
    """Return the commit of the git repository that contains a folder; "" without a repository or
    without git.
    """
    with suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(
            _GIT,
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
        return git.stdout.strip()
    return ""


# the installed packages by module, cached, since the search can take a second
_packages = cache(packages_distributions)


def versions_used(imports: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, this package, its main dependencies, and the loaded packages
    behind `imports`.
    """
    packages = _packages()
    others = set[str]()
    for module in imports:
        if module in sys.modules:
            others.update(packages.get(module, ()))
    names = dict.fromkeys((*_ALWAYS, *sorted(others)))
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: version(name) for name in names}}


# --- law, model and settings ----------------------------------------------------------------------


def law_values(
    law: Law, optimizer: type[Optimizer], ranks: Iterable[int | None]
) -> dict[str, float]:
    """Return a law's multipliers at a study's ranks, from a small layer to a wider one. They
    identify its code.
    """
    values = {}
    for rank in ranks:
        for role, init in _FULL if rank is None else _LORA:
            scaling = 1.0 if rank is None else 2.0
            factor = Factor("", role, rank, 128, 192, scaling, init)  # type: ignore[arg-type]
            where = "full finetuning" if rank is None else f"rank {rank}, {role}"
            # A law may not cover what no trial tries; a trial that needs it raises the error.
            with suppress(Exception):
                bound = law.bind(optimizer, {})
                values[f"{where}, Init[{init}]"] = checked_multiplier(
                    bound, factor, _LAW_AT
                )
    return values


def built_with(
    opt: Optimizer, native: type[Optimizer], settings: Mapping[str, Any], at: Reference
) -> dict[str, Any]:
    """Return what decides a trial besides its rank, seed and rate: the model's width, alpha and
    init, and all settings.

    Settings that were not given have their defaults. If groups differ in a setting, its value is a
    list, and the value of the factors' groups is stored too. For a LoRA trial the rates of
    parameters that are not factors are stored.
    """
    defaults = {
        **defaults_of(RankAwareOptimizer.__new__),
        **defaults_of(native),
        **settings,
    }
    names = opt.defaults.keys() - _LEFT_OUT
    built = {
        name: plain_value(value)
        for name, value in defaults.items()
        if name not in _LEFT_OUT
    }
    built |= settings_of(opt.param_groups, names)
    of_factors = [group for group in opt.param_groups if group["lora_role"] != "other"]
    factors = settings_of(of_factors or opt.param_groups, names)
    apart = {name: value for name, value in factors.items() if value != built[name]}
    other_rates = {} if at.method == "full" else _other_rates(opt)
    extras = _known({"factors' settings": apart, "other rates": other_rates})
    return {**built, **extras, **shape_of(at)}


def shape_of(at: Reference) -> dict[str, Any]:
    """Return what decides a trial of a model's configuration."""
    # not "alpha", which is a setting of RMSprop
    return {"width": at.fan_in, "lora_alpha": at.alpha, "init": at.init}


def _other_rates(opt: Optimizer) -> dict[str, Any]:
    """Return the rates of parameters that are not factors, by name pattern. Patterns with two rates
    are left out.
    """
    tables = []
    for group in opt.param_groups:
        if group["lora_role"] != "other":
            continue
        rate: Any = effective_lr(group)
        # twelve digits remove a ratio's rounding error
        rate = BASE if rate == opt.defaults["lr"] else float(f"{rate:.12g}")
        tables.append({name_pattern(name): rate for name in group["param_names"]})
    return agreed(tables)


def layers_of(survey: Survey) -> dict[str, float]:
    """Return the mean fan-in of the adapted layers, by name pattern."""
    widths: dict[str, list[float]] = {}
    for layer, width in {f.layer: f.fan_in for f in survey.factors}.items():
        widths.setdefault(name_pattern(layer), []).append(width)
    return {pattern: sum(each) / len(each) for pattern, each in widths.items()}


def settings_in(built: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the optimizer's settings `names` from `built_with`'s result. If groups differ, the
    factors' count.
    """
    settings = {**built, **built.get("factors' settings", {})}
    return {name: settings[name] for name in names if settings.get(name) is not None}


# --- a stored study -------------------------------------------------------------------------------

# version of the stored format, raised if an earlier version would misread it
_SCHEMA = 1
_COMPARED = ("schema", "steps", "ranks", "seeds", "optimizer", "batch", "warmup")
_OTHER_STUDY = "Give this calibration another name, or another storage."
# what damaged values raise
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    ValidationError,
)


def made_with(options: Options, code: Code) -> dict[str, Any]:
    """Return what the trials of a calibration are made with, as its study stores it."""
    schedule = options.schedule
    return {
        "schema": _SCHEMA,
        "steps": schedule.steps,
        "ranks": schedule.lora,
        "seeds": sorted(schedule.seeds),
        "optimizer": options.optimizer_name,
        "batch": options.batch,
        "warmup": options.warmup,
        "law": repr(options.law),
        "multipliers": law_values(options.law, options.optimizer, schedule.ranks),
        **code.loop,
        "rankaware-optim": version("rankaware-optim"),
    }


def check_whole(study: optuna.Study, law: Law) -> None:
    """Raise a `CalibrationError` if a stored study is damaged, or was made by an earlier version
    with runs of several lengths or batches.
    """
    _check_one_length(study)
    try:
        trials = Trials.read(study.get_trials(deepcopy=False))
        _check_values(study, trials, law)
    except _DAMAGE as error:
        raise CalibrationError(
            f"The stored study {study.study_name!r} is damaged ({type(error).__name__}: {error}),"
            " and was not changed.",
            "Restore its storage from a copy, or give this calibration another name, or another"
            " storage.",
        ) from error


def _check_one_length(study: optuna.Study) -> None:
    made = study.user_attrs.get("made_with")
    if not isinstance(made, dict):
        return
    steps = made.get("steps")
    trials = study.get_trials(deepcopy=False)
    lengths = [trial.user_attrs.get("steps", steps) for trial in trials]
    if (
        isinstance(steps, list)
        or made.get("batches")
        or lengths.count(steps) < len(lengths)
    ):
        raise CalibrationError(
            f"The stored study {study.study_name!r} was made by an earlier version with several"
            " lengths or batches.",
            _OTHER_STUDY,
        )


def _check_values(study: optuna.Study, trials: Trials, law: Law) -> None:
    """Raise if a value that is read has another type, or contradicts another."""
    stored = study.user_attrs  # after the trials, before which they are written
    made = stored.get("made_with", {})
    for table in (made, made.get("multipliers", {}), stored.get("settings", {})):
        if not isinstance(table, dict):
            raise TypeError("an attribute holds an impossible value")
    if len(study.directions) > 1:
        raise TypeError("it has several objectives")
    for trial in trials:
        if trial.rank not in (None, *made.get("ranks", [trial.rank])):
            raise TypeError(f"trial {trial.number} has a rank that was not to be tried")
        if len(trial.curve or ()) > made.get("steps", math.inf):
            raise TypeError(f"trial {trial.number} has more values than steps")
    if "reference" in stored:
        reference = Reference(**stored["reference"])
        checked_multiplier(law, reference.as_factor(), reference)
        math.log2(stored["full_fan_in"])


def check_comparable(
    name: str, stored: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise a `CalibrationError` if the trials of a stored study cannot be compared with new ones.

    stored, now: see `made_with`.
    """
    refuse(name, differences(stored, {key: now[key] for key in _COMPARED}))
    law = differences(stored.get("multipliers", {}), now["multipliers"], _SAME_RATE)
    refuse(name, law, f"other rates of the law {stored.get('law')}: ")


def refuse(name: str, difference: str, what: str = "") -> None:
    """Raise a `CalibrationError` if there is a difference."""
    if difference:
        raise CalibrationError(
            f"The stored study {name!r} was made with {what}{difference}.", _OTHER_STUDY
        )


def warn_of_code(
    name: str, stored: Mapping[str, Any], now: Mapping[str, Any], how: str
) -> None:
    """Warn if the trials were made by another loop or version. stored, now: see `made_with`."""
    left_out = ("law", "multipliers", *_COMPARED)
    changed = differences(stored, {key: now[key] for key in now if key not in left_out})
    if changed:
        warn(
            f"The stored study {name!r} {how} {changed}. Its trials can be compared with new ones"
            " only if the training has not changed. Otherwise give this calibration another name."
        )
