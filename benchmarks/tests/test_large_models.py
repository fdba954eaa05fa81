"""Tests of the page on large models: which files it accepts, and how best and converted learning
rates are read.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import pytest
from laws import large_models, others
from recording import RESULTS
from study.grids import FULL

from rankaware_optim import Falling, Reference

Lines = Iterable[Iterable[object]]


@pytest.fixture
def csv_of(tmp_path: Path) -> Callable[[str, Lines], Path]:
    """Return a function that writes a CSV file and returns its path."""

    def write(head: str, rows: Lines) -> Path:
        path = tmp_path / "sweep.csv"
        lines = [",".join(map(str, row)) for row in rows]
        path.write_text("\n".join([head, *lines]) + "\n")
        return path

    return write


# --- the files ------------------------------------------------------------------------------------------------------


def test_only_the_files_that_were_read_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is recognised by its hash, whatever its name. An unknown file and a missing one are errors."""
    path = tmp_path / "mine.csv"
    path.write_text("rank,lr\n")
    with pytest.raises(click.ClickException, match="none of the files"):
        others.files_by_name([path])
    known = others.Source(hashlib.sha256(path.read_bytes()).hexdigest(), "")
    monkeypatch.setattr(others, "SOURCES", {"theirs.csv": known})
    assert others.files_by_name([path]) == {"theirs.csv": path}
    with pytest.raises(click.ClickException, match=r"Missing: theirs\.csv"):
        others.files_by_name([])


def test_runs_of_a_cell_are_averaged_and_empty_ones_left_out() -> None:
    """A curve has the mean loss of all runs at a learning rate, and runs without a rank are full finetuning."""
    rows = [
        {"rank": rank, "lr": "0.5", "loss": loss}
        for rank, loss in (("4", "1"), ("4", "3"), ("", "2"), ("8", ""))
    ]
    assert others.curves_of(rows, "loss") == {4: {-1.0: 2.0}, FULL: {-1.0: 2.0}}


# --- best learning rates -----------------------------------------------------------------------------------------------------

PARABOLA = {float(x): (x - 0.3) ** 2 for x in range(-2, 3)}
CURVES = [
    # a curve, and its best learning rate by three readings: the lowest tried, the vertex of a
    # parabola, and the middle of the flat part
    (PARABOLA, 0.0, 0.3, 0.5),
    ({0.0: 3.0, 1.0: 1.2, 2.0: 1.0}, None, 1.625, None),
    ({0.0: 9.0, 1.0: 4.0, 2.0: 1.0}, None, None, None),
    ({0.0: 90.0, 1.0: 1.0, 2.0: 0.0, 3.0: 90.0}, 2.0, None, 1.5),
]


@pytest.mark.parametrize(("curve", "tried", "vertex", "middle"), CURVES)
def test_a_best_rate_is_read_in_several_ways(
    curve: Any, tried: Any, vertex: Any, middle: Any
) -> None:
    """A reading of the best learning rate gives None if it would lie at an end of the curve."""
    assert others.lowest_tried(curve) == tried
    if vertex is not None:
        assert others.vertex_of_three(curve) == pytest.approx(vertex)
    if middle is None or curve is not PARABOLA:
        assert others.middle_of_flat(curve) == middle


# --- conversions ----------------------------------------------------------------------------------------------------------

RANKS = (4, 16, 64)


@pytest.fixture
def followed(csv_of: Callable[[str, Lines], Path]) -> others.Sweep:
    """Return a sweep of a 7B model whose losses are parabolas around the default law's learning rates.

    It includes full finetuning.
    """
    at = others.Widths(3584, 3584, 512, 18944)
    tuned = Reference(16, 16, fan_in=at.mean)
    rows = []
    for rank in (*RANKS, FULL):
        there = Reference(rank or 1, rank or 1, fan_in=at.mean)
        if rank == FULL:
            there = Reference(method="full", fan_in=at.inner)
        best = -11.0 + math.log2(Falling().multiplier(there.as_factor(), tuned))
        rows += [
            (rank or "", 2.0**x, 1.0 + 0.1 * (x - best) ** 2) for x in range(-20, -6)
        ]
    return others.qwen_7b(csv_of("rank,lr,loss", rows))


