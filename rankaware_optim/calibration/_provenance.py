"""What a calibration's trials were made with, as JSON values that are equal in every process: the
training loop's code, and the model and settings of each trial.
"""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tokenize import TokenError
from typing import Any

from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Reference
from .._warn import warn
from ..errors import CalibrationError
from ..optimizer import RankAwareOptimizer
from ..recipe import (
    BASE,
    SAME_UPDATES,
    agreed,
    differences,
    name_pattern,
    plain_value,
    settings_of,
)
from ._constants import GIT_S
from ._schedule import Options

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
_PACKAGES = ("rankaware-optim", "torch", "optuna")
_IF_LOADED = ("peft", "transformers", "trl", "accelerate", "lightning", "diffusers")

# --- the training loop ----------------------------------------------------------------------------


def source_of(train: Any) -> dict[str, str]:
    """Return what a recipe says of a training loop, without its partials and decorators: the
    function's name, the first twelve digits of its source's hash, and the commit of its git
    repository, with "-dirty" if files were changed. What cannot be read is left out.
    """
    function = inspect.unwrap(train)
    while isinstance(function, partial):
        function = inspect.unwrap(function.func)
    if not hasattr(function, "__qualname__"):
        function = type(function)
    source = {"train": function.__qualname__}
    folder = Path.cwd()
    # the last two: the file was edited since, and other text stands at the function's line
    with suppress(OSError, TypeError, SyntaxError, TokenError):
        text = inspect.getsource(function)
        source["hash"] = hashlib.sha256(text.encode()).hexdigest()[:12]
        file = Path(inspect.getsourcefile(function) or "")
        folder = file.parent if file.is_file() else folder
    with suppress(OSError, subprocess.SubprocessError):
        git = subprocess.run(
            _GIT, cwd=folder, check=True, capture_output=True, text=True, timeout=GIT_S
        )
        source["commit"] = git.stdout.strip()
    return source


def versions_used() -> dict[str, str]:
    """Return the versions of Python, this package, its main dependencies, and those libraries that
    are loaded.
    """
    python = ".".join(map(str, sys.version_info[:3]))
    loaded = [name for name in _IF_LOADED if name in sys.modules]
    versions = {"python": python}
    for name in (*_PACKAGES, *loaded):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


# --- model and settings ---------------------------------------------------------------------------


def built_with(
    opt: Any,
    native: type[Optimizer],
    settings: Mapping[str, Any],
    at: Reference,
    at_own_lr: Collection[int] = (),
) -> dict[str, Any]:
    """Return what decides a trial besides its rank, seed and rate: the model's width, alpha and
    init, and all settings.

    Settings that were not given have their defaults. If groups differ in a setting, its value is a
    list, and the value of the factors' groups is stored too. For a LoRA trial the rates of
    parameters that are not factors are stored. at_own_lr: numbers of the groups that were given an
    "lr".
    """
    ours = defaults_of(RankAwareOptimizer.__new__)
    given = {**ours, **defaults_of(native), **settings}
    built = {name: plain_value(given[name]) for name in given.keys() - _LEFT_OUT}
    names = opt.defaults.keys() - _LEFT_OUT
    built |= settings_of(opt.param_groups, names)
    numbers = {group.user_group for group in opt.rates.groups if group.role != "other"}
    of_factors = [opt.param_groups[number] for number in sorted(numbers)]
    factors = settings_of(of_factors or opt.param_groups, names)
    apart = {name: value for name, value in factors.items() if value != built[name]}
    if apart:
        built["factors' settings"] = apart
    others = {} if at.method == "full" else _other_rates(opt, at_own_lr)
    if others:
        built["other rates"] = others
    return {**built, **shape_of(at)}


def shape_of(at: Reference) -> dict[str, Any]:
    """Return what decides a trial of a model's configuration."""
    # not "alpha", which is a setting of RMSprop
    return {"width": at.fan_in, "lora_alpha": at.alpha, "init": at.init}


def _other_rates(opt: Any, at_own_lr: Collection[int]) -> dict[str, Any]:
    """Return the rates of parameters that are not factors, by name pattern. Patterns with two rates
    are left out.
    """
    tables = []
    for group in opt.rates.groups:
        if group.role != "other":
            continue
        is_own = group.is_given or group.user_group in at_own_lr
        # twelve digits remove a ratio's rounding error
        rate = float(f"{group.lr:.12g}") if is_own else BASE
        tables.append({name_pattern(name): rate for name in group.names})
    return agreed(tables)


# --- a stored study -------------------------------------------------------------------------------

_SCHEMA = 1  # of a stored study, raised if an earlier version would misread it
_MAY_DIFFER = ("train", "hash", "rankaware-optim")


def made_with(options: Options, source: Mapping[str, str]) -> dict[str, Any]:
    """Return what the trials of a calibration are made with, as its study stores it."""
    return {
        "schema": _SCHEMA,
        "steps": options.steps,
        "ranks": options.lora,
        "seeds": sorted(options.seeds),
        "optimizer": options.optimizer_name,
        "batch": options.batch,
        "warmup": options.warmup,
        "law": plain_value(options.law),
        "train": source["train"],
        "hash": source.get("hash"),
        "rankaware-optim": version("rankaware-optim"),
    }


def check_comparable(
    name: str, stored: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Raise a `CalibrationError` if trials cannot be compared with new ones.

    stored, now: see `made_with` and `built_with`.
    """
    options = {key: value for key, value in now.items() if key not in _MAY_DIFFER}
    if difference := differences(stored, options):
        raise CalibrationError(
            f"The stored study {name!r} was made with {difference}.",
            "Give this calibration another name, or another storage.",
        )


def warn_of_code(name: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn if the trials were made by another loop or version. stored, now: see `made_with`."""
    changed = differences(stored, {key: now[key] for key in _MAY_DIFFER})
    if changed:
        warn(
            f"The stored study {name!r} was made with {changed}. Its trials can be compared with"
            " new ones only if the training has not changed. Otherwise give this calibration"
            " another name."
        )
