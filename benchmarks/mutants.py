"""Mutants of the package, one at a time: does a test fail?

    tox run -e mutants                               # 300 of each package, resumable
    tox run -e mutants -- --only laws --count 20     # some of one package
    tox run -e mutants -- --again                    # and the survivors on file, with new tests
    OMP_NUM_THREADS=1 python benchmarks/mutants.py   # the same, where mutmut is installed

mutmut's operators make the mutants: another operator, number, comparison or constant, a condition
that always or never holds, a keyword argument left out. Every mutant meets those tests of its
package that reach its lines, the fast ones first, until one fails or 10 CPU seconds of them have
passed; a line that runs on import is reached by all. Each mutant runs in a fork of a
process that has imported torch and not the package, on a copy of the package and its tests. What
came of it is kept in results/mutants.jsonl, and holds as long as the mutant's file is as it was.
Without OMP_NUM_THREADS=1 a busy machine waits for threads.

A survivor that no test can see is named in mutants.toml by its lines, and leaves the score:

    [[equivalent]]
    file = "rankaware_optim/laws/_mua.py"
    before = "    return x if x > 0 else -x"
    after = "    return x if x >= 0 else -x"
    why = "-0 is 0"
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import hypothesis
import libcst as cst
import pytest
import tomli
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation import mutators
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.pragma_handling import IgnoredCode
from recording import RESULTS, block, machine, made_on

RESTS_ON = ()  # outcomes: made again at a release
ROOT = Path(__file__).parents[1]
PACKAGE = "rankaware_optim"
FILE = RESULTS / "mutants.jsonl"
EQUIVALENT = Path(__file__).with_suffix(".toml")
SEED = 39
ROOMS = {
    "laws": (0.90, ["laws", "test_optimizers_table.py", "testing"]),
    "fitting": (0.85, ["fitting", "sweeps"]),
    "optimizer": (0.90, ["optimizer"]),
    "recipe": (0.85, ["recipe", "optimizer/test_recipes.py"]),
}
"""The bar and the tests of each package."""

HEAVY = (
    "torch",
    "torch._dynamo",
    "numpy",
    "optuna",
    "optuna.storages",
    "sqlalchemy",
    "jinja2",
)
OPTIONS = (
    *("-p", "no:cacheprovider"),
    *("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"),
)
KINDS = (
    mutators.operator_number,
    mutators.operator_name,
    mutators.operator_remove_unary_ops,
    mutators.operator_keywords,
    mutators.operator_swap_op,
    mutators.operator_augmented_assignment,
    mutators.operator_if_exp,
    mutators.operator_match,
)
BLOCKS = (cst.Module, cst.BaseSuite, cst.BaseCompoundStatement)
TEST_S, TESTS_S = 2.5, 10.0  # CPU seconds of a test that a mutant meets, and of all
AT_LEAST_S, CPU_TIMES, WALL_TIMES = 10.0, 4.0, 10.0  # limits of one mutant's tests
MEMORY = 16 << 30
_AROUND = 24  # signs shown around a change


@dataclass(frozen=True)
class Mutant:
    """A change of one place of a file."""

    file: str
    line: int
    statement: range
    """The lines of the statement, or of the head of a block, that is changed."""
    key: str
    """Names the change and the file that it is made in, with all that stands there."""
    source: str
    """The whole file without the change."""
    text: Callable[[], str]
    """Gives the whole file with the change."""


@dataclass(frozen=True)
class Reach:
    """What the tests of a package do on the package as it is."""

    seconds: dict[str, float]
    """CPU seconds by test, of those that passed in time."""
    tests: dict[str, dict[int, list[str]]]
    """Tests by file and line. A line that an import runs has "" among them."""

    def meets(self, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant, fast ones first; after them, on import, all others.

        The further cases of a test count as slower than its first.
        """
        lines = self.tests.get(mutant.file, {})
        reach = {test for line in mutant.statement for test in lines.get(line, ())}
        chosen = self.seconds if "" in reach else reach & self.seconds.keys()
        cases: Counter[str] = Counter()
        order = {}
        for test in sorted(chosen, key=self.seconds.__getitem__):
            function = test.partition("[")[0]
            cases[function] += 1
            order[test] = test not in reach, cases[function] * self.seconds[test]
        tests = sorted(order, key=order.__getitem__)
        ends = accumulate(self.seconds[test] for test in tests)
        return [test for test, end in zip(tests, ends, strict=True) if end <= TESTS_S]


