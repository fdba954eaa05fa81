"""`-o`: a command writes over what one like it wrote, and over nothing else."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner

from rankaware_optim.cli._main import main
from rankaware_optim.sweeps import DEMO_SWEEP

from ..helpers.calibrations import calibrate, made_up


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return calibrate(made_up(), trials=6).save(
        tmp_path_factory.mktemp("recipe") / "made.toml"
    )


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


TEXT = b"Notes of many years.\n"
PICTURE = b"\x89PNG\r\n\x1a\n"
FIT = ["fit", DEMO_SWEEP, "--model", "efficientnet-lite0, alpha = rank"]
CALIBRATE = ["calibrate", "loops:train", "--ranks", "2,4", "--steps", 5]
OTHERS = [
    (CALIBRATE, "pyproject.toml", b'[project]\nname = "mine"\n', "a recipe"),
    (CALIBRATE, "settings.toml", b"schema = 1\n[server]\n", "a recipe"),
    (FIT, "pyproject.toml", b'[project]\nname = "mine"\n', "a recipe"),
    (
        ["report", None],
        "index.html",
        b"<!doctype html><title>Mine</title>",
        "a page of `rankaware report`",
    ),
    (["report", None], "made.toml", TEXT, "a page of `rankaware report`"),
    (["plot", None], "made.png", TEXT, "a PNG picture"),
    (["plot", None], "made.svg", PICTURE, "an SVG picture"),
    (["plot", None], "made.jpg", b"\xff\xd8\xff", "a file that this command writes"),
    (["coordcheck"], "made.pdf", PICTURE, "a PDF file"),
]


@pytest.mark.parametrize(
    ("command", "name", "data", "kind"),
    OTHERS,
    ids=[f"{c[0]} {name}" for c, name, *_ in OTHERS],
)
def test_what_is_not_recognised_is_left(command, name, data, kind, recipe, tmp_path):
    """A file of another kind stays as it is; the error comes before any work, in one sentence with its cure."""
    out = tmp_path / name
    out.write_bytes(data)
    done = call(*(recipe if part is None else part for part in command), "-o", out)
    assert done.exit_code == 1
    cure = "Give another file, or remove this one."
    assert (
        done.stderr
        == f"Error: {out} exists and is not {kind}, so it was not overwritten. {cure}\n"
    )
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == data


@pytest.mark.skipif(os.name != "posix", reason="there are no pipes among the files")
def test_a_pipe_is_left(recipe, tmp_path):
    """A pipe that nobody writes to is not opened."""
    os.mkfifo(tmp_path / "made.png")
    assert (
        "is not a PNG picture"
        in call("plot", recipe, "-o", tmp_path / "made.png").stderr
    )


AGAIN = [
    (["report", None], "made.html"),
    (FIT, "made.toml"),
]


@pytest.mark.parametrize(
    ("command", "name"), AGAIN, ids=[f"{c[0]} {name}" for c, name in AGAIN]
)
def test_the_same_command_writes_again(command, name, recipe, tmp_path):
    """An empty file and what the command itself wrote are written over."""
    out = tmp_path / name
    arguments = [*(recipe if part is None else part for part in command), "-o", out]
    out.touch()
    for _ in range(2):
        assert call(*arguments).exit_code == 0
        assert out.stat().st_size
