"""A recipe's two files: what is there after a kill, beside another save or reader, and what a save leaves alone."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from rankaware_optim import Recipe, RecipeError
from rankaware_optim._files import read_bytes

from ..helpers.recipes import RECIPE, TENSORS, tensors_of

ROOT = Path(__file__).parents[2]
HANG = 120  # seconds


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> list[list[str]]:
    """The lines of helpers/torn_saves.py."""
    command = [
        sys.executable,
        "-m",
        "tests.helpers.torn_saves",
        str(tmp_path_factory.mktemp("torn")),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert not ended.returncode, ended.stderr
    return [line.split() for line in ended.stdout.splitlines()]


@pytest.mark.xdist_group("torn saves")
def test_a_killed_save_leaves_one_whole_recipe(attacked):
    """Killed before any of its file operations, a save leaves the old recipe or the new one, each with its trials."""
    names = [name for kind, _, name, _ in attacked if kind == "killed"]
    assert names == sorted(names, reverse=True)
    assert set(names) == {"old", "new"}
    assert {whole for kind, _, _, whole in attacked if kind == "killed"} == {"whole"}


@pytest.mark.xdist_group("torn saves")
def test_a_reader_finds_one_whole_recipe(attacked):
    """A save between any two of a reader's file operations gives it the new recipe or the old one, no error.

    The old one may lack its trials, which the save removed.
    """
    names = [name for kind, _, name, _ in attacked if kind == "read"]
    assert len(names) >= 2
    assert set(names) == {"old", "new"}


def test_two_saves_at_once_leave_one_whole_recipe(tmp_path):
    """Of different recipes saved over one path at the same time one stays, with its own tensors and no other file."""
    target, kinds = tmp_path / "r.toml", [replace(RECIPE, name=name) for name in "ab"]
    kinds += [
        replace(made, tensors={**TENSORS, "seed": TENSORS["seed"] + 1})
        for made in kinds
    ]
    for number in range(20):
        pair = kinds[number % 4], kinds[(number + 1 + number // 4) % 4]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda made: made.save(target), pair, timeout=HANG))
        found = Recipe.load(target)
        assert any(
            made.name == found.name
            and np.array_equal(made.tensors["seed"], found.tensors["seed"])
            for made in pair
        )
        assert {target, tensors_of(target)} <= set(tmp_path.iterdir())


def test_a_save_while_another_removes_keeps_its_trials(tmp_path, monkeypatch):
    """A save that names a file again, just as another save found it unused and removes it, has its trials."""
    target = tmp_path / "r.toml"
    other = replace(RECIPE, tensors={**TENSORS, "seed": TENSORS["seed"] + 1})
    RECIPE.save(target)
    trials, unlink = tensors_of(target), Path.unlink

    def save_then_unlink(path: Path, missing_ok: bool = False) -> None:
        if path == trials:
            monkeypatch.setattr(Path, "unlink", unlink)
            RECIPE.save(target)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", save_then_unlink)
    other.save(target)
    assert np.array_equal(Recipe.load(target).tensors["seed"], TENSORS["seed"])


STORED = Path(__file__).parent / "stored"
FORMER = sorted(path.name for path in STORED.glob("*.toml"))


@pytest.fixture(params=FORMER)
def former(request, tmp_path) -> Path:
    """A recipe that a former package wrote, in a folder of its own."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    return tmp_path / request.param


def test_there_is_a_former_recipe_of_every_schema():
    """Stored are recipes of schema 1 and 2."""
    assert [
        re.search(r"(?m)^schema = (\d)$", (STORED / name).read_text())[1]
        for name in FORMER
    ] == ["1", "2"]


def test_a_former_recipe_is_read_and_written_anew(former):
    """Its rates, covariance, trials and hash are those of the recipe that is written of it, in the schema of today."""
    found = Recipe.load(former)
    again = found.save(former.with_name("again.toml"))
    assert "schema = 3\n" in again.read_text()
    assert Recipe.load(again) == found
    assert Recipe.load(again).tag == found.tag
    assert tensors_of(former).exists()


def test_a_former_recipe_needs_its_tensors(former):
    """Its covariance is there, so without them it is an error."""
    tensors_of(former).unlink()
    with pytest.raises(RecipeError, match=r"cannot be read.* Copy both files"):
        Recipe.load(former)


