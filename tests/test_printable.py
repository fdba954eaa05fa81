"""Tests that names, notes and cells from foreign files reach a terminal without control characters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rankaware_optim import RankAwareWarning, Rate, RecipeError, Survey
from rankaware_optim._printing import Table, printable
from rankaware_optim._warn import warn

from .helpers.recipes import RECIPE

EVIL = "\x1b[2J[/bold]\x9b1m\x07\x08\u202e\r\ud800é"
PLAIN = "[2J[/bold]1m"
BAD = replace(
    RECIPE,
    name=EVIL,
    notes=(EVIL,),
    optimizer=EVIL,
    versions={EVIL: EVIL},
    settings={EVIL: EVIL},
)


def warned() -> str:
    with pytest.warns(RankAwareWarning) as caught:
        warn(EVIL)
    return str(caught[0].message)


PRINTED = {
    "text": lambda: printable(EVIL),
    "recipe": lambda: str(BAD),
    "rate": lambda: str(Rate(1e-3, notes=(EVIL,))),
    "error": lambda: str(RecipeError(EVIL, EVIL)),
    "warning": warned,
    "survey": lambda: str(Survey(other=(EVIL,), notes=(EVIL,))),
}


@pytest.mark.parametrize("kind", PRINTED)
def test_no_control_character_is_printed(kind):
    """Control characters, lone surrogates and direction marks are removed from printed text, and the rest remains."""
    text = PRINTED[kind]()
    assert text == printable(text)
    assert PLAIN in text


def test_a_table_has_no_codes_of_colours(monkeypatch):
    """The text of a table contains no codes for colours or bold, even on a terminal or in a notebook."""
    table = Table(("lr", "rank"), [("1e-3", "8")], ["a note"], title="Rates")
    plain = table.text()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert table.text() == plain
    assert "[" not in plain
