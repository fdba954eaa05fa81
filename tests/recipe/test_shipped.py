"""The recipes that the repository ships: what they are known by, and that they are the fits of their trials."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rankaware_optim import Recipe
from rankaware_optim.fitting import (
    Observation,
    fit_observations,
    height,
    impute,
    noise_of,
    prior_of,
    recent,
)

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
            ends = {"start": height(curve), "tail": recent(curve)}
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
