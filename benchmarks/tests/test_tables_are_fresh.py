"""Tables against the fingerprints that they rest on, and fingerprints against the code."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import fingerprints as prints
import pytest
from behaviour import BEHAVIOUR

import rankaware_optim as ra

BENCHMARKS = Path(__file__).parents[1]
ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"
PAGES = sorted(str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.md"))
MARK = re.compile(r"\b([a-z.]+@[0-9a-f]{8})\b")
MADE_BY = re.compile(r"(?:Command:|Made by) `python (benchmarks/[\w/]+\.py)")
FILE = BENCHMARKS / "fingerprints.json"
NAMES = list(json.loads(FILE.read_text())) if FILE.exists() else []
SLOW = ("fit", "search", "calibration", "scores")
QUICK = [name for name in NAMES if not name.startswith(SLOW)]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_has_what_the_code_gives(name: str) -> None:
    """A fingerprint on file is that of the code as it is, up to rounding."""
    found = prints.change(prints.stored()[name], prints.now([name])[name])
    assert not any(found), (
        f"{name}: {prints.in_words(found)}. Run benchmarks/fingerprints.py --write, see its diff."
    )


def test_the_file_has_every_fingerprint() -> None:
    """Every fingerprint that is taken is on file, and no other."""
    assert list(BEHAVIOUR) == NAMES


@pytest.mark.parametrize("page", PAGES)
def test_a_table_is_no_older_than_what_it_rests_on(page: str) -> None:
    """A page carries the fingerprints that its scripts name, as on file."""
    text = (RESULTS / page).read_text()
    scripts = [ROOT / name for name in MADE_BY.findall(text)]
    assert scripts, f"{page} does not say which script made it."
    named = {name for script in scripts for name in rests_on(script)}
    assert set(MARK.findall(text)) == set(prints.marks(sorted(named))), (
        f"{page} is stale: make it again."
    )
    assert named or {"commit", "date"} <= set(re.findall(r"\w+", text)), (
        f"{page} rests on nothing and has no date."
    )


SCRIPTS = [
    path
    for path in sorted(BENCHMARKS.rglob("*.py"))
    if path.parent.name != "tests"
    and '__name__ == "__main__"' in path.read_text()
    and re.search(r"RESULTS|record\(", path.read_text())
]
# recipes, a picture, and what tables rest on
WITHOUT_TABLES = {
    "make_recipes",
    "fingerprints",
}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_its_tables_rest_on(path: Path) -> None:
    """Every script with a table names fingerprints that are on file, or none."""
    assert path.stem in WITHOUT_TABLES or prints.marks(rests_on(path)) is not None


def rests_on(script: Path) -> tuple[str, ...]:
    """A script's `RESTS_ON`, read without importing the script."""
    for node in ast.parse(script.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RESTS_ON":
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{script.name} has no RESTS_ON.")


# --- what a fingerprint sees ----------------------------------------------------------------------------------------


def rates_of_b(patch: pytest.MonkeyPatch) -> None:
    """LoRA+ gives its B factors a thousandth more."""
    multiplier = ra.LoRAPlus.multiplier
    patch.setattr(ra.LoRAPlus, "multiplier", lambda *asked: 1.001 * multiplier(*asked))


def full_width(patch: pytest.MonkeyPatch) -> None:
    """Full finetuning counts a larger width."""
    patch.setattr(ra.Survey, "full_width", lambda survey, init="A": 2.0 * survey.width)


def rates_of_recipes(patch: pytest.MonkeyPatch) -> None:
    """A recipe's rates are for ten times the batch."""
    at = ra.Recipe.at
    patch.setattr(
        ra.Recipe,
        "at",
        lambda recipe, rank=None, **options: at(
            recipe, rank, **{"batch": 320, **options}
        ),
    )


def suggestions(patch: pytest.MonkeyPatch) -> None:
    """A suggestion is for a chat, whatever was asked for."""
    suggest = ra.suggest_lr
    patch.setattr(
        ra,
        "suggest_lr",
        lambda site, kind, **options: suggest(
            site, kind, **{**options, "task": "chat"}
        ),
    )


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (rates_of_b, {"laws.adam", "optimizer.common"}),
        (full_width, {"inspection", "transfer"}),
        (rates_of_recipes, {"recipes"}),
        (suggestions, {"transfer"}),
    ],
)
def test_a_changed_number_is_seen_where_it_belongs(
    monkeypatch: pytest.MonkeyPatch, change: Any, seen: set[str]
) -> None:
    """A change of a number changes the fingerprint that it belongs to, and no other."""
    change(monkeypatch)
    now, stored = prints.now(QUICK), prints.stored()
    assert {
        name for name in QUICK if any(prints.change(stored[name], now[name]))
    } == seen


def test_fingerprints_are_of_public_names() -> None:
    """What is taken rests on no private name or module of the package, so that these may change."""
    text = (BENCHMARKS / "behaviour.py").read_text()
    assert not re.findall(r"rankaware_optim[\w.]*\._\w+|\bra\.[\w.]*\b_\w+", text)


# --- how fingerprints are compared and written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "by"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.2),
        ([0.0], [1e-15], 0.0),
        ([None, "A"], [None, "A"], 0.0),
        ([None], [1.0], math.inf),
        (["A"], ["B"], math.inf),
        ([1.0], [1.0, 2.0], math.inf),
    ],
)
def test_a_change_has_a_size(old: Any, new: Any, by: float) -> None:
    """The largest relative change of a number; infinite where a text or the number of values changed."""
    assert prints.largest(old, new) == pytest.approx(by)


@pytest.mark.parametrize(
    ("now", "carried"),
    [
        (
            {"laws.a": {"x": [1.0 + 1e-9], "y": [2.0]}, "laws.b": {"x": [1.0]}},
            "as it was",
        ),
        ({"laws.a": {"x": [1.1], "y": [2.0]}, "laws.b": {"x": [1.0]}}, "stale"),
        ({"laws.a": {"x": [1.0]}, "laws.b": {"x": [1.0]}}, "renewed"),
        (
            {"laws.a": {"x": [1.0], "y": [2.0], "z": [3.0]}, "laws.b": {"x": [1.0]}},
            "renewed",
        ),
        ({"laws.a": {"x": [1.0], "y": [2.0]}}, "renewed"),
    ],
)
def test_what_came_or_went_makes_no_table_stale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, now: Any, carried: str
) -> None:
    """Writing gives a table new digests where cases came or went and no number moved. Rounding changes nothing."""
    old = {"laws.a": {"x": [1.0], "y": [2.0]}, "laws.b": {"x": [1.0]}}
    monkeypatch.setattr(prints, "FILE", tmp_path / "fingerprints.json")
    monkeypatch.setattr(prints, "RESULTS", tmp_path)
    page, first = tmp_path / "page.md", " ".join(prints.marks(["laws"], old))
    page.write_text(f"Rests on {first}.")
    changes = {
        name: prints.change(old.get(name, {}), now.get(name, {}))
        for name in {**old, **now}
    }
    prints.write(old, now, changes)
    text, fresh = page.read_text(), f"Rests on {' '.join(prints.marks(['laws']))}."
    assert (text == fresh) == (carried != "stale")
    assert (text == f"Rests on {first}.") == (carried != "renewed")


def test_a_fingerprint_that_is_not_there_is_said() -> None:
    """An unknown name in RESTS_ON ends the script with a sentence that lists those on file."""
    with pytest.raises(
        KeyError,
        match=r"RESTS_ON names law, which fingerprints.json does not have. It has laws",
    ):
        prints.marks(["law"])
