"""Tables against the code that they depend on, and what their hash sees of it."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="the benchmarks are not at hand")
RESULTS = BENCHMARKS / "results"
PAGES = sorted(str(path.relative_to(RESULTS)) for path in RESULTS.rglob("*.md"))
MARK = re.compile(r"(benchmarks/[\w/]+\.py)@([0-9a-f]{12})")


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("code_hash")


@pytest.mark.parametrize("page", PAGES)
def test_a_table_is_no_older_than_its_code(code: Any, page: str) -> None:
    """The hash that a table carries is that of its script and of what the script names, as they are now."""
    marks = set(MARK.findall((RESULTS / page).read_text()))
    assert marks, f"{page} carries no hash: make it again by its command, whose `machine()` has one."
    for script, found in marks:
        now = code.code_of(BENCHMARKS.parent / script)
        assert now == f"{script}@{found}", f"{page} is older than its code: make it again by its command."


SCRIPTS = [
    path
    for path in sorted(BENCHMARKS.rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text() and re.search(r"RESULTS|record\(", path.read_text())
]
WITHOUT_TABLES = {"make_recipes", "report_page"}  # recipes and a picture


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_says_what_its_tables_depend_on(code: Any, path: Path) -> None:
    """Every script with a table names modules that are there."""
    named = code.depends_on(path)
    assert bool(named) != (path.stem in WITHOUT_TABLES)
    assert all(code.files(module) for module in named)


# --- what the hash sees ---------------------------------------------------------------------------------------------

SOURCE = '''
"""A law."""

def moved(lr, rank):
    """Its rate."""
    if rank < 1:
        raise ValueError(f"rank {rank} is below 1.")  # says why
    warn("The rank is large.")
    return lr / rank
'''


def tree(code: Any, source: str) -> str:
    return repr(tuple(code.parts(ast.parse(source))))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A law.", "Another word for it."),
        ('    """Its rate."""\n', ""),
        ("  # says why", ""),
        ('f"rank {rank} is below 1."', '"A rank is 1 or more."'),
        ("The rank is large.", "This rank is large."),
        ("lr / rank", "(lr /\n  rank)"),
    ],
)
def test_words_may_change(code: Any, old: str, new: str) -> None:
    """Docstrings, comments, layout, and what is raised or warned with are not seen."""
    assert tree(code, SOURCE.replace(old, new)) == tree(code, SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr / rank", "lr * rank"),
        ("rank < 1", "rank < 2"),
        ("ValueError", "TypeError"),
        ("(lr, rank)", "(lr, rank=None)"),
        ("return lr", "return None"),
        ("return lr / rank", 'return "lr"'),
        ('    warn("The rank is large.")\n', ""),
    ],
)
def test_what_is_computed_may_not(code: Any, old: str, new: str) -> None:
    """A changed operator, number, default, exception or value is seen."""
    assert old in SOURCE
    assert tree(code, SOURCE.replace(old, new)) != tree(code, SOURCE)


def test_a_hash_is_of_the_script_and_of_what_it_names(code: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It changes with the script, with a module and with a file of a package that the script names, and no other."""
    monkeypatch.setattr(code, "BENCHMARKS", tmp_path / "benchmarks")
    written = {
        "benchmarks/room/script.py": 'DEPENDS_ON = ("other", "rankaware_optim.laws")\n',
        "benchmarks/other.py": "x = 1\n",
        "benchmarks/unnamed.py": "x = 1\n",
        "rankaware_optim/laws/_one.py": "x = 1\n",
    }
    for name, text in written.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    script = tmp_path / "benchmarks/room/script.py"
    first, seen = code.code_of(script), []
    assert MARK.fullmatch(first)
    for name, text in written.items():
        (tmp_path / name).write_text(text + "y = 2\n")
        if code.code_of(script) != first:
            seen.append(name)
        (tmp_path / name).write_text(text)
    assert seen == [name for name in written if "unnamed" not in name]


def test_a_group_stands_for_the_files_of_its_modules(code: Any) -> None:
    """Groups may contain groups, and every name in them is that of a module."""
    found = code.files("CALIBRATED_RATES")
    assert {path for module in code.GROUPS["SEARCH"] for path in code.files(module)} < set(found)
    assert all(path.is_file() for path in found)


def test_a_module_that_is_not_there_is_said(code: Any) -> None:
    """A name in DEPENDS_ON that is no module ends the script with a sentence."""
    with pytest.raises(FileNotFoundError, match="Name one that is"):
        code.files("laws.none_such")


def test_what_is_no_script_has_no_hash(code: Any, tmp_path: Path) -> None:
    """A program outside the benchmarks, as a test run is, leaves its code unknown."""
    assert code.code_of(tmp_path / "other.py") == "unknown"
