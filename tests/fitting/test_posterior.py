"""The posterior equals dense formulas: a Gaussian for each shape, and their mixture over the shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rankaware_optim.fitting import Observation, Prior, fit_observations
from rankaware_optim.fitting._loss_model import bowls_of
from rankaware_optim.fitting._observations import arms_of

PRIOR = Prior(0.15, 0.8, 16.0, full_reach=6.0, scatter=0.25)
LOSSES = {-11.0: 1.5, -10.0: 0.9, -9.0: 0.5, -8.5: 0.6, -7.5: 1.8}


def study(ranks):
    """Return five trials of each rank, with starts of 2.5 and optima half an octave higher for each later rank."""
    return [
        Observation(rank, 0, x + i / 2, loss, 2.5, loss)
        for i, rank in enumerate(ranks)
        for x, loss in LOSSES.items()
    ]


def row(rank):
    if rank is None:
        return [1.0, 6.0, 1.0]
    return [1.0, math.log2(rank) - 4.0, 0.0]


def conditioned(rows, vertices, sds):
    """Return mean and covariance of (base, drift, factor) given the optima, and the log density of the optima."""
    prior = np.diag([1e6, 0.15**2, 0.8**2])
    spread = rows @ prior @ rows.T + np.diag(sds**2 + 0.25**2)
    gain = prior @ rows.T @ np.linalg.inv(spread)
    fit = vertices @ np.linalg.solve(spread, vertices)
    log = -0.5 * (fit + np.linalg.slogdet(spread)[1])
    return gain @ vertices, prior - gain @ rows @ prior, log


@pytest.mark.parametrize("ranks", [(16,), (4, 64), (4, None), (4, 64, None)])
def test_the_fit_is_the_mixture_over_shapes_of_a_gaussian_each(ranks):
    """The fit is a mixture of one Gaussian for each shape, weighted by how well the shape explains
    the losses and how well its optima agree.
    """
    trials = study(ranks)
    arms = arms_of(trials, [], gain=2.0)
    bowls, rows = bowls_of(arms), np.array([row(rank) for rank in arms])
    parts = [
        conditioned(rows, *each) for each in zip(bowls.mean, bowls.sd, strict=True)
    ]
    logs = bowls.log_weight + np.array([log for _, _, log in parts])
    weights = np.exp(logs - logs.max()) / np.exp(logs - logs.max()).sum()
    mean = sum(w * m for w, (m, _, _) in zip(weights, parts, strict=True))
    covariance = sum(
        w * (c + np.outer(m - mean, m - mean))
        for w, (m, c, _) in zip(weights, parts, strict=True)
    )
    fit = fit_observations(trials, PRIOR)
    assert fit is not None
    assert fit.mean == pytest.approx(mean, abs=1e-4)
    assert fit.covariance == pytest.approx(covariance, abs=1e-4)
    assert fit.steepness == pytest.approx(weights @ bowls.steepness, abs=1e-4)
    assert fit.ceiling is None
    squares = weights @ (bowls.mean**2 + bowls.sd**2)
    for i, rank in enumerate(arms):
        vertex = weights @ bowls.mean[:, i]
        sd = math.sqrt(squares[i] - vertex**2)
        assert fit.vertices[rank] == pytest.approx((vertex, sd), abs=1e-4)
        assert fit.best(rank) == pytest.approx(row(rank) @ mean, abs=1e-3)
