"""Sweeps that others published: only the files that were read are taken, and a grid of accuracies is read as LoRA's."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from laws import published

NAME = "rank_x_lr_results.json"


def accuracies(tmp_path: Path) -> Path:
    """LoRA's accuracy by rank and rate, best at 2^-10 at rank 4 and an octave lower at rank 16; another method's."""
    ranks = {
        str(rank): {
            "lrs": [2.0**x for x in range(-14, -6)],
            "acc": [0.5 - (x - best) ** 2 / 100 for x in range(-14, -6)],
        }
        for rank, best in ((4, -10), (16, -11))
    }
    path = tmp_path / NAME
    path.write_text(
        json.dumps(
            {
                "lora": {"ranks": ranks},
                "dora": {"ranks": {"4": {"lrs": [1.0], "acc": [1.0]}}},
            }
        )
    )
    return path


def test_a_grid_is_read_at_s_of_1(tmp_path: Path) -> None:
    """Every accuracy of LoRA is a run whose loss is what is missing to 1, with alpha equal to the rank."""
    runs = (
        importlib.import_module("internals")
        .read_sweep(published.grid(accuracies(tmp_path)))
        .runs
    )
    assert len(runs) == 16
    assert {(run.rank, run.alpha) for run in runs} == {(4, 4), (16, 16)}
    assert min(runs, key=lambda run: run.loss).lr in (2.0**-10, 2.0**-11)
    assert min(run.loss for run in runs) == pytest.approx(0.5)


def test_laws_are_scored_on_a_known_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A law that moves the best rate by an octave is right, one that keeps it is an octave off."""
    path = accuracies(tmp_path)
    known = replace(
        published.SOURCES[NAME], sha256=hashlib.sha256(path.read_bytes()).hexdigest()
    )
    monkeypatch.setitem(published.SOURCES, NAME, known)
    worst = {
        row["law"]: row["worst_octaves"]
        for row in published.rows_of(path)
        if row["best rate by"] == "parabola"
    }
    assert worst["power with exponent -0.5, law (constant)"] == pytest.approx(
        0.0, abs=0.01
    )
    assert worst["constant"] == pytest.approx(1.0, abs=0.01)
    assert all(math.isfinite(octaves) for octaves in worst.values())


@pytest.mark.parametrize("name", [NAME, "other.json"])
def test_another_file_is_refused(tmp_path: Path, name: str) -> None:
    """A file of another hash or name is not scored, and nothing is written."""
    path = accuracies(tmp_path).rename(tmp_path / name)
    said = CliRunner().invoke(published.main, ["table", str(path)])
    assert said.exit_code == 1
    assert "none of the files that were read" in said.output