def test_lengths_of_a_former_recipe_are_ignored_with_a_note(former):
    """The rate at other lengths is the recipe's, which a note says."""
    plain, text = Recipe.load(former), former.read_text()
    former.write_text(
        text.replace("[horizon]\n", "[horizon]\ntried = [[50, 0.1, 0.02]]\n")
    )
    found = Recipe.load(former)
    assert found.lr == plain.lr
    assert any("several lengths" in note for note in found.notes)


@pytest.mark.parametrize("name", ["best_lr", "fitted_lr"])
def test_a_bad_fitted_rate_is_named_as_in_its_file(name, tmp_path):
    """Whichever name the file has for the fitted optimum is the path that an error says."""
    target = RECIPE.save(tmp_path / "r.toml")
    if name == "best_lr":
        target.write_text(
            target.read_text()
            .replace("schema = 3", "schema = 1")
            .replace("fitted_lr = ", "best_lr = ")
        )
    for line in (f"{name} = -1.0", ""):
        target.write_text(re.sub(f"(?m)^{name} = .*$", line, target.read_text()))
        with pytest.raises(RecipeError) as caught:
            Recipe.load(target)
        assert caught.value.cause.endswith(f"@ rate.{name}")


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize(
    ("umask", "former", "then"),
    [(0o077, None, 0o600), (0o002, None, 0o664), (0o022, 0o640, 0o640)],
)
def test_files_have_the_mode_that_they_should(umask, former, then, tmp_path):
    """New files have what the umask leaves, and a recipe saved over keeps its mode, its tensors too."""
    target, before = tmp_path / "r.toml", os.umask(umask)
    try:
        if former is not None:
            RECIPE.save(target).chmod(former)
        replace(RECIPE, tensors={**TENSORS, "seed": TENSORS["seed"] + 1}).save(target)
    finally:
        os.umask(before)
    assert {
        stat.S_IMODE(path.stat().st_mode) for path in (target, tensors_of(target))
    } == {then}


def test_a_link_stays_a_link(tmp_path):
    """Saving through a symlink writes the recipe that it points to, and reading through it finds the tensors there."""
    (tmp_path / "store").mkdir()
    link, made = tmp_path / "r.toml", tmp_path / "store" / "v1.toml"
    link.symlink_to(made)
    for name in ("first", "second"):
        assert replace(RECIPE, name=name).save(link) == link
        assert link.is_symlink()
        assert Recipe.load(link).name == Recipe.load(made).name == name
    assert set((tmp_path / "store").iterdir()) == {made, tensors_of(made)}


