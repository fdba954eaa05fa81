"""Tests that a recipe is only data: no function that reads it imports or runs a module that its file names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import pytest
import tomli
import tomli_w
import torch

import rankaware_optim as ra
from rankaware_optim.cli import main as command
from rankaware_optim.laws import get_law

from ..helpers.models import mlp
from ..helpers.recipes import RECIPE

pytestmark = pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")

MODULES = ["foreign_payload:Adam", "foreign_payload.Adam", "foreign_payload"]


def optimizer(path: Path, kind: object = "adamw", **options: object) -> None:
    opt = ra.RankAwareOptimizer(
        mlp((4, 8), width=64), kind, recipe=path, other_lr=1e-3, **options
    )
    str(opt.report())
    opt.load_state_dict(opt.state_dict())


def run(*words: object) -> None:
    command.main([str(word) for word in words], standalone_mode=False)


READERS: dict[str, Callable[[Path], object]] = {
    "load": ra.Recipe.load,
    "at": lambda path: ra.Recipe.load(path).at(rank=8, alpha=4, init="B"),
    "at full": lambda path: ra.Recipe.load(path).at(method="full"),
    "save": lambda path: ra.Recipe.load(path).save(path.with_name("saved.toml")),
    "text": lambda path: ra.Recipe.load(path).explain(),
    "optimizer": optimizer,
    "another optimizer": lambda path: optimizer(path, torch.optim.SGD),
    "other steps": lambda path: optimizer(path, steps=50, batch=8),
    "rankaware lr": lambda path: run("lr", path, "--rank", 8),
    "rankaware show": lambda path: run("show", path),
    "rankaware report": lambda path: run("report", path, "-o", path.with_suffix(".html")),
}  # fmt: skip


@pytest.fixture
def payload(tmp_path, monkeypatch) -> Path:
    """Return a folder on the import path with a module that leaves a file behind when it is run."""
    (tmp_path / "foreign_payload.py").write_text("open('ran', 'w')\nclass Adam: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_by_all(path: Path) -> list[str]:
    """Return the errors that the readers raise for a recipe, after checking that none of them ran the foreign module."""
    said = []
    for read in READERS.values():
        try:
            read(path)
        except (ra.RankAwareError, click.ClickException) as error:
            said.append(str(error))
    assert "foreign_payload" not in sys.modules
    assert not Path("ran").exists()
    return said


@pytest.mark.parametrize("module", MODULES)
def test_no_reader_runs_what_a_recipe_names(module, payload):
    """No reader imports a module that is named in the strings of a recipe."""
    texts = {
        "name": module,
        "optimizer": module,
        "settings": {"weight_decay": 0.1, "betas": ("a", module), module: module},
        "other_rates": {module: "base"},
        "layers": {module: 64.0},
        "versions": {"torch": module},
        "source": {"train": module},
        "notes": (module,),
    }
    read_by_all(replace(RECIPE, **texts).save(payload / "r.toml"))


LAWS = [
    *({"name": name} for name in MODULES),
    {"name": "power", "law": {"name": MODULES[0]}},
    {"name": "power", "law": MODULES[0]},
]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_that_is_a_module_is_refused_by_every_reader(law, payload):
    """If the law of a recipe is a module such as "module:Law", every reader raises an error about the law."""
    path = RECIPE.save(payload / "r.toml")
    document = {**tomli.loads(path.read_text()), "law": law}
    path.write_text(tomli_w.dumps(document))
    said = read_by_all(path)
    assert len(said) == len(READERS)
    assert all("law" in text for text in said)


def test_the_law_of_the_user_may_be_a_module(tmp_path, monkeypatch):
    """A law such as "module:Law" is imported if the user passes it."""
    (tmp_path / "mine.py").write_text("from rankaware_optim import Constant as Law\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_law("mine:Law").name == "constant"
