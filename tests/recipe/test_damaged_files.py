"""Recipes and sweeps whose files were damaged."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankaware_optim as ra
from rankaware_optim.sweeps import fit_sweep

from ..helpers.calibrations import bowl
from ..helpers.damage import damaged

RECIPE = Path(__file__).parents[2] / "recipes" / "language-b.toml"
SWEEP = "rank,alpha,fan_in,lr,loss\n" + "".join(
    f"{rank},{rank},64,{2.0**x},{bowl(x + 8)}\n"
    for rank in (4, 64)
    for x in range(-12, -4)
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A recipe's two files, and a sweep's."""
    folder = tmp_path_factory.mktemp("files")
    for path in RECIPE.parent.glob(f"{RECIPE.stem}.*"):
        shutil.copy(path, folder)
    (folder / "sweep.csv").write_text(SWEEP)
    return folder


DAMAGED = [
    # the file that is damaged, the one that is read, and how
    ("language-b.toml", "language-b.toml", ra.Recipe.load),
    ("language-b.trials.safetensors", "language-b.toml", ra.Recipe.load),
    ("sweep.csv", "sweep.csv", fit_sweep),
]


@pytest.mark.parametrize(("name", "given_name", "read"), DAMAGED)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_gives_rates(files, name, given_name, read, data):
    """Whatever happens to one of the files, there is an error of ours, or a rate in a finite band."""
    path, whole = files / name, (files / name).read_bytes()
    path.write_bytes(data.draw(damaged(whole)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ra.RankAwareWarning)
            rate = read(files / given_name).at(16)
    except ra.RankAwareError:
        return
    finally:
        path.write_bytes(whole)
    assert 0 < rate.low <= rate.lr <= rate.high < math.inf
