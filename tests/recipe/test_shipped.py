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
    "efficientnet-lite0-digits": "e3f887367e1b",
    "image-generation-a-inverse-rank": "49f717692fe3",
    "image-generation-a": "295f1b12b0b4",
    "image-generation-b": "60ecab5f3b88",
    "language-a-inverse-rank": "0b9710bfeb02",
    "language-a": "09d561473056",
    "language-b": "f53c4c7c1d85",
    "language-smollm2-a-inverse-rank": "3e07fc26731d",
    "language-smollm2-a": "e8d65feb287f",
    "language-smollm2-b": "3303efbc3a8a",
    "reinforcement-a-inverse-rank": "f00ab3390f69",
    "reinforcement-a": "04d6beca05e4",
    "reinforcement-b": "a927ed340997",
    "text-classification-a-inverse-rank": "4b3aece05811",
    "text-classification-a": "d3c7b44d5ce8",
    "text-classification-b": "0bab759f9d1c",
    "vision-classification-a-inverse-rank": "cca1d3c69905",
    "vision-classification-a": "1bc80e0099a0",
    "vision-classification-b": "8d6643870b58",
    "vision-language-a-inverse-rank": "52fb7cf96d99",
    "vision-language-a": "65c3c2aaaaa8",
    "vision-language-b": "df51a9b4c61f",
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
