"""Let docstrings be written as they are read in an editor: an indented block after a plain line is an equation or a call.

reStructuredText requires two colons before such a block. This module inserts them before Napoleon reads the sections.
"""

from __future__ import annotations

from typing import Any

SECTIONS = (
    "Args:",
    "Raises:",
    "Returns:",
    "Yields:",
    "Attributes:",
    "Example:",
    "Examples:",
    "Note:",
)
BEFORE_NAPOLEON = 400


def with_literal_blocks(lines: list[str]) -> list[str]:
    """Insert `::` before every indented block that is outside of sections, lists and literal blocks."""
    made: list[str] = []
    literal = section = False
    for i, line in enumerate(lines):
        if line and not line.startswith(" "):
            literal, section = line.endswith("::"), line in SECTIONS
        after_blank = i > 0 and not lines[i - 1].strip()
        if line.startswith("    ") and after_blank and not literal and not section:
            made += ["::", ""]
            literal = True
        made.append(line)
    return made


def with_whole_summary(lines: list[str]) -> list[str]:
    """End the first paragraph with a full stop if it leads to a block, because tables show it alone."""
    last = lines.index("") - 1 if "" in lines else len(lines) - 1
    if lines[last].endswith("::"):
        return [*lines[:last], f"{lines[last][:-2]}.", *lines[last + 1 :]]
    return lines


def _process(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = with_literal_blocks(with_whole_summary(lines))
    if what in ("attribute", "property"):
        lines[:0] = [
            "..",
            "",
        ]  # else Napoleon takes what stands before a colon for the value's type


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=BEFORE_NAPOLEON)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
