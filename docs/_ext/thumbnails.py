"""Draw pictures for the gallery of examples: each shows the script's tool and the calls of this package in it."""

from __future__ import annotations

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
AFTER_THE_GALLERY = 900  # its own pictures are there by then
COMMON = {*sys.stdlib_module_names, "datasets", "rankaware_optim", "tiny", "torch"}
COLUMNS, LINES = 38, 13


def code_of(script: Path) -> Iterator[str]:
    """Yield the import of the tool and the calls of `ra`, or the settings that name it, or else the functions."""
    text = script.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    imports = [
        ast.unparse(n) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    tools = [line for line in imports if re.split(r"[ .]", line)[1] not in COMMON]
    yield from sorted(tools, key=lambda line: " peft" in line)[:1]
    settings = script.with_suffix(".yaml")
    if settings.exists():
        _, _, ours = settings.read_text(encoding="utf-8").partition("optimizer:\n")
        block = takewhile(lambda line: line.startswith(" "), ours.splitlines())
        yield from textwrap.dedent("\n".join(block)).splitlines()
        return
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if name.startswith("ra.") and name != "ra.Reference":
            yield f"{name}("
            for node in (*call.args, *call.keywords):
                yield f"  {ast.get_source_segment(text, node)},"
            yield ")"
    if "import rankaware_optim" not in text:
        yield from (
            f"def {n.name}(...)" for n in nodes if isinstance(n, ast.FunctionDef)
        )


def draw(lines: list[str], path: Path) -> None:
    """Draw lines of code as a picture of the gallery's size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0, 2.8), facecolor="#f8f9fb")
    style = {"family": "monospace", "size": 12, "color": "#1c1f23", "va": "top"}
    figure.text(0.04, 0.95, "\n".join(lines[:LINES]), **style, parse_math=False)
    figure.savefig(path, dpi=100)


def make(app: Any) -> None:
    thumbs = Path(app.srcdir) / "examples" / "images" / "thumb"
    for script in sorted(EXAMPLES.glob("*.py")):
        lines: list[str] = []
        for line in code_of(script):
            deeper = " " * (2 + len(line) - len(line.lstrip()))
            style = {"subsequent_indent": deeper, "break_long_words": False}
            lines += textwrap.wrap(line, COLUMNS, **style)
        draw(lines, thumbs / f"sphx_glr_{script.stem}_thumb.png")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", make, priority=AFTER_THE_GALLERY)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
