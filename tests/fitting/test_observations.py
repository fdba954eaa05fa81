"""What the fit reads from loss curves: start, end and noise, which runs diverged, and which runs
learned.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from rankaware_optim.fitting import (
    Observation,
    all_rose,
    arms_of,
    below_cliff,
    best_fall,
    diverged,
    gain_of,
    impute,
    loss_at_start,
    noise_of,
    none_learned,
    recent_mean,
    usual_noise,
)


def run(x=-9.0, value=1.0, start=2.0, **fields) -> Observation:
    given = {"rank": 4, "seed": 0, "tail": value, **fields}
    return Observation(x=x, value=value, start=start, **given)


CURVES = [
    ([3.0, 1.0, 1.0, 1.0, 1.0, 7.0], 3.0, 2.2),
    ([1.0, 3.0, 4.0, 2.0, 5.0, 9.0], 3.0, 4.6),
    ([2.0], 2.0, 2.0),
    ([*range(70)], 2.0, 66.0),
]


@pytest.mark.parametrize(("curve", "start", "end"), CURVES)
def test_a_curve_starts_at_its_first_values_and_ends_at_its_last(curve, start, end):
    """A loss curve's start is its first value or the median of five, whichever is higher, and its
    end is the mean of the last five values or of the last tenth.
    """
    assert loss_at_start(curve) == start
    assert recent_mean(curve) == pytest.approx(end)
    assert recent_mean(curve, 1) == curve[-1]


@pytest.mark.parametrize("trend", [0.0, -0.01])
def test_noise_is_measured_about_the_trend(trend):
    """The measured noise of a loss curve is within a tenth of the true noise, whatever the trend,
    and despite a jump and a NaN.
    """
    curve = np.random.default_rng(0).normal(0, 0.3, 2000) + trend * np.arange(2000)
    curve[700:] += 40.0
    curve[900] = math.nan
    assert noise_of(curve) == pytest.approx(0.3, rel=0.1)
    assert noise_of([1.0, 2.0]) == 0.0
    # NaN and infinity are left out, not replaced by 0.
    assert noise_of([2.0, 1.75, math.nan, 1.5, math.inf, 1.25]) == 0.0


def test_a_pruned_run_keeps_its_gap_to_the_best():
    """A run that was stopped at 0.5 above the best run is scored 0.5 above the best run's score,
    unless it was stopped in the first 30 % of its steps.
    """
    beside = [2.25 - step / 4 for step in range(10)]
    best = run(value=0.25, tail=0.5, first=2.25)
    worse = [value + 0.5 for value in beside]
    assert impute(-7.0, worse[:3], best, beside) == run(
        -7.0, 0.75, 2.75, tail=1.0, first=2.25
    )
    ahead = impute(-7.0, [0.0] * 6, best, beside)
    assert ahead is not None
    assert ahead.value == 0.25  # a run ahead of the best run is not scored better
    assert impute(-7.0, worse[:2], best, beside) is None
    assert impute(-7.0, worse[:1], best, beside[:3]) is not None


LOST_AT_3 = [run(-10, 1.0), run(-9, 0.5), run(-3, 9.0), run(-2, 0.8)]


def test_runs_are_split_at_divergence_and_kept_below_the_lowest_of_it():
    """Diverged runs are left out, and so are runs at higher learning rates than the lowest one that
    diverged.
    """
    assert diverged(LOST_AT_3) == {LOST_AT_3[2]}
    assert below_cliff(LOST_AT_3, {LOST_AT_3[2]}) == LOST_AT_3[:2]
    assert below_cliff(LOST_AT_3[:2], {LOST_AT_3[2]}) == LOST_AT_3[:2]


RISES = [(0.0, 2.3, False), (0.0, 2.5, True), (0.4, 2.5, False), (0.4, 2.7, True)]


@pytest.mark.parametrize(("noise", "end", "lost"), RISES)
def test_a_rise_counts_beyond_a_quarter_of_the_gain_and_beyond_the_noise(
    noise, end, lost
):
    """With a gain of 1.6, a run diverged if it ended above its start by more than 0.4 and by more
    than 1.5 times its noise.
    """
    ends = {-9: 0.4, -8: 0.6, -5: end}
    seen = [run(x, value, noise=noise) for x, value in ends.items()]
    assert diverged(seen) == ({seen[2]} if lost else set())


ENDS = [
    # the ends of two curves that start at 2.0 with noise 0.1, whether both rose, and whether one learned
    ((2.3, 2.4), True, False),
    ((2.3, 2.1), False, True),
    ((1.0, 2.4), False, True),
    ((1.9, 2.0), False, False),  # within two standard deviations of the first value
    ((1.7, 2.0), False, True),
    ((2.0, 2.1), False, False),
    ((2.0, 2.2), False, True),  # clearly below another run's end, without a rise
    ((2.3, 2.6), True, False),  # below another run's end, but above its own first value
]


@pytest.mark.parametrize(("ends", "rose", "learned"), ENDS)
def test_curves_rose_or_learned_beyond_their_noise_alone(ends, rose, learned):
    """All runs rose if each ended above its first value, and a run learned if it ended below its
    first value or another run's end, each beyond the noise.
    """
    seen = [run(tail=end, first=2.0, noise=0.1) for end in ends]
    assert (all_rose(seen), not none_learned(seen)) == (rose, learned)


def test_a_level_curve_neither_rose_nor_learned():
    """A curve without noise that ends where it began neither rose nor learned."""
    level = run(tail=2.0, first=2.0)
    assert not all_rose([level])
    assert none_learned([level])
    assert none_learned([level, run(tail=2.2, first=2.0)])


LOW = run(value=1.0, start=1.0)  # a run that started low by chance and did not change
FALLS = [
    ([], 0.0),
    ([run(value=3.0)], 0.0),
    ([run(value=1.5), run(value=-math.inf)], 0.5),
    ([LOW, run(value=2.5), run(value=2.5)], 0.0),
    ([run(value=0.5), run(value=1.0, start=2.2), run(value=3.0, start=2.1)], 1.6),
]


@pytest.mark.parametrize(("seen", "fall"), FALLS)
def test_the_best_fall_is_from_the_usual_start(seen, fall):
    """The best fall is the median start minus the lowest end."""
    assert best_fall(seen) == pytest.approx(fall)
    assert not fall > 1 or gain_of(seen) == pytest.approx(fall)


def test_the_gain_of_other_scores_is_of_their_own():
    """If scores are not comparable with the loss curves, the gain is the upper quartile of the
    scores minus the lowest, and is never zero.
    """
    scores = (-90.0, -80.0, -70.0, -60.0, -50.0)
    assert gain_of([run(value=score, tail=1.0) for score in scores]) == 30.0
    assert gain_of([run(value=5.0, start=5.0)]) == pytest.approx(6e-6)
    assert gain_of([run(value=1.5), run(value=1.75)]) == 0.5


@pytest.mark.parametrize(("off", "gain"), [(0.25, 1.0), (0.5, 1.0), (0.75, 0.5625)])
def test_scores_half_a_fall_off_their_curve_are_another_thing(off, gain):
    """The gain follows from the loss curves if scores differ from them by at most half of the fall,
    and from the range of the scores otherwise.
    """
    ends = (1.0, 1.25, 1.5, 1.75)
    seen = [run(value=end + off, tail=end) for end in ends]
    assert gain_of(seen) == gain
    assert usual_noise([run(noise=noise) for noise in (0.1, 0.2, 0.7)]) == 0.2


def test_arms_are_gaps_to_the_ranks_best_in_units_of_the_gain():
    """In units of the gain, the best run of a rank has the gap 0, no gap is above 1, and a diverged
    run has the gap 1.
    """
    ended = [run(-9, 1.0), run(-8, 1.5, seed=1), run(-7, 4.0), run(-6, 2.0, rank=None)]
    lost = run(-5, math.inf, seed=2)
    arms = arms_of([*ended, lost], [lost], gain=2.0)
    assert list(arms) == [4, None]
    assert arms[4].x.tolist() == [-9, -8, -7, -5]
    assert arms[4].y.tolist() == [0.0, 0.25, 1.0, 1.0]
    assert arms[4].seeds.tolist() == [0, 1, 0, 2]
    assert arms[None].y.tolist() == [0.0]
