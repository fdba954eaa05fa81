"""Ctrl-C at any moment, then the same call in the same process, which must go on at once and end correctly.

A process calibrates, and its own timer sends it SIGINT at a moment drawn from the length of a whole calibration. The
two calls must end within ten times what one takes undisturbed, with every trial counted and none left running.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from attacks.outcomes import Attack, Outcomes
from attacks.victim import TRIALS, calibration, storage_in, trials_of

import rankaware_optim as ra
from rankaware_optim.calibration._trials import Trials


def run_on(url: str) -> Any:
    def run(seed: int, count: int, folder: Path) -> Outcomes:
        torch.set_num_threads(1)
        chance, outcomes = random.Random(seed), Outcomes()
        began = time.perf_counter()
        # also imports modules, which Ctrl-C must not interrupt
        calibration(storage_in(folder, url), name="straight")
        calibration(storage_in(folder, url), name="again")
        seconds = (time.perf_counter() - began) / 2
        handles, limit = open_files(), 10 * seconds
        for number in range(count):
            delay = chance.uniform(0.0, 1.1 * seconds)
            name = f"study-{seed}-{number}"
            call = partial(interrupted, folder, url, name, delay, limit)
            outcomes.attempt((seed, number), call, limit=limit)
        outcomes.attempt("files", lambda: closed(handles))
        return outcomes

    return run


def closed(handles: int) -> None:
    """Check that no file is left open, except those that an error's traceback held."""
    gc.collect()
    if (now := open_files()) > handles + 5:
        raise AssertionError(f"{now} files are open, before there were {handles}")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def interrupted(folder: Path, url: str, name: str, delay: float, limit: float) -> None:
    storage, verbosity = storage_in(folder, url), optuna.logging.get_verbosity()
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        try:
            calibration(storage, name=name)
        except ra.CalibrationInterrupted:
            pass
        finally:
            timer.cancel()
            timer.join()
        time.sleep(0)  # a late signal is raised here
    except KeyboardInterrupt:
        pass
    if optuna.logging.get_verbosity() != verbosity:
        raise AssertionError("Optuna's verbosity was left changed")
    # ends the process, and fails its piece, if the call does not return
    signal.alarm(int(limit) + 1)
    recipe = calibration(storage, name=name)
    signal.alarm(0)
    trials = Trials.read(trials_of(storage, name))
    if (
        len(trials.counted()) != TRIALS
        or trials.running()
        or len(recipe.tensors["lr"]) != TRIALS
    ):
        raise AssertionError(
            f"counted {len(trials.counted())} of {TRIALS}, running {len(trials.running())}"
        )


ATTACKS = (
    Attack("interrupts, journal", 100, 25, run_on("")),
    Attack("interrupts, SQLite", 100, 25, run_on("sqlite:///{folder}/study.db")),
)
