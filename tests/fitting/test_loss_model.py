"""The loss model's curves: the mean over shapes, noises and levels, each weighed as the fit weighs it."""

from __future__ import annotations

import numpy as np
import pytest

from rankaware_optim.fitting import _loss_model as model

U = np.linspace(-3.0, 2.0, 41)


def bowl(u, a=3.0, k=0.1, h=1.0):
    """The loss of one shape, in units of the gain."""
    above = (np.exp(np.minimum(a * u, 20.0)) - a * u - 1) / a**2
    return np.minimum(
        k * np.where(u < 0, h**2 * (np.sqrt(1 + (u / h) ** 2) - 1), above), 1.0
    )


def arm(u, **shape):
    """Trials along a bowl of optimum 0, as gaps to the best of them."""
    y = bowl(u, **shape)
    return model.Arm(u, y - y.min(), np.zeros(len(u), dtype=np.int64))


def of_one_shape(arm, sigma, noise, curve):
    """log density of an arm's gaps about `curve` + a level of flat prior, and the level's mean: by a dense formula."""
    per_noise, shape = model._covariances(arm)
    covariance = sigma**2 * per_noise + shape
    precision = np.linalg.inv(covariance)
    ones, miss = np.ones(len(arm.x)), arm.y - curve
    level = ones @ precision @ miss / (ones @ precision @ ones)
    rest = miss - level
    logs = -0.5 * (
        rest @ precision @ rest
        + np.linalg.slogdet(covariance)[1]
        + np.log(ones @ precision @ ones)
    )
    return logs, level


def test_a_curve_is_the_mean_over_the_shapes_of_the_grid():
    """For one rank whose runs show no plateau, it is the sum over every shape, weighed by prior and likelihood."""
    seen = arm(np.array([-2.0, -1.0, 0.0, 2.5]))
    assert seen.y.max() >= model.CAP  # no second plateau to weigh
    logs, curves = [], []
    for sigma in model.NOISE:
        for h in model.REACH:
            for a in model.STEEPNESS:
                for k in model.CURVATURE:
                    likelihood, level = of_one_shape(
                        seen, sigma, sigma, shape(seen.x, h, a, k)
                    )
                    logs.append(likelihood)
                    curves.append(level + shape(U, h, a, k))
    kernel = model._rank_given_shared()
    noise = np.repeat(model.NOISE, len(logs) // len(model.NOISE))
    prior = np.exp(-0.5 * (np.log(noise / 0.015) / 1.2) ** 2)
    weights = np.exp(np.array(logs) - max(logs)) * (prior @ kernel)
    expected = weights @ np.array(curves) / weights.sum()
    assert model.curves_of({4: seen}, {4: U})[4] == pytest.approx(expected, abs=1e-9)


def shape(u, h, a, k):
    below = h**2 * (np.sqrt(1 + (u / h) ** 2) - 1)
    above = u**2 / 2 if a == 0 else (np.exp(np.clip(a * u, 0, 20)) - a * u - 1) / a**2
    return np.minimum(k * np.where(u < 0, below, above), 1.0)


@pytest.mark.parametrize("k", [0.02, 0.1, 0.4])
def test_curvature_is_read_off_the_trials(k):
    """On trials without noise the curve within half an octave of the optimum is theirs, and lowest there."""
    seen = {
        4: arm(np.arange(-3.0, 2.0, 0.5), k=k),
        None: arm(np.arange(-2.5, 2.0, 0.5), k=k),
    }
    for curve in model.curves_of(seen, dict.fromkeys(seen, U)).values():
        near = np.abs(U) <= 0.51
        assert curve[near] == pytest.approx(bowl(U, k=k)[near], abs=0.05)
        assert U[curve.argmin()] == pytest.approx(0.0, abs=0.13)


def test_ranks_lend_each_other_their_shape():
    """A rank tried at one rate alone takes its cliff from the rank that was tried at many."""
    many, one = arm(np.arange(-3.0, 2.0, 0.5), k=0.4), arm(np.array([-1.0]), k=0.4)
    alone = model.curves_of({64: one}, {64: U})[64]
    beside = model.curves_of({4: many, 64: one}, {4: U, 64: U})[64]
    known = bowl(U, k=0.4) - bowl(np.array([-1.0]), k=0.4)
    assert np.abs(beside - known).mean() < np.abs(alone - known).mean()
