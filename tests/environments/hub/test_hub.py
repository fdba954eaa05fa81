"""Recipes on a Hub that speaks a few of its routes on this machine, by huggingface_hub's own functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankaware_optim import Recipe

from ...helpers.recipes import RECIPE
from .server import Hub, serving

pytest.importorskip("huggingface_hub")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[3]
REPO = "me/digits-lora"
HEAD = "from rankaware_optim import Recipe, RecipeError\nfrom tests.helpers.recipes import RECIPE\n"
PUSH = f"print(RECIPE.push_to_hub({REPO!r}, base_model='org/base', token='t'))"
PULL = f"Recipe.from_hub({REPO!r}, token='t').save(sys.argv[1])"


@pytest.fixture
def hub():
    with serving() as made:
        yield made


@pytest.fixture
def run(hub, tmp_path):
    """Runs code in a separate process against the Hub of this test, with this cache: its output, or its error."""

    def ran(
        code: str, *arguments: object, cache: str = "cache", **environment: str
    ) -> str:
        own = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / cache),
            "HF_HUB_OFFLINE": "0",
        }
        own |= {
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "MPLBACKEND": "agg",
        }
        own["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        command = [
            sys.executable,
            "-c",
            f"import sys\n{HEAD}{code}",
            *map(str, arguments),
        ]
        ended = subprocess.run(
            command,
            env={**os.environ, **own, **environment},
            capture_output=True,
            text=True,
        )
        return (
            ended.stdout.strip()
            if not ended.returncode
            else ended.stderr.strip().splitlines()[-1]
        )

    return ran


def test_a_recipe_travels_by_the_hub(hub: Hub, run, tmp_path):
    """Pushed and read elsewhere it is the same recipe, and once read it is there with HF_HUB_OFFLINE=1 too."""
    assert run(PUSH) == f"{hub.url}/{REPO}/commit/{hub.sha(REPO)}"
    pushed = hub.repos[REPO]
    ends = {name.rpartition(".")[2] for name in pushed if name.startswith("rankaware/")}
    assert ends == {"toml", "safetensors", "png"}
    assert pushed["rankaware/recipe.png"].startswith(b"\x89PNG")
    assert not run(PULL, tmp_path / "online.toml", cache="other")
    count = len(hub.seen)
    assert not run(PULL, tmp_path / "offline.toml", cache="other", HF_HUB_OFFLINE="1")
    assert len(hub.seen) == count
    for name in ("online.toml", "offline.toml"):
        found = Recipe.load(tmp_path / name)
        assert (found.tag, found.explain()) == (RECIPE.tag, RECIPE.explain())


def test_the_card_says_what_was_calibrated(hub: Hub, run):
    """A new card has the tag, the base model, the recipe's facts and its plot; a second push replaces them, no more."""
    run(PUSH)
    card = hub.repos[REPO]["README.md"].decode()
    head = card.split("---")[1]
    assert "- rankaware-recipe" in head
    assert "base_model: org/base" in head
    assert "![Trials and rates by rank](rankaware/recipe.png)" in card
    assert all(f"    {line}" in card for line in RECIPE.explain().splitlines())
    files = set(hub.repos[REPO])
    run(
        f"from dataclasses import replace\nreplace(RECIPE, fitted_lr=4e-3).push_to_hub({REPO!r}, token='t')"
    )
    again = hub.repos[REPO]["README.md"].decode()
    assert again != card
    assert (
        again.count("## Learning rate")
        == again.count("- rankaware-recipe")
        == again.count("# digits")
        == 1
    )
    assert "base_model: org/base" in again
    assert set(hub.repos[REPO]) == files


def test_an_adapters_repository_keeps_its_own(hub: Hub, run):
    """In an adapter's repository its files and its card stay; the tag, the section and the subfolder are added."""
    own = {
        "README.md": b"---\nlicense: mit\nbase_model: org/own\n---\n# Mine\n\nWords.\n",
        "adapter.safetensors": b"x",
    }
    hub.repos[REPO] = dict(own)
    run(f"RECIPE.push_to_hub({REPO!r}, token='t')")
    card = hub.repos[REPO]["README.md"].decode()
    assert hub.repos[REPO]["adapter.safetensors"] == b"x"
    kept = ("license: mit", "base_model: org/own", "# Mine\n\nWords.")
    assert all(words in card for words in (*kept, "- rankaware-recipe"))
    assert card.index("Words.") < card.index("## Learning rate")


ERRORS = [
    (PULL, 0, f"The Hub's repository '{REPO}' cannot be used: "),
    ("Recipe.from_hub('a/b/c')", 0, "The Hub's repository 'a/b/c' cannot be used: "),
    (PUSH, 403, f"The Hub's repository '{REPO}' cannot be used: "),
]


@pytest.mark.parametrize(("code", "status", "message"), ERRORS)
def test_what_the_hub_refuses_is_our_error(code, status, message, hub: Hub, run):
    """A repository that is not there, a name that is none, and a refusal are a RecipeError with cause and cure."""
    hub.refuses = status
    ended = run(code, "r.toml")
    assert f"RecipeError: {message}" in ended
    assert ended.endswith("your token (hf auth login).")


def test_a_repository_without_a_recipe_is_our_error(hub: Hub, run):
    """A repository that holds no recipe says so by the file that is missing."""
    hub.repos[REPO] = {"README.md": b"# Mine"}
    assert "RecipeError: There is no recipe at " in run(PULL, "r.toml")
