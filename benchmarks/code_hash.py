"""Hash of the code behind a table, which shows whether the table is older than its code.

A script that writes a table lists in `DEPENDS_ON` the modules and packages that its figures depend on. Modules of
rankaware_optim have their full names, modules of the benchmarks the names by which they are imported. `GROUPS` has
short names for those that belong together. The hash is of the syntax trees of all these and of the script. It leaves
out comments, docstrings, and the texts of exceptions and warnings, so that these may change freely.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parent
GROUPS = {
    "SEARCH": (  # which rates a calibration tries
        "rankaware_optim.recipe._loss_model",
        "rankaware_optim.recipe._observations",
        "rankaware_optim.calibration",
    ),
    "CALIBRATED_RATES": (  # which rates it finds
        "SEARCH",
        "rankaware_optim.laws",
        "rankaware_optim.recipe._recipe",
        "rankaware_optim.recipe._uncertainty",
        "rankaware_optim.recipe._horizon",
    ),
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_of(script: Path) -> str:
    """benchmarks/<script>@<hash>, as tables carry it; "unknown" for a script outside the benchmarks."""
    if BENCHMARKS not in script.resolve().parents:
        return "unknown"
    name = script.resolve().relative_to(BENCHMARKS)
    digest = hashlib.sha256()
    for path in dict.fromkeys((BENCHMARKS / name, *(path for module in depends_on(script) for path in files(module)))):
        digest.update(repr((path.name, *parts(ast.parse(path.read_text())))).encode())
    return f"benchmarks/{name.as_posix()}@{digest.hexdigest()[:12]}"


def depends_on(script: Path) -> tuple[str, ...]:
    """A script's `DEPENDS_ON`, read without importing the script; empty if it has none."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["DEPENDS_ON"]:
            return tuple(ast.literal_eval(node.value))
    return ()


def files(module: str) -> list[Path]:
    """The file of a module, or all files of a package and its subpackages, or those of a group's modules.

    Raises:
        FileNotFoundError: there is no such module.
    """
    if module in GROUPS:
        return [path for each in GROUPS[module] for path in files(each)]
    root = BENCHMARKS.parent if module.partition(".")[0] == "rankaware_optim" else BENCHMARKS
    path = root / module.replace(".", "/")
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    if not found or not found[0].exists():
        raise FileNotFoundError(f"DEPENDS_ON names {module}, which is not in this repository. Name one that is.")
    return found


def parts(node: object) -> Iterator[object]:
    """Node types, fields and values of a syntax tree, the same in every Python version.

    Positions in the file and empty fields are left out.
    """
    if isinstance(node, list):
        for each in node:
            yield tuple(parts(each))
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for name, value in ast.iter_fields(worded(node)):
            if value is not None and value != []:
                yield name, tuple(parts(value))
    else:
        yield repr(node)


def worded(node: ast.AST) -> ast.AST:
    """A node without its words: the docstring, or the text of an exception or warning."""
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        return type(node)(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return ast.Raise(exc=node.exc.func)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "warn":
        return ast.Call(func=node.func)
    return node
