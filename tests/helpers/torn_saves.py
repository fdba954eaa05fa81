"""Saves over a recipe that are killed before one of their file operations, and reads that a save comes between.

Started as a script with a folder, so that Python and torch are imported once. A line is what was done, before which
operation, the name that a reader finds then, and whether the recipe has its trials.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from rankaware_optim import Recipe

from .recipes import RECIPE, TENSORS

OLD = replace(RECIPE, name="old")
NEW = replace(RECIPE, name="new", tensors={**TENSORS, "seed": TENSORS["seed"] + 1})
OPERATIONS = ("open", "os.rename", "os.remove", "os.chmod")


def before(operation: int, act: Callable[[], None]) -> None:
    """Let `act` run before this process's n-th file operation from here on."""
    seen = count(1)

    def hook(event: str, _: object) -> None:
        if event in OPERATIONS and next(seen) == operation:
            act()

    sys.addaudithook(hook)


def in_a_child(work: Callable[[], None]) -> bool:
    """Whether `work` came to its end in a separate process, which an audit hook does not outlive."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def state(target: Path) -> tuple[str, str]:
    found = Recipe.load(target)
    if found.missing:
        return found.name, "rates"
    right = (OLD if found.name == "old" else NEW) == found
    return found.name, "whole" if right else "mixed"


def killed(target: Path, operation: int) -> bool:
    def work() -> None:
        before(operation, lambda: os.kill(os.getpid(), signal.SIGKILL))
        NEW.save(target)

    return in_a_child(work)


def read(target: Path, operation: int) -> bool:
    """A reader of the old recipe, with a save of the new one before its n-th operation, says what it found."""
    saved = []

    def work() -> None:
        before(operation, lambda: saved.append(NEW.save(target)))
        print("read", operation, *state(target), flush=True)
        os._exit(0 if saved else 1)

    return not in_a_child(work)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")  # trials of another save
    torch.set_num_threads(1)
    for attack in (killed, read):
        for operation in count(1):
            target = OLD.save(folder / f"{attack.__name__}{operation}" / "r.toml")
            over = attack(target, operation)
            if attack is killed:
                print("killed", operation, *state(target), flush=True)
                NEW.save(target)
                print("saved", operation, *state(target), flush=True)
            if over:
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]))
