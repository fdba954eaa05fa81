"""The table of optimizers: a row of it, from the check to the comparisons."""

from __future__ import annotations

import pytest
from ecosystem.optimizers import row

ROWS = {
    "torch.optim.AdamW": ("sign-like", "sign-like"),
    "torch.optim.SGD": ("gradient-like", "gradient-like"),
}


@pytest.mark.parametrize("key", ROWS)
def test_a_row_is_complete(key):
    """A class that torch ships is known by the check and moves as given."""
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
