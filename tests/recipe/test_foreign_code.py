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

from rankaware_optim import LawError, RankAwareError, RankAwareOptimizer, Recipe
from rankaware_optim.laws import get_law
from rankaware_optim.optimizer import effective_lr

from ..helpers.models import mlp
from ..helpers.recipes import RECIPE

ROOT = Path(__file__).parents[2]
HANG = 300  # seconds
LAW = re.compile(r"\[law\.law\].*?(?=\n\[)", re.DOTALL)

# What a recipe names: a module of ours, one of Python that finds and runs tests, and one in a package.
MODULES = ["payload:Adam", "unittest.__main__:X", "payload.Adam"]


KINDS = {"texts", "measured", "law", "outer-law", "text-law", "tensors"}


def measured(optimizer: str) -> str:
    """The table of a law that recipes of former packages hold, which ran the optimizer that it names."""
    lines = [
        'name = "measured"',
        "tokens = 8",
        "steps = 16",
        "seed = 0",
        "target = 1.0",
        "ratio = 1.0",
    ]
    return "\n".join(
        ["[law.law]", *lines, f'optimizer = "{optimizer}"', 'settings = "{}"', ""]
    )


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
            "measured": LAW.sub(lambda _: measured(module), text),  # noqa: B023
            "law": LAW.sub(f'[law.law]\nname = "{module}"\n', text),
            "outer-law": text.replace('name = "power"', f'name = "{module}"'),
            "text-law": LAW.sub("", text).replace(
                'name = "power"', f'name = "power"\nlaw = "{module}"'
            ),
            "tensors": re.sub(r'(?m)^file = ".*"$', f'file = "{module}"', text),
        }
        for name, changed in laws.items():
            assert changed != text
            if number and name not in ("measured", "law"):
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
    """A recipe whose law is "module:Law" is refused by every reader: install it as an entry point, or pass law=."""
    for line in read:
        if line["recipe"].startswith(("law-", "outer-law-")):
            assert re.search(
                "Install it as an entry point .*or pass law=", line["said"]
            ), line


def test_the_law_of_the_user_may_be_a_module(tmp_path, monkeypatch):
    """law="module:Law" that the user types is imported."""
    (tmp_path / "mine.py").write_text("from rankaware_optim import Constant as Law\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_law("mine:Law").name == "constant"


def former(folder: Path, **changes) -> Recipe:
    """A recipe with the law `measured`, as packages that had it wrote it."""
    path = replace(RECIPE, **changes).save(folder / "former.toml")
    text = LAW.sub(
        lambda _: measured("torch.optim.sgd:SGD"), path.read_text(encoding="utf-8")
    )
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path)


@pytest.mark.parametrize("fan_in", [64, None])
@pytest.mark.parametrize("init", ["A", "B"])
def test_a_recipe_of_the_former_law_answers_at_its_own_reference(
    init, fan_in, tmp_path
):
    """Its reference has its rate, in the optimizer too, after a save too. Any other configuration is refused."""
    made = former(
        tmp_path, reference=replace(RECIPE.reference, init=init, fan_in=fan_in)
    )
    for found in (made, Recipe.load(made.save(tmp_path / "again.toml"))):
        assert found.tag == made.tag
        assert (
            found.at().lr == found.at(rank=4).lr == found.at(4, alpha=8).lr == RECIPE.lr
        )
        opt = RankAwareOptimizer(
            mlp((4, 4), scalings=2.0, width=64, init=init),
            "adamw",
            recipe=found,
            other_lr=1e-3,
        )
        assert {
            effective_lr(g) for g in opt.param_groups if g["lora_role"] in "AB"
        } == {RECIPE.lr}
        other = [
            {"rank": 64},
            {"alpha": 4},
            {"rank": 4, "alpha": 4},
            {"method": "full"},
            {"init": "AB".strip(init)},
        ]
        for where in (*other, *([{"fan_in": 128}] if fan_in else ())):
            with pytest.raises(
                RankAwareError,
                match=r"no longer part .* Calibrate again, or .* law=|fan-in",
            ):
                found.at(**where)
        with pytest.raises(LawError, match="Calibrate again"):
            RankAwareOptimizer(
                mlp((8, 8), width=64, init=init), "adamw", recipe=found, other_lr=1e-3
            )


def test_the_former_law_cannot_be_asked_for():
    """law="measured" is an unknown law."""
    with pytest.raises(LawError, match="Unknown law 'measured'"):
        get_law("measured")
