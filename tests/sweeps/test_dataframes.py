"""Tests that a pandas dataframe can be passed as a sweep."""

from __future__ import annotations

import pytest

from rankaware_optim.sweeps._read import read_sweep

pd = pytest.importorskip("pandas")

CSV = "rank,alpha,lr,loss\n4,8,1e-4,0.75\n4,8,2e-4,\n4,8,9e-4,NaN\n4,8,3e-4,diverged\n"


def test_a_dataframe_reads_as_its_csv(tmp_path):
    """A dataframe gives the same sweep as its CSV file, although pandas turns an empty loss into NaN."""
    path = tmp_path / "s.csv"
    path.write_text(CSV)
    frame = pd.read_csv(path)
    sweep = read_sweep(path)
    assert len(sweep.runs) == 2
    assert "2 runs were left out of 4" in sweep.notes[0]
    assert read_sweep(frame) == read_sweep(frame.to_dict("records")) == sweep
