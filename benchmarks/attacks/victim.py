"""What is attacked: a small calibration on a storage, the checks of its study, and a server that forks processes which
may be killed.

The server is a separate process, so that Python and torch are imported once. It reads a job per line of JSON,
{"storage", "folder", "name", "kill" (seconds, or null)}, and answers with the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from made_up import train

import rankaware_optim as ra
from rankaware_optim.calibration import _liveness
from rankaware_optim.calibration._storage import close_storage, open_storage
from rankaware_optim.calibration._trials import Trials

STEPS, TRIALS = 10, 6
SHIPPED = Path(__file__).parents[2] / "recipes" / "efficientnet-lite0-digits.toml"
SILENCE_S = 0.5


def calibration(
    storage: Any,
    *,
    pause: float = 0.002,
    at: tuple[int, int] = (-1, 0),
    act: Any = None,
    **options: Any,
) -> ra.Recipe:
    """Calibrate by six runs of ten steps around 2^-7, with `pause` seconds per step so that a kill may hit anywhere.

    at: the number of a trial and of its value, before which `act` is called.
    """
    options = {
        "ranks": (2, 4),
        "steps": STEPS,
        "trials": TRIALS,
        "storage": storage,
        "progress": False,
        **options,
    }
    return ra.calibrate(partial(loop, pause=pause, at=at, act=act), "adamw", **options)


def loop(trial: Any, pause: float, at: tuple[int, int], act: Any) -> Iterator[float]:
    """The made-up run."""
    for step, value in enumerate(train(trial, pause)):
        if (trial.number, step) == at:
            act()
        yield value


def prepare() -> None:
    """Let a worker count as dead after half a second without a sign of life, and quieten what is not looked at."""
    _liveness._BEAT_S = SILENCE_S / 5
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # the package has a filter of its own for these
    warnings.simplefilter("ignore", ra.RankAwareWarning)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def storage_in(folder: Path, url: str) -> Any:
    return url.format(folder=folder) if url else folder / "study.journal"


def trials_of(
    storage: Any, name: str = "calibration"
) -> list[optuna.trial.FrozenTrial]:
    """The trials of a study; none if there is no storage or no study."""
    if "://" not in str(storage) and not Path(storage).exists():
        return []
    held = open_storage(storage)
    try:
        names = optuna.get_all_study_names(held)
        return (
            optuna.load_study(study_name=name, storage=held).trials
            if name in names
            else []
        )
    finally:
        close_storage(held)


def finished(storage: Any, name: str = "calibration") -> dict[int, Any]:
    """When each finished trial ended, and its value, by its number."""
    trials = trials_of(storage, name)
    return {
        t.number: (t.datetime_complete, t.value)
        for t in trials
        if t.state.is_finished()
    }


def is_complete(
    storage: Any, expected: int, ended: dict[int, Any], name: str = "calibration"
) -> None:
    """Check that the study has all of its trials, none running, and those that had ended as they were."""
    found, after = trials_of(storage, name), finished(storage, name)
    lost = [number for number, one in ended.items() if after.get(number) != one]
    trials = Trials.read(found)
    counted, running = len(trials.counted()), len(trials.running())
    if lost or running or counted != expected:
        raise AssertionError(
            f"lost or changed {lost}, left running {running}, counted {counted} of {expected}"
        )


# --- a process that may be killed -----------------------------------------------------------------------------------


def do(job: dict[str, Any]) -> None:
    """Do one job, in the forked process."""
    storage = job["storage"]
    recipe = calibration(
        storage if "://" in storage else Path(storage), name=job["name"]
    )
    recipe.save(Path(job["folder"]) / "recipe.toml")


@contextmanager
def victims() -> Iterator[Any]:
    """Yields a function that runs a job in a forked process, checks its exit status, and returns the seconds taken."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", "from attacks.victim import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(kill: float | None = None, **job: Any) -> float:
            began = time.perf_counter()
            print(json.dumps({**job, "kill": kill}), file=server.stdin, flush=True)
            status = int(server.stdout.readline())
            if status != 0 and (kill is None or status != signal.SIGKILL):
                raise AssertionError(f"the victim ended with {status}")
            return time.perf_counter() - began

        yield run
        server.stdin.close()


def main() -> None:
    """Fork a process for every line of standard input."""
    prepare()
    calibration(None, pause=0.0)  # imports everything that a victim needs

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            do(job)
            os._exit(0)
        if job["kill"] is not None:
            time.sleep(job["kill"])
            # not waited for yet, so its process id is not reused
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], flush=True)
