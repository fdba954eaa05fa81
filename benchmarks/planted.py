"""Bugs planted in a copy of the package, one at a time: does a test of the room see each?

    PYTHONPATH=benchmarks python benchmarks/planted.py                 # all: results/planted.md
    PYTHONPATH=benchmarks python benchmarks/planted.py --only _files   # bugs in files whose name has a word

The tests named with a bug must pass on the package as it is, and one of them must fail on the copy with the bug.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
from recording import machine, record

RESTS_ON = ()  # outcomes: made again at a release
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rankaware_optim"
LIMIT_S = 300.0  # of the tests of a bug; one that takes longer is seen


class Bug(NamedTuple):
    """In `file` of the package the text `before`, which occurs once, becomes `after`. One of `tests` must fail."""

    file: str
    before: str
    after: str
    tests: str
    missed_because: str = ""

    @property
    def text(self) -> str:
        """The whole file with the bug."""
        text = (PACKAGE / self.file).read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            times = text.count(self.before)
            raise click.ClickException(f"{self.file} has {times} times: {self.before}")
        return text.replace(self.before, self.after)


# fmt: off
BUGS = (
    Bug("_files.py", "if not stat.S_ISREG(status.st_mode):", "if False:", "tests/recipe/test_files.py"),
    Bug("_files.py", "os.replace(made, target)", "target.write_bytes(data)", "tests/recipe/test_files.py"),
    Bug("_files.py", "os.fsync(file.fileno())", "pass", "tests/recipe/test_files.py", missed_because="a process that ends loses nothing that it wrote: only a power failure would show it"),
    Bug("_files.py", "stat.S_IMODE(os.stat(target).st_mode)", "0o600", "tests/recipe/test_files.py"),
    Bug("_printing.py", 'return "".join(sign for sign in text if sign.isprintable() or sign in "\\n\\t")', "return text", "tests/test_printable.py"),
    Bug("laws/_mua.py", "return 2.0 / (p + math.sqrt(p * p + 4.0 * q))", "return 1.0 / p", "tests/laws"),
    Bug("laws/_law.py", "tried = min(max(ratio, 1 / BATCH_REACH), BATCH_REACH)", "tried = ratio", "tests/laws tests/recipe/test_horizon.py"),
    Bug("recipe/_ground.py", "if abs(math.log2(width / own)) <= math.log2(SAME_WIDTH):", "if True:", "tests/recipe/test_ground.py"),
    Bug("recipe/_ground.py", "return one.endswith(two) or two.endswith(one)", "return one == two", "tests/recipe/test_ground.py"),
    Bug("recipe/_ground.py", "return replace(recipe, covariance=wider), sentence", "return recipe, sentence", "tests/recipe/test_ground.py"),
    Bug("inspection/_file_pairs.py", "if not os.path.isfile(path):", "if False:", "tests/inspection/test_files.py"),
    Bug("inspection/_file_pairs.py", "except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:", "except (OSError, TypeError) as error:", "tests/inspection/test_files.py"),
    Bug("inspection/_file_pairs.py", 'names = [name for name in names if name.rpartition(".")[2] == "alpha"]', "names = []", "tests/inspection/test_files.py"),
    Bug("fitting/_observations.py", "margin = max(DIVERGED * gain, CLEAR", "margin = max(10 * DIVERGED * gain, CLEAR", "tests/fitting"),
    Bug("fitting/_observations.py", "gap = max(0.0, recent(curve, TAIL) - recent(beside[: len(curve)], TAIL))", "gap = 0.0", "tests/fitting"),
    Bug("recipe/_recipe_files.py", "if hashlib.sha256(data).hexdigest() != sha256:", "if False:", "tests/recipe/test_files.py"),
    Bug("recipe/_recipe_files.py", "_TROUBLE = (ArithmeticError, OSError, ", "_TROUBLE = (ArithmeticError, ", "tests/recipe/test_files.py"),
    Bug("recipe/_recipe_files.py", "if (array.dtype.kind, array.ndim) != _TRIAL.get(name):", "if False:", "tests/recipe/test_files.py"),
    Bug("recipe/_recipe_files.py", "if not (unknown | ((rates >= low) & (rates <= high))).all():", "if False:", "tests/recipe/test_files.py"),
    Bug("recipe/_schema.py", "if spectrum[0] < -1e-6 * abs(spectrum[-1]):", "if False:", "tests/recipe/test_files.py"),
    Bug("recipe/_schema.py", "rtol=1e-6, atol=1e-6 * largest", "rtol=1e6, atol=1e6 * largest", "tests/recipe/test_files.py"),
    Bug("recipe/_schema.py", "if not math.isclose(self.rate.lr, lr, rel_tol=1e-6):", "if False:", "tests/recipe/test_files.py"),
    Bug("optimizer/_wrapper.py", "vars(self).update(before)", "pass", "tests/optimizer/test_checkpoints.py"),
    Bug("optimizer/_state_dict.py", "return is_positive(value) or (is_number(value) and value == 0)", "return True", "tests/optimizer/test_checkpoints.py"),
    Bug("transfer/_convert.py", "moved = assigner.assign(factor.name, factor, rule).multiplier", "moved = multiplier", "tests/transfer"),
    Bug("sweeps/_runs.py", "tuple(dict.fromkeys(run for run in runs if run))", "tuple(run for run in runs if run)", "tests/sweeps"),
    Bug("calibration/_storage.py", "if not path.is_file():", "if False:", "tests/calibration"),
    Bug("calibration/_storage.py", "os.truncate(self._path, whole)", "pass", "tests/calibration/test_storage.py"),
    Bug("optimizer/_state_dict.py", "if ours != theirs:", "if False:", "tests/optimizer/test_checkpoints.py"),
    Bug("optimizer/_state_dict.py", "if len(set(keys)) < len(keys):", "if False:", "tests/optimizer/test_checkpoints.py"),
    Bug("optimizer/_state_dict.py", "if {str(key) for key in keys if isinstance(key, int)} & state.keys():", "if False:", "tests/optimizer/test_checkpoints.py"),
    Bug("optimizer/_state_dict.py", "if canonical_name(str(saved)) != canonical_name(str(here)):", "if False:", "tests/optimizer/test_groups.py"),
    Bug("optimizer/_wrapper.py", "if hidden is None or hidden.parts.stepping:", "if hidden is None:", "tests/optimizer/test_loops.py"),
    Bug("optimizer/_parts.py", "return value.clone()", "return value", "tests/optimizer/test_loops.py"),
    Bug("inspection/_inspect_file.py", "if path.suffix.lower() in _PICKLES:", "if path.suffix in _PICKLES:", "tests/inspection/test_files.py"),
    Bug("calibration/_liveness.py", "missed = missed + 1 if beat == last else 0", "missed = missed + 1", "tests/calibration"),
    Bug("calibration/_liveness.py", "if missed >= MISSED:", "if False:", "tests/calibration"),
    Bug("calibration/_liveness.py", "if own is not None and trial.number == own.number:", "if False:", "tests/calibration", missed_because="its own heartbeat is new at every look, so a worker never misses itself"),
    Bug("calibration/_runner.py", "if self._place in _INSIDE.get():", "if False:", "tests/calibration/test_storage.py"),
    Bug("calibration/_storage.py", "path = Path(os.path.realpath(path))", "pass", "tests/calibration/test_storage.py"),
)
# fmt: on


@click.command()
@click.option(
    "--only", default="", help="Plant the bugs of files whose name has this word."
)
@click.option("--workers", default=2, show_default=True)
def main(only: str, workers: int) -> None:
    """Plant the bugs, and write which are seen."""
    bugs = [bug for bug in BUGS if only in bug.file]
    rooms = sorted({path for bug in bugs for path in bug.tests.split()})
    init = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    if is_seen("__init__.py", init, rooms, 5 * LIMIT_S):
        raise click.ClickException("Without a bug a test fails, or takes too long.")
    with ThreadPoolExecutor(workers) as pool:
        rows = list(pool.map(row_of, bugs))
    if not only:
        seen = sum(row["seen"] for row in rows)
        notes = [f"Of {len(rows)} bugs, {seen} are seen. Bar: all but two."]
        notes += [
            f"Missed in {bug.file}: {bug.missed_because or 'not known why'}."
            for bug, row in zip(bugs, rows, strict=True)
            if not row["seen"]
        ]
        title = "Bugs planted in the package, and the tests that must see each"
        record("planted", title, rows, machine(threads=1), notes)


def row_of(bug: Bug) -> dict[str, Any]:
    change = " becomes ".join(
        f"`{' '.join(text.split())}`".replace("|", "\\|")
        for text in (bug.before, bug.after)
    )
    seen = is_seen(bug.file, bug.text, bug.tests.split())
    print("seen  " if seen else "MISSED", bug.file, change, flush=True)
    return {"file": bug.file, "bug": change, "tests": bug.tests, "seen": seen}


def is_seen(
    file: str, text: str, tests: Sequence[str], limit_s: float = LIMIT_S
) -> bool:
    """Whether a test fails on a copy of the package in which `file` has this text."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        ignored = shutil.ignore_patterns("__pycache__")
        for path in ROOT.iterdir():
            if path.name in (PACKAGE.name, "tests"):
                shutil.copytree(path, copy / path.name, ignore=ignored)
            elif not path.name.startswith("."):
                (copy / path.name).symlink_to(path)
        (copy / PACKAGE.name / file).write_text(text, encoding="utf-8")
        options = ("-x", "-q", "-p", "no:cacheprovider", f"--basetemp={copy / 'tmp'}")
        command = [sys.executable, "-m", "pytest", "-n", "0", *options, *tests]
        paths = os.pathsep.join([str(copy), *filter(None, sys.path)])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=limit_s)  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
        return done.returncode != 0


if __name__ == "__main__":
    main()
