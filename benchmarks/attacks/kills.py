"""Kills at any moment: of calibrations on a journal, SQLite and PostgreSQL, and of a process that saves recipes.

A calibration is killed one to four times, then called once more. No trial that had ended may be lost or run twice, none
may be left running, and the recipe must be that of a calibration that was not killed. A process that saves two recipes
in turn is killed. Its file must then hold one of the two, complete, and the next save must leave no other file.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from attacks.outcomes import FAILED, HANG_S, HELD, Attack, Outcomes
from attacks.victim import SHIPPED, TRIALS

import rankaware_optim as ra
from rankaware_optim.calibration._optuna import close_storage
from rankaware_optim.calibration._storage import open_storage
from rankaware_optim.calibration._trials import Trials


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


def kill_calibrations(url: str, seed: int, count: int, folder: Path) -> Outcomes:
    """Kill calibrations on the storage `url`, which may contain {folder}; "" is a journal."""
    chance, outcomes = random.Random(seed), Outcomes()
    with victims() as run:
        for number in range(2):  # the first also waits for the server's imports
            straight = folder / f"straight-{number}"
            straight.mkdir(parents=True)
            storage = (url or "{folder}/study.journal").format(folder=straight)
            name = f"straight-{seed}-{number}"
            seconds = run(what="calibrate", storage=storage, folder=str(straight), name=name)
        expected = recipe_of(straight)
        kills = 0
        while kills < count:
            mine = folder / f"{seed}-{kills}"
            mine.mkdir()
            storage = (url or "{folder}/study.journal").format(folder=mine)
            job = {"what": "calibrate", "storage": storage, "folder": str(mine), "name": f"study-{seed}-{kills}"}
            times = min(chance.randint(1, 4), count - kills)
            before = outcomes.counts[HELD]
            outcomes.attempt((seed, kills), partial(killed, run, job, times, seconds, chance, expected), limit=100.0)
            outcomes.counts[HELD if outcomes.counts[HELD] > before else FAILED] += times - 1
            kills += times
    return outcomes


def recipe_of(folder: Path) -> str:
    return ra.Recipe.load(folder / "recipe.toml").tag.partition(" ")[0]


def killed(run: Any, job: dict[str, Any], times: int, seconds: float, chance: random.Random, expected: str) -> None:
    kept: dict[int, Any] = {}
    for _ in range(times):
        run(kill=chance.uniform(0.0, 1.1 * seconds), **job)
        for trial in filter(lambda trial: trial.state.is_finished(), trials_of(job)):
            if kept.setdefault(trial.number, trial.datetime_complete) != trial.datetime_complete:
                raise AssertionError(f"trial {trial.number} was run twice")
    if (took := run(**job)) > 3 * seconds + HANG_S:
        raise AssertionError(f"the last call took {took:.0f} s, an undisturbed one takes {seconds:.0f} s")
    after = trials_of(job)
    lost = [number for number, ended in kept.items() if after[number].datetime_complete != ended]
    counted, running = len(Trials.read(after).counted()), Trials.read(after).running()
    if lost or running or counted != TRIALS:
        raise AssertionError(f"lost {lost}, left running {len(running)}, counted {counted} of {TRIALS}")
    if (found := recipe_of(Path(job["folder"]))) != expected:
        raise AssertionError(f"the recipe is {found}, not {expected}")


def trials_of(job: dict[str, Any]) -> list[optuna.trial.FrozenTrial]:
    storage = job["storage"]
    if "://" not in storage and not Path(storage).exists():
        return []
    held = open_storage(storage if "://" in storage else Path(storage))
    try:
        names = optuna.get_all_study_names(held)
        return optuna.load_study(study_name=job["name"], storage=held).trials if job["name"] in names else []
    finally:
        close_storage(held)


# --- saving ---------------------------------------------------------------------------------------------------------


def kill_saves(seed: int, count: int, folder: Path) -> Outcomes:
    chance, outcomes = random.Random(seed), Outcomes()
    recipe = ra.Recipe.load(SHIPPED)
    with victims() as run:
        for number in range(count):
            mine = folder / f"{seed}-{number}"
            mine.mkdir(parents=True)
            recipe.save(mine / "recipe.toml")
            run(kill=chance.uniform(0.0, 0.08), what="save", folder=str(mine))
            outcomes.attempt((seed, number), lambda mine=mine: whole(mine, recipe))
    return outcomes


def whole(folder: Path, recipe: ra.Recipe) -> None:
    path = folder / "recipe.toml"
    found = ra.Recipe.load(path)
    if found.name not in (recipe.name, "other"):
        raise AssertionError(f"a recipe named {found.name!r}")
    recipe.save(path)
    names = sorted(file.name for file in folder.iterdir() if not file.name.endswith(".lock"))
    if len(names) != 2:
        raise AssertionError(f"the folder holds {names}, not only the recipe's files")


def on(url: str) -> Any:
    return lambda seed, count, folder: kill_calibrations(url, seed, count, folder)


ATTACKS = (
    Attack("kills, journal", 400, 50, on("")),
    Attack("kills, SQLite", 200, 50, on("sqlite:///{folder}/study.db")),
    Attack("kills, save", 400, 100, kill_saves),
    *(
        Attack("kills, PostgreSQL", 100, 50, on(url))
        for url in filter(None, [os.environ.get("RANKAWARE_POSTGRESQL", "")])
    ),
)
