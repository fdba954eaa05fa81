"""What a recipe records: two are equal if every value is."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from rankaware_optim import Power, Recipe, Reference

from ..helpers.recipes import KINDS

RECIPE = replace(
    KINDS["full too"], settings={"a": 1}, other_rates={"head.weight": 1e-3}
)
OTHERS = {
    "reference": Reference(rank=8, alpha=8),
    "scaling_rule": "alpha",
    "law": Power(exponent=0.2),
    "layers": {"q": 64.0},
    "source": {"train": "other"},
    "versions": {"torch": "9"},
}
COMPARED = [field.name for field in fields(Recipe) if field.name != "missing"]


def changed(name):
    """The recipe with another value of one field."""
    value = getattr(RECIPE, name)
    if name in OTHERS:
        other = OTHERS[name]
    elif isinstance(value, dict):
        other = {key: 2 * inner for key, inner in value.items()}
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, (str, tuple)):
        other = value + ("more" if isinstance(value, str) else (1,))
    else:
        other = 1 if value is None else 2 * value + 1
    return replace(RECIPE, **{name: other})


@pytest.mark.parametrize("name", COMPARED)
def test_every_value_is_compared(name):
    """Recipes that differ in one value differ, and those that only lack a file of trials are alike, as NaN is."""
    other = changed(name)
    assert other != RECIPE
    assert other == replace(other, missing="x.trials.safetensors")