@click.command()
@click.option(
    "--only", type=click.Choice(list(ROOMS)), help="One package instead of all."
)
@click.option(
    "--count", default=300, show_default=True, help="Mutants drawn of each package."
)
@click.option("--again", is_flag=True, help="Run the survivors on file again.")
@click.option("--workers", default=2, show_default=True, help="Processes at a time.")
def main(only: str | None, count: int, again: bool, workers: int) -> None:
    """Run the mutants that are drawn and not on file, and write the table of all."""
    os.chdir(ROOT)
    for name in HEAVY:
        import_module(name)
    mutants = {room: mutants_of(room) for room in ROOMS}
    outcomes, equivalent = on_file(mutants), equivalents()

    def is_missing(mutant: Mutant) -> bool:
        row = outcomes.get(mutant.key)
        if row is None:
            return True
        survived = row["outcome"] == "survived"
        return again and survived and change(row) not in equivalent

    for room in [only] if only else ROOMS:
        missing = [mutant for mutant in mutants[room][:count] if is_missing(mutant)]
        for row in run(room, missing, workers):
            outcomes[row["key"]] = row
            lines = "".join(json.dumps(each) + "\n" for each in outcomes.values())
            FILE.write_text(lines, encoding="utf-8")
    write({room: each[:count] for room, each in mutants.items()}, outcomes, equivalent)


# --- mutants --------------------------------------------------------------------------------------------------------


def mutants_of(room: str) -> list[Mutant]:
    """Every mutant of a package, in the order in which they are drawn."""
    mutants = [
        mutant
        for path in (ROOT / PACKAGE / room).rglob("*.py")
        for mutant in mutants_in(path)
    ]
    return sorted(
        mutants, key=lambda mutant: sha256(f"{SEED} {mutant.key}".encode()).digest()
    )


