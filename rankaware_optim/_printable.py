"""Text that is safe to print on a terminal. Names, notes and cells may come from untrusted files."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return `text` without characters that control a terminal: controls, direction marks,
    surrogates.

    >>> printable("\\x1b[2Ja note")
    '[2Ja note'
    """
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")
