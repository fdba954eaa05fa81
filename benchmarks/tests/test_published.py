"""Sweeps that others published: only the file that was read is taken."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from laws import published, tinker


def page(published_page: Any) -> Path:
    """A model's losses at ranks 4 and 16, best at 2^-10 and an octave lower."""
    runs = [
        (rank, 2.0**x, 1.0 + (x - best) ** 2 / 10)
        for rank, best in ((4, -10), (16, -11))
        for x in range(-14, -6)
    ]
    found: Path = published_page({"Qwen/Qwen3-8B": runs})
    return found


def test_laws_are_scored_on_the_models_added(published_page: Any) -> None:
    """A law that moves the best rate by an octave is right, one that keeps it is an octave off."""
    worst = {
        row["law"]: row["worst_octaves"]
        for row in published.rows_of(page(published_page))
        if row["best rate by"] == "parabola"
    }
    assert worst["constant"] == pytest.approx(1.0, abs=0.01)
    by_root = worst["power with exponent -0.5, law (constant)"]
    assert by_root == pytest.approx(0.0, abs=0.01)


def test_another_file_is_refused(
    published_page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of another hash is not scored."""
    path = page(published_page)
    said = CliRunner().invoke(published.main, [str(path)])
    assert said.exit_code == 1
    assert "is not the sft_sweep.md that was read" in said.output
    monkeypatch.setattr(tinker, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert tinker.checked(path) == path
