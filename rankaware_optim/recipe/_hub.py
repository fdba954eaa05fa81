"""Recipes on the Hugging Face Hub, through huggingface_hub. The layout is that of `save_beside`,
with a model card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .._printing import printable
from ..errors import RankAwareError, RecipeError
from ._beside import FILE, FOLDER, PLOT, README, save_beside

if TYPE_CHECKING:
    from ._recipe import Recipe

_TAG = "rankaware-recipe"


def push(
    recipe: Recipe,
    repo: str,
    *,
    base_model: str | None,
    private: bool | None,
    token: Any,
    message: str,
    **where: Any,
) -> str:
    """Push the recipe, its plot and the card. Return the commit's URL."""
    with _hub(repo) as hub, TemporaryDirectory() as made:
        api, folder = hub.HfApi(token=token), Path(made)
        drawn = len(recipe.tensors.get("lr", ())) > 0
        if drawn:
            from ..reports import plot_recipe

            (folder / FOLDER).mkdir()
            plot_recipe(recipe, folder / FOLDER / PLOT)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        (folder / README).write_text(
            _card(hub, api, recipe, repo, base_model, where), encoding="utf-8"
        )
        save_beside(recipe, folder, plot=drawn)
        upload = {
            "repo_id": repo,
            "folder_path": made,
            "commit_message": message,
            "delete_patterns": f"{FOLDER}/*",
        }
        return str(api.upload_folder(**upload, **where).commit_url)


def pull(repo: str, **where: Any) -> Path:
    """Return the path of a repository's recipe, downloaded with the files beside it or taken from
    the cache.
    """
    with _hub(repo) as hub:
        return (
            Path(hub.snapshot_download(repo, allow_patterns=f"{FOLDER}/*", **where)) / FOLDER / FILE
        )


def _card(
    hub: Any, api: Any, recipe: Recipe, repo: str, base_model: str | None, where: Mapping[str, Any]
) -> str:
    """Return the repository's README, or a new one, with the tag and the base model in its
    metadata.
    """
    try:
        found = Path(api.hf_hub_download(repo, README, **where)).read_text(encoding="utf-8")
    except hub.utils.EntryNotFoundError:
        name = printable(recipe.name).replace("\n", " ")
        found = f"# {name}\n\nA recipe of learning rates, made by rankaware-optim.\n"
    card = hub.ModelCard(found, ignore_metadata_errors=True)
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
    except (
        Exception
    ) as error:  # HTTP errors, refused names, no network: their classes change between releases
        first = next(iter(str(error).splitlines()), "").rstrip(".")
        raise RecipeError(
            f"The Hub's repository {repo!r} cannot be used: {first or type(error).__name__}.",
            "Check its name, the network and your token (hf auth login).",
        ) from error
