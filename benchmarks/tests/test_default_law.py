"""The page on the default law: what moved rates lose on a published sweep, and the intervals of differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import default_law
from study.regret import in_points, resampled

from rankaware_optim import CalibrationError, MuA, Reference
from rankaware_optim.laws import checked_multiplier

RATES = range(-18, -6)
MODEL = "Qwen/Qwen3-8B-Base"  # of width 4096


def runs_of(ranks: dict[int, range]) -> Iterator[tuple[int, float, float]]:
    """Runs of one model that follows two tokens at alpha 32, each rank at its own rates (log2)."""
    for rank, rates in ranks.items():
        factor = Reference(rank, 32, fan_in=4096).as_factor()
        moved = checked_multiplier(
            MuA(tokens=2.0), factor, Reference(16, 32, fan_in=4096)
        )
        best = -12.0 + math.log2(moved)
        for x in rates:
            yield rank, 2.0**x, 1.0 + 0.1 * (x - best) ** 2


def test_a_sweep_loses_least_by_its_own_law(published_page: Any) -> None:
    """Drawn from two tokens, a sweep loses nothing by them that the grid shows, and more by other ways the farther off."""
    path = published_page({MODEL: runs_of({1: RATES, 4: RATES, 64: RATES})})
    means = {
        name: float(default_law.mean_of(default_law.lost_by_models(path, way, 1), 4))
        for name, way in default_law.WAYS.items()
    }
    assert min(means, key=means.__getitem__) == default_law.TODAY
    assert means["1 token"] < means["the paper's law"] == means["keeping it"]
    assert means["4 tokens"] < means["8 tokens"] < means["16 tokens"]


def test_an_end_of_a_grid_is_a_target_and_no_source(published_page: Any) -> None:
    """A rate is moved from ranks whose best rate lies inside the grid, to all with three rates, from the lowest rank on."""
    ranks = {1: RATES, 4: RATES, 16: range(-18, -13), 64: range(-13, -11)}
    path = published_page({MODEL: runs_of(ranks)})
    way = default_law.WAYS[default_law.TODAY]
    for lowest, moves in ((1, 4), (4, 1)):  # 1 and 4 to each other and to 16; 4 to 16
        (lost,) = default_law.lost_by_models(path, way, lowest).values()
        assert len(lost) == moves
        assert min(lost) >= 0.0


def test_models_are_counted_apart(published_page: Any) -> None:
    """The models that a law was chosen by are no part of those added since."""
    path = published_page({MODEL: runs_of({1: RATES, 4: RATES})})
    way = default_law.WAYS[default_law.TODAY]
    assert MODEL in default_law.lost_by_models(path, way, 1, default_law.FIRST)
    with pytest.raises(CalibrationError):
        default_law.lost_by_models(path, way, 1, default_law.ADDED)


GROUPS = st.lists(
    st.lists(st.floats(-1.0, 1.0), min_size=1, max_size=4), min_size=1, max_size=6
)


@given(GROUPS)
def test_the_mean_of_groups_lies_in_its_interval(groups: list[list[float]]) -> None:
    """Resampled means stay between the lowest and the highest group, around the mean of all values."""
    means = [sum(each) / len(each) for each in groups]
    drawn = resampled(groups)
    assert min(means) - 1e-9 <= drawn.min() <= drawn.max() <= max(means) + 1e-9
    whole = [value for each in groups for value in each]
    if len(set(map(len, groups))) == 1:
        apart = abs(drawn.mean() - sum(whole) / len(whole))
        assert apart <= 0.05 * (max(means) - min(means)) + 1e-9


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([[0.01], [0.01]], "+1.00 [+1.00, +1.00]"),
        # a group counts by its values
        ([[0.0, 0.0, 0.0], [0.04]], "+1.00 [+0.00, +4.00]"),
        ([[-0.01], [0.01]], "+0.00 [-1.00, +1.00]"),
    ],
)
def test_a_difference_is_said_in_points(groups: list[list[float]], said: str) -> None:
    """The mean of all values, and the interval of means over groups drawn again."""
    assert in_points(groups) == said


def test_a_group_weighs_as_much_as_it_has_values() -> None:
    """Of a group of three zeros and one of a single 4, both drawn once have the mean 1."""
    assert set(resampled([[0.0, 0.0, 0.0], [4.0]])) == {0.0, 1.0, 4.0}


def test_a_way_is_not_compared_with_itself() -> None:
    """A row of the way that the others are compared with has a dash."""
    lost = {"a": [0.1], "b": [0.2]}
    assert default_law.less(lost, lost) == "–"
    assert default_law.less(lost, {"a": [0.2], "b": [0.3]}) == "-10.00 [-10.00, -10.00]"
