"""A recipe is data: no text of its file is ever imported or run, whichever reader gets it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click
import pytest
import tomli
import tomli_w
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    """A folder that modules are found in, with a module that leaves a mark where it is run."""
    (tmp_path / "foreign_payload.py").write_text("open('ran', 'w')\nclass Adam: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def naming(document: object, module: str, chosen: Callable[[], bool]) -> object:
    """The document with a module in the place of some of its texts."""
    if isinstance(document, dict):
        return {key: naming(value, module, chosen) for key, value in document.items()}
    if isinstance(document, list):
        return [naming(value, module, chosen) for value in document]
    return module if isinstance(document, str) and chosen() else document


def read_by_all(path: Path) -> list[str]:
    """What every reader says of a recipe. It may refuse it, and runs nothing."""
    said = []
    for read in READERS.values():
        try:
            read(path)
        except (ra.RankAwareError, click.ClickException) as error:
            said.append(str(error))
    assert "foreign_payload" not in sys.modules
    assert not Path("ran").exists()
    return said


FULL = replace(
    RECIPE,
    settings={"weight_decay": 0.1, "betas": ("a", "b"), "foreign_payload:Adam": "x"},
    other_rates={"foreign_payload.Adam": "base"},
    layers={"foreign_payload": 64.0},
    reference=replace(RECIPE.reference, batch=16),
    steps=100,
    versions={"torch": "2.6"},
    source={"train": "train"},
    notes=("a",),
)


@settings(
    deadline=None,
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(module=st.sampled_from(MODULES), data=st.data())
def test_no_reader_runs_what_a_recipe_names(module, data, payload):
    """Of recipes that name modules in any of their texts no reader imports one."""
    path = FULL.save(payload / "r.toml")
    document = naming(
        tomli.loads(path.read_text()), module, lambda: data.draw(st.booleans())
    )
    path.write_text(tomli_w.dumps(document))
    with suppress(FileNotFoundError):
        read_by_all(path)


LAWS = [("law", {"name": "power", "law": MODULES[0]}), ("law", {"name": MODULES[0]})]
LAWS += [("law", {"name": "power", "law": {"name": name}}) for name in MODULES]
LAWS += [("optimizer", {"class": name, "settings": {}}) for name in MODULES]


@pytest.mark.parametrize(("table", "value"), LAWS)
def test_a_law_that_is_a_module_is_refused_with_what_to_do(table, value, payload):
    """A recipe whose law is "module:Law" is refused by every reader. One of another optimizer is only another one's."""
    path = FULL.save(payload / "r.toml")
    document = {**tomli.loads(path.read_text()), table: value}
    path.write_text(tomli_w.dumps(document))
    said = read_by_all(path)
    if table == "law":
        assert len(said) == len(READERS)
        assert all("law" in text for text in said)
    else:
        assert not said


def test_the_law_of_the_user_may_be_a_module(tmp_path, monkeypatch):
    """law="module:Law" that the user types is imported."""
    (tmp_path / "mine.py").write_text("from rankaware_optim import Constant as Law\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_law("mine:Law").name == "constant"