def mutants_in(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file."""
    source, file = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    wrapper, visitor = MetadataWrapper(cst.parse_module(source)), Visitor()
    module, where = wrapper.visit(visitor), wrapper.resolve(PositionProvider)
    parents = wrapper.resolve(ParentNodeProvider)
    digest = sha256(source.encode()).hexdigest()[:8]
    for index, mutation in enumerate(visitor.mutations):
        old = statement = mutation.original_node
        while not isinstance(parents[statement], BLOCKS):
            statement = parents[statement]
        yield Mutant(
            file,
            where[old].start.line,
            range(where[statement].start.line, where[statement].end.line + 1),
            f"{file}:{digest}:{index}",
            source,
            partial(_replaced, module, old, mutation.mutated_node),
        )


def _replaced(module: cst.Module, old: cst.CSTNode, new: cst.CSTNode) -> str:
    return module.deep_replace(old, new).code


class Visitor(MutationVisitor):
    """mutmut's, which also looks into decorated functions, and passes over what no test should see.

    These are the texts of errors and warnings, `strict` of `zip`, and stubs for the type checker.
    """

    def __init__(self) -> None:
        kinds = [pair for pair in mutators.mutation_operators if pair[1] in KINDS]
        super().__init__(
            [*kinds, (cst.Call, without_keyword)], IgnoredCode(set(), set(), set())
        )

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            names = {
                cst.Module([]).code_for_node(each.decorator) for each in node.decorators
            }
            return "overload" in names
        if isinstance(node, cst.Raise):
            return True
        if isinstance(node, cst.Call):
            name = cst.Module([]).code_for_node(node.func)
            return name in ("cast", "len", "isinstance", "TypeVar") or "warn" in name
        if (
            isinstance(node, cst.Arg)
            and node.keyword
            and node.keyword.value == "strict"
        ):
            return True
        return bool(super()._skip_node_and_children(node))


def without_keyword(node: cst.Call) -> Iterator[cst.Call]:
    """A call with one keyword argument left out."""
    for index, argument in enumerate(node.args):
        if argument.keyword and argument.keyword.value not in ("strict", "encoding"):
            yield node.with_changes(args=[*node.args[:index], *node.args[index + 1 :]])


# --- tests ----------------------------------------------------------------------------------------------------------


def run(room: str, mutants: Sequence[Mutant], workers: int) -> Iterator[dict[str, Any]]:
    """Run the tests of a package on each mutant, and yield what came of it."""
    if not mutants:
        return
    waiting, running = list(reversed(mutants)), {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        slots = [copied(Path(folder) / str(number)) for number in range(workers)]
        gc.collect()
        gc.freeze()  # a fork's tests collect what is theirs
        reach = reached(room, slots[0])
        total = sum(reach.seconds.values())
        print(f"{room}: {len(reach.seconds)} tests, {total:.0f} CPU s", flush=True)
        try:
            while waiting or running:
                while waiting and slots:
                    slot, mutant = slots.pop(), waiting.pop()
                    child = forked(partial(attempt, slot, mutant, reach))
                    running[child] = slot, mutant, time.monotonic()
                child, status = os.wait()
                slot, mutant, began = running.pop(child)
                stop(child)
                slots.append(slot)
                yield outcome(room, slot, mutant, status, time.monotonic() - began)
        finally:
            for child in running:
                stop(child)


def copied(slot: Path) -> Path:
    """A folder like the repository, with a package and tests of its own: edits go unseen."""
    slot.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for path in ROOT.iterdir():
        if path.name in (PACKAGE, "tests"):
            shutil.copytree(path, slot / path.name, ignore=ignored)
        else:
            (slot / path.name).symlink_to(path)
    return slot


def forked(work: Callable[[], int]) -> int:
    """Start a process of a group of its own that ends with what `work` returns, and return its id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.setsid()
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def stop(group: int) -> None:
    """End what a process and its children left running."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def tested(slot: Path, paths: Sequence[str], plugin: object, *options: str) -> int:
    """Run tests in this process, with the package that is in `slot`."""
    with open(slot / "log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(slot)
    sys.path.insert(0, str(slot))
    os.environ |= {"PYTHONPATH": str(slot), "OMP_NUM_THREADS": "1"}
    options = (*options, *OPTIONS, f"--basetemp={slot / 'tmp'}")
    return int(pytest.main([*paths, *options], plugins=[plugin]))


def reached(room: str, slot: Path) -> Reach:
    """Run the tests of a package on it as it is, once, and keep what each test reaches."""

    def work() -> int:
        plugin = Watch(slot, room)
        code = tested(slot, [f"tests/{name}" for name in ROOMS[room][1]], plugin)
        (slot / "reach").write_bytes(pickle.dumps(plugin.reach()))
        return code

    child = forked(work)
    _, status = os.waitpid(child, 0)
    stop(child)
    end = (slot / "log").read_text()[-2000:]
    if not (slot / "reach").exists():
        raise click.ClickException(f"The tests did not run: {end}")
    if status:
        print(f"Left out, since they fail: {end}", flush=True)
    return pickle.loads((slot / "reach").read_bytes())


class Watch:
    """A pytest plugin that notes the lines that each test reaches, and its CPU seconds."""

    def __init__(self, slot: Path, room: str) -> None:
        coverage = import_module("coverage")
        self.root, self.seconds, self.failed = slot, {}, set()
        self.package = f"{PACKAGE}.{room}"
        source = [str(slot / PACKAGE / room)]
        self.coverage = coverage.Coverage(data_file=None, source=source)
        self.coverage.start()
        self.coverage.switch_context("")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.clear_caches()
        self.coverage.switch_context(item.nodeid)
        began = sum(os.times()[:4])
        done = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - began
        self.coverage.switch_context("")
        return done

    def clear_caches(self) -> None:
        """Let the next test reach what is computed once."""
        for name, module in sys.modules.items():
            if name.startswith(self.package):
                for each in vars(module).values():
                    if hasattr(each, "cache_clear"):
                        each.cache_clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def reach(self) -> Reach:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            Path(path).relative_to(self.root).as_posix(): data.contexts_by_lineno(path)
            for path in data.measured_files()
        }
        passed = {
            test: seconds
            for test, seconds in self.seconds.items()
            if test not in self.failed and seconds <= TEST_S
        }
        return Reach(passed, lines)


def attempt(slot: Path, mutant: Mutant, reach: Reach) -> int:
    """Put a mutant into the copy of the package, and run the tests until one fails."""
    tests = reach.meets(mutant)
    if not tests:
        return 0
    path = slot / mutant.file
    path.write_text(mutant.text(), encoding="utf-8")
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()
    limit = AT_LEAST_S + CPU_TIMES * sum(reach.seconds[test] for test in tests)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.dump_traceback_later(WALL_TIMES * limit, exit=True)
    # A failure need not shrink.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    quick = hypothesis.settings(
        deadline=None, derandomize=True, database=None, phases=phases
    )
    hypothesis.settings.register_profile("quick", quick)
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    plugin = Ordered(slot, tests)
    return tested(slot, list(files), plugin, "-x", "--hypothesis-profile=quick")


class Ordered:
    """A pytest plugin that runs the tests given, in their order, and notes which failed first."""

    def __init__(self, slot: Path, tests: Sequence[str]) -> None:
        self.file = slot / "killed by"
        self.rank = {test: index for index, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.rank]
        items.sort(key=lambda item: self.rank[item.nodeid])

    def pytest_exception_interact(self, node: pytest.Item | pytest.Collector) -> None:
        if not self.file.exists():
            self.file.write_text(node.nodeid)


def outcome(
    room: str, slot: Path, mutant: Mutant, status: int, seconds: float
) -> dict[str, Any]:
    """What came of a mutant. The copy of the package gets its file back."""
    (slot / mutant.file).write_text(mutant.source, encoding="utf-8")
    killer = slot / "killed by"
    test = killer.read_text() if killer.exists() else ""
    killer.unlink(missing_ok=True)
    old, new = mutant.source.splitlines(), mutant.text().splitlines()
    start = alike(old, new)
    end = alike(old[start:][::-1], new[start:][::-1])
    before, after = ("\n".join(lines[start : len(lines) - end]) for lines in (old, new))
    killed = "killed" if test else "killed by time"
    row = {
        "package": room,
        "key": mutant.key,
        "file": mutant.file,
        "line": mutant.line,
        "before": before,
        "after": after,
        "outcome": killed if status else "survived",
        "test": test,
        "seconds": round(seconds, 1),
    }
    print(
        f"{row['outcome']:9} {place(row)} {short(row)} {test} {seconds:.0f} s",
        flush=True,
    )
    return row


# --- the file and the table -----------------------------------------------------------------------------------------


def on_file(mutants: dict[str, list[Mutant]]) -> dict[str, dict[str, Any]]:
    """The outcomes that hold still, by the mutant's key."""
    keys = {mutant.key for each in mutants.values() for mutant in each}
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["key"]: row for row in rows if row["key"] in keys}


