"""Recipes whose files were damaged."""

from __future__ import annotations

import math
import shutil
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankaware_optim as ra

from ..helpers.damage import damaged

FILES = sorted((Path(__file__).parents[2] / "recipes").glob("language-b*"))


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.suffix)
@given(data=st.data())
def test_a_damaged_recipe_is_refused_or_gives_rates(tmp_path_factory, file, data):
    """Whatever happens to one of its files, a recipe is refused by our error or has a rate in a finite band."""
    folder = tmp_path_factory.mktemp("recipe")
    for each in FILES:
        shutil.copy(each, folder)
    (folder / file.name).write_bytes(data.draw(damaged(file.read_bytes())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ra.RankAwareWarning)
        try:
            rate = ra.Recipe.load(folder / "language-b.toml").at(16)
        except ra.RankAwareError:
            return
    assert 0 < rate.low <= rate.lr <= rate.high < math.inf
