"""Tests that the constants and defaults of the package are those in a golden file.

Most of these numbers come from a benchmark or are promised on a page, but few of them change what an
ordinary example prints. This command writes the golden file again:

    tox run -e core -- tests/test_constants.py --write-golden
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import rankaware_optim as ra

FILE = Path(__file__).parent / "golden" / "constants.txt"


def modules() -> Iterator[ModuleType]:
    """Yield every module of the package."""
    for found in pkgutil.walk_packages(ra.__path__, "rankaware_optim."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def assigned(module: ModuleType) -> set[str]:
    """Return the names to which a module assigns a value, without the names that it imports."""
    names = set()
    for node in ast.parse(inspect.getsource(module)).body:
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            names |= {
                each.id
                for each in ast.walk(target or ast.Pass())
                if isinstance(each, ast.Name)
            }
    return names


def is_plain(value: object) -> bool:
    """Return whether a value is a number, a Boolean, or a nested collection of numbers and strings."""
    if isinstance(value, (tuple, list)):
        return any(map(is_plain, value)) and all(
            is_plain(each) or isinstance(each, str) or each is None for each in value
        )
    if isinstance(value, Mapping):
        return is_plain([*value.values()])
    return type(value) in (int, float, bool)


def written(value: object) -> str:
    """Return a value as a string, with six significant digits for floats."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        items = ", ".join(f"{key!r}: {written(each)}" for key, each in value.items())
        return f"{{{items}}}"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(written, value))})"
    return repr(value)


def defaults_of(owner: object) -> Iterator[tuple[str, object]]:
    """Yield the defaults of a function, of the fields of a class and of the methods of a class."""
    if isinstance(owner, FunctionType):
        for name, parameter in inspect.signature(owner).parameters.items():
            yield name, parameter.default
    if isinstance(owner, type):
        if is_dataclass(owner):
            for field in fields(owner):
                yield field.name, None if field.default is MISSING else field.default
        yield from getattr(owner, "_field_defaults", {}).items()
        for name, method in vars(owner).items():
            if name.startswith("__"):
                continue
            function = getattr(method, "__func__", method)
            for argument, default in defaults_of(function):
                yield f"{name}({argument})", default


def constants() -> str:
    """Return a line for each constant and for each default of the package that is a number or contains numbers."""
    lines = []
    for module in modules():
        place = module.__name__.removeprefix("rankaware_optim.")
        own = assigned(module)
        for name, value in vars(module).items():
            if name in own and name.isupper() and is_plain(value):
                lines.append(f"{place}.{name} = {written(value)}")
            if getattr(value, "__module__", "") != module.__name__:
                continue
            for argument, default in defaults_of(value):
                if is_plain(default):
                    lines.append(f"{place}.{name}: {argument} = {written(default)}")
    return "\n".join(sorted({*lines})) + "\n"


def test_constants_and_defaults_are_those_of_the_golden_file(
    request: pytest.FixtureRequest,
) -> None:
    """Every constant and default of the package is as in the golden file. A change of a number changes the file too."""
    now = constants()
    if request.config.getoption("--write-golden"):
        FILE.write_text(now, encoding="utf-8")
    assert now == FILE.read_text(encoding="utf-8")
