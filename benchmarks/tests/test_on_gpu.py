"""Tests of the benchmark for a CUDA device, run at its smallest size on a CPU."""

from __future__ import annotations

import re

import on_gpu
import pytest
from click.testing import CliRunner


@pytest.fixture(scope="module")
def printed() -> str:
    result = CliRunner().invoke(on_gpu.main, ["--device", "cpu", "--smallest"])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_part_runs(printed: str) -> None:
    """Every question of the page has a table, and every step equals the native one exactly."""
    match, cost, move = printed.split("\n## ")[-3:]
    assert set(re.findall(r"\| ([^|]+) \|$", match, re.M)[2:]) == {"0"}
    assert cost.count("\n| f") == 3
    assert "the law holds" in move


def test_a_moved_rate_is_scored_by_the_sweep() -> None:
    """The loss between two learning rates is interpolated, and beyond the sweep it is that of the last one."""
    curve = {-8: 1.0, -7: 0.5, -6: 2.0}
    assert on_gpu.at(curve, -7.5) == 0.75
    assert on_gpu.at(curve, -3.0) == 2.0
