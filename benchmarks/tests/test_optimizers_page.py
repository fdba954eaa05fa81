"""Tests of single rows in the table of optimizers."""

from __future__ import annotations

import pytest
from ecosystem.optimizers import row

ROWS = {
    "torch.optim.AdamW": ("sign-like", "sign-like"),
    "torch.optim.SGD": ("gradient-like", "gradient-like"),
}


@pytest.mark.parametrize("key", ROWS)
def test_a_row_is_complete(key):
    """A row of one of torch's classes has its family, the results of both checks, and no other way to step."""
    family, check = ROWS[key]
    made = row(key)
    assert made.pop("check").startswith(check)
    assert made.pop("over ranks").startswith(check)
    assert made == {
        "class": key,
        "family": family,
        "known by": "check",
        "displacement": "as given",
        "another way to step": "",
    }
