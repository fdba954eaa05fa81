"""Saves and studies that end, or whose call fails, at every single call by which they change a file (calls.py).

The recipe on disk must then be the old one or the new one, with its trials, and the next save must go well. A study
must be resumed by the same call, no trial that had ended may be lost or run twice, and its recipe must be that of a
study that was left alone. No file of others may be changed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attacks.bystanders import NEW, OLD, are_there, is_one_of, others_of
from attacks.calls import acting, ends_at, fail
from attacks.outcomes import HANG_S, Attack, Outcomes
from attacks.victim import SILENCE_S, calibration, finished, is_complete, prepare

import rankaware_optim as ra

How = Callable[[int, Callable[[], object]], None]
Run = Callable[[int, int, Path], Outcomes]
README = "# My adapter\n\nHand-written.\n"
EVERY = 500  # more than a study has calls
# small, as it is run for every call
STUDY: dict[str, Any] = {
    "trials": 2,
    "steps": 2,
    "pause": 0.0,
}


# --- saves ----------------------------------------------------------------------------------------------------------


def save(path: Path) -> None:
    NEW.save(path)


def save_beside(path: Path) -> None:
    NEW.save_beside(path.parents[1])


def end(at: int, work: Callable[[], object]) -> None:
    ends_at(at, work)


def fails(at: int, work: Callable[[], object]) -> None:
    """Do `work` with a failing call. It may say so, or do without the call."""
    with acting(at, fail, reads=True), suppress(ra.RecipeError, ra.CalibrationError):
        work()


def torn(how: How, work: Callable[[Path], None], folder: Path, at: int) -> None:
    """Save over a recipe until call `at`, and check what is left."""
    adapter = folder / str(at)
    (adapter / "rankaware").mkdir(parents=True)
    path, readme, weights = (
        adapter / "rankaware" / "recipe.toml",
        adapter / "README.md",
        adapter / "adapter.bin",
    )
    OLD.save(path)
    readme.write_text(README)
    weights.write_bytes(b"weights")
    others = others_of(path) | {weights: b"weights"}
    how(at, lambda: work(path))
    is_one_of(path, OLD, NEW)
    are_there(others)
    if not readme.read_text().startswith(README.rstrip()):
        raise AssertionError(f"the README is {readme.read_text()!r}")
    work(path)
    is_one_of(path, NEW)
    are_there(others)


def run_saves(how: How) -> Run:
    def run(seed: int, count: int, folder: Path) -> Outcomes:
        outcomes = Outcomes()
        torch.set_num_threads(1)
        for work in (save, save_beside):
            mine = folder / work.__name__
            (mine / "adapter" / "rankaware").mkdir(parents=True)
            OLD.save(mine / "adapter" / "rankaware" / "recipe.toml")
            with acting(0, fail, reads=how is fails) as calls:
                work(mine / "adapter" / "rankaware" / "recipe.toml")
            for at in range(1, calls() + 1):
                outcomes.attempt(
                    (work.__name__, at), partial(torn, how, work, mine, at)
                )
        return outcomes

    return run


# --- studies --------------------------------------------------------------------------------------------------------


def study(path: Path) -> ra.Recipe:
    return calibration(path, **STUDY)


def resumed(how: How, folder: Path, expected: str, seconds: float, at: int) -> None:
    """Run a study until call `at`, and resume it."""
    folder = folder / str(at)
    folder.mkdir()
    path = folder / "study.journal"
    others = {
        folder / name: name.encode()
        for name in ("study.journal.bak", "study.journal.lock", ".study.journal.1")
    }
    for file, held in others.items():
        file.write_bytes(held)
    how(at, lambda: study(path))
    ended, began = finished(path), time.perf_counter()
    recipe, took = study(path), time.perf_counter() - began
    if took > 3 * seconds + 2 * SILENCE_S + HANG_S:
        raise AssertionError(
            f"the next call took {took:.0f} s, an undisturbed one takes {seconds:.1f} s"
        )
    is_complete(path, STUDY["trials"], ended)
    if recipe.tag != expected:
        raise AssertionError(f"the recipe is {recipe.tag}, not {expected}")
    are_there(others)


def run_studies(how: How) -> Run:
    def run(seed: int, count: int, folder: Path) -> Outcomes:
        prepare()
        expected = study(
            folder / "first.journal"
        ).tag  # also imports what a study needs
        began = time.perf_counter()
        with acting(0, fail, reads=how is fails) as calls:
            study(folder / "straight.journal")
        seconds, outcomes = time.perf_counter() - began, Outcomes()
        every = range(1, calls() + 1)
        for at in sorted(random.Random(seed).sample(every, min(count, len(every)))):
            outcomes.attempt(
                (seed, at),
                partial(resumed, how, folder, expected, seconds, at),
                limit=60.0,
            )
        return outcomes

    return run


ATTACKS = (
    Attack("ended between calls, saves", 1, 1, run_saves(end)),
    Attack(
        "ended between calls, journal", EVERY, EVERY, run_studies(end), patience=1800.0
    ),
    Attack("failing calls, saves", 1, 1, run_saves(fails)),
    Attack("failing calls, journal", 200, 50, run_studies(fails)),
)
