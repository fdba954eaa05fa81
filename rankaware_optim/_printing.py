"""Text for terminals: plain characters, and tables made with rich."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def printable(text: str) -> str:
    """Return `text` without characters that control a terminal: controls, direction marks,
    surrogates. Names, notes and cells may come from untrusted files.

    >>> printable("\\x1b[2Ja note")
    '[2Ja note'
    """
    return "".join(sign for sign in text if sign.isprintable() or sign in "\n\t")


def text_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    lines: Iterable[str] = (),
    title: str = "",
    left: Sequence[str] = (),
    width: int = 120,
) -> str:
    """Return a table of `rows` under `headings`, with `lines` of text below it.

    left: the headings of left-aligned columns. width: the largest width of the table, in
    characters.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title or None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=width, no_color=True, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
        for line in lines:
            console.print(line, soft_wrap=True)
    return printable(capture.get()).rstrip()