def equivalents() -> dict[tuple[str, str, str], str]:
    """Why no test can see a change, by the change."""
    rows = tomli.loads(EQUIVALENT.read_text(encoding="utf-8"))["equivalent"]
    return {change(row): row["why"] for row in rows}


def change(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["file"], row["before"], row["after"]


def place(row: dict[str, Any]) -> str:
    return f"{row['file']}:{row['line']}"


def write(
    drawn: dict[str, list[Mutant]],
    outcomes: dict[str, dict[str, Any]],
    equivalent: dict[tuple[str, str, str], str],
) -> None:
    """Write results/mutants.md: the score of each package, and its survivors."""
    scores, survivors = [], []
    for room, mutants in drawn.items():
        rows = [outcomes[mutant.key] for mutant in mutants if mutant.key in outcomes]
        if not rows:
            continue
        counts = Counter(row["outcome"] for row in rows)
        survived = [row for row in rows if row["outcome"] == "survived"]
        reasons = [equivalent.get(change(row)) for row in survived]
        same = len(reasons) - reasons.count(None)
        killed = len(rows) - len(survived)
        cells = [len(rows), killed, counts["killed by time"], len(survived), same]
        score, bar = killed / (len(rows) - same), ROOMS[room][0]
        scores.append([room, *map(str, cells), f"{score:.0%}", f"{bar:.0%}"])
        survivors += [
            [f"`{place(row)}`", short(row), why or "–"]
            for row, why in zip(survived, reasons, strict=True)
        ]
    heads = ["package", "drawn", "killed", "of them by time", "survived"]
    heads += ["of them equivalent", "score", "bar"]
    on = machine(threads=1) | {"mutmut": version("mutmut"), "seed": SEED}
    parts = [
        "# Mutants: does a test fail when the code is changed?",
        "The score is the share of the mutants drawn, without equivalent ones, on which a test of the package fails.",
        block("Scores", heads, scores),
        block("Survivors", ["place", "change", "equivalent, since"], survivors),
        made_on(on),
    ]
    (RESULTS / "mutants.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print("\n\n".join(parts[2:4]))


def short(row: dict[str, Any]) -> str:
    """A change in a table's cell: what differs, and the words around it."""
    old, new = (" ".join(row[each].split()) for each in ("before", "after"))
    start = left_out(old, new)
    end = left_out(old[start:][::-1], new[start:][::-1])
    texts = (text[start : len(text) - end].replace("|", "\\|") for text in (old, new))
    return " becomes ".join(f"`{text}`" for text in texts)


def left_out(first: str, second: str) -> int:
    """How many signs that two texts begin with, whole words, are far from a difference."""
    return first.rfind(" ", 0, max(0, alike(first, second) - _AROUND)) + 1


def alike(first: Sequence[str], second: Sequence[str]) -> int:
    """How many signs or lines two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


if __name__ == "__main__":
    main()
