"""The recipes that the repository ships: what they are known by, and that their pictures show the fit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rankaware_optim import Recipe
from rankaware_optim.calibration.fit import Prior, diverged, fit_observations
from rankaware_optim.recipe._plot_data import _observations, _trials, picture_of

FOLDER = Path(__file__).parents[2] / "recipes"
# What optimizers' checkpoints know them by: a package that hashed them otherwise would take them for other recipes.
HASHES = {
    "efficientnet-lite0-digits": "9cfb4ac779d3",
    "image-generation-a-inverse-rank": "b82d80da23d6",
    "image-generation-a": "3ba305dfd2c3",
    "image-generation-b": "83300b723bc4",
    "language-a-inverse-rank": "f3cdc1cc6ddd",
    "language-a": "022c14d299a2",
    "language-b": "02c0905f2af0",
    "language-smollm2-a-inverse-rank": "4da13b55bfc1",
    "language-smollm2-a": "6b5c12e6ca0f",
    "language-smollm2-b": "486d2486420a",
    "reinforcement-a-inverse-rank": "0666add436ec",
    "reinforcement-a": "d39366d39ebd",
    "reinforcement-b": "40a03e6e723b",
    "text-classification-a-inverse-rank": "ec6b91006bbc",
    "text-classification-a": "5740f9205831",
    "text-classification-b": "df69401393e9",
    "vision-classification-a-inverse-rank": "9de3641ab269",
    "vision-classification-a": "44db0dbc5f5a",
    "vision-classification-b": "c2e22b48921a",
    "vision-language-a-inverse-rank": "e52a437d2d6e",
    "vision-language-a": "df4e45288ddc",
    "vision-language-b": "2ebbc82bf94b",
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
    at_base = replace(shipped, tensors={**shipped.tensors, "own_lr": shipped.tensors["lr"]})
    pairs = [pair for rank, points in _trials(at_base).items() for pair in _observations(rank, points, 0.0)]
    seen, pivot, at_b = [o for o, _ in pairs], shipped.law.pivot, shipped.reference.init == "B"
    reach = math.log2(shipped.full_fan_in / pivot) if at_b else 0.0
    prior = Prior(0.2 if at_b else 0.15, 0.4, pivot, reach, scatter=0.1)
    fit = fit_observations(seen, prior)
    shift = fit.mean[1] * math.log2(shipped.reference.rank / pivot)
    assert [lost for _, lost in pairs] == diverged(seen)
    assert 2.0 ** (fit.mean[0] + shift) == pytest.approx(shipped.fitted_lr, rel=1e-9)
    assert np.allclose(fit.covariance, shipped.covariance, rtol=1e-9, atol=1e-12)
    assert (fit.ceiling is None) == (shipped.ceiling is None)
    assert fit.ceiling is None or 2.0 ** (fit.ceiling + shift) == pytest.approx(shipped.ceiling, rel=1e-9)


def test_curves_have_their_lowest_point_at_the_best_rate(shipped):
    """A curve that reaches into the frame is lowest where the recipe puts the optimum, to the curve's own steps."""
    curves = [(arm, arm.curve) for arm in picture_of(shipped).arms if arm.curve]
    assert len(curves) >= 2
    for arm, curve in curves:
        rates, scores = np.array(curve).T
        assert math.log2(rates[scores.argmin()]) == pytest.approx(math.log2(arm.rate.lr) + shipped.lean, abs=0.1)
