"""Bugs planted in a copy of the package, one at a time: does the attack that must see each fail?

    PYTHONPATH=benchmarks python benchmarks/attacks/planted.py             # all, some minutes on two cores
    PYTHONPATH=benchmarks python benchmarks/attacks/planted.py --only _io  # bugs in files whose name has a word

Every attack is first run on the package as it is, with the same seeds and numbers: it must not fail there. The time
that this takes is the control for the time limit of the runs with bugs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import click
from attacks.attack import ATTACKS, FIRST_SEED
from attacks.outcomes import FAILED
from recording import machine, record

import rankaware_optim

RESTS_ON = ()  # outcomes: made again at a release
PACKAGE = Path(rankaware_optim.__file__).parent
# a run may take so many times the control's time, and at least so many seconds
SLOWER, AT_LEAST_S = (
    5.0,
    60.0,
)


class Bug(NamedTuple):
    """In `file`, the text `before`, which occurs once, becomes `after`. `count` attempts of `attack` must see it."""

    file: str
    before: str
    after: str
    attack: str
    count: int = 1
    missed_because: str = ""


# fmt: off
BUGS = (
    Bug("_files.py", "if not stat.S_ISREG(status.st_mode):", "if False:", "not regular files"),
    Bug("_files.py", 'flags | getattr(os, "O_NONBLOCK", 0)', "flags", "not regular files"),
    Bug("recipe/_recipe_files.py", "if target.exists() and not target.is_file():", "if False:", "not regular files"),
    Bug("_files.py", "os.replace(made, target)", "target.write_bytes(data)", "ended between calls, saves"),
    Bug("_files.py", "os.fsync(file.fileno())", "pass", "ended between calls, saves", missed_because="a process that ends loses nothing that it wrote: only a power failure would show it"),
    Bug("recipe/_recipe_files.py", "if hashlib.sha256(data).hexdigest() != sha256:", "if False:", "damaged recipes", 200),
    Bug("recipe/_recipe_files.py", "        if data:\n            replace_bytes(beside, data, like=target)\n        replace_bytes(target, encoded)\n", "        replace_bytes(target, encoded)\n        if data:\n            replace_bytes(beside, data, like=target)\n", "ended between calls, saves"),
    Bug("recipe/_recipe_files.py", "return any(_may_name(toml, path.name) for toml in tomls)", "return False", "moved and copied recipes"),
    Bug("recipe/_recipe_files.py", "return True\n    file = ", "return False\n    file = ", "moved and copied recipes"),
    Bug("recipe/_recipe_files.py", 'if not path.name.endswith(f".{sha256[:12]}.safetensors"):', "if False:", "what a save may not replace"),
    Bug("recipe/_recipe_files.py", "if hashlib.sha256(data).hexdigest() != sha256 or _is_named(path):", "if _is_named(path):", "what a save may not replace"),
    Bug("recipe/_recipe_files.py", "if not target.stat().st_mode & stat.S_IWUSR:", "if False:", "what a save may not replace"),
    Bug("recipe/_recipe_files.py", "except (OSError, TypeError, UnicodeEncodeError) as error:", "except (TypeError, UnicodeEncodeError) as error:", "failing calls, saves"),
    Bug("recipe/_recipe_files.py", "_remove_tensors(target, former)", "[f.unlink() for f in target.parent.glob(f'{target.stem}.*.safetensors') if f != beside]", "files that look like ours"),
    Bug("recipe/_sharing.py", "if os.path.commonpath([root, real]) != root:", "if False:", "what a save may not replace"),
    Bug("recipe/_document.py", "if kind.range and not _all_within(value, kind):", "if False:", "impossible numbers in trials"),
    Bug("recipe/_document.py", "if spectrum[0] < -1e-6 * abs(spectrum[-1]):", "if False:", "impossible covariances"),
    Bug("recipe/_document.py", "if not np.allclose(matrix, matrix.T, rtol=1e-6, atol=1e-6 * largest):", "if False:", "impossible covariances"),
    Bug("recipe/_document.py", "if value.dtype.name not in kind.dtypes or value.ndim != kind.axes:", "if False:", "damaged recipes", 300),
    Bug("_printing.py", 'return "".join(sign for sign in text if sign.isprintable() or sign in "\\n\\t")', "return text", "damaged recipes", 600),
    Bug("laws/_toml.py", "        factory = LAWS.get(name)\n    except", "        factory = import_module(name.partition(':')[0]).Law if ':' in name else LAWS.get(name)\n    except", "modules named in recipes", 20),
    Bug("inspection/_inspect_file.py", 'return type(name, (), {"__module__": package})', "return getattr(__import__(package, fromlist=[name]), name)", "modules named in adapters"),
    Bug("inspection/_safetensors.py", "if not os.path.isfile(path):", "if False:", "not regular files"),
    Bug("inspection/_safetensors.py", "if not isinstance(entry, dict) or not isinstance(", "if False and not isinstance(", "damaged adapter files", 1500),
    Bug("inspection/_safetensors.py", "if code is None or tensor.shape not in ((), (1,)):", "if tensor.shape not in ((), (1,)):", "damaged adapter files", 1500),
    Bug("optimizer/_state_dict.py", "if not (is_positive(value) or unpinned or at_start):", "if False:", "impossible rates in checkpoints"),
    Bug("optimizer/_wrapper.py", "vars(self).update(before)", "pass", "damaged checkpoints", 1000),
    Bug("optimizer/_rehearsal.py", 'raise _no_step("state", error) from error', "return", "damaged checkpoints", 1000),
    Bug("calibration/_provenance.py", "    ValueError,\n    ValidationError,\n", "    ValueError,\n", "impossible values in journals"),
    Bug("calibration/_calibration.py", '        trials = self.trials()\n        stored = self.study.user_attrs.get("made_with", {"schema": None})\n', '        stored = self.study.user_attrs.get("made_with", {"schema": None})\n        trials = self.trials()\n', "starts at once, journal"),
    Bug("calibration/_storage.py", "if path.exists() and not path.is_file():", "if False:", "not regular files"),
    Bug("calibration/_storage.py", "os.truncate(path, whole)", "pass", "ended between calls, journal", 40),
    Bug("calibration/_storage.py", "if now.st_ino != self._inode or now.st_size < self._written:", "if False:", "storage changed, journal"),
    Bug("calibration/_storage.py", "if not _is_in_storage(error) and not isinstance(error, ValidationError):", "if True:", "storage changed, SQLite"),
    Bug("calibration/_liveness.py", "if missed + 1 >= _MISSED:", "if False:", "stopped workers, journal"),
    Bug("calibration/_runner.py", "except UpdateFinishedTrialError:", "except ZeroDivisionError:", "stopped workers, journal"),
    Bug("sweeps/_runs.py", "if not is_within(range_, value):", "if False:", "damaged sweeps", 500),
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
    with (
        tempfile.TemporaryDirectory(prefix="planted-") as folder,
        ThreadPoolExecutor(workers) as pool,
    ):
        kinds = sorted({(bug.attack, bug.count) for bug in bugs})
        controls = dict(
            zip(
                kinds,
                pool.map(lambda kind: attacked(PACKAGE.parent, *kind), kinds),
                strict=True,
            )
        )
        for (attack, count), (failures, _, seconds) in controls.items():
            print(
                f"control: {attack}, {count}: {failures} failed, {seconds:.0f} s",
                flush=True,
            )

        def planted(number: int) -> dict[str, Any]:
            bug = bugs[number]
            copy = with_bug(bug, Path(folder) / str(number))
            failures, words, seconds = attacked(
                copy, bug.attack, bug.count, controls[bug.attack, bug.count][2]
            )
            shutil.rmtree(copy)
            print(
                f"{'seen  ' if failures else 'MISSED'} {bug.file}: {bug.before[:60]!r}, {seconds:.0f} s: {words[:120]}",
                flush=True,
            )
            return row_of(bug, failures, controls[bug.attack, bug.count][0])

        rows = list(pool.map(planted, range(len(bugs))))
    if not only:
        write(rows)


def with_bug(bug: Bug, folder: Path) -> Path:
    """A folder with a copy of the package that has the bug."""
    copy = folder / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.before) != 1:
        raise click.ClickException(
            f"{bug.file} has {text.count(bug.before)} times: {bug.before}"
        )
    path.write_text(text.replace(bug.before, bug.after), encoding="utf-8")
    return folder


def attacked(
    package: Path, attack: str, count: int, control: float = 0.0
) -> tuple[int, str, float]:
    """Run one piece of an attack on a package. Return the failures, the first in words, and the seconds."""
    script = Path(__file__).with_name("attack.py")
    command = [
        sys.executable,
        str(script),
        "--piece",
        attack,
        str(FIRST_SEED),
        "--size",
        str(count),
    ]
    paths = [str(package), str(script.parents[1]), *filter(None, sys.path)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    began = time.perf_counter()
    limit = (
        ATTACKS[attack].patience if not control else max(AT_LEAST_S, SLOWER * control)
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return 1, f"more than {limit:.0f} s", time.perf_counter() - began
    seconds = time.perf_counter() - began
    if done.returncode:
        return (
            1,
            f"the process ended with {done.returncode}: {done.stderr[-200:]}",
            seconds,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    return found["counts"].get(FAILED, 0), next(iter(found["failures"]), ""), seconds


def row_of(bug: Bug, failures: int, without: int) -> dict[str, Any]:
    change = " becomes ".join(
        f"`{' '.join(text.split())}`".replace("|", "\\|")
        for text in (bug.before, bug.after)
    )
    return {
        "file": bug.file,
        "bug": change,
        "attack": bug.attack,
        "attempts": bug.count,
        "failed": failures,
        "without the bug": without,
        "seen": bool(failures) and not without,
    }


def write(rows: list[dict[str, Any]]) -> None:
    seen = sum(row["seen"] for row in rows)
    notes = [f"Of {len(rows)} bugs, {seen} are seen. Bar: all but two."]
    for bug, row in zip(BUGS, rows, strict=True):
        if not row["seen"]:
            notes.append(
                f"Missed in {bug.file}: {bug.missed_because or 'not known why'}."
            )
    notes.append(
        "An attack of which all calls are tried counts as one attempt. SQLite's own calls are not reached, since it makes "
        "them in C: it is attacked by kills at random moments."
    )
    record(
        "planted",
        "Bugs planted in the package, and the attack that must see each",
        rows,
        machine(threads=1),
        notes,
    )


if __name__ == "__main__":
    main()
