"""What the fit assumes before any trial: its prior, and the law at the means of the prior."""

from __future__ import annotations

import pytest

from rankaware_optim import MuA, Power, Reference
from rankaware_optim.fitting import Prior, centred_law, prior_of
from rankaware_optim.laws import get_law

AT = {
    "A": Reference(16, 16.0, fan_in=1024),
    "B": Reference(16, 16.0, init="B", fan_in=1024),
    "full": Reference(method="full", fan_in=1024),
}


@pytest.mark.parametrize(
    ("at", "drift_sd", "full_sd", "full_reach"),
    [("A", 0.15, 0.8, 0.0), ("B", 0.2, 0.6, 7.0), ("full", 0.15, 1e-3, 0.0)],
)
def test_the_prior_is_that_of_the_init(at, drift_sd, full_sd, full_reach):
    """The prior depends on the init: if A starts at zero, the drift reaches up to rank = fan-in,
    which is seven octaves above the pivot 16 at a width of 2048.
    """
    prior = prior_of(AT[at], (4, 64, None), 2048.0)
    assert (prior.drift_sd, prior.full_sd, prior.pivot) == (drift_sd, full_sd, 16.0)
    assert prior.full_reach == pytest.approx(full_reach)


def test_what_is_unknown_leaves_the_prior_at_the_usual():
    """Without LoRA ranks the pivot is 16, and without a width the drift does not reach up to full
    finetuning.
    """
    assert prior_of(AT["full"], (None,), None).pivot == 16.0
    assert prior_of(AT["B"], (8,), None).full_reach == 0.0
    assert Prior() == prior_of(AT["A"], (16,), None)


def test_the_pivot_is_the_ranks_geometric_mean_to_nine_decimals():
    """The pivot is the geometric mean of the ranks: exactly 16 for 4 and 64, and √32 to nine
    decimals for 4 and 8.
    """
    assert prior_of(AT["A"], (4, 64), None).pivot == 16.0
    assert prior_of(AT["A"], (4, 8, None), None).pivot == 5.656854249


@pytest.mark.parametrize(
    ("at", "law", "exponent", "to_full"),
    [("A", "mua", 0.1, False), ("B", "mua", -0.35, True), ("B", "falling", 0.1, True)],
)
def test_the_law_is_centred_on_the_prior(at, law, exponent, to_full):
    """The exponent is the fitted drift, plus -0.45 if A starts at zero and the law itself does not
    fall with the rank.
    """
    centred = centred_law(get_law(law), AT[at], 8.0, drift=0.1, factor=-1.0)
    assert centred.exponent == pytest.approx(exponent)
    assert (centred.full_factor, centred.pivot, centred.to_full) == (0.5, 8.0, to_full)
    assert centred.law == get_law(law)


def test_full_finetuning_takes_the_law_as_it_is():
    """If the base learning rate belongs to full finetuning, no drift and no factor are added."""
    law = MuA(tokens=4.0)
    centred = centred_law(law, AT["full"], 8.0, drift=0.1, factor=-1.0)
    assert centred == Power(law=law)
