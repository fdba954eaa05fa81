"""What a push and a pull ask of huggingface_hub; tests/environments/hub has the real one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankaware_optim import Recipe
from rankaware_optim.recipe import _sharing as sharing

from ..helpers.recipes import RECIPE


class NoEntry(Exception):
    """A repository has no such file."""


class Card:
    """A model card: its text, and its metadata as a first line."""

    def __init__(self, text, ignore_metadata_errors):
        assert ignore_metadata_errors
        self.text, self.data = text, SimpleNamespace(tags=None, base_model=None)
        if text.startswith("tags "):
            self.data.tags = text.partition("\n")[0].split()[1:]

    def __str__(self):
        return f"{self.data.tags} {self.data.base_model}\n{self.text}"


class Hub:
    """As much of huggingface_hub as is used, for one repository; it notes what it is asked."""

    utils = SimpleNamespace(EntryNotFoundError=NoEntry)
    ModelCard = Card

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.files = folder, {}, {}

    def HfApi(self, **options):
        self.calls["api"] = options
        return self

    def create_repo(self, repo, **options):
        self.calls["create"] = repo, options
        return SimpleNamespace(repo_id=f"id of {repo}")

    def hf_hub_download(self, repo, name, **options):
        self.calls["download"] = repo, name, options
        if not (self.folder / name).exists():
            raise NoEntry
        return str(self.folder / name)

    def upload_folder(self, *, folder_path, **options):
        self.calls["upload"] = options
        root = Path(folder_path)
        for path in root.rglob("*"):
            if path.is_file():
                self.files[path.relative_to(root).as_posix()] = path.read_bytes()
        return SimpleNamespace(commit_url="the commit")

    def snapshot_download(self, repo, **options):
        self.calls["snapshot"] = repo, options
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def push(recipe, **changes):
    options = {
        "base_model": None,
        "private": None,
        "token": None,
        "message": "why",
        "revision": None,
    }
    draw = lambda path: path.write_bytes(b"a plot")  # noqa: E731
    return sharing.push(recipe, "me/it", draw, **{**options, **changes})


def test_a_push_makes_the_repository_and_uploads_one_commit(hub):
    """A new repository gets a card with a title, the recipe's section and its plot; former files of it go."""
    options = {"token": "t", "private": True, "revision": "dev", "base_model": "b/c"}
    assert push(RECIPE, **options) == "the commit"
    assert hub.calls == {
        "api": {"token": "t"},
        "create": ("me/it", {"private": True, "exist_ok": True}),
        "download": ("id of me/it", "README.md", {"revision": "dev"}),
        "upload": {
            "repo_id": "id of me/it",
            "commit_message": "why",
            "delete_patterns": "rankaware/*",
            "revision": "dev",
        },
    }
    card = hub.files["README.md"].decode()
    assert card.startswith("['rankaware-recipe'] b/c\n# digits\n")
    assert "(rankaware/recipe.png)" in card
    assert hub.files["rankaware/recipe.png"] == b"a plot"
    assert "rankaware/recipe.toml" in hub.files


def test_a_card_that_is_there_is_kept(hub):
    """Its text, its tags and its base model stay, and the recipe's tag is there once."""
    for tags in (["lora"], ["lora", "rankaware-recipe"]):
        text = f"tags {' '.join(tags)}\nMy adapter.\n"
        (hub.folder / "README.md").write_text(text)
        push(replace(RECIPE, tensors={}))
        card = hub.files["README.md"].decode()
        assert card.startswith(f"['lora', 'rankaware-recipe'] None\n{text}")
        assert "recipe.png" not in card
        assert "rankaware/recipe.png" not in hub.files


def test_one_trial_is_drawn(hub):
    """A plot is made as soon as there is a point."""
    first = {key: value[:1] for key, value in RECIPE.tensors.items()}
    push(replace(RECIPE, tensors=first))
    assert "rankaware/recipe.png" in hub.files


@pytest.mark.parametrize("message", [None, "mine"])
def test_a_recipe_hands_its_options_over(hub, message):
    """The commit's message is by default the recipe's tag."""
    made = replace(RECIPE, tensors={})
    options = {"private": False, "token": "t", "revision": "r", "base_model": "b/c"}
    assert made.push_to_hub("me/it", commit_message=message, **options) == "the commit"
    expected = message or f"Learning-rate recipe {made.tag}"
    assert hub.calls["upload"]["commit_message"] == expected
    assert hub.calls["upload"]["revision"] == "r"
    assert hub.calls["api"] == {"token": "t"}
    assert hub.calls["create"][1]["private"] is False
    assert hub.files["README.md"].startswith(b"['rankaware-recipe'] b/c\n")


def test_a_pull_takes_the_recipes_files_alone(hub):
    """Nothing else of the repository is downloaded, such as weights."""
    RECIPE.save(hub.folder / "rankaware" / "recipe.toml")
    where = {"revision": "r", "token": "t", "cache_dir": "c"}
    assert Recipe.from_hub("me/it", **where) == RECIPE
    assert hub.calls["snapshot"] == (
        "me/it",
        {"allow_patterns": "rankaware/*", **where},
    )
