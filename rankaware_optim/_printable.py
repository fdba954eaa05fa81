"""Text that a terminal only prints: names, notes and cells may come from a stranger's file."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` without what a terminal would obey instead of print: controls, marks of direction, half characters.

    >>> printable("\\x1b[2Ja note")
    '[2Ja note'
    """
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")
