"""Golden files: what the public names of a room give, number by number.

    tox run -e core -- tests/test_golden.py --write-golden

writes them again. Their diff then shows what a change moved. What moved by rounding alone stays as it was, since pages
of the benchmarks carry the digest of a file.
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
    """A value as the file holds it: floats with six digits, none as a word."""
    if isinstance(value, dict):
        return {key: written(each) for key, each in value.items()}
    if isinstance(value, list):
        return [written(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    return "none" if value is None else value


def tables_of(room: str, folder: Path) -> dict[str, Any]:
    """A room's tables as the code gives them now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ra.RankAwareWarning)
        tables = ROOMS[room]()
        if room == "inspection":
            tables |= inspection_of_files(folder)
    return written(tables)


def text_of(tables: dict[str, Any]) -> str:
    """TOML with a case a line."""
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
    """Whether two values agree, numbers up to rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float | int) and isinstance(b, float | int):
        return a == b or math.isclose(a, b, rel_tol=TOLERANCE)
    return bool(a == b)


def kept(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new tables, with the old value of every case that has not moved."""
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
    """Where two files differ: table, case, both values."""
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
    """Every number of a golden file is what the code gives, up to rounding."""
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
    """One per cent is a difference, and rounding is none."""
    assert len(differences({"t": {"case": before}}, {"t": {"case": after}})) == count
