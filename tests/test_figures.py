"""Ticks of rates: round numbers that stand where they say."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from rankaware_optim._figures import log_ticks


@given(low=st.floats(1e-9, 1e3), octaves=st.floats(1.0, 60.0), most=st.integers(3, 9))
def test_ticks_are_round_and_inside(low, octaves, most):
    """From a factor of two on there is a tick, at most as many as asked for, rising, each of one digit and inside."""
    high = low * 2.0**octaves
    ticks = log_ticks(low, high, most)
    assert 1 <= len(ticks) <= most
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    assert all(float(f"{tick:g}") == tick == float(f"{tick:.0e}") for tick in ticks)


@given(low=st.floats(1e-9, 1e3), decades=st.floats(1.0, 12.0))
def test_a_decade_has_ticks_of_1_2_and_5(low, decades):
    """From a decade on the first digits are 1, 2 and 5, and from three on 1 alone."""
    first = {f"{tick:.0e}"[0] for tick in log_ticks(low, low * 10.0**decades, most=99)}
    assert first <= set("125")
    assert decades < 3 or first == {"1"}
    assert math.isfinite(low)
