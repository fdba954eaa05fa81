"""What a calibration's trials were made with, as JSON values that are equal in every process: the
training loop's code, the law's multipliers, and the model and settings of each trial.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from .._optimizers import defaults_of
from .._types import Factor, Reference
from ..laws import Law, checked_multiplier
from ..optimizer import RankAwareOptimizer, effective_lr
from ..recipe import BASE, SAME_UPDATES, agreed, name_pattern, plain_value, settings_of

SAME_RATE = (
    1e-3  # relative tolerance of a law's multipliers, which a plug-in may measure
)
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
    "strict",
    "on_rank_change",
    "native_type",
    "apply_settings",
    "steps",
    "warmup_share",
    "seed",
    "generator",
    *SAME_UPDATES,
}
_GIT = ("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
_PATIENCE_S = 10.0  # timeout for git on a slow disk
_ALWAYS = ("rankaware-optim", "torch", "optuna")


# --- the training loop ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Code:
    """A training loop's code at the start of the calibration, as far as it can be read.

    Args:
        train: the function's name.
        hash: the first twelve digits of its source's hash.
        commit: the commit of its git repository, with "-dirty" if files were changed.
        imports: the top-level modules that its file imports.
    """

    train: str = ""
    hash: str = ""
    commit: str = ""
    imports: tuple[str, ...] = ()

    @property
    def loop(self) -> dict[str, str]:
        """Return the values by which two loops are compared."""
        return _known({"train": self.train, "its source's hash": self.hash})

    @property
    def source(self) -> dict[str, str]:
        """Return the values that a recipe stores."""
        return _known({"train": self.train, "hash": self.hash, "commit": self.commit})


def _known(values: Mapping[str, str]) -> dict[str, str]:
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
    imports = set[str]()
    with suppress(OSError, TypeError):
        source = inspect.getsource(function)
        digits = hashlib.sha256(source.encode()).hexdigest()[:12]
        file = Path(inspect.getsourcefile(function) or "")
        folder = file.parent if file.is_file() else folder
        imports = set(_imports("".join(inspect.findsource(function)[0])))
    return Code(function.__qualname__, digits, _commit(folder), tuple(sorted(imports)))


def _imports(source: str) -> Iterator[str]:
    """Yield the modules that a file imports. Yield none if it is not plain Python, such as a
    notebook cell.
    """
    with suppress(SyntaxError, ValueError):
        for node in ast.walk(ast.parse(source)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            yield from (name.partition(".")[0] for name in names)


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


@cache
def _packages() -> Mapping[str, list[str]]:
    """Return the installed packages by module. The result is cached, since the search can take a
    second.
    """
    return packages_distributions()


def versions_used(imports: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of Python, this package, its main dependencies, and the loaded packages
    behind `imports`.
    """
    packages = _packages()
    others = set[str]()
    for module in imports:
        if module in sys.modules:
            others.update(packages.get(module, ()))
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in (*_ALWAYS, *sorted(others - {*_ALWAYS})):
        versions[name] = version(name)
    return versions


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
    if apart:
        built["factors' settings"] = apart
    other_rates = {} if at.method == "full" else _other_rates(opt)
    if other_rates:
        built["other rates"] = other_rates
    return {**built, "width": at.fan_in, "alpha": at.alpha, "init": at.init}


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


def settings_in(built: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the optimizer's settings `names` from `built_with`'s result. If groups differ, the
    factors' count.
    """
    settings = {**built, **built.get("factors' settings", {})}
    return {
        name: settings[name]
        for name in names
        if settings.get(name) is not None and name not in _LEFT_OUT
    }
