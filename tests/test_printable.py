"""What is printed: nothing in a stranger's names, notes and cells reaches a terminal as a command."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from rankaware_optim import RankAwareWarning, Rate, RecipeError, Survey
from rankaware_optim._printing import printable
from rankaware_optim._warn import warn
from rankaware_optim.cli import main

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
    """Escapes, bells, half characters and marks of direction are left out of every printed text, the rest stays."""
    text = PRINTED[kind]()
    assert text == printable(text)
    assert PLAIN in text


@pytest.mark.parametrize("command", ["show", "lr"])
def test_a_command_prints_a_recipes_notes_without_escapes(command, tmp_path):
    """Notes with escapes and with rich's markup are printed as text by every command that reads a recipe."""
    made = replace(RECIPE, name=EVIL[:-2], notes=(EVIL[:-2],), ranks=(4, 64))
    path = made.save(tmp_path / "r.toml")
    more = {"show": (), "lr": ("--rank", "8")}[command]
    result = CliRunner().invoke(main, [command, str(path), *more], color=True)
    assert result.exit_code == 0
    assert "[2J[/bold]" in result.output
    assert result.output == printable(result.output)
