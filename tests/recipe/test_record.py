"""What a recipe records: two are equal if every value is."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from rankaware_optim import Recipe

from ..helpers.recipes import KINDS


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_every_value_is_compared(name):
    """Recipes that differ in one value differ, but not those of which one lacks its file of trials."""
    made = KINDS["two ranks"]
    is_table = isinstance(getattr(made, name), dict)
    other = replace(made, **{name: {"another": 1} if is_table else "another"})
    assert (made == other) == (name == "missing")
    assert other == replace(other)


def test_nan_equals_nan():
    """Trials with the same NaN are alike."""
    damaged = KINDS["damaged curves"]
    copies = {name: array.copy() for name, array in damaged.tensors.items()}
    assert replace(damaged, tensors=copies) == damaged
