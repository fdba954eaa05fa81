"""A recipe beside an adapter, in its folder or its repository on the Hugging Face Hub: files in a
subfolder that no loader reads as weights, and a section in the README.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import Any

from .._files import read_bytes, replace_bytes
from .._printing import printable
from ..errors import RankAwareError, RecipeError
from ._recipe_data import RecipeData
from ._recipe_files import save
from ._recipe_text import explain

_FOLDER, _FILE, _PLOT, _README = "rankaware", "recipe.toml", "recipe.png", "README.md"
_BEGIN, _END = "<!-- rankaware-optim: begin -->", "<!-- rankaware-optim: end -->"
_MOST = 10_000_000  # largest README, bytes
_TAG = "rankaware-recipe"


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


def save_beside(
    recipe: RecipeData, adapter: str | os.PathLike[str], plot: bool = False
) -> Path:
    """Write the recipe into the adapter's folder. plot: whether a plot is in the folder, for the
    README to show.
    """
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
        replace_bytes(readme, _with_section(text, _section(recipe, plot)).encode())
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


def _section(recipe: RecipeData, plot: bool) -> str:
    """Return the README's section about the recipe, between two marks. Untrusted texts are in a
    code block.
    """
    picture = ("", f"![Trials and rates by rank]({_FOLDER}/{_PLOT})") if plot else ()
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
        *picture,
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


# --- the Hub --------------------------------------------------------------------------------------


def push(
    recipe: RecipeData,
    repo: str,
    draw: Callable[[Path], object],
    *,
    base_model: str | None,
    private: bool | None,
    token: Any,
    message: str,
    revision: str | None,
) -> str:
    """Push the recipe, its plot and the card. Return the commit's URL.

    Args:
        recipe: the recipe.
        repo: "owner/name".
        draw: draws the recipe's plot to a file.
        base_model: the base model's repository, for the card.
        private: as in huggingface_hub.
        token: as in huggingface_hub.
        message: the commit's message.
        revision: as in huggingface_hub.
    """
    with _hub(repo) as hub, TemporaryDirectory() as temporary:
        api, folder = hub.HfApi(token=token), Path(temporary)
        has_trials = len(recipe.tensors.get("lr", ())) > 0
        if has_trials:
            (folder / _FOLDER).mkdir()
            draw(folder / _FOLDER / _PLOT)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        try:
            readme = api.hf_hub_download(repo, _README, revision=revision)
            text = Path(readme).read_text(encoding="utf-8")
        except hub.utils.EntryNotFoundError:
            name = printable(recipe.name).replace("\n", " ")
            text = f"# {name}\n\nA recipe of learning rates, made by rankaware-optim.\n"
        card = _with_metadata(
            hub.ModelCard(text, ignore_metadata_errors=True), base_model
        )
        (folder / _README).write_text(card, encoding="utf-8")
        save_beside(recipe, folder, plot=has_trials)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=temporary,
            commit_message=message,
            delete_patterns=f"{_FOLDER}/*",
            revision=revision,
        )
        return str(commit.commit_url)


def pull(repo: str, **where: Any) -> Path:
    """Return the path of a repository's recipe, downloaded with the files beside it or taken from
    the cache.
    """
    with _hub(repo) as hub:
        folder = hub.snapshot_download(repo, allow_patterns=f"{_FOLDER}/*", **where)
        return Path(folder) / _FOLDER / _FILE


def _with_metadata(card: Any, base_model: str | None) -> str:
    """Return a model card with the tag and the base model in its metadata."""
    tags = list(card.data.tags or [])
    card.data.tags = tags if _TAG in tags else [*tags, _TAG]
    if base_model is not None:
        card.data.base_model = base_model
    return str(card)


@contextmanager
def _hub(repo: str) -> Iterator[Any]:
    """Yield huggingface_hub. Whatever it raises becomes a `RecipeError`."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise RecipeError(
            "Recipes on the Hub need huggingface_hub, which is not installed.",
            "Install it by pip install huggingface_hub.",
        ) from error
    try:
        yield huggingface_hub
    except RankAwareError:
        raise
    except Exception as error:  # the classes of its errors change between releases
        first = next(iter(str(error).splitlines()), "").rstrip(".")
        raise RecipeError(
            f"The Hub's repository {repo!r} cannot be used: {first or type(error).__name__}.",
            "Check its name, the network and your token (hf auth login).",
        ) from error
