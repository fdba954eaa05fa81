"""The fitted loss curve of a rank: its median, its interval, and at which learning rates it
estimates the lost improvement.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from rankaware_optim.fitting import Observation, curves_of, improvement_is_known
from rankaware_optim.fitting._curve import LossCurve

START = 3.0


def run(x: float, loss: float, *, rank: int | None = 8, seed: int = 0) -> Observation:
    """Return a run that starts at a loss of 3."""
    return Observation(rank, seed, x, value=loss, start=START, tail=loss)


def bowl(x: float, best: float = -9.0) -> float:
    """Return the loss of a parabola that is 1 at `best` and rises to 3 at most."""
    return min(1.0 + 0.1 * (x - best) ** 2, START)


def curve(**changes) -> LossCurve:
    """Return a curve of two equally likely parabolas of curvature 0.2, whose optima are an octave
    apart, with these fields changed.
    """
    two = np.ones(2)
    usual = {
        "lowest": 1.0,
        "gain": 2.0,
        "tried": (-11.0, -8.0),
        "miss": 0.01,
        "levels": two * 0.0,
        "optima": np.array([-9.5, -8.5]),
        "shoulders": two * 4.0,
        "steepness": two * 0.0,
        "curvature": two * 0.2,
        "plateaus": two,
    }
    return LossCurve(**{**usual, **changes})


SAME = {"optima": np.array([-9.0, -9.0])}


def test_the_curve_is_the_median_of_its_bowls_in_the_unit_of_the_scores():
    """At each learning rate the curve is the median loss of its bowls, in the unit of the scores,
    and its 90 % interval spans their losses.
    """
    gaps = [0.1 * u * u for u in (1.5, 0.5)]
    middle, low, high = (float(each[0]) for each in curve().losses(np.array([-8.0])))
    assert middle == pytest.approx(1.0 + 2.0 * sum(gaps) / 2)
    width = gaps[0] - gaps[1]
    assert low == pytest.approx(1.0 + 2.0 * (gaps[1] + 0.05 * width))
    assert high == pytest.approx(1.0 + 2.0 * (gaps[1] + 0.95 * width))
    higher = curve(levels=np.full(2, 0.3)).losses(np.array([-8.0]))
    assert float(higher[0][0]) == pytest.approx(middle + 0.6)


def test_the_share_is_counted_from_the_best_that_can_be_chosen():
    """The lost improvement is counted from the best learning rate that can be chosen, because the
    optimum itself is uncertain.
    """
    expected = sum(0.1 * u * u for u in (1.5, 0.5)) / 2 - 0.1 * 0.25
    assert curve().lost_at(-8.0) == pytest.approx(expected, abs=1e-3)
    assert curve().lost_at(-9.0) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("x", "is_known"), [(-14.0, True), (-14.1, False), (-8.0, True), (-7.9, False)]
)
def test_a_curve_reaches_from_three_octaves_below_to_the_highest_tried(x, is_known):
    """A curve gives estimates from three octaves below the lowest learning rate tried up to the
    highest one, because a cliff may follow above it.
    """
    assert (curve(**SAME).lost_at(x) is not None) == is_known


@pytest.mark.parametrize(("steepness", "is_known"), [(0.2, True), (8.0, False)])
def test_bowls_that_disagree_say_nothing(steepness, is_known):
    """A learning rate has no estimate if the losses of the bowls differ there by more than half of
    the gain.
    """
    differing = curve(**SAME, curvature=np.array([0.1, 0.1 * (1 + steepness)]))
    assert (differing.lost_at(-11.0) is not None) == is_known


def test_a_curve_that_misses_its_trials_says_nothing():
    """A curve that misses its trials gives no estimate, as for losses that are flat over several
    octaves beside a wall.
    """
    assert curve(**SAME, miss=0.05).lost_at(-9.0) is not None
    assert curve(**SAME, miss=0.07).lost_at(-9.0) is None
    flat = {-10.0: 2.2, -8.4: 1.0, -6.4: 1.001, -4.4: 1.035}
    (fitted,) = curves_of([run(x, loss) for x, loss in flat.items()]).values()
    assert fitted.miss > 0.06
    assert fitted.lost_at(-8.4) is None


def test_few_trials_are_not_explained_by_a_dip_between_them():
    """Between a few trials, the curve does not fall far below the best of them."""
    seen = [run(x, loss) for x, loss in ((-11.0, 2.2), (-9.0, 1.0), (-7.0, 1.1))]
    (fitted,) = curves_of(seen).values()
    x = np.linspace(-11.0, -7.0, 50)
    assert fitted.losses(x)[0].min() > 1.0 - 2.0 * 0.1


def test_above_the_optimum_a_bowl_may_be_a_cliff_that_ends_on_its_plateau():
    """Above the optimum a steep bowl rises as (exp(a·u) - a·u - 1)/a², and on neither side does the
    loss rise beyond a plateau.
    """
    cliff = curve(**SAME, steepness=np.full(2, 3.0), plateaus=np.full(2, 0.4))
    above = cliff.losses(np.array([-8.5, -6.0]))[0]
    expected = 0.2 * (math.exp(1.5) - 1.5 - 1.0) / 9.0
    assert above == pytest.approx([1.0 + 2.0 * expected, 1.0 + 2.0 * 0.4])
    below = cliff.losses(np.array([-10.0, -30.0]))[0]
    arm = 16.0 * (math.sqrt(1.0 + 1 / 16) - 1.0)
    assert below == pytest.approx([1.0 + 2.0 * 0.2 * arm, 1.0 + 2.0])


# --- curves that are fitted to trials -----------------------------------------------------------------------------

TRIED = [-12.0, -11.0, -10.0, -9.0, -8.0]


def test_a_fitted_curve_runs_through_its_trials():
    """The median of a fitted curve is near the trials around the best, its interval is narrow, and
    the curve knows which range was tried.
    """
    (fitted,) = curves_of([run(x, bowl(x)) for x in TRIED]).values()
    middle, low, high = fitted.losses(np.array(TRIED))
    assert middle[1:] == pytest.approx([bowl(x) for x in TRIED[1:]], abs=0.1)
    assert np.all(low < middle)
    assert np.all(middle < high)
    assert np.all((high - low)[1:] < 0.6)
    assert fitted.tried == (-12.0, -8.0)
    assert fitted.gain == pytest.approx(2.0)
    assert fitted.lowest == 1.0


def test_seeds_of_other_levels_share_one_curve_between_them():
    """Two seeds whose losses differ by a constant share one curve, which runs between them."""
    seen = [run(x, bowl(x) + 0.2 * s, seed=s) for x in TRIED for s in (0, 1)]
    (fitted,) = curves_of(seen).values()
    middle = fitted.losses(np.array(TRIED[1:]))[0]
    assert middle == pytest.approx([bowl(x) + 0.1 for x in TRIED[1:]], abs=0.12)


def test_each_rank_has_a_curve_and_another_rank_lends_its_shape():
    """A rank with only two trials has a curve, whose interval is narrower if another rank with many
    trials has the same shape.
    """
    few = [run(x, bowl(x), rank=64) for x in (-10.0, -9.0)]
    many = [run(x, bowl(x)) for x in np.arange(-13.0, -6.0, 0.5)]
    alone, beside = curves_of(few), curves_of([*few, *many])
    assert {*beside} == {8, 64}
    x = np.array([-11.0])

    def width(fitted: LossCurve) -> float:
        _, low, high = fitted.losses(x)
        return float(high[0] - low[0])

    assert width(beside[64]) < width(alone[64])


def test_ranks_whose_runs_all_diverged_have_no_curve():
    """A rank has a curve only if at least one of its runs ended with a finite loss."""
    lost = [run(x, math.inf, rank=None) for x in TRIED]
    assert {*curves_of([*lost, *(run(x, bowl(x)) for x in TRIED)])} == {8}
    assert curves_of(lost) == curves_of([]) == {}


def test_a_diverged_run_is_a_wall():
    """A diverged run counts as a wall: above the highest finite run, the curve rises steeply up to
    the learning rate that diverged.
    """
    seen = [*(run(x, bowl(x)) for x in TRIED), run(-6.0, math.inf)]
    (fitted,) = curves_of(seen).values()
    assert fitted.lost_at(-6.0) > 0.6
    assert fitted.tried == (-12.0, -6.0)


def test_the_improvement_is_known_of_losses_that_fell():
    """The improvement is known if losses fell, but not if the scores differ from the losses, no
    loss fell, or every run diverged.
    """
    seen = [run(x, bowl(x)) for x in TRIED]
    assert improvement_is_known(seen)
    other = [replace(o, value=-10.0 * o.value, returned=True) for o in seen]
    level = [replace(o, start=o.value) for o in seen]
    lost = [run(x, math.inf) for x in TRIED]
    assert not any(map(improvement_is_known, (other, level, lost, [])))
