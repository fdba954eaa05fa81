"""Files of others beside a recipe: what merely looks like ours, and recipes that were renamed, copied or linked.

None of them may be changed or removed by a save, and each recipe among them keeps its rates and its trials.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tomli
import tomli_w
from attacks.outcomes import Attack, Outcomes
from attacks.victim import SHIPPED
from safetensors.numpy import save_file

import rankaware_optim as ra

OLD = ra.Recipe.load(SHIPPED)
NEW = replace(OLD, name="new", tensors={**OLD.tensors, "lr": 2.0 * OLD.tensors["lr"]})


def is_one_of(path: Path, *recipes: ra.Recipe) -> None:
    """Check that the file is one of these recipes, with its rate and its trials."""
    found = ra.Recipe.load(path)
    same = [one for one in recipes if (one.name, one.tag) == (found.name, found.tag)]
    if not same or found.at().lr != same[0].at().lr:
        raise AssertionError(f"{path.name} is the recipe {found.tag}")
    if found.tensors.keys() != same[0].tensors.keys():
        raise AssertionError(f"{path.name} has lost its trials")
    if not np.array_equal(found.tensors["lr"], same[0].tensors["lr"]):
        raise AssertionError(f"{path.name} has the trials of another recipe")


def tensors_of(path: Path) -> Path:
    return path.with_name(
        tomli.loads(path.read_text(encoding="utf-8"))["tensors"]["file"]
    )


# --- files that look like ours --------------------------------------------------------------------------------------

LOOKS = (
    "{stem}.safetensors",
    "{stem}.0123456789ab.safetensors",
    ".{stem}.toml.abcdefgh",
    ".{stem}.toml.0a1b2c3d",
    ".{stem}.safetensors.abcdefgh",
    ".{stem}.0123456789ab.safetensors.abcdefgh",
    "{stem}.toml.rankaware.lock",
    "{stem}.lock",
    "{stem}.json",
    "other.toml",
)


def look_alikes(path: Path) -> list[Path]:
    """Write files of others whose names look like ours; one of them also holds a tensor that is called as ours."""
    made = [path.with_name(name.format(stem=path.stem)) for name in LOOKS]
    for file in made:
        file.write_bytes(f"# of someone else: {file.name}".encode())
    save_file({"fit.covariance": np.eye(3), "model.weight": np.ones(4)}, made[0])
    return made


# --- recipes that were moved or copied ------------------------------------------------------------------------------


def moved(path: Path) -> Path:
    return path.rename(path.with_name("moved.toml"))


def copied(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_name("copied.toml")))


def hard_linked(path: Path) -> Path:
    made = path.with_name("linked.toml")
    os.link(path, made)
    return made


def moved_with_its_tensors(path: Path) -> Path:
    """Both files in a folder of their own."""
    folder = path.parent / "kept"
    folder.mkdir()
    tensors_of(path).rename(folder / tensors_of(path).name)
    return path.rename(folder / path.name)


def copied_and_broken(path: Path) -> Path:
    """A copy that cannot be read for now, and so may name the tensors."""
    made = copied(path)
    made.write_bytes(made.read_bytes() + _BROKEN)
    return made


_BROKEN = b"\xff"

WAYS: tuple[Callable[[Path], Path], ...] = (
    moved,
    copied,
    hard_linked,
    moved_with_its_tensors,
    copied_and_broken,
)


def others_of(path: Path) -> dict[Path, bytes]:
    """Files of others beside a recipe, with a copy and a link of it, and their contents."""
    made = [*look_alikes(path), copied(path), hard_linked(path), tensors_of(path)]
    return {file: file.read_bytes() for file in made}


def are_there(others: dict[Path, bytes]) -> None:
    lost = [file.name for file in others if not file.exists()]
    changed = [
        file.name
        for file, held in others.items()
        if file.exists() and file.read_bytes() != held
    ]
    if lost or changed:
        raise AssertionError(f"of others, {lost} are gone and {changed} changed")


# --- the attacks ----------------------------------------------------------------------------------------------------


def run_look_alikes(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = Outcomes()
    for name in LOOKS:
        mine = folder / name.strip(".").replace("{stem}", "r")
        mine.mkdir()
        outcomes.attempt(name, partial(beside_look_alikes, mine / "r.toml", name))
    return outcomes


def beside_look_alikes(path: Path, name: str) -> None:
    OLD.save(path)
    others = {
        file: file.read_bytes()
        for file in look_alikes(path)
        if file.name == name.format(stem=path.stem)
    }
    for recipe in (NEW, OLD, NEW):
        recipe.save(path)
        is_one_of(path, recipe)
        are_there(others)


def run_moved(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = Outcomes()
    for way in WAYS:
        for number in (1, 2):  # saves afterwards
            mine = folder / f"{way.__name__}-{number}"
            mine.mkdir()
            outcomes.attempt(
                (way.__name__, number), partial(kept, way, mine / "r.toml", number)
            )
    return outcomes


def kept(way: Callable[[Path], Path], path: Path, number: int) -> None:
    OLD.save(path)
    other = way(path)
    for recipe in (NEW, OLD)[:number]:
        recipe.save(path)
    other.write_bytes(other.read_bytes().removesuffix(_BROKEN))
    is_one_of(other, OLD)


# --- what a save may not replace ------------------------------------------------------------------------------------


def names_a_model(folder: Path) -> list[Path]:
    """The recipe names a file of others, and has its hash."""
    model = folder / "model.safetensors"
    save_file({"weight": np.ones(4)}, model)
    naming(
        folder / "r.toml", model.name, hashlib.sha256(model.read_bytes()).hexdigest()
    )
    return [model]


def names_what_it_did_not_write(folder: Path) -> list[Path]:
    """The recipe names a file whose name has the recipe's hash, and whose contents have another."""
    model, sha256 = folder / f"r.{'0' * 12}.safetensors", "0" * 64
    save_file({"weight": np.ones(4)}, model)
    naming(folder / "r.toml", model.name, sha256)
    return [model]