def test_a_sweep_that_follows_the_law_is_moved_by_it(followed: others.Sweep) -> None:
    """The law finds the best learning rates of a sweep that follows it.

    An unchanged learning rate does not.
    """
    names = (large_models.ALONE, large_models.KEPT)
    law, kept = (large_models.WAYS[name] for name in names)
    for to_full in (False, True):
        found = large_models.moves(followed, law, "vertex", to_full)
        assert len(found) == (len(RANKS) if to_full else 6)
        assert max(abs(each.octaves) for each in found) < 1e-6
        assert (
            max(each.lost for each in found) < 2.5
        )  # the parabola's chords lie above it
    best = followed.best["vertex"]
    move = large_models.moved(followed, kept, "vertex", 4, 64)
    assert move.octaves == pytest.approx(best[4] - best[64])
    assert move.lost > 3


def test_the_packages_way_to_full_finetuning_is_its_ratio(
    followed: others.Sweep,
) -> None:
    """The package converts by the law between ranks, and by the bfloat16 ratio to full finetuning and back."""
    way, law = (
        large_models.WAYS[name] for name in ("the default law", large_models.ALONE)
    )
    assert way(followed, 4, 64) == law(followed, 4, 64)
    there, back = way(followed, 16, FULL), way(followed, FULL, 16)
    assert there == pytest.approx(-back)
    to_32 = Falling().multiplier(
        Reference(16, 32, fan_in=followed.widths.mean).as_factor(), followed.at(16)
    )
    assert there == pytest.approx(math.log2(to_32 * 2.8 / 26))


def test_what_is_not_known_is_not_moved(followed: others.Sweep) -> None:
    """A best learning rate at an end of its grid is not converted, and the square-root rule has
    none for full finetuning.
    """
    unknown = {
        "tried": {},
        "vertex": {r: x for r, x in followed.best["vertex"].items() if r != 4},
    }
    cut = others.Sweep(
        *(followed.model, followed.widths, float, "%", followed.curves, unknown)
    )
    law = large_models.WAYS["the default law"]
    assert large_models.moved(cut, law, "vertex", 4, 16) is None
    assert large_models.moved(cut, law, "vertex", 16, 4).octaves is None
    root = large_models.WAYS[large_models.ROOT]
    assert large_models.moved(cut, root, "vertex", 16, FULL) is None


def test_accuracy_is_lost_in_points(csv_of: Callable[[str, Lines], Path]) -> None:
    """Lost accuracy is counted in percentage points below the best run."""
    rows = [(16, 2.0**x, y) for x, y in ((-12, 0.2), (-11, 0.8), (-10, 0.4))]
    sweep = others.qwen_grpo(csv_of("rank,lr,accuracy_final", rows))
    assert sweep.lost(16, -10.0) == pytest.approx(40)
    assert large_models.accuracy_at(sweep, 16, -11.5) == pytest.approx(0.5)
    assert sweep.best["vertex"] == {16: -11.0}


def test_a_ceiling_ends_at_the_first_broken_story(
    csv_of: Callable[[str, Lines], Path],
) -> None:
    """The highest learning rate with whole outputs lies below the first one that broke some outputs."""
    shares = {1: (100, 100, 100), 2: (100, 100, 50), 4: (100, 80, 100)}
    rows = [
        (rank, 2.0**x, share, 0)
        for rank, each in shares.items()
        for x, share in zip((-12, -11, -10), each, strict=True)
    ]
    broken = others.olmo_dpo(csv_of("rank,lr,coherent_percent,trait_percent", rows))
    assert [broken.highest_whole(rank) for rank in shares] == [-10, -11, -12]
    assert large_models.slope_of(broken, 1, 4) == pytest.approx(-1.0)
    assert -0.5 <= large_models.law_slope(broken, 1, 4) < 0


# --- README ---------------------------------------------------------------------------------------------------------


def test_the_table_of_readme_is_that_of_the_page() -> None:
    """README shows the page's first table with at most six rows, and its picture, which exists."""
    readme = (RESULTS.parents[1] / "README.md").read_text()
    table = readme.split("<!-- tables -->\n\n")[1].split("\n\n<!-- end")[0]
    assert table in (RESULTS / "large_models.md").read_text()
    rows = [re.split(r" *\| *", line)[2:-1] for line in table.splitlines()[2:]]
    assert 1 < len(rows) <= 6
    assert all(float(cell) >= 0 for row in rows for cell in row)
    assert "benchmarks/results/large_models.png" in readme
    assert (RESULTS / "large_models.png").exists()