def test_a_newer_recipe_is_not_overwritten(tmp_path):
    """A recipe of a newer schema is refused with its number, and both its files stay as they are."""
    target = RECIPE.save(tmp_path / "r.toml")
    target.write_text(target.read_text().replace("schema = 3", "schema = 7"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RecipeError, match="newer schema, 7"):
        RECIPE.save(target)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


UNREADABLE = [
    {"fitted_lr": 1e-40},
    {"notes": (3,)},
    {"settings": {"x": 2**70}},
    {"steps": -1},
]
UNREADABLE += [{"covariance": np.eye(3) * math.nan}, {"tensors": {"lr": np.zeros(2)}}]


@pytest.mark.parametrize("change", UNREADABLE)
def test_what_could_not_be_read_again_is_not_saved(change, tmp_path):
    """A value that `load` would refuse is refused by `save`, and the recipe that was there stays."""
    target = RECIPE.save(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="impossible value"):
        replace(RECIPE, **change).save(target)
    assert Recipe.load(target).tag == RECIPE.tag


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX")
def test_a_pipe_is_no_recipe(tmp_path):
    """A pipe in the place of either file is an error at once, for nobody writes to it."""
    target = RECIPE.save(tmp_path / "r.toml")
    for path in (tensors_of(target), target):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(RecipeError, match="not a regular file"):
            Recipe.load(target)
    with pytest.raises(RecipeError, match="not a regular file"):
        RECIPE.save(target)


def test_a_file_is_read_up_to_a_size(tmp_path):
    """What is longer than asked for is an OSError with the size, not memory."""
    (tmp_path / "x").write_bytes(b"1234")
    assert read_bytes(tmp_path / "x", 4) == b"1234"
    with pytest.raises(OSError, match="longer than 3 bytes"):
        read_bytes(tmp_path / "x", 3)


# --- what belongs to others -----------------------------------------------------------------------------------------

NEXT = replace(RECIPE, name="next", tensors={**TENSORS, "seed": TENSORS["seed"] + 1})
KEPT = {
    "renamed": os.rename,
    "copied": shutil.copy,
    "a hard link": os.link,
    "a symbolic link": lambda target, other: (
        os.rename(target, other),
        os.symlink(other.name, target),
    ),
}


@pytest.mark.parametrize("how", KEPT)
def test_a_recipe_kept_under_another_name_keeps_its_trials(how, tmp_path):
    """A recipe that was renamed, copied or linked has its trials after another save under its first name."""
    target, other = RECIPE.save(tmp_path / "r.toml"), tmp_path / "other.toml"
    KEPT[how](target, other)
    NEXT.save(target)
    assert not Recipe.load(other).missing
    assert Recipe.load(other) == (NEXT if how == "a symbolic link" else RECIPE)
    assert Recipe.load(target) == NEXT


def test_a_save_removes_the_trials_that_it_replaces(tmp_path):
    """The trials' file that the replaced recipe named goes, if no other recipe in the folder names it."""
    target = RECIPE.save(tmp_path / "r.toml")
    NEXT.save(tmp_path / "other.toml")
    former = tensors_of(target)
    NEXT.save(target)
    assert not former.exists()
    assert set(tmp_path.iterdir()) == {
        *(target, tensors_of(target)),
        *(tmp_path / "other.toml", tensors_of(tmp_path / "other.toml")),
    }


OTHERS = [b"[tensors]\nfile = ", b"\xff", b"[" * 5000, b"#" * 300_000]


@pytest.mark.parametrize("text", OTHERS, ids=["cut", "no text", "too deep", "too long"])
def test_a_toml_that_cannot_be_read_may_name_the_trials(text, tmp_path):
    """Beside a TOML that cannot be read, a save removes no trials."""
    target = RECIPE.save(tmp_path / "r.toml")
    former = tensors_of(target)
    (tmp_path / "other.toml").write_bytes(text)
    NEXT.save(target)
    assert former.exists()
    (tmp_path / "other.toml").unlink()


FOREIGN = [
    "r.0123456789ab.safetensors",
    ".r.toml.abcdefgh",
    ".r.toml.01234567",
    "r.safetensors",
    "r.toml.bak",
]


def test_files_that_look_like_ours_are_left_alone(tmp_path):
    """Files of others stay, whatever their names, and although they hold a covariance."""
    for name in FOREIGN:
        (tmp_path / name).write_bytes(save({"fit.covariance": np.eye(3)}))
    for made in (RECIPE, NEXT, RECIPE):
        made.save(tmp_path / "r.toml")
    assert {path.name for path in tmp_path.iterdir()} == {
        *FOREIGN,
        "r.toml",
        tensors_of(tmp_path / "r.toml").name,
    }


def test_a_recipe_that_names_a_file_of_others_does_not_remove_it(tmp_path):
    """A replaced TOML may name a file of weights, even with its hash or with a hash in its name. The file stays."""
    weights = save({"w": np.ones(3)})
    digest = hashlib.sha256(weights).hexdigest()
    for file, sha256 in (
        ("model.safetensors", digest),
        ("model.0123456789ab.safetensors", "0123456789ab" + digest[12:]),
        ("../model.safetensors", digest),
    ):
        target = RECIPE.save(tmp_path / "in" / "r.toml")
        text = re.sub(r"(?m)^file = .*$", f'file = "{file}"', target.read_text())
        target.write_text(re.sub(r"(?m)^sha256 = .*$", f'sha256 = "{sha256}"', text))
        theirs = [tmp_path / "in" / Path(file).name, tmp_path / "in" / file]
        for path in theirs:
            path.write_bytes(weights)
        NEXT.save(target)
        assert all(path.read_bytes() == weights for path in theirs)


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("mode", [0o444, 0o466, 0o044])
def test_a_recipe_that_its_owner_may_not_write_is_not_replaced(mode, tmp_path):
    """A recipe without its owner's write bit is refused, root or not, and both its files stay as they are."""
    target = RECIPE.save(tmp_path / "r.toml")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    target.chmod(mode)
    with pytest.raises(
        RecipeError, match=r"read-only\. Make it writable, or name another file"
    ):
        NEXT.save(target)
    target.chmod(0o644)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="there are no pipes among the files")
def test_a_save_that_is_refused_writes_nothing(tmp_path):
    """Over a pipe or a folder of the recipe's name nothing is saved, also no tensors."""
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    before = sorted(tmp_path.iterdir())
    for path in before:
        with pytest.raises(RecipeError, match="not a regular file"):
            RECIPE.save(path)
    assert sorted(tmp_path.iterdir()) == before
