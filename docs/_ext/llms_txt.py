"""Write llms.txt beside the pages: every page in the order of the contents, with its title and its first sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docutils import nodes

ABOUT = "Learning rates that stay right when the LoRA rank, alpha or init changes, or when you change to full finetuning."


def _in_order(env: Any, page: str, seen: list[str]) -> list[str]:
    """Return a page and the pages below it, in the order of the contents."""
    if page not in seen:
        seen.append(page)
        for below in env.toctree_includes.get(page, ()):
            _in_order(env, below, seen)
    return seen


def _line(env: Any, page: str, url: str) -> str:
    paragraphs = env.get_doctree(page).findall(nodes.paragraph)
    first = next(
        (p.astext() for p in paragraphs if isinstance(p.parent, nodes.section)), ""
    )
    sentence = " ".join(first.split()).partition(". ")[0].rstrip(".:")
    return f"- [{env.titles[page].astext()}]({url})" + (
        f": {sentence}." if sentence else ""
    )


def _write(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        env = app.env
        pages = _in_order(env, env.config.root_doc, [])[1:]
        lines = [_line(env, page, app.builder.get_target_uri(page)) for page in pages]
        text = "\n".join(
            [
                f"# {env.config.project}",
                "",
                f"> {ABOUT}",
                "",
                "## Pages",
                "",
                *lines,
                "",
            ]
        )
        (Path(app.outdir) / "llms.txt").write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