def names_what_lies_elsewhere(folder: Path) -> list[Path]:
    """The recipe names a file of another folder, as it would be called here."""
    (folder / "other").mkdir()
    model = folder / "other" / tensors_of(folder / "r.toml").name
    shutil.copy(tensors_of(folder / "r.toml"), model)
    naming(
        folder / "r.toml",
        f"other/{model.name}",
        hashlib.sha256(model.read_bytes()).hexdigest(),
    )
    return [model]


def naming(path: Path, file: str, sha256: str) -> None:
    document = tomli.loads(path.read_text(encoding="utf-8"))
    document["tensors"] = {"file": file, "sha256": sha256}
    path.write_text(tomli_w.dumps(document), encoding="utf-8")


def read_only(folder: Path) -> list[Path]:
    (folder / "r.toml").chmod(0o444)
    return [folder / "r.toml", tensors_of(folder / "r.toml")]


STATES = (
    names_a_model,
    names_what_it_did_not_write,
    names_what_lies_elsewhere,
    read_only,
)


def run_states(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = Outcomes()
    for state in STATES:
        mine = folder / state.__name__
        mine.mkdir()
        outcomes.attempt(state.__name__, partial(left, state, mine), ra.RecipeError)
    for linked in ("README.md", "rankaware", "rankaware/recipe.toml"):
        mine = folder / linked.replace("/", "-")
        mine.mkdir()
        outcomes.attempt(
            f"{linked} is a link", partial(inside, linked, mine), ra.RecipeError
        )
    return outcomes


def left(state: Callable[[Path], list[Path]], folder: Path) -> None:
    OLD.save(folder / "r.toml")
    others = {file: file.read_bytes() for file in state(folder)}
    try:
        NEW.save(folder / "r.toml")
    finally:
        are_there(others)


def inside(linked: str, folder: Path) -> None:
    """An adapter in which something is a link to outside."""
    adapter, outside = folder / "adapter", folder / "outside"
    (adapter / "rankaware").mkdir(parents=True)
    outside.mkdir()
    OLD.save(outside / "recipe.toml")
    (outside / "README.md").write_text("# Of others\n")
    place = adapter / linked
    if linked == "rankaware":
        place.rmdir()
    place.symlink_to(outside if linked == "rankaware" else outside / place.name)
    others = {file: file.read_bytes() for file in outside.iterdir()}
    try:
        NEW.save_beside(adapter)
    finally:
        are_there(others)
        if {*outside.iterdir()} != others.keys():
            raise AssertionError("something was written outside the adapter's folder")


ATTACKS = (
    Attack("files that look like ours", 1, 1, run_look_alikes),
    Attack("moved and copied recipes", 1, 1, run_moved),
    Attack("what a save may not replace", 1, 1, run_states),
)
