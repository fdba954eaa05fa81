"""Tests of `rankaware fit`: exports of trackers, the comparison of laws, and the user's own laws."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import rankaware_optim as ra
from rankaware_optim.cli import main

WANDB = "Name,State,config.learning_rate,lora_r,lora_alpha,eval/loss,train/loss\n"
CHEN = """\
from dataclasses import dataclass
from typing import ClassVar
from rankaware_optim.laws import Law

@dataclass(frozen=True)
class Chen(Law):
    name: ClassVar[str] = "chen"
    def multiplier(self, factor, reference):
        return ((reference.rank or 1) / (factor.rank or 1)) ** 0.5

class NoLaw:
    pass
"""


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Return a folder with a tracker's export, in which two runs crashed, and with a module that has a law."""
    rows = [
        f"r{rank}{x},finished,{2.0**x},{rank},{rank},{1 + (x + 9) ** 2 / 20},9\n"
        for rank in (4, 64)
        for x in range(-12, -6)
    ]
    rows += [f"c,crashed,{2.0**-6},4,4,0.1,9\n", f"d,crashed,{2.0**-5},4,4,,9\n"]
    (tmp_path / "runs.csv").write_text(WANDB + "".join(rows))
    (tmp_path / "chenlaw.py").write_text(CHEN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("chenlaw", None)
    if "chen" in ra.laws._text._LAWS.registered:
        ra.register_law(ra.laws._text._LAWS.registered["chen"], remove=True)


def test_a_trackers_export_is_fitted_in_one_command(folder):
    """The usual names of columns are recognised, --where leaves out crashed runs, and the columns read are printed."""
    done = run("fit", "runs.csv", "--where", "State=finished", "-o", "r.toml")
    assert done.exit_code == 0, done.output
    assert "lr from config.learning_rate" in " ".join(done.output.split())
    recipe = ra.Recipe.load("r.toml")
    assert 2**-9.5 < recipe.fitted_lr < 2**-8.5
    assert len(recipe.tensors["lr"]) == 12


def test_columns_may_be_named(folder):
    """`rankaware fit` reads the column that --columns names."""
    done = run("fit", "runs.csv", "--columns", "rank=lora_r,loss=train/loss")
    assert "loss from train/loss" in " ".join(done.output.split())


WRONG = [
    (("--columns", "loss=eval/los"), "mean 'eval/loss'"),
    (
        ("--columns", "loss"),
        "--columns must be of the form name=value, but it is 'loss'",
    ),
    (("--where", "State=done"), "finished (12), crashed (2)"),
    (("--where", "State"), "--where must be of the form name=value, but it is 'State'"),
    (("--law", "nowhere:Law"), "nowhere"),
    (("--law", "chenlaw:NoLaw"), "not a subclass of rankaware_optim.Law"),
    (("--law", "chen"), "--law package.module:Class"),
    (("--compare", "falling,nobody"), "nobody"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_a_wrong_option_is_one_sentence_and_no_file(words, message, folder):
    """A wrong option ends the command with an error that names it, and no file is written."""
    before = sorted(folder.iterdir())
    done = run("fit", "runs.csv", "-o", "r.toml", *words)
    assert done.exit_code != 0
    assert message in " ".join(done.output.split())
    assert not (folder / "r.toml").exists()
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


def test_laws_are_compared_without_a_recipe(folder):
    """--compare prints a table with one row per law, and writes a recipe only if -o is passed."""
    where = ("--where", "State=finished")
    done = run("fit", "runs.csv", *where, "--compare", "falling,chenlaw:Chen")
    assert done.exit_code == 0, done.output
    for word in ("falling", "chen", "octaves off", "excess loss"):
        assert word in done.output
    assert "base rate" not in done.output
    both = run("fit", "runs.csv", *where, "--compare", "mua", "-o", "r.toml")
    assert "octaves off" in both.output
    assert Path("r.toml").exists()


def test_a_law_of_ones_own_works_in_every_command(folder):
    """A recipe of the user's own law is fitted and read with --law module:Class, and without it an error names --law."""
    law = ("--law", "chenlaw:Chen")
    where = ("--where", "State=finished")
    assert run("fit", "runs.csv", *where, *law, "-o", "r.toml").exit_code == 0
    readers = [("lr", "--rank", 8), ("show",), ("report", "-o", "r.html")]
    for name, *words in readers:
        done = run(name, "r.toml", *words, *law)
        assert done.exit_code == 0, done.output
    ra.register_law(ra.laws.get_law("chenlaw:Chen"), remove=True)
    for name, *words in readers:
        done = run(name, "r.toml", *words, *(["--force"] if "-o" in words else []))
        assert done.exit_code == 1
        assert "--law package.module:Class" in done.output


def test_a_law_that_is_not_the_recipes_is_refused(folder):
    """Passing a --law that is not the law of the recipe raises an error that names both laws."""
    run("fit", "runs.csv", "--where", "State=finished", "-o", "r.toml")
    done = run("lr", "r.toml", "--law", "chenlaw:Chen")
    assert done.exit_code != 0
    assert (
        "'chen' was passed as --law, but the recipe contains the law 'mua'"
        in " ".join(done.output.split())
    )
