"""How many planted bugs the tests see.

The script plants one bug at a time, each a change to one line of `rankaware_optim/`, and runs the
tests of the room that the line belongs to: first the room's own folder, and if that passes, the
whole tox environment that tests the room. A bug is seen if a test fails.

    python benchmarks/planted_bugs.py            # plants five bugs in each room, about an hour
    python benchmarks/planted_bugs.py --room laws --bugs 2

The choice of bugs depends on the source and on `--seed` alone. It was committed before the first
run. The interpreter needs the packages of the environments `core` and `integrations`.

**What counts as equivalent.** A change is equivalent if no public call can give another result or
another message after it. Changes to annotations, to docstrings and to imports for type checkers are
never drawn. The others were judged by reading the code: `EQUIVALENT` names each with its reason, and
the next change in the drawn order takes its place.

**What the total judges.** Tests are written for the bugs that a run misses, so a later run with the
same seed repeats bugs for which tests were written, and its total says little. Each run that judges
the tests therefore has a new seed, which is committed before the run:

* Seed 20261202 on 47affc49: 50 of 60 were seen (83 %). Tests for the missed ones followed. The same
  seed on e813cd3e repeated 39 of the bugs, and had 21 new ones, of which 17 were seen (81 %).
* Seed 31337 (four bugs in each room) was used while tests were written: 43 of 48 were seen on
  f637e384 (90 %).
* Seed 20261203 judged the tests after that, on 36136d04: 48 of 60 were seen (80 %), below the goal
  of 85 %. Tests for the 12 missed bugs followed, and a golden file of all constants and defaults.
* Seed 777 was then used to find more missing tests, with the tests of each room alone.
* Seed 20261204 judged the tests after that, on bf3b19f5: 56 of 60 were seen (93 %). The table is its
  run. Three of the bugs had also been drawn by an earlier seed, and had been seen then. One bug was
  seen because the tests did not end. Two of the four missed bugs are equivalent (the arguments of
  `zip` have equal lengths, and the base class of `_Stream` has no constructor). A test for another
  one followed, and the fourth was in code that is now simpler.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import click
from recording import machine, record

RESTS_ON = ()
ROOT = Path(__file__).parents[1]
PACKAGE = "rankaware_optim"
SEED = 20261204
TIMEOUT_S = 600

CORE = ["tests", "--ignore=tests/environments", "-m", "not processes"]
INTEGRATIONS = ["tests/environments/integrations", "tests/reports", "tests/recipe"]
# The folder of a room's own tests, and the environment that is run if those pass
ROOMS: dict[str, tuple[list[str], list[str]]] = {
    "root": (["tests/testing", "tests/test_optimizers_table.py"], CORE),
    "inspection": (["tests/inspection"], CORE),
    "laws": (["tests/laws"], CORE),
    "fitting": (["tests/fitting"], CORE),
    "recipe": (["tests/recipe"], CORE),
    "reports": (["tests/reports"], INTEGRATIONS),
    "optimizer": (["tests/optimizer"], CORE),
    "transfer": (["tests/transfer"], CORE),
    "calibration": (["tests/calibration"], CORE),
    "sweeps": (["tests/sweeps"], CORE),
    "trainers": (["tests/calibration/test_in_place.py"], INTEGRATIONS),
    "cli": (["tests/cli"], CORE),
}

# The functions that call the trainers. Their tests are those of the trainers.
DOORS = ("_attach.py", "_calibrate.py")

# (file, text of the line before, text of the line after) -> why no public call can differ
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        f"{PACKAGE}/fitting/_loss_model.py",
        "h = SHOULDERS.reshape(-1, 1, 1, *inner)",
        "h = SHOULDERS.reshape(-2, 1, 1, *inner)",
    ): "numpy infers the length of an axis from any negative number",
    (
        f"{PACKAGE}/recipe/_same_model.py",
        "ours, theirs = zip(*pairs, strict=True) if pairs else ((), ())",
        "ours, theirs = zip(*pairs, strict=False) if pairs else ((), ())",
    ): "each element is a pair, so all have the same length",
    (
        f"{PACKAGE}/optimizer/_rates.py",
        "names, params = zip(*kept, strict=True)",
        "names, params = zip(*kept, strict=False)",
    ): "each element is a pair, so all have the same length",
}


@dataclass(frozen=True)
class Bug:
    """A change to one line. `before` and `after` are the line's text, without its indentation."""

    file: str
    line: int
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.before, self.after


# --- the bugs -------------------------------------------------------------------------------------

NEGATED = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
AT_THE_EDGE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
}


def changes_of(node: ast.AST) -> Iterator[ast.AST]:
    """Every wrong version of a node that is tried."""
    match node:
        case ast.Compare(ops=[op]):
            for table in (NEGATED, AT_THE_EDGE):
                if type(op) in table:
                    changed = copy.deepcopy(node)
                    changed.ops = [table[type(op)]()]
                    yield changed
        case ast.BoolOp():
            changed = copy.deepcopy(node)
            changed.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield changed
            yield node.values[0]
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.BinOp() if type(node.op) in SWAPPED:
            changed = copy.deepcopy(node)
            changed.op = SWAPPED[type(node.op)]()
            yield changed
        case ast.IfExp():
            changed = copy.deepcopy(node)
            changed.body, changed.orelse = node.orelse, node.body
            yield changed
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=float()):
            yield ast.Constant(node.value * 2 or 1.0)
        case ast.Call():
            for i in range(len(node.keywords)):
                changed = copy.deepcopy(node)
                del changed.keywords[i]
                yield changed
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield ast.Pass()


