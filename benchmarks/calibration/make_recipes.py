"""Make the recipes in recipes/, each on a real network.

    python benchmarks/calibration/make_recipes.py                        # the demo's: EfficientNet-lite0 on digits
    python benchmarks/calibration/make_recipes.py --domain language      # three, one a configuration of the study

A domain's recipe is calibrated at ranks 4 and 64 with three full runs, at a fifth of the cost of its sweep of nine
rates at five ranks and in full, on seeds that the study does not use, at the study's warm-up of 5 %.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from calibration.searches import recipe_of
from study.configurations import CONFIGS
from study.domains import get_domain, names
from study.training import WARMUP

from rankaware_optim.cli._demo import calibrate_digits

RECIPES = Path(__file__).parents[2] / "recipes"
SHARE, FULL_TRIALS = 0.2, 3


@click.command()
@click.option(
    "--domain", "chosen", multiple=True, type=click.Choice(names()), help="Of the study, instead of the demo."
)
def main(chosen: tuple[str, ...]) -> None:
    """Calibrate and save; a recipe that is there already is replaced."""
    torch.set_num_threads(1)
    for name in chosen:
        for config in CONFIGS:
            own = {"full_trials": FULL_TRIALS, "name": file_name(name, config)}
            recipe = recipe_of(get_domain(name), config, SHARE, 0, {}, WARMUP, **own)
            click.echo(recipe.save(path_of(name, config)))
    if not chosen:
        recipe = calibrate_digits("efficientnet-lite0-digits")
        click.echo(recipe.save(RECIPES / f"{recipe.name}.toml"))


def path_of(domain: str, config: str) -> Path:
    """Where a domain's recipe lies."""
    return RECIPES / f"{file_name(domain, config)}.toml"


def file_name(domain: str, config: str) -> str:
    """Init[A], s = 1/r, of image_generation is image-generation-a-inverse-rank."""
    short = {"Init[A], s = 1": "a", "Init[A], s = 1/r": "a-inverse-rank", "Init[B], s = 1": "b"}
    return f"{domain.replace('_', '-')}-{short[config]}"


if __name__ == "__main__":
    main()
