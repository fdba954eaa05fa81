"""How sure a rate is: the fit's own deviation, and what is added for whatever was not tried."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rankaware_optim import (
    Constant,
    Power,
    Recipe,
    RecipeError,
    Reference,
)
from rankaware_optim.fitting import Fit, Prior
from rankaware_optim.recipe import (
    ANY_WIDTH,
    recipe_of,
)
from rankaware_optim.recipe._rates import margin, spread

COVARIANCE = np.array([[0.05, 0.01, -0.02], [0.01, 0.02, 0.004], [-0.02, 0.004, 0.3]])
AT_16 = Reference(16, 16.0, fan_in=256.0)
RECIPE = Recipe(
    name="r",
    fitted_lr=2e-3,
    reference=AT_16,
    law=Power(exponent=0.4, pivot=8.0),
    covariance=COVARIANCE,
    scaling_rule="fixed",
    full_fan_in=512.0,
    ranks=(4, 64),
    scatter=0.2,
)
FULL = Reference(method="full", fan_in=512.0)
B = replace(RECIPE, reference=replace(AT_16, init="B"))
TO_FULL = replace(RECIPE, law=replace(RECIPE.law, to_full=True))
CASES = [
    # recipe, target, the fit's design vector, what is added
    (RECIPE, AT_16, (1, 1, 0), [0.2]),
    (RECIPE, replace(AT_16, rank=4), (1, -1, 0), [0.2]),
    (RECIPE, replace(AT_16, rank=64), (1, 3, 0), [0.2]),
    (RECIPE, replace(AT_16, rank=256), (1, 5, 0), [0.2, 0.1 * 2]),
    (RECIPE, replace(AT_16, rank=1), (1, -3, 0), [0.2, 0.1 * 2]),
    (RECIPE, replace(AT_16, fan_in=2048.0), (1, 1, 0), [0.2, 0.25 * 3]),
    (RECIPE, replace(AT_16, fan_in=257.0), (1, 1, 0), [0.2]),
    (RECIPE, replace(AT_16, fan_in=262.0), (1, 1, 0), [0.2, 0.25 * math.log2(262 / 256)]),
    (RECIPE, replace(AT_16, init="B"), (1, 1, 0), [0.2, 1.0]),
    (B, AT_16, (1, 1, 0), [0.2, 1.0]),
    (B, replace(B.reference, rank=256), (1, 5, 0), [0.2, 0.1 * 2]),
    (B, replace(B.reference, rank=1), (1, -3, 0), [0.2, 0.2 * 2]),
    (replace(RECIPE, ranks=()), AT_16, (1, 1, 0), [0.2, 0.1]),
    (RECIPE, FULL, (1, 0, 1), [0.4 / 2 * 6]),
    (TO_FULL, FULL, (1, 6, 1), []),
    (replace(RECIPE, full_seen=True), FULL, (1, 0, 1), []),
    (
        replace(RECIPE, full_seen=True),
        replace(FULL, fan_in=1024.0),
        (1, 0, 1),
        [0.25],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "target", "row", "added"), CASES)
def test_the_spread_is_the_fits_and_what_was_not_tried(recipe, target, row, added):
    """A tenth for each octave of rank beyond, a fifth below at A = 0, a quarter of width, one for the init."""
    variance = np.array(row) @ COVARIANCE @ row + sum(sd**2 for sd in added)
    sd, notes = spread(recipe, target)
    assert sd == pytest.approx(math.sqrt(variance))
    untried = len(added) - (target.method == "lora")
    assert len(notes) == (1 if recipe is TO_FULL else untried)


@pytest.mark.parametrize(("sd", "octaves"), [(0.0, 0.0), (0.2, 0.06), (1.0, 0.25)])
def test_the_margin_is_of_an_exponential_cliff_and_bounded(sd, octaves):
    """a·sd²/2 for a steepness a of 3, a quarter of an octave at most."""
    assert margin(replace(RECIPE, steepness=3.0), sd) == pytest.approx(octaves)


@pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")
def test_a_recipe_of_unknown_width_answers_as_one_of_4096():
    """Between ranks of one init the width nearly cancels, so none is asked for."""
    lost = replace(RECIPE, reference=replace(AT_16, fan_in=None))
    wide = replace(RECIPE, reference=replace(AT_16, fan_in=4096.0))
    assert ANY_WIDTH == 4096.0
    assert lost.at(64).lr == wide.at(64).lr
    with pytest.raises(RecipeError, match="Give the model's width"):
        lost.at(64, init="B")


def test_a_recipe_is_made_of_a_fit():
    """Its optimum, ceiling and spread are the fit's at the reference's rank, its margin follows from them."""
    mean = np.array([-9.0, 0.5, 0.25])
    fit = Fit(Prior(pivot=16.0, scatter=0.3), mean, COVARIANCE, 2.0, -6.0, {})
    made = recipe_of(
        fit, Constant(), Reference(64, 64.0, fan_in=256.0), name="r", ranks=(64,)
    )
    assert made.fitted_lr == 2.0**-8  # two octaves of rank at half an octave each
    assert made.ceiling == 2.0**-5
    assert made.law == Power(0.5, 2**0.25, pivot=16.0, law=Constant())
    assert (made.steepness, made.scatter) == (2.0, 0.3)
    variance = np.array([1, 2, 0]) @ COVARIANCE @ [1, 2, 0] + 0.3**2
    assert made.margin == pytest.approx(min(variance, 0.25))
    assert (
        recipe_of(replace(fit, ceiling=None), Constant(), AT_16, name="r").ceiling
        is None
    )
