"""Make the recipes in recipes/, each on a real network.

    python benchmarks/calibration/make_recipes.py                        # EfficientNet-lite0 on digits, constant rates
    python benchmarks/calibration/make_recipes.py --domain language      # three, one a configuration of the study
    python benchmarks/calibration/make_recipes.py --domain language --seed 1   # into benchmarks/results/recipes

A domain's recipe is calibrated at its lowest and highest rank with three full runs, at a fifth of the cost of its sweep
of nine rates at five ranks and in full, on seeds that the study does not use, at the study's warm-up of 5 %. The study
scores the recipes of every search seed that there are; that of seed 0 is shipped.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from calibration.searches import Spent, recipe_of
from recording import RESULTS
from study.configurations import CONFIGS
from study.digits_loop import (
    BATCH,
    CALIBRATED_RANKS,
    SEEDS,
    STEPS,
    build,
    evaluate,
    fit,
)
from study.domains import Domain, get_domain, names
from study.domains._efficientnet import HEAD_RATE
from study.grids import FULL
from study.training import WARMUP

from rankaware_optim import RankAwareWarning, Recipe, calibrate
from rankaware_optim.calibration import Trial

RECIPES, OTHER_SEEDS = Path(__file__).parents[2] / "recipes", RESULTS / "recipes"
SHARE, RATES_SWEPT, FULL_TRIALS = 0.2, 9, 3


@click.command()
@click.option(
    "--domain",
    "chosen",
    multiple=True,
    type=click.Choice(names()),
    help="Of the study, instead of the demo.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Random seed of the search.",
)
def main(chosen: tuple[str, ...], seed: int) -> None:
    """Calibrate and save; a recipe that is there already is replaced."""
    torch.set_num_threads(1)
    for name in chosen:
        for config in CONFIGS:
            path = path_of(name, config, seed)
            path.parent.mkdir(exist_ok=True)
            plan = plan_of(get_domain(name))
            recipe = recipe_of(get_domain(name), config, seed, Spent(), **plan)
            click.echo(replace(recipe, name=path.stem).save(path))
    if not chosen:
        given = {
            "ranks": CALIBRATED_RANKS,
            "steps": STEPS,
            "seeds": SEEDS,
            "batch": BATCH,
        }
        recipe = calibrate(digits, torch.optim.AdamW, **given)
        recipe = replace(recipe, name="efficientnet-lite0-digits")
        click.echo(recipe.save(RECIPES / f"{recipe.name}.toml"))


def plan_of(domain: Domain) -> dict[str, Any]:
    """The options of a domain's calibration."""
    arms = len(domain.ranks_swept) + 1
    return {
        "ranks": (domain.ranks_swept[0], domain.ranks_swept[-1]),
        "steps": domain.steps,
        "trials": round(SHARE * RATES_SWEPT * arms) - FULL_TRIALS,
        "full_trials": FULL_TRIALS,
        "warmup": WARMUP,
    }


def digits(trial: Trial) -> Generator[torch.Tensor, None, float]:
    """The demo's loop, its rates constant as in the package's sweep."""
    model = build(trial.rank)
    yield from fit(
        model,
        trial.optimizer(model, weight_decay=0.01, rates={"*classifier*": HEAD_RATE}),
        trial.seed,
    )
    return evaluate(model)


def paths_of(domain: str, config: str) -> list[Path]:
    """The recipes of every search seed that there are."""
    shipped, own = path_of(domain, config, 0), path_of(domain, config, 1)
    others = own.parent.glob(f"{shipped.stem}-[0-9].toml")
    return [path for path in (shipped, *sorted(others)) if path.exists()]


def rate_of(recipe: Recipe, config: str, rank: int) -> list[float]:
    """log2 of the rate and of its band's ends at a rank of the configuration, or for full finetuning."""
    with warnings.catch_warnings():
        # extrapolations are asked for on purpose
        warnings.simplefilter("ignore", RankAwareWarning)
        rate = (
            recipe.at(method="full")
            if rank == FULL
            else recipe.at(rank, alpha=CONFIGS[config].alpha(rank))
        )
    return [math.log2(value) for value in (rate.lr, rate.low, rate.high)]


def path_of(domain: str, config: str, seed: int) -> Path:
    """Init[A], s = 1/r, of image_generation is image-generation-a-inverse-rank.toml; seed 1's name ends in -1."""
    short = {
        "Init[A], s = 1": "a",
        "Init[A], s = 1/r": "a-inverse-rank",
        "Init[B], s = 1": "b",
    }
    name = f"{domain.replace('_', '-')}-{short[config]}"
    return OTHER_SEEDS / f"{name}-{seed}.toml" if seed else RECIPES / f"{name}.toml"


if __name__ == "__main__":
    main()
