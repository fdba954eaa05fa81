"""The recipes that the repository ships: what they are known by, and that they are the fits of their trials."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rankaware_optim import Recipe
from rankaware_optim.fitting import (
    Observation,
    fit_observations,
    impute,
    loss_at_start,
    noise_of,
    prior_of,
    recent_mean,
)

FOLDER = Path(__file__).parents[2] / "recipes"
PATHS = sorted(FOLDER.glob("*.toml"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def shipped(request) -> Recipe:
    return Recipe.load(request.param)


def test_the_hashes_stay():
    """Shipped recipes keep the tags that states made with them carry: else they would be taken for others."""
    tags = [Recipe.load(path).tag for path in PATHS]
    assert all(
        tag.endswith(f" {path.stem}") for tag, path in zip(tags, PATHS, strict=True)
    )
    assert (
        hashlib.sha256("\n".join(tags).encode()).hexdigest()[:12] == "1eb578a3e5a1"
    ), tags


def observations(tensors: dict[str, np.ndarray]) -> Iterator[Observation]:
    """The trials of a recipe as the fit saw them, those that were pruned last, with the score imputed."""
    best: dict[tuple[int, int], tuple[Observation, np.ndarray]] = {}
    for i in np.argsort(tensors["pruned"], kind="stable"):
        rank, seed = int(tensors["rank"][i]), int(tensors["seed"][i])
        x, value = math.log2(tensors["lr"][i]), float(tensors["value"][i])
        curve = tensors["curve"][i, : tensors["steps"][i]].astype(np.float64)
        if tensors["pruned"][i]:
            carried = impute(x, curve, *best[rank, seed])
            if carried is not None:
                yield carried
        elif not math.isfinite(value):
            yield Observation(rank or None, seed, x, math.inf, math.inf, math.inf)
        else:
            ends = {"start": loss_at_start(curve), "tail": recent_mean(curve)}
            run = Observation(
                rank or None, seed, x, value, **ends, noise=noise_of(curve)
            )
            held = best.setdefault((rank, seed), (run, curve))
            if run.value < held[0].value:
                best[rank, seed] = run, curve
            yield run


def test_a_fit_of_its_trials_gives_the_recipe(shipped):
    """Fitted once more, a shipped recipe's trials give its own rate, covariance and ceiling."""
    prior = prior_of(shipped.reference, shipped.ranks, shipped.full_fan_in)
    fit = fit_observations([*observations(shipped.tensors)], prior)
    best = fit.best(shipped.reference.rank)
    assert 2.0**best == pytest.approx(shipped.fitted_lr, rel=1e-9)
    assert np.allclose(fit.covariance, shipped.covariance, rtol=1e-9, atol=1e-12)
    assert (fit.ceiling is None) == (shipped.ceiling is None)
    assert fit.ceiling is None or 2.0 ** (
        fit.ceiling + best - fit.mean[0]
    ) == pytest.approx(shipped.ceiling, rel=1e-9)
