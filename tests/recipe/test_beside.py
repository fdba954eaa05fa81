"""A recipe beside an adapter: where it lies, what the README says, and that the folder then names the recipe."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rankaware_optim import Recipe, RecipeError, inspect_file

from ..helpers.recipes import RECIPE

OWN = "---\nbase_model: org/own\n---\n# Mine\n\nWords."


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter's folder with one file of weights."""
    made = tmp_path / "adapter"
    made.mkdir()
    save_file(
        {"q.lora_A.weight": torch.zeros(4, 8), "q.lora_B.weight": torch.zeros(8, 4)},
        made / "x.safetensors",
    )
    return made


@pytest.mark.parametrize(
    "name",
    [str, Path, lambda folder: f"{folder}/", lambda folder: folder / "rankaware"],
)
def test_the_folder_names_the_recipe(name, adapter):
    """Saved beside an adapter, a recipe is loaded by the adapter's folder, or its own, and the adapter by its weights."""
    written = RECIPE.save_beside(adapter)
    assert written == adapter / "rankaware" / "recipe.toml"
    assert Recipe.load(name(adapter)) == RECIPE
    assert {path.name for path in adapter.iterdir()} == {
        *("x.safetensors", "README.md", "rankaware"),
    }
    assert [f.rank for f in inspect_file(adapter).factors] == [4, 4]


@pytest.mark.parametrize("other", ["recipe of another name", "no recipe"])
def test_the_recipe_saved_beside_the_adapter_is_the_folders(other, adapter):
    """A recipe.toml that lies in the adapter's folder already does not hide the one saved beside the adapter."""
    if other == "no recipe":
        (adapter / "recipe.toml").write_text("bake = 20\n")
    else:
        replace(RECIPE, name=other).save(adapter / "recipe.toml")
    RECIPE.save_beside(adapter)
    assert Recipe.load(adapter).name == RECIPE.name


@pytest.mark.parametrize("own", [None, OWN, f"{OWN}\n", ""])
def test_the_readme_keeps_its_own_words(own, adapter):
    """The section is added to a README's own words, and another save replaces it alone."""
    readme = adapter / "README.md"
    if own is not None:
        readme.write_text(own, encoding="utf-8")
    RECIPE.save_beside(adapter)
    once = readme.read_text(encoding="utf-8")
    readme.write_text(f"{once}\nAfter.\n", encoding="utf-8")
    other = replace(RECIPE, fitted_lr=4e-3)
    other.save_beside(adapter)
    again = readme.read_text(encoding="utf-8")
    assert once.startswith((own or "").rstrip())
    assert again.startswith((own or "").rstrip())
    assert all(f"    {line}" in once for line in RECIPE.explain().splitlines())
    assert all(f"    {line}" in again for line in other.explain().splitlines())
    assert again.count("## Learning rate") == 1
    assert again.endswith("\nAfter.\n")
    assert Recipe.load(adapter).fitted_lr == 4e-3


@pytest.mark.parametrize("cut", [True, False])
def test_words_around_damaged_or_doubled_sections_are_kept(cut, adapter):
    """A section cut by hand is the user's text, and of two sections pasted together one is left; no word is lost."""
    readme = adapter / "README.md"
    RECIPE.save_beside(adapter)
    section = readme.read_text(encoding="utf-8")
    section = section.partition("<!-- rankaware-optim: end -->")[0] if cut else section
    readme.write_text(
        f"{section}\n## My results\n\n{section}\n## More\n", encoding="utf-8"
    )
    for _ in range(3):
        RECIPE.save_beside(adapter)
    text = readme.read_text(encoding="utf-8")
    assert text.count("## My results") == text.count("## More") == 1
    assert text.count("<!-- rankaware-optim: end -->") == 1


HOSTILE = "a\n# b\n<!-- rankaware-optim: end --><script>"


def test_untrusted_words_stay_a_block_of_code(adapter):
    """A recipe's name and notes can neither leave their block of code nor end the section."""
    made = replace(RECIPE, name=HOSTILE, notes=(HOSTILE,), optimizer="x.Y`<b>\n\n# z")
    for _ in range(2):
        made.save_beside(adapter)
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert text.count("rankaware-optim: end -->\n") == 1
    quoted = [
        line
        for line in text.splitlines()
        if "script" in line or line.startswith("# ") or "<b>" in line
    ]
    assert all(line.startswith("    ") for line in quoted)


def test_what_cannot_be_saved_beside_is_refused(adapter, tmp_path):
    """No folder, or a README that is no text, is an error before anything was written. Nor is there one to load."""
    with pytest.raises(
        RecipeError, match=r"There is no recipe at .*rankaware.recipe\.toml"
    ):
        Recipe.load(adapter)
    with pytest.raises(
        RecipeError, match=r"There is no folder .* Save the adapter there first"
    ):
        RECIPE.save_beside(tmp_path / "missing")
    (adapter / "README.md").write_bytes(b"\xff\xfe")
    before = sorted(os.listdir(adapter))
    with pytest.raises(RecipeError, match=r"README\.md cannot be written"):
        RECIPE.save_beside(adapter)
    assert before == sorted(os.listdir(adapter))


@pytest.mark.parametrize(
    "linked", ["README.md", "rankaware", "rankaware/recipe.toml", "a missing README.md"]
)
def test_nothing_is_written_outside_the_folder(linked, adapter, tmp_path):
    """A README, a folder or a recipe that is a link to elsewhere is refused, and nothing is written anywhere."""
    name = linked.rpartition(" ")[2]
    path, elsewhere = adapter / name, tmp_path / "elsewhere" / name
    for parent in (path.parent, elsewhere.parent):
        parent.mkdir(parents=True, exist_ok=True)
    if name == "rankaware":
        elsewhere.mkdir()
    elif "missing" not in linked:
        elsewhere.write_text("theirs")
    path.symlink_to(elsewhere)
    before = {
        file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")
    }
    with pytest.raises(RecipeError, match=r"is a link to outside "):
        RECIPE.save_beside(adapter)
    assert {
        file: file.is_file() and file.read_bytes() for file in tmp_path.rglob("*")
    } == before


def test_a_link_to_the_adapters_folder_is_followed(adapter, tmp_path):
    """The folder itself may be given by a link, and links inside it may stay inside."""
    (tmp_path / "link").symlink_to(adapter)
    (adapter / "words.md").write_text("Mine.")
    (adapter / "README.md").symlink_to("words.md")
    RECIPE.save_beside(tmp_path / "link")
    assert Recipe.load(adapter) == RECIPE
    assert (adapter / "words.md").read_text(encoding="utf-8").startswith("Mine.")
