"""Kills at random moments of calibrations on databases, whose calls are made in C (between_calls.py has the others).

A calibration is killed one to four times, then called once more. No trial that had ended may be lost or run twice, none
may be left running, and the recipe must be that of a calibration that was not killed.
"""

from __future__ import annotations

import os
import random
from functools import partial
from pathlib import Path
from typing import Any

from attacks.outcomes import FAILED, HANG_S, HELD, Attack, Outcomes
from attacks.victim import SILENCE_S, TRIALS, finished, is_complete, prepare, victims

import rankaware_optim as ra


def on(url: str) -> Any:
    """The attack on the storage `url`, which may contain {folder}."""

    def run(seed: int, count: int, folder: Path) -> Outcomes:
        prepare()
        chance, outcomes = random.Random(seed), Outcomes()
        with victims() as victim:
            for number in range(2):  # the first also waits for the server's imports
                straight = job_in(
                    folder / f"straight-{number}", url, f"straight-{seed}-{number}"
                )
                seconds = victim(**straight)
            expected, kills = recipe_of(straight), 0
            while kills < count:
                job = job_in(folder / str(kills), url, f"study-{seed}-{kills}")
                times = min(chance.randint(1, 4), count - kills)
                before = outcomes.counts[HELD]
                attempt = partial(killed, victim, job, times, seconds, chance, expected)
                outcomes.attempt((seed, kills), attempt, limit=100.0)
                outcomes.counts[HELD if outcomes.counts[HELD] > before else FAILED] += (
                    times - 1
                )
                kills += times
        return outcomes

    return run


def job_in(folder: Path, url: str, name: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    return {"storage": url.format(folder=folder), "folder": str(folder), "name": name}


def recipe_of(job: dict[str, Any]) -> str:
    return ra.Recipe.load(Path(job["folder"]) / "recipe.toml").tag.partition(" ")[0]


def killed(
    victim: Any,
    job: dict[str, Any],
    times: int,
    seconds: float,
    chance: random.Random,
    expected: str,
) -> None:
    storage, name = job["storage"], job["name"]
    ended: dict[int, Any] = {}
    for _ in range(times):
        victim(kill=chance.uniform(0.0, 1.1 * seconds), **job)
        for number, one in finished(storage, name).items():
            if ended.setdefault(number, one) != one:
                raise AssertionError(f"trial {number} was run twice")
    if (took := victim(**job)) > 3 * seconds + 4 * SILENCE_S + HANG_S:
        raise AssertionError(
            f"the last call took {took:.0f} s, an undisturbed one takes {seconds:.0f} s"
        )
    is_complete(storage, TRIALS, ended, name)
    if (found := recipe_of(job)) != expected:
        raise AssertionError(f"the recipe is {found}, not {expected}")


ATTACKS = (
    Attack("kills, SQLite", 200, 50, on("sqlite:///{folder}/study.db")),
    *(
        Attack("kills, PostgreSQL", 100, 50, on(url))
        for url in filter(None, [os.environ.get("RANKAWARE_POSTGRESQL", "")])
    ),
)
