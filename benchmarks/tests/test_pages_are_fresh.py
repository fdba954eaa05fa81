"""Tests that result pages are up to date with the golden tables on which they rest."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import renew
from recording import RESULTS, mark

ROOT = RESULTS.parents[1]
PAGES = sorted(path.name for path in RESULTS.glob("*.md"))


def rests_on(script: Path) -> tuple[str, ...]:
    """Return the `RESTS_ON` of a script without importing the script."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RESTS_ON":
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{script.name} has no RESTS_ON.")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_no_older_than_what_it_rests_on(page: str) -> None:
    """A page shows the current digests of the golden tables that its script names, or a commit and a date."""
    text = (RESULTS / page).read_text()
    command = renew.COMMAND.search(text)
    assert command, f"{page} does not say which script made it."
    named = rests_on(ROOT / command[1].split()[0])
    carried = [found[0] for found in renew.MARK.finditer(text)]
    assert carried == [mark(table) for table in named], (
        f"{page} is stale: tox run -e renew"
    )
    assert named or {"commit", "date"} <= set(re.findall(r"\w+", text))


@pytest.mark.parametrize(
    ("now", "moved"),
    [
        ("[a]\nx = 1.0", False),
        ("[a]\nx = 1.0\ny = 2.0\n[b]\nx = 3.0", False),
        ("[b]\nx = 3.0", False),
        ("[a]\nx = 1.1\ny = 2.0", True),
        ('[a]\nx = "LawError"', True),
    ],
)
def test_a_table_moves_where_a_case_differs(now: str, moved: bool) -> None:
    """Cases that were added to a golden table or removed from it make no page stale. Changed cases do."""
    assert renew.has_moved(b"[a]\nx = 1.0", now.encode()) == moved


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("laws/none.py sweep.csv", "not in the tree: sweep.csv. Give --data FOLDER"),
        ("-c 'raise ValueError(7)'", "ValueError: 7"),
        ("-c pass", None),
        ("-c pass here.csv", None),
    ],
)
def test_what_cannot_be_made_is_said(
    tmp_path: Path, command: str, reason: str | None
) -> None:
    """If a page's command fails or lacks a file, the reason is returned.

    Files are also looked for in the data folder.
    """
    page = tmp_path / "page.md"
    (tmp_path / "here.csv").touch()
    (tmp_path / "laws").mkdir()
    (tmp_path / "laws/none.py").touch()
    page.write_text(f"Command: `python {command}`\n")
    assert renew.make(page, tmp_path) == reason
