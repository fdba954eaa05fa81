"""Make the recipes in recipes/, each on a real network.

    python benchmarks/calibration/make_recipes.py                        # EfficientNet-lite0 on digits, constant rates
    python benchmarks/calibration/make_recipes.py --domain language      # three, one a configuration of the study

A domain's recipe is calibrated at ranks 4 and 64 with three full runs, at a fifth of the cost of its sweep of nine
rates at five ranks and in full, on seeds that the study does not use, at the study's warm-up of 5 %.
"""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import click
import torch
from calibration.searches import recipe_of
from study.configurations import CONFIGS
from study.domains import get_domain, names
from study.training import WARMUP

from rankaware_optim import calibrate
from rankaware_optim.calibration import Trial
from rankaware_optim.cli._demo import BATCH, CALIBRATED_RANKS, HEAD_RATE, SEEDS, STEPS, build, evaluate, fit

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
        given = {"ranks": CALIBRATED_RANKS, "steps": STEPS, "seeds": SEEDS, "batch": BATCH, "warmup": 0.0}
        recipe = calibrate(digits, torch.optim.AdamW, **given, name="efficientnet-lite0-digits")
        click.echo(recipe.save(RECIPES / f"{recipe.name}.toml"))


def digits(trial: Trial) -> Generator[torch.Tensor, None, float]:
    """The demo's loop, its rates constant as in the package's sweep."""
    model = build(trial.rank)
    yield from fit(model, trial.optimizer(model, weight_decay=0.01, rates={"*classifier*": HEAD_RATE}), trial.seed)
    return evaluate(model)


def path_of(domain: str, config: str) -> Path:
    """Where a domain's recipe lies."""
    return RECIPES / f"{file_name(domain, config)}.toml"


def file_name(domain: str, config: str) -> str:
    """Init[A], s = 1/r, of image_generation is image-generation-a-inverse-rank."""
    short = {"Init[A], s = 1": "a", "Init[A], s = 1/r": "a-inverse-rank", "Init[B], s = 1": "b"}
    return f"{domain.replace('_', '-')}-{short[config]}"


if __name__ == "__main__":
    main()
