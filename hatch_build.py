"""The README as the package's description: away from the repository its links are absolute."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)")


class Description(MetadataHookInterface):
    """Gives `readme`: README.md, its links absolute where `project.urls` has a Repository."""

    def update(self, metadata: dict[str, Any]) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        if repository is not None:
            text = with_absolute_links(text, repository.rstrip("/"))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(text: str, repository: str) -> str:
    """A text whose relative links lead to the repository's main branch, pictures to their bytes."""

    def absolute(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}[{words}]({repository}/{kind}/main/{path})"

    return LINK.sub(absolute, text)
