"""The loss model: the optimum of the losses for every shape in the grid, and the weight of each
shape.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from rankaware_optim.fitting import _loss_model as model


def bowl(u, a=3.0, k=0.1, h=1.0):
    """Return the loss of one bowl shape at u octaves from the optimum, in units of the gain."""
    above = (np.exp(np.minimum(a * u, 20.0)) - a * u - 1) / a**2
    return np.minimum(
        k * np.where(u < 0, h**2 * (np.sqrt(1 + (u / h) ** 2) - 1), above), 1.0
    )


def arm(u, **shape):
    """Return trials along a bowl with its optimum at 0, as gaps to the best trial."""
    y = bowl(u, **shape)
    return model.Arm(u, y - y.min(), np.zeros(len(u), dtype=np.int64))


def covariances(arm):
    """Return the covariance of the noise in units of σ², and of the error of the shape, entry by entry."""
    noise, error = np.zeros((2, len(arm.x), len(arm.x)))
    for i, j in product(range(len(arm.x)), repeat=2):
        near = math.exp(-((arm.x[i] - arm.x[j]) ** 2) / 2)
        if arm.seeds[i] == arm.seeds[j]:
            noise[i, j] = 3.0**2 + near / 2  # a level of 3σ, and half of σ² smooth
        error[i, j] = 0.2**2 * arm.y[i] * arm.y[j] * near / 2
    error += np.diag((0.2 * arm.y) ** 2) / 2
    return noise + np.eye(len(arm.x)) / 2, error


@pytest.mark.parametrize("seeds", [(0, 0, 0), (0, 1, 0), (2, 1, 0)])
def test_trials_of_a_seed_share_its_level_and_near_ones_their_smooth_noise(seeds):
    """Runs of one seed share a level, and half of their noise and half of the shape's error are
    smooth over an octave.
    """
    seen = model.Arm(
        np.array([-2.0, 0.0, 0.5]), np.array([0.7, 0.0, 0.2]), np.array(seeds)
    )
    for given, expected in zip(
        model._covariances(seen), covariances(seen), strict=True
    ):
        assert given == pytest.approx(expected, abs=1e-12)


def shape(u, h, a, k, plateau=1.0):
    below = h**2 * (np.sqrt(1 + (u / h) ** 2) - 1)
    above = u**2 / 2 if a == 0 else (np.exp(np.clip(a * u, 0, 20)) - a * u - 1) / a**2
    return np.where(u < 0, np.minimum(k * below, 1.0), np.minimum(k * above, plateau))


SIGMAS = np.geomspace(0.002, 0.5, 6)
BOWLS = [*product((0.4, 1.0, 4.0), (0.0, 1.5, 3.0, 4.5), np.geomspace(0.005, 2.0, 10))]
SHAPES = np.array([(sigma, *bowl) for sigma in SIGMAS for bowl in BOWLS])
"""The grid: σ, h, a, k."""
PRIOR = np.exp(-0.5 * (np.log(SHAPES[:, 0] / 0.015) / 1.2) ** 2)


def of_shapes(arm, plateau, optima):
    """Return the log density of an arm's gaps for every shape and optimum, an array (shapes,
    optima), by a dense formula with the level integrated out.
    """
    noise, error = covariances(arm)
    u = arm.x - optima[:, None]
    miss = arm.y - np.array([shape(u, *bowl, plateau) for bowl in BOWLS])
    logs = []
    for sigma in SIGMAS:
        covariance = sigma**2 * noise + error
        precision = np.linalg.inv(covariance)
        level = miss @ precision.sum(axis=0) / precision.sum()
        rest = miss - level[..., None]
        logs.append(
            -0.5 * np.sum(rest @ precision * rest, axis=-1)
            - 0.5 * np.linalg.slogdet(covariance)[1]
            - 0.5 * np.log(precision.sum())
        )
    return np.concatenate(logs)


def given_shared():
    """Return the probability of each shape as a rank's own (columns), given the shared one (rows)."""
    sigma, h, a, k = SHAPES.T
    unknowns = np.log(sigma) / 0.5, np.log(h) / 0.7, a / 1.0, np.log(k) / 0.7
    far = sum((value[:, None] - value[None, :]) ** 2 for value in unknowns)
    weights = np.exp(-0.5 * far)
    return weights / weights.sum(axis=1, keepdims=True)


WHOLE = model.Arm(
    np.array([-2.0, -1.0, 0.0, 2.5]), np.array([0.3, 0.1, 0.0, 1.0]), np.array([0] * 4)
)
STALLED = model.Arm(
    np.array([-1.5, 0.0, 0.5, 1.5]),
    np.array([0.2, 0.0, 0.1, 0.6]),
    np.array([0, 0, 1, 1]),
)
LOWER = STALLED._replace(y=np.array([0.4, 0.0, 0.05, 0.3]))
ONE = model.Arm(np.array([-0.5]), np.array([0.0]), np.array([3]))
STUDIES = [
    ({4: WHOLE}, [{4: 1.0}]),
    ({4: WHOLE, 64: STALLED}, [{4: 1.0, 64: 1.0}]),
    (
        {4: STALLED, None: ONE},
        [{4: 1.0, None: 1.0}, {4: 0.6, None: 1.0}],
    ),
    ({4: STALLED, 64: LOWER}, [{4: 1.0, 64: 1.0}, {4: 0.6, 64: 0.4}]),
]
"""Studies, and the plateaus above the optimum that their runs leave possible."""


@pytest.mark.parametrize(("arms", "choices"), STUDIES)
def test_the_optimum_under_each_shape_is_the_mean_over_its_candidates(arms, choices):
    """For each shape, the optimum is the posterior mean over candidates that are an eighth of an
    octave apart and reach three octaves beyond the learning rates.
    """
    xs = np.concatenate([arm.x for arm in arms.values()])
    optima = np.arange(xs.min() - 3.0, xs.max() + 3.0, 0.125)
    log_weight, mean, sd = [], [], []
    for plateaus in choices:
        weight, means, sds = np.log(PRIOR), [], []
        for rank, arm in arms.items():
            logs = of_shapes(arm, plateaus[rank], optima)
            belief = given_shared() @ np.exp(logs)
            weight = weight + np.log(belief.mean(axis=1))
            belief /= belief.sum(axis=1, keepdims=True)
            means.append(belief @ optima)
            far = (optima - means[-1][:, None]) ** 2
            sds.append(np.sqrt((belief * far).sum(axis=1)))
        log_weight.append(weight)
        mean.append(np.transpose(means))
        sd.append(np.transpose(sds))
    bowls = model.bowls_of(arms)
    assert bowls.log_weight == pytest.approx(np.concatenate(log_weight), abs=1e-6)
    assert bowls.mean == pytest.approx(np.concatenate(mean), abs=1e-6)
    assert bowls.sd == pytest.approx(np.concatenate(sd).clip(0.125 / 4), abs=1e-6)
    assert bowls.steepness.tolist() == SHAPES[:, 2].tolist() * len(choices)


def test_many_trials_overflow_no_weight():
    """With 200 exact trials, whose log density is in the hundreds, no weight overflows and the
    optimum is found.
    """
    bowls = model.bowls_of({4: arm(np.linspace(-3.0, 1.0, 200))})
    best = bowls.mean[bowls.log_weight.argmax(), 0]
    assert np.isfinite(bowls.log_weight).all()
    assert best == pytest.approx(0.0, abs=0.13)
