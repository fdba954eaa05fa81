"""Tests that the public functions of each subpackage give the numbers that are in its golden file.

After an intended change, this command writes the golden files again, and their diff shows the changed numbers:

    tox run -e core -- tests/test_golden.py --write-golden

Numbers that changed only by rounding are not rewritten, because pages of the benchmarks contain a file's digest.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tomli
import tomli_w

import rankaware_optim as ra

from .golden.cases import ROOMS, inspection_of_files

FOLDER = Path(__file__).parent / "golden"
DIGITS, TOLERANCE = 6, 2e-5
LINES = 150


def written(value: Any) -> Any:
    """Return a value in the form of the golden files: floats with six digits, and None as "none"."""
    if isinstance(value, dict):
        return {key: written(each) for key, each in value.items()}
    if isinstance(value, list):
        return [written(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return "none" if value is None else value


def tables_of(room: str, folder: Path) -> dict[str, Any]:
    """Return the tables of a subpackage that the current code gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ra.RankAwareWarning)
        tables = ROOMS[room]()
        if room == "inspection":
            tables |= inspection_of_files(folder)
    return written(tables)


def text_of(tables: dict[str, Any]) -> str:
    """Return the tables as TOML with one case per line."""
    lines = []
    for title, table in tables.items():
        lines.append(f"[{tomli_w.dumps({title: 0}).partition(' = ')[0]}]")
        for case, value in table.items():
            several = isinstance(value, list)
            items = value if several else [value]
            shown = ", ".join(tomli_w.dumps({"x": x})[4:].strip() for x in items)
            key = tomli_w.dumps({case: 0}).partition(" = ")[0]
            lines.append(f"{key} = {f'[{shown}]' if several else shown}")
        lines.append("")
    return "\n".join(lines)


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal, where numbers may differ by rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a == b or math.isclose(a, b, rel_tol=TOLERANCE)
    return bool(a == b)


def kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the new tables, but with the old value of every case that has only changed by rounding."""
    return {
        title: {
            case: old[title][case]
            if same(old.get(title, {}).get(case), value)
            else value
            for case, value in table.items()
        }
        for title, table in new.items()
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each difference between two files, with the table, the case and both values."""
    listed = []
    for title in {**old, **new}:
        before, after = old.get(title, {}), new.get(title, {})
        for case in {**before, **after}:
            if not same(before.get(case), after.get(case)):
                listed.append(
                    f"[{title}] {case}: {before.get(case)} became {after.get(case)}"
                )
    return listed


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_gives_what_its_golden_file_has(
    room: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The code gives every number of the golden file, up to rounding."""
    path = FOLDER / f"{room}.toml"
    now = tables_of(room, tmp_path)
    if request.config.getoption("--write-golden"):
        before = tomli.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(text_of(kept(before, now)), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    moved = differences(tomli.loads(text), now)
    assert not moved, (
        f"{len(moved)} cases moved. If they should, write the file again: "
        "tox run -e core -- tests/test_golden.py --write-golden\n" + "\n".join(moved)
    )
    assert len(text.splitlines()) <= LINES


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        ([1.0, 2.0], [1.0, 2.02], 1),
        ([1.0, 2.0], [1.0, 2.00001], 0),
        ([1.0], [1.0, 2.0], 1),
        (1.0, "LawError", 1),
        (0.0, 1e-9, 1),
    ],
)
def test_a_difference_is_listed(before: Any, after: Any, count: int) -> None:
    """A change of 1 % is listed as a difference, but a change by rounding is not."""
    assert len(differences({"t": {"case": before}}, {"t": {"case": after}})) == count
