"""Saves over an existing recipe that are killed before one of their file operations, and reads
during which a save happens.

Tests start this file as a script with a folder, so that Python and torch are imported only once.
Each printed line says what was done, before which file operation, the name of the recipe that a
reader finds then, and whether that recipe has its trials.
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
    """Call `act` before this process's file operation number `operation`, counted from here on."""
    seen = count(1)

    def hook(event: str, _: object) -> None:
        if event in OPERATIONS and next(seen) == operation:
            act()

    sys.addaudithook(hook)


def in_a_child(work: Callable[[], None]) -> bool:
    """Run `work` in a child process, so that audit hooks end with it, and return whether `work`
    came to its end.
    """
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
    """Print what a reader of the old recipe finds if the new recipe is saved before the reader's
    file operation of this number, and return whether there was no such operation.
    """
    saved = []

    def work() -> None:
        before(operation, lambda: saved.append(NEW.save(target)))
        print("read", operation, *state(target), flush=True)
        os._exit(0 if saved else 1)

    return not in_a_child(work)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")  # about trials that belong to another save
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
