"""A recipe beside an adapter: files no loader reads as weights, and a section in the README."""

from __future__ import annotations

import os
import re
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from .._files import read_bytes, replace_bytes
from ..errors import RecipeError
from ._recipe_files import save
from ._recipe_text import explain

if TYPE_CHECKING:
    from ._recipe import Recipe

_FOLDER, _FILE, _README = "rankaware", "recipe.toml", "README.md"
_BEGIN, _END = "<!-- rankaware-optim: begin -->", "<!-- rankaware-optim: end -->"
_MOST = 10_000_000  # largest README, bytes


def recipe_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of the recipe's TOML file: `path` itself, or the file in that folder that
    `save_beside` wrote.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        return folder
    beside = folder / _FOLDER / _FILE
    return (
        folder / _FILE
        if os.path.isfile(folder / _FILE) and not os.path.isfile(beside)
        else beside
    )


def save_beside(recipe: Recipe, adapter: str | os.PathLike[str]) -> Path:
    """Write the recipe into the adapter's folder."""
    folder = Path(adapter)
    if not os.path.isdir(folder):
        raise RecipeError(
            f"There is no folder {folder} to save a recipe in.",
            "Save the adapter there first.",
        )
    readme = folder / _README
    try:
        _check_inside(folder)
        text = read_bytes(readme, _MOST).decode() if os.path.lexists(readme) else ""
        path = save(recipe, folder / _FOLDER / _FILE)
        replace_bytes(readme, _with_section(text, _section(recipe)).encode())
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{readme} cannot be written: {error}.", "Repair it, or remove it."
        ) from error
    return path


def _check_inside(folder: Path) -> None:
    """Raise a `RecipeError` if a file that would be written is a link to outside the folder, or
    lies there by one.
    """
    root, beside = os.path.realpath(folder), folder / _FOLDER
    files = beside.iterdir() if os.path.isdir(beside) else ()
    for path in (folder / _README, beside, *files):
        real = os.path.realpath(path)
        if os.path.commonpath([root, real]) != root:
            raise RecipeError(
                f"{path} is a link to {real}, outside {folder}.", "Remove the link."
            )


def _section(recipe: Recipe) -> str:
    """Return the README's section about the recipe, between two marks. Untrusted texts are in a
    code block.
    """
    lines = [
        _BEGIN,
        "## Learning rate",
        "",
        (
            f"The calibrated recipe in `{_FOLDER}/` gives the learning rate at another rank or"
            " alpha, and for full finetuning, with its 90 % band (the package is rankaware-optim):"
        ),
        "",
        "    opt = RankAwareOptimizer(model, torch.optim.AdamW, recipe=FOLDER_OF_THIS_README)",
        "    rankaware lr FOLDER_OF_THIS_README --rank 64",
        "",
        indent(explain(recipe), "    ").replace("<!--", "<! --"),
        _END,
    ]
    return "\n".join(lines)


def _with_section(text: str, section: str) -> str:
    """Return `text` with `section` in place of earlier sections, or at the end. A section without
    its end is text.
    """
    before, *after = re.split(
        f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", text, flags=re.DOTALL
    )
    if after:
        return before + section + "".join(after)
    return "\n\n".join(filter(None, (text.rstrip(), section))) + "\n"
