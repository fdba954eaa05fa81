"""What a recipe gives on another model: the scores of rates on published curves."""

from __future__ import annotations

import pytest
from internals import PUBLISHED
from laws import elsewhere

from rankaware_optim import Rate

WIDTHS = {"small": 2048.0}.__getitem__
PARABOLA = {float(x): 2.0 + (x + 12) ** 2 / 10 for x in range(-15, -8)}
CURVES = {
    ("small", 16): PARABOLA,
    ("small", 64): {x: -x for x in PARABOLA},  # the best is at the edge
    ("small", 1): {-12.0: 2.0},
}


def test_a_rate_is_scored_on_the_curves_whose_best_lies_inside() -> None:
    """An octave above the best rate loses what the curve says, and its band holds the best rate or not."""
    (target,) = targets = elsewhere.targets_in(CURVES, WIDTHS)
    assert target.best == pytest.approx(-12.0)
    assert (target.at.rank, target.at.alpha, target.at.fan_in) == (
        16,
        PUBLISHED.alpha,
        2048.0,
    )
    high = elsewhere.score(targets, lambda at: Rate(2.0**-11, low=2.0**-11.5, high=1.0))
    assert high == pytest.approx((5.0, 1.0, 0.0))
    sure = elsewhere.score(targets, lambda at: Rate(2.0**-12, low=2.0**-13, high=1.0))
    assert sure == pytest.approx((0.0, 0.0, 1.0))


def test_shipped_recipes_refuse_a_published_model() -> None:
    """Each is asked with and without steps and batch. What it would say moves with the whole batch or a part of it."""
    targets, recipes = elsewhere.targets_in(CURVES, WIDTHS), elsewhere.shipped("A")
    count = 2 * len(recipes)
    assert elsewhere.refused(targets, recipes) == f"{count} of {count} refused"
    language = next(each for each in recipes if each.name == "language-a")
    at, horizon = targets[0].at, {"batch": elsewhere.BATCH}
    was = elsewhere.by_the_whole_batch(language, horizon)(at)
    now = elsewhere.less_certain(language, horizon)(at)
    alone = elsewhere.unchecked(language, {})(at)
    assert was.lr / alone.lr == pytest.approx(4.0, rel=0.05)
    assert now.lr / alone.lr == pytest.approx(2.0, rel=0.1)
    assert now.high / now.low > was.high / was.low
