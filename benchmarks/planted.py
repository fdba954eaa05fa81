"""Bugs planted in a copy of the package, one at a time: does a test of the room see each?

    PYTHONPATH=benchmarks python benchmarks/planted.py                 # all: results/planted.md
    PYTHONPATH=benchmarks python benchmarks/planted.py --only _files   # bugs in files whose name has a word
    PYTHONPATH=benchmarks python benchmarks/planted.py --places 20     # functions to plant new ones in, drawn by a seed

The tests named with a bug must pass on the package as it is, and one of them must fail on the copy with the bug.
"""

from __future__ import annotations

import ast
import os
import random
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
    Bug("inspection/_pairs.py", "return float(size * math.prod(kernel))", "return float(size)", "tests/inspection"),
    Bug("inspection/_file_pairs.py", "declared._replace(alpha=alpha, rslora=False)", "declared._replace(alpha=alpha)", "tests/inspection"),
    Bug("fitting/_observations.py", "values = values[np.isfinite(values)]\n    with np.errstate", "values = np.where(np.isfinite(values), values, 0.0)\n    with np.errstate", "tests/fitting"),
    Bug("reports/_picture.py", "scores = (best - 0.1 * height, best + height)", "scores = (0.0, best + height)", "tests/reports"),
    Bug("transfer/_convert.py", "batch = None if origin.batch is None else target.batch", "batch = target.batch", "tests/transfer"),
    Bug("sweeps/_fit.py", '(x - _BELOW if end == "lowest" else x, _EDGE_SD)', "(x, _EDGE_SD)", "tests/sweeps"),
    Bug("sweeps/_runs.py", 'in ("-1", "-1.0")', 'in ("-1",)', "tests/sweeps"),
    Bug("optimizer/_parts.py", 'part.group["params"] = [params[i] for i in part.at]', 'part.group["params"] = [params[i] for i in reversed(part.at)]', "tests/optimizer"),
    Bug("optimizer/_rates.py", "return iter(self._by_name())", "return iter(sorted(self._by_name()))", "tests/optimizer/test_groups.py"),
    Bug("calibration/_calibration.py", "self._fit: tuple[int, Fit | None] = (-1, None)", "self._fit: tuple[int, Fit | None] = (1, None)", "tests/calibration"),
    Bug("inspection/_pairs.py", "rank >= 1 and float(rank).is_integer()", "rank > 1 and float(rank).is_integer()", "tests/inspection"),
    Bug("optimizer/_state_dict.py", "if value.dim() == axes > 0]", "if value.dim() >= axes > 0]", "tests/optimizer/test_checkpoints.py"),
    Bug("optimizer/_unmoved.py", "size / (root + eps), 0.0)", "size / (square.double() + eps).sqrt(), 0.0)", "tests/optimizer/test_unmoved.py"),
    Bug("fitting/_posterior.py", "mean = 0.0 if law.falls_with_rank else DRIFT[reference.init][0]", "mean = DRIFT[reference.init][0]", "tests/fitting"),
    Bug("calibration/_liveness.py", "        if self.is_alive():\n            self.join(JOIN_S)", "        pass", "tests/calibration/test_resuming.py"),
    Bug("optimizer/_notes.py", "another in {f.init for f in dense(survey.factors)}", "another in {f.init for f in survey.factors}", "tests/optimizer/test_param_groups.py"),
    Bug("inspection/_pairs.py", 'what = "declares no rank" if rank is None else', 'what = "declares no rank" if not rank else', "tests/inspection"),
    Bug("integrations/_attach.py", 'if trainer.optimizer_cls_and_kwargs is None or "recipe" in settings:', "if trainer.optimizer_cls_and_kwargs is None:", "tests/environments/integrations/test_trainers.py"),
    Bug("integrations/_lightning_run.py", "if trainer.global_step > run.steps_taken and run.end_step():", "if run.end_step():", "tests/environments/integrations/test_calibrate_made.py"),
    Bug("_optimizers.py", "or long > 128 * short", "or long >= 128 * short", "tests/test_optimizers_table.py"),
    Bug("_rate.py", "    def __str__(self) -> str:\n        return self.explain()", "    def __str__(self) -> str:\n        return str(self.lr)", "tests/recipe/test_rates.py tests/transfer"),
    Bug("calibration/_runner.py", 'self.calibration.settings = stored.get("settings", {})', "self.calibration.settings = {}", "tests/calibration/test_resuming.py"),
    Bug("laws/_corrections.py", "        if optimizer_family(optimizer_class, settings) in SIGN_LIKE:\n            return super().bind(optimizer_class, settings)\n        return self.law.bind(optimizer_class, settings)", "        if optimizer_family(optimizer_class, settings) in SIGN_LIKE:\n            return super().bind(optimizer_class, settings)\n        return self.law", "tests/laws"),
    Bug("optimizer/_wrapper.py", 'if name == "step" and closure is None:', 'if name == "step":', "tests/optimizer/test_loops.py"),
    Bug("cli/_calibrate.py", "    signal.signal(number, signal.SIG_IGN)\n", "", "tests/cli/test_calibrate.py"),
    Bug("testing/_law.py", "    if read != law:", "    if read is None:", "tests/testing"),
    Bug("inspection/_pairs.py", "for module in (base, pair.owner, pair.owner.get_submodule(inner)):", "for module in (base, pair.owner):", "tests/inspection"),
    Bug("calibration/_liveness.py", "self._seen.get(trial.number, (self, 0))", "self._seen.get(trial.number, (None, 0))", "tests/calibration/test_resuming.py"),
)
# fmt: on


@click.command()
@click.option(
    "--only", default="", help="Plant the bugs of files whose name has this word."
)
@click.option("--workers", default=2, show_default=True)
@click.option("--places", default=0, help="Print so many functions instead.")
@click.option("--seed", default=29, show_default=True, help="That draws them.")
def main(only: str, workers: int, places: int, seed: int) -> None:
    """Plant the bugs, and write which are seen."""
    if places:
        print(*random.Random(seed).sample(functions(), places), sep="\n")
        return
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


def functions() -> list[str]:
    """The package's functions and methods, each as file:line and name."""
    lines = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                file = path.relative_to(PACKAGE)
                lines.append(f"{file}:{node.lineno} {node.name}")
    return lines


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
