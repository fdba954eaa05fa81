"""Sweeps whose file was damaged."""

from __future__ import annotations

import math
import warnings

from hypothesis import given
from hypothesis import strategies as st

import rankaware_optim as ra
from rankaware_optim.sweeps import fit_sweep

from ..helpers.calibrations import bowl
from ..helpers.damage import damaged

ROWS = [(rank, x, bowl(x + 8)) for rank in (4, 64) for x in range(-12, -4)]
CSV = "rank,alpha,lr,loss\n" + "".join(
    f"{rank},{rank},{2.0**x},{loss}\n" for rank, x, loss in ROWS
)


@given(data=st.data())
def test_a_damaged_sweep_is_refused_or_gives_rates(tmp_path_factory, data):
    """Whatever happens to its file, a sweep is refused by an error of ours or fitted to a rate in a finite band."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.csv"
    path.write_bytes(data.draw(damaged(CSV.encode())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ra.RankAwareWarning)
        try:
            rate = fit_sweep(path, fan_in=64.0).at(16)
        except ra.RankAwareError:
            return
    assert 0 < rate.low <= rate.lr <= rate.high < math.inf
