"""What is no regular file, where a file is expected: pipes, sockets, devices, folders and links that lead nowhere.

Each must be refused, in a sentence and at once, by every reader, in a process of its own with little memory.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attacks.bystanders import NEW, OLD, tensors_of
from attacks.calls import in_child
from attacks.outcomes import HANG_S, Attack, Outcomes, Refused
from attacks.victim import calibration, prepare

import rankaware_optim as ra
from rankaware_optim.sweeps import fit_sweep

MEMORY = 2**30  # bytes that a reader may map beside what is mapped


def pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_RDONLY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def nothing(path: Path) -> None:
    path.symlink_to("/dev/null")


def folder_there(path: Path) -> None:
    path.mkdir()


def link_to_nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


KINDS: tuple[Callable[[Path], None], ...] = (
    pipe, a_socket, endless, nothing, folder_there, link_to_nowhere, link_to_itself,
)  # fmt: skip


def a_recipe(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "recipe.toml")
    ra.Recipe.load(folder / "recipe.toml")


def replaced_recipe(folder: Path, make: Callable[[Path], None]) -> None:
    """A save over it. A link to nowhere is a file that is not there yet."""
    make(folder / "recipe.toml")
    try:
        NEW.save(folder / "recipe.toml")
    except ra.RecipeError:
        if len(list(folder.iterdir())) != 1:
            raise AssertionError(
                "the save was refused, but has written something"
            ) from None
        raise
    if make is link_to_nowhere:
        raise ra.RecipeError("It was made.", "")


def a_recipes_tensors(folder: Path, make: Callable[[Path], None]) -> None:
    """A recipe without its tensors still has its rates, so it may be read, without trials."""
    path = OLD.save(folder / "recipe.toml")
    tensors = tensors_of(path)
    tensors.unlink()
    make(tensors)
    found = ra.Recipe.load(path)
    if found.tensors or found.at().lr != OLD.at().lr:
        raise AssertionError("it has trials of no file")
    raise ra.RecipeError("It has no trials.", "")


def an_adapter(folder: Path, make: Callable[[Path], None]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4}))
    make(folder / "adapter_model.safetensors")
    ra.inspect_file(folder)


def an_adapters_file(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "adapter_model.safetensors")
    ra.inspect_file(folder / "adapter_model.safetensors")


def a_sweep(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "sweep.csv")
    fit_sweep(folder / "sweep.csv", optimizer="adamw")


def a_journal(folder: Path, make: Callable[[Path], None]) -> None:
    """A journal that is not there yet is made, also behind a link."""
    make(folder / "study.journal")
    calibration(folder / "study.journal", pause=0.0, trials=1)
    if make is link_to_nowhere:
        raise ra.CalibrationError("It was made.", "")


WRITERS = (replaced_recipe, a_journal)
# not given to writers: with a bug, and run by root, these would replace the machine's own
DEVICES = (
    endless,
    nothing,
)
READERS = (
    a_recipe,
    replaced_recipe,
    a_recipes_tensors,
    an_adapter,
    an_adapters_file,
    a_sweep,
    a_journal,
)


def run(seed: int, count: int, folder: Path) -> Outcomes:
    prepare()
    outcomes = Outcomes()
    limit = HANG_S + 5 * undisturbed(folder)
    for read in READERS:
        for make in KINDS:
            if read in WRITERS and make in DEVICES:
                continue
            mine = folder / f"{read.__name__}-{make.__name__}"
            mine.mkdir()
            what = f"{make.__name__} as {read.__name__}"
            outcomes.attempt(
                what,
                partial(refused, read, mine, make, limit),
                Refused,
                limit=2 * limit,
            )
    return outcomes


def undisturbed(folder: Path) -> float:
    """The seconds of a calibration and of reading a recipe, on this machine."""
    began = time.perf_counter()
    calibration(None, pause=0.0, trials=1)
    ra.Recipe.load(OLD.save(folder / "recipe.toml"))
    return time.perf_counter() - began


def refused(
    read: Callable[[Path, Callable[[Path], None]], None],
    folder: Path,
    make: Callable[[Path], None],
    limit: float,
) -> None:
    def with_little_memory() -> None:
        mapped = (
            int(Path("/proc/self/statm").read_text().split()[0])
            * resource.getpagesize()
        )
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY,) * 2)
        read(folder, make)

    in_child(with_little_memory, ra.RankAwareError, limit)
    raise AssertionError("it was taken for a file")


ATTACKS = (Attack("not regular files", 1, 1, run),)
