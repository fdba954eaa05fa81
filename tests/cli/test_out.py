"""`-o`: a command overwrites nothing without --force."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from rankaware_optim.cli import main

from ..helpers.recipes import RECIPE

COMMANDS = {
    "calibrate loops:train --ranks 2,4 --steps 5": "made.toml",
    "fit sweep.csv": "made.toml",
    "report r.toml": "made.html",
    "plot r.toml": "made.png",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_exists_is_left(command, tmp_path, monkeypatch):
    """It stays as it is, and the error comes before any work, in one sentence with its cure."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / COMMANDS[command]
    out.write_text("Notes of many years.\n")
    done = CliRunner().invoke(main, [*command.split(), "-o", out.name])
    assert done.exit_code == 1
    assert done.stderr == f"Error: {out.name} exists. --force overwrites it.\n"
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "Notes of many years.\n"


@pytest.mark.parametrize("order", ["-o page.html --force", "--force -o page.html"])
def test_force_overwrites(order, tmp_path, monkeypatch):
    """With --force the file is written, wherever the option stands."""
    monkeypatch.chdir(tmp_path)
    RECIPE.save("r.toml")
    (tmp_path / "page.html").touch()
    done = CliRunner().invoke(main, ["report", "r.toml", *order.split()])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page.html").stat().st_size
