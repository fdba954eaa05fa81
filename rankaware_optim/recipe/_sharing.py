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

_BESIDE = Path("rankaware", "recipe.toml")
_BEGIN, _END = "<!-- rankaware-optim: begin -->", "<!-- rankaware-optim: end -->"
_MOST = 10_000_000  # largest README, bytes
# Untrusted texts are in the block of code.
_SECTION = f"""\
{_BEGIN}
## Learning rate

The calibrated recipe in `rankaware/` gives the learning rate at another rank or alpha, and for full finetuning, with its 90 % band (the package is rankaware-optim):

    opt = RankAwareOptimizer(model, torch.optim.AdamW, recipe=FOLDER_OF_THIS_README)
    rankaware lr FOLDER_OF_THIS_README --rank 64

{{}}
{_END}"""  # noqa: E501, a paragraph of Markdown


def recipe_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of the recipe's TOML file: `path` itself, or the file in that folder that
    `save_beside` wrote.
    """
    folder = Path(path)
    if not os.path.isdir(folder):
        return folder
    beside, inside = folder / _BESIDE, folder / _BESIDE.name
    return inside if inside.is_file() and not beside.is_file() else beside


def save_beside(recipe: Recipe, adapter: str | os.PathLike[str]) -> Path:
    """Write the recipe into the adapter's folder."""
    folder = Path(adapter)
    if not os.path.isdir(folder):
        raise RecipeError(
            f"There is no folder {folder} to save a recipe in.",
            "Save the adapter there first.",
        )
    readme, target = folder / "README.md", folder / _BESIDE
    root = Path(os.path.realpath(folder))
    for path in (readme, target, target.with_suffix(".trials.safetensors")):
        if not Path(os.path.realpath(path)).is_relative_to(root):
            raise RecipeError(
                f"{path} is a link to outside {folder}.", "Remove the link."
            )
    try:
        text = read_bytes(readme, _MOST).decode() if os.path.lexists(readme) else ""
        save(recipe, target)
        replace_bytes(readme, _with_section(text, explain(recipe)).encode())
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{readme} cannot be written: {error}.", "Repair it, or remove it."
        ) from error
    return target


def _with_section(text: str, facts: str) -> str:
    """Return a README with the section in place of earlier ones, or at the end. A section without
    its end is text.
    """
    section = _SECTION.format(indent(facts, "    ").replace("<!--", "<! --"))
    before, *after = re.split(
        f"{_BEGIN}(?:(?!{_BEGIN}).)*?{_END}", text, flags=re.DOTALL
    )
    if after:
        return before + section + "".join(after)
    return "\n\n".join(filter(None, (text.rstrip(), section))) + "\n"
