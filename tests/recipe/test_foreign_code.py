"""A recipe is data: no value of its file is ever imported, whichever reader gets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rankaware_optim import Recipe
from rankaware_optim.laws import get_law

from ..helpers.recipes import RECIPE

ROOT = Path(__file__).parents[2]
HANG = 300  # seconds
LAW = re.compile(r"\[law\.law\].*?(?=\n\[)", re.DOTALL)

# What a recipe names: a module of ours, one of Python that finds and runs tests, and one in a package.
MODULES = ["payload:Adam", "unittest.__main__:X", "payload.Adam"]


KINDS = {"texts", "law", "outer-law", "text-law", "tensors"}


def naming(module: str) -> Recipe:
    """A recipe that names a module wherever a text may stand."""
    texts = {module: module}
    return replace(
        RECIPE,
        name=module,
        optimizer=module,
        settings={**texts, "weight_decay": module, "betas": [module, module]},
        other_rates={module: "base"},
        versions=texts,
        source={"train": module, **texts},
        notes=(module,),
    )


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> list[dict]:
    """The lines of helpers/recipe_readers.py."""
    honest, others = (tmp_path_factory.mktemp(name) for name in ("honest", "others"))
    RECIPE.save(honest / "honest.toml")
    (others / "payload.py").write_text("class Adam: pass\n")
    # what unittest.__main__ would find
    (others / "test_payload.py").write_text("open('ran', 'w')\n")
    for number, module in enumerate(MODULES):
        path = naming(module).save(others / f"texts-{number}.toml")
        text = path.read_text(encoding="utf-8")
        laws = {
            "law": LAW.sub(f'[law.law]\nname = "{module}"\n', text),
            "outer-law": text.replace('name = "power"', f'name = "{module}"'),
            "text-law": LAW.sub("", text).replace(
                'name = "power"', f'name = "power"\nlaw = "{module}"'
            ),
            "tensors": re.sub(r'(?m)^file = ".*"$', f'file = "{module}"', text),
        }
        for name, changed in laws.items():
            assert changed != text
            if number and name != "law":
                continue
            (others / f"{name}-{number}.toml").write_text(changed, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "tests.helpers.recipe_readers",
        str(honest / "honest.toml"),
        str(others),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    ended = subprocess.run(
        command,
        env=environment,
        cwd=others,
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert not ended.returncode, ended.stderr
    assert not (others / "ran").exists()
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.xdist_group("readers")
def test_no_reader_imports_what_a_recipe_names(read):
    """Of recipes that name modules in every field, and by any law, no reader imports one."""
    assert {line["recipe"].rpartition("-")[0] for line in read} == KINDS
    assert {
        (line["recipe"], line["reader"], *line["new"]) for line in read if line["new"]
    } == set()


@pytest.mark.xdist_group("readers")
def test_a_law_that_is_a_module_is_refused_with_what_to_do(read):
    """A recipe whose law is "module:Law" is refused by every reader: a package installs it by an entry point."""
    for line in read:
        if line["recipe"].startswith(("law-", "outer-law-")):
            assert re.search("Unknown law .* adds one by the entry", line["said"]), line


def test_the_law_of_the_user_may_be_a_module(tmp_path, monkeypatch):
    """law="module:Law" that the user types is imported."""
    (tmp_path / "mine.py").write_text("from rankaware_optim import Constant as Law\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_law("mine:Law").name == "constant"
