"""The fit: it finds the known optimum of synthetic sweeps, and does not depend on the order of
trials or on units.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankaware_optim.fitting import (
    Fit,
    Observation,
    Prior,
    at_target,
    diverged,
    fit_observations,
    gain_of,
    steps_variance,
)

Z90 = 1.645
BASE = -9.0  # log2 of the true best learning rate at the pivot
START = 2.3
OFFSETS = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def linex(u: float) -> float:
    return 0.06 * (math.exp(2 * u) - 2 * u - 1)


def sweep(
    seed: int = 0,
    *,
    drift=0.0,
    factor=0.0,
    ranks=(4, 64),
    bowl=linex,
    noise=0.02,
    offsets=OFFSETS,
    base=BASE,
) -> list[Observation]:
    """Return runs of every rank at `offsets` around `base`, whose losses are a noisy bowl around
    the rank's own optimum.
    """
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-0.5, 0.5)
    own = rng.normal(0, noise, 2)
    seen = []
    for rank in ranks:
        best = base + (
            factor if rank is None else drift * math.log2(rank / Prior().pivot)
        )
        for i, offset in enumerate(offsets):
            x = base + offset + shift
            loss = 0.3 + bowl(x - best) + own[i % 2] + rng.normal(0, noise)
            seen.append(observation(x, loss, rank=rank, seed=i % 2))
    return seen


def observation(
    x: float, loss: float = math.inf, *, rank: int | None = 4, seed: int = 0
) -> Observation:
    """Return a run at log2 learning rate x that ended at `loss`, and diverged if `loss` is far
    above its start.
    """
    lost = loss > START + 1
    value = math.inf if lost else loss
    return Observation(rank, seed, x, value, START, value)


def fitted(seen, prior=None) -> Fit:
    fit = fit_observations(seen, prior or Prior())
    assert fit is not None
    return fit


def spread(fit: Fit) -> np.ndarray:
    return np.sqrt(np.diag(fit.covariance))


# --- what the fit finds ---------------------------------------------------------------------------------------------


def quadratic(u: float) -> float:
    return 0.1 * u * u


def saturating(u: float) -> float:
    """Return the loss of a bowl with a wall above the optimum, which flattens towards the untrained
    loss below the optimum.
    """
    if u > 0:
        return 0.07 * (math.expm1(3 * u) / 3 - u)
    return 0.2 * (math.sqrt(1 + u * u) - 1)


def stalling(height: float):
    """Return a bowl whose wall ends on a plateau, as if every run learned an easy part, and nothing
    more at too high a learning rate.
    """
    return lambda u: min(linex(u), height)


def two_heights(seed: int) -> list[Observation]:
    """Return runs of two ranks that share a plateau, where one rank improves less and so lies
    closer to the plateau.
    """
    options = {"offsets": (-3.0, -1.5, 0.0, 1.5, 3.0, 4.5)}
    low = sweep(seed, ranks=(4,), bowl=stalling(0.12), noise=0.01, **options)
    return [*low, *sweep(seed, ranks=(64,), bowl=stalling(1.2), **options)]


def two_slopes(seed: int) -> list[Observation]:
    """Return runs of two ranks, one of which has a bowl four times as steep as the other."""
    steep = sweep(seed, ranks=(64,), noise=0.005)
    moved = [replace(o, value=0.3 + 4 * (o.value - 0.3)) for o in steep]
    return [*sweep(seed, ranks=(4,)), *moved]


def apart(seed: int) -> list[Observation]:
    """Return runs of two seeds whose loss levels differ by four times the noise."""
    seen = sweep(seed, noise=0.01)
    return [replace(o, value=o.value + 0.08 * o.seed) for o in seen]


FAR = (*OFFSETS, 3.0, 4.0)
NARROW, OF_FULL = 0.5, 2 / 3 * Prior().full_sd
STUDIES = {
    # the study, the true base, drift and factor, how many of 40 intervals must contain them,
    # and the largest median standard deviation
    "a plateau": (partial(sweep, bowl=stalling(0.3), offsets=FAR), (BASE,), 33, 0.4),
    "two plateaus": (two_heights, (BASE,), 33, 0.4),
    "two slopes": (two_slopes, (BASE,), 30, NARROW),
    "seeds apart": (apart, (BASE,), 33, 0.2),
}
for drift, noise in product((-0.2, 0.0, 0.15), (0.005, 0.02, 0.06)):
    study = partial(sweep, drift=drift, noise=noise)
    STUDIES[f"drift {drift}, noise {noise}"] = study, (BASE, drift), 30, NARROW
for bowl, noise in product((quadratic, saturating), (0.003, 0.02)):
    study = partial(sweep, bowl=bowl, noise=noise)
    STUDIES[f"{bowl.__name__}, noise {noise}"] = study, (BASE,), 33, NARROW
for factor in (-0.6, 0.0, 0.6):
    study = partial(sweep, ranks=(4, 64, None), factor=factor)
    STUDIES[f"factor {factor}"] = study, (BASE, 0.0, factor), 30, OF_FULL


@pytest.mark.parametrize("study", STUDIES)
def test_the_truth_is_found_within_narrow_bands(study):
    """For every kind of bowl, the 90 % intervals of 40 studies contain the truth often enough and
    are narrow, and the mean error is small.
    """
    make, truth, covered, narrow = STUDIES[study]
    fits = [fitted(make(seed)) for seed in range(40)]
    errors = np.array([fit.mean[: len(truth)] - truth for fit in fits])
    sds = np.array([spread(fit)[: len(truth)] for fit in fits])
    assert ((np.abs(errors) < Z90 * sds).sum(axis=0) >= covered).all()
    assert np.abs(errors.mean(axis=0)).max() < 0.15
    assert np.median(sds, axis=0).max() < narrow


# --- longer runs ----------------------------------------------------------------------------------------------------


@given(u=st.floats(0, 10))
def test_a_slope_is_sure_for_a_short_way_and_fades(u):
    """The variance that is added for another number of steps grows in both directions, at first
    like that of a straight line and never faster.
    """
    straight = steps_variance(1e-3) * 1e6 * u**2
    assert steps_variance(u) < steps_variance(u + 1)
    assert steps_variance(u) <= 1.001 * straight + 1e-9
    assert steps_variance(-u) == steps_variance(u)
    if 1e-2 < u < 0.1:
        assert steps_variance(u) == pytest.approx(straight, rel=0.03)


@pytest.mark.parametrize("octaves", [0.0, 3.0])
def test_a_fit_at_more_steps_is_less_sure_of_every_rate_alike(octaves):
    """For a longer run, the best learning rates of all ranks and of full finetuning stay the same,
    and their variances grow by the same number.
    """
    fit = fitted(sweep())
    far = at_target(fit, octaves)
    for rank in (4, 16, None):
        assert far.best(rank) == fit.best(rank)
        row = fit.prior.row(rank)
        added = row @ (far.covariance - fit.covariance) @ row
        assert added == pytest.approx(steps_variance(octaves), abs=1e-12)
    assert far.ceiling == fit.ceiling


# --- what does not change the fit -----------------------------------------------------------------------------------


def assert_alike(first: Fit, second: Fit) -> None:
    assert second.mean == pytest.approx(first.mean, abs=1e-6)
    assert second.covariance == pytest.approx(first.covariance, rel=1e-6, abs=1e-12)
    assert second.steepness == pytest.approx(first.steepness, abs=1e-6)
    assert second.ceiling == first.ceiling


studies = st.builds(
    sweep,
    seed=st.integers(0, 1000),
    drift=st.floats(-0.3, 0.3),
    ranks=st.sampled_from([(4,), (4, 64), (8, 32, None), (None,)]),
    noise=st.floats(0.001, 0.1),
    offsets=st.lists(st.floats(-4, 4), min_size=1, max_size=8, unique=True).map(tuple),
).map(
    lambda seen: (
        [*seen, observation(BASE - 5, 1.0)] if diverged(seen) == {*seen} else seen
    )
)


@settings(max_examples=50)
@given(seen=studies, seed=st.integers(0, 100))
def test_the_order_of_trials_does_not_matter(seen, seed):
    """The same observations in any order give the same fit."""
    assert_alike(fitted(seen), fitted(random.Random(seed).sample(seen, len(seen))))


@settings(max_examples=50)
@given(seen=studies, offset=st.floats(-100, 100), scale=st.floats(1e-3, 1e3))
def test_the_units_of_the_loss_do_not_matter(seen, offset, scale):
    """Adding a constant to every loss, or changing its unit, changes no fitted learning rate."""

    def moved(o: Observation) -> Observation:
        values = {name: getattr(o, name) for name in ("value", "start", "tail")}
        return replace(o, **{k: (v + offset) * scale for k, v in values.items()})

    assert_alike(fitted(seen), fitted([moved(o) for o in seen]))


# Candidates span six octaves. Whether there are 48 or 49 of them must not depend on rounding.
X, LOSS = -7.03850018875348, 1.1832439645316866
ONE_RUN = Observation(4, 0, X, LOSS, 2.3, LOSS)


@settings(max_examples=50)
@given(seen=studies, octaves=st.floats(-20, 20))
@example(seen=[ONE_RUN], octaves=3.0)
def test_the_units_of_the_rate_do_not_matter(seen, octaves):
    """Shifting all learning rates by some octaves shifts the fitted base learning rate equally, and
    changes nothing else.
    """
    first, second = fitted(seen), fitted([replace(o, x=o.x + octaves) for o in seen])
    expected = first.mean + np.array([octaves, 0, 0])
    assert second.mean == pytest.approx(expected, abs=1e-2)
    assert second.steepness == pytest.approx(first.steepness, abs=0.1)


# --- diverged runs --------------------------------------------------------------------------------------------------

NAN_RUN = Observation(4, 0, -6.0, math.nan, START, math.nan)
RISEN = Observation(4, 0, -6.0, 3.0, START, 3.0)
LOST = [
    (observation(-6.0), True),
    (NAN_RUN, True),
    # a returned score cannot hide a curve that ended in NaN
    (replace(NAN_RUN, value=0.5), True),
    (replace(NAN_RUN, tail=1.0), True),
    (RISEN, True),
    (replace(RISEN, value=0.5), True),
    (replace(RISEN, tail=2.4), False),
    (observation(-6.0, 2.2), False),
]


@pytest.mark.parametrize(("run", "lost"), LOST)
def test_a_run_diverged_that_is_not_finite_or_ends_far_above_its_start(run, lost):
    """A run diverged if it was stopped for divergence, contains a NaN, or ended above its start by
    more than a quarter of the best gain.
    """
    assert diverged([observation(-9.0, 0.3), run]) == ({run} if lost else set())


@pytest.mark.parametrize("returned", [True, False])
def test_where_no_run_gained_those_that_rose_diverged(returned):
    """If no run fell below its start, a run that rose counts as diverged, unless the run returned
    its score.
    """
    level = replace(RISEN, tail=START, value=START, returned=returned)
    rose = replace(RISEN, returned=returned)
    assert diverged([rose, level]) == (set() if returned else {rose})


@pytest.mark.parametrize("gain", [0.2, 1.5])
def test_where_a_run_gained_a_returned_score_excuses_no_rise(gain):
    """If at least one loss curve fell, a run whose curve rose counts as diverged even if it
    returned its score.
    """
    fell = replace(RISEN, tail=START - gain, returned=True)
    rose = replace(RISEN, returned=True)
    assert diverged([fell, rose]) == {rose}


@pytest.mark.parametrize("start", [START - 1.2, START + 5])
def test_one_odd_first_value_is_held_against_no_run(start):
    """A first loss that is low by chance does not make a run count as diverged, and one that is
    high by chance does not count as a gain.
    """
    losses = {-10: 2.0, -9: 1.5, -8: 1.4, -7: 1.6}
    seen = [observation(x, loss) for x, loss in losses.items()]
    odd = [*seen[:3], replace(seen[3], start=start)]
    assert not diverged(odd)
    assert gain_of(odd) == pytest.approx(gain_of(seen))


# Learning rates are at least an eighth of an octave apart, because two runs of a seed at one learning
# rate would contradict every bowl if their losses differ by more than all other runs improve.
ended = st.tuples(st.integers(-112, -56).map(lambda i: i / 8), st.floats(0.3, 2.2))


@settings(max_examples=100)
@given(
    good=st.lists(ended, min_size=1, max_size=8, unique_by=lambda run: run[0]),
    lost=st.lists(st.floats(-6.5, 0), min_size=1, max_size=4),
    rank=st.sampled_from([4, 16, 64]),
)
def test_no_fit_lies_above_the_ceiling(good, lost, rank):
    """Whatever the good runs look like, the fitted optimum is below the lowest learning rate that diverged."""
    runs = [*good, *((x, math.inf) for x in lost)]
    seen = [observation(x, loss, rank=rank) for x, loss in runs]
    fit = fitted(seen, Prior(pivot=float(rank)))
    assert fit.mean[0] < fit.ceiling == min(lost)
