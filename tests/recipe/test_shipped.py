"""The recipes that the repository ships are known by their tags."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rankaware_optim import Recipe

PATHS = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def test_the_hashes_stay():
    """Shipped recipes keep the tags that states made with them carry: else they would be taken for others."""
    tags = [Recipe.load(path).tag for path in PATHS]
    assert [tag.split()[1] for tag in tags] == [path.stem for path in PATHS]
    digest = hashlib.sha256("\n".join(tags).encode()).hexdigest()
    assert digest[:12] == "77f51ff00ab4", tags