def code_of(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node that runs: no annotations, no imports for type checkers, nothing inside an f-string, whose
    positions are not exact.
    """
    for name, child in ast.iter_fields(tree):
        if name in ("annotation", "returns", "type_params"):
            continue
        for node in child if isinstance(child, list) else [child]:
            if not isinstance(node, ast.AST) or isinstance(node, ast.JoinedStr):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                continue
            yield node
            yield from code_of(node)


def bugs_of(path: Path) -> Iterator[Bug]:
    """Every bug that can be planted in a file."""
    source = path.read_text(encoding="utf-8")
    lines = source.encode().splitlines(keepends=True)
    file = str(path.relative_to(ROOT))
    for node in code_of(ast.parse(source)):
        if getattr(node, "lineno", None) != getattr(node, "end_lineno", 0):
            continue
        for changed in changes_of(node):
            new = ast.unparse(changed)
            if isinstance(changed, (ast.Compare, ast.BoolOp, ast.BinOp, ast.IfExp)):
                new = f"({new})"
            i = node.lineno - 1
            line = lines[i]
            line = line[: node.col_offset] + new.encode() + line[node.end_col_offset :]
            text = b"".join([*lines[:i], line, *lines[i + 1 :]]).decode()
            try:
                compile(text, file, "exec")
            except SyntaxError:
                continue
            before, after = lines[i].decode().strip(), line.decode().strip()
            yield Bug(file, node.lineno, before, after, text)


def drawn(room: str, count: int, seed: int) -> list[Bug]:
    """The bugs of a room, in the order of a seeded shuffle, at most one a line."""
    folder = ROOT / PACKAGE / ("" if room == "root" else room)
    files = set(folder.glob("*.py" if room == "root" else "**/*.py"))
    doors = {ROOT / PACKAGE / name for name in DOORS}
    files = files | doors if room == "trainers" else files - doors
    candidates = [bug for file in sorted(files) for bug in bugs_of(file)]
    random.Random(f"{seed} {room}").shuffle(candidates)
    chosen: dict[tuple[str, int], Bug] = {}
    for bug in candidates:
        if bug.key not in EQUIVALENT:
            chosen.setdefault((bug.file, bug.line), bug)
    return list(chosen.values())[:count]


# --- the tests ------------------------------------------------------------------------------------


def fails(tree: Path, tests: Sequence[str]) -> bool:
    """Whether a test fails in a tree, or does not end."""
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        run = subprocess.run(
            [*command, *tests],
            cwd=tree,
            env=environment,
            timeout=TIMEOUT_S,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True
    return run.returncode != 0


def seen_by(bug: Bug, room: str, tree: Path) -> str:
    """Plant a bug in a tree, and return which tests saw it: "the room", "the environment" or "none"."""
    own, environment = ROOMS[room]
    path = tree / bug.file
    original = path.read_text(encoding="utf-8")
    path.write_text(bug.source, encoding="utf-8")
    try:
        if fails(tree, own):
            return "the room"
        return "the environment" if fails(tree, environment) else "none"
    finally:
        path.write_text(original, encoding="utf-8")


def copy_of_the_tree(folder: Path) -> Path:
    """A copy of the committed tree. The bugs are planted in it, and never in the tree itself."""
    archive = subprocess.run(
        ["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
    return folder


@click.command()
@click.option("--room", "rooms", multiple=True, type=click.Choice(list(ROOMS)))
@click.option("--bugs", default=5, show_default=True, help="Bugs in each room.")
@click.option("--seed", default=SEED, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--list", "only_list", is_flag=True, help="Show the bugs, run nothing.")
def main(
    rooms: Sequence[str], bugs: int, seed: int, workers: int, only_list: bool
) -> None:
    """Plant bugs, and write results/planted_bugs.md if every room was tried."""
    planted = [
        (room, bug) for room in rooms or ROOMS for bug in drawn(room, bugs, seed)
    ]
    if only_list:
        for _, bug in planted:
            print(f"{bug.file}:{bug.line}\n  - {bug.before}\n  + {bug.after}")
        return
    on = machine(threads=1)
    home = Path(tempfile.mkdtemp(prefix="planted-bugs-"))
    trees: Queue[Path] = Queue()
    for i in range(workers):
        trees.put(copy_of_the_tree(home / str(i)))

    def tried(room: str, bug: Bug) -> dict[str, str]:
        tree = trees.get()
        try:
            seen = seen_by(bug, room, tree)
        finally:
            trees.put(tree)
        row = {
            "room": room,
            "place": f"{bug.file}:{bug.line}",
            "before": f"`{bug.before.replace('|', chr(92) + '|')}`",
            "after": f"`{bug.after.replace('|', chr(92) + '|')}`",
            "seen by": seen,
        }
        print(seen, f"{bug.file}:{bug.line}", bug.before, "->", bug.after, flush=True)
        return row

    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(lambda pair: tried(*pair), planted))
    shutil.rmtree(home)
    seen = sum(row["seen by"] != "none" for row in rows)
    total = f"**{seen} of {len(rows)} planted bugs are seen ({seen / len(rows):.0%}).**"
    print(total)
    if not rooms:
        explanation = (__doc__ or "").partition("\n\n")[2].strip()
        named = [
            f"* `{before}` → `{after}` in `{file}`: {why}"
            for (file, before, after), why in EQUIVALENT.items()
        ]
        notes = [total, explanation, "Equivalent changes:\n\n" + "\n".join(named)]
        record("planted_bugs", "How many planted bugs the tests see", rows, on, notes)


if __name__ == "__main__":
    main()
