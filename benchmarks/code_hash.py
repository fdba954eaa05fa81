"""Whether a table is older than the code it depends on: a hash of syntax trees, so that words may change freely.

A script that writes a table names in `DEPENDS_ON` the modules and packages that its figures depend on: the package's by
their full names, the benchmarks' as they are imported. The hash is of these and of the script. Comments, docstrings,
and what is raised or warned with are left out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_of(script: Path) -> str:
    """benchmarks/<script>@<hash>, as tables carry it; "unknown" for what is no script of the benchmarks."""
    if BENCHMARKS not in script.resolve().parents:
        return "unknown"
    name = script.resolve().relative_to(BENCHMARKS)
    digest = hashlib.sha256()
    for path in dict.fromkeys((BENCHMARKS / name, *(path for module in depends_on(script) for path in files(module)))):
        digest.update(repr((path.name, *parts(ast.parse(path.read_text())))).encode())
    return f"benchmarks/{name.as_posix()}@{digest.hexdigest()[:12]}"


def depends_on(script: Path) -> tuple[str, ...]:
    """A script's `DEPENDS_ON`, read without importing it; empty where it has none."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["DEPENDS_ON"]:
            return tuple(ast.literal_eval(node.value))
    return ()


def files(module: str) -> list[Path]:
    """A module's file, or all files of a package and of those below it.

    Raises:
        FileNotFoundError: there is no such module.
    """
    root = BENCHMARKS.parent if module.partition(".")[0] == "rankaware_optim" else BENCHMARKS
    path = root / module.replace(".", "/")
    found = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    if not found or not found[0].exists():
        raise FileNotFoundError(f"DEPENDS_ON names {module}, which is no module of this repository. Name one that is.")
    return found


def parts(node: object) -> Iterator[object]:
    """What a syntax tree is made of, alike in every version of Python: empty fields and positions are left out."""
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
    """A node without its words: no docstring, an exception or a warning without what it says."""
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        return type(node)(**{**dict(ast.iter_fields(node)), "body": node.body[1:]})
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        return ast.Raise(exc=node.exc.func)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "warn":
        return ast.Call(func=node.func)
    return node
