"""The recipes that the repository ships: what they are known by, and that their pictures show the fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rankaware_optim import Recipe
from rankaware_optim.fitting import diverged, fit_observations, prior_of
from rankaware_optim.reports._picture import _observations, _trials, picture_of

FOLDER = Path(__file__).parents[2] / "recipes"
# What optimizers' checkpoints know them by: a package that hashed them otherwise would take them for other recipes.
HASHES = {
    "efficientnet-lite0-digits": "692e0ec7b847",
    "image-generation-a-inverse-rank": "259b12b179fe",
    "image-generation-a": "a09a9bb438db",
    "image-generation-b": "89936ffa99f1",
    "language-a-inverse-rank": "8f0fab87d4af",
    "language-a": "fad6e371e4a5",
    "language-b": "64116bb1a829",
    "language-smollm2-a-inverse-rank": "5c038c2dfd1f",
    "language-smollm2-a": "16d329b790e2",
    "language-smollm2-b": "b9b5d30ecd53",
    "reinforcement-a-inverse-rank": "bede8e09e324",
    "reinforcement-a": "6810a4f435a0",
    "reinforcement-b": "1f490d50af52",
    "text-classification-a-inverse-rank": "81eb0cce0ed5",
    "text-classification-a": "b75df5e0eaf5",
    "text-classification-b": "1ce8ae0d43e4",
    "vision-classification-a-inverse-rank": "80c933d3065f",
    "vision-classification-a": "c67e1d19d9dd",
    "vision-classification-b": "dfcbf1bddfbc",
    "vision-language-a-inverse-rank": "da4b12235de3",
    "vision-language-a": "173e4b5fb738",
    "vision-language-b": "b971ee1f0a5d",
}


@pytest.fixture(params=HASHES)
def shipped(request) -> Recipe:
    return Recipe.load(FOLDER / f"{request.param}.toml")


def test_every_file_is_known():
    """The table above is of all recipes in the folder."""
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == sorted(HASHES)


def test_the_hash_stays(shipped):
    """A shipped recipe keeps the tag that states made with it carry."""
    assert shipped.tag == f"{HASHES[shipped.name]} {shipped.name}"


def test_the_picture_is_drawn_from_what_the_fit_saw(shipped):
    """Fitted once more as then, the observations behind the curves give the recipe's own rate and covariance."""
    at_base = replace(
        shipped, tensors={**shipped.tensors, "own_lr": shipped.tensors["lr"]}
    )
    pairs = [
        pair
        for rank, points in _trials(at_base).items()
        for pair in _observations(rank, points, 0.0)
    ]
    seen = [o for o, _ in pairs]
    prior = prior_of(shipped.reference, shipped.ranks, shipped.full_fan_in)
    fit = fit_observations(seen, prior)
    best = fit.best(shipped.reference.rank)
    pruned_last = [
        sorted(points, key=lambda p: p.fate == "pruned")
        for points in _trials(at_base).values()
    ]
    fates = [point.fate for points in pruned_last for point in points]
    # The fit takes a run that was pruned far above its start for diverged. The picture shows it as pruned.
    assert [lost for _, lost in pairs] == [
        bad and fate != "pruned"
        for bad, fate in zip(diverged(seen), fates, strict=True)
    ]
    assert 2.0**best == pytest.approx(shipped.fitted_lr, rel=1e-9)
    assert np.allclose(fit.covariance, shipped.covariance, rtol=1e-9, atol=1e-12)
    assert (fit.ceiling is None) == (shipped.ceiling is None)
    assert fit.ceiling is None or 2.0 ** (
        fit.ceiling + best - fit.mean[0]
    ) == pytest.approx(shipped.ceiling, rel=1e-9)


def test_curves_have_their_lowest_point_at_the_best_rate(shipped):
    """A curve that reaches into the frame is lowest where the recipe puts the optimum, to the curve's own steps."""
    curves = [(arm, arm.curve) for arm in picture_of(shipped).arms if arm.curve]
    assert len(curves) >= 2
    for arm, curve in curves:
        rates, scores = np.array(curve).T
        assert math.log2(rates[scores.argmin()]) == pytest.approx(
            math.log2(arm.rate.lr) + shipped.lean, abs=0.1
        )
