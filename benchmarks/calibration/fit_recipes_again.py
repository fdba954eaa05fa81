"""Fit the trials of the recipes on file once more, by the law and the fit as they are. No training.

    python benchmarks/calibration/fit_recipes_again.py    # recipes/ and results/recipes

A trial trained at a rate of its own. From this follows its base rate by today's law.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import click
import numpy as np
import torch
from calibration.make_recipes import OTHER_SEEDS, RECIPES
from calibration.studies import MadeUp
from internals import Trials
from optuna.trial import TrialState

from rankaware_optim import Law, Recipe
from rankaware_optim.fitting import (
    Observation,
    fit_observations,
    loss_at_start,
    noise_of,
    prior_of,
    recent_mean,
)
from rankaware_optim.laws import PRIOR_LAW, checked_multiplier, get_law
from rankaware_optim.recipe import configuration, recipe_of

# What a fit decides of a recipe.
BY_FIT = {
    *("fitted_lr", "reference", "law", "covariance"),
    *("steepness", "scatter", "ceiling", "margin"),
}


@click.command()
def main() -> None:
    """Replace every recipe on file by that of the same trials."""
    for path in sorted([*RECIPES.glob("*.toml"), *OTHER_SEEDS.glob("*.toml")]):
        click.echo(fitted_again(Recipe.load(path)).save(path))


def fitted_again(recipe: Recipe) -> Recipe:
    """The recipe of the same trials by today's law and fit."""
    law = get_law(PRIOR_LAW).bind(torch.optim.AdamW, recipe.settings)
    rates = base_rates(recipe, law)
    moved = replace(recipe, tensors={**recipe.tensors, "lr": rates})
    prior = prior_of(recipe.reference, recipe.ranks, recipe.full_fan_in)
    fit = fit_observations(trials_of(moved).evidence(), prior)
    assert fit is not None
    kept = {f.name for f in fields(recipe)} - BY_FIT
    others = {name: getattr(moved, name) for name in kept}
    return recipe_of(fit, law, recipe.reference, **others)


def base_rates(recipe: Recipe, law: Law) -> np.ndarray[Any, Any]:
    """The base rates by a law, in the order of the trials."""
    at = {rank: configuration(recipe, rank) for rank in recipe.ranks}
    at[0] = configuration(recipe, method="full")
    moved = {}
    for rank, place in at.items():
        before, after = (
            checked_multiplier(each, place.as_factor(), recipe.reference)
            for each in (recipe.law.law, law)
        )
        moved[rank] = before / after
    ranks = recipe.tensors["rank"].tolist()
    return recipe.tensors["lr"] * np.array([moved[rank] for rank in ranks])


def trials_of(recipe: Recipe) -> Trials:
    """The trials as a study has them."""
    stored, records = recipe.tensors, []
    for i in range(len(stored["lr"])):
        curve = stored["curve"][i, : stored["steps"][i]].astype(np.float64).tolist()
        rank, seed = int(stored["rank"][i]) or None, int(stored["seed"][i])
        known = {"rank": rank, "seed": seed, "x": math.log2(stored["lr"][i])}
        if stored["pruned"][i]:
            ended = {"state": TrialState.PRUNED, "end": "pruned"}
        else:
            run = observation_of(**known, value=float(stored["value"][i]), curve=curve)
            ended = {"state": TrialState.COMPLETE, "observation": run}
        records.append(MadeUp(**known, **ended, curve=curve))
    return Trials(records)


def observation_of(
    rank: int | None, seed: int, x: float, value: float, curve: list[float]
) -> Observation:
    """What a trial that was not pruned tells the fit."""
    if not math.isfinite(value):
        return Observation(rank, seed, x, math.inf, math.inf, math.inf)
    start, tail = loss_at_start(curve), recent_mean(curve)
    return Observation(rank, seed, x, value, start, tail, noise=noise_of(curve))


if __name__ == "__main__":
    main()
