"""Make the recipes in recipes/, each on a real network.

python benchmarks/make_recipes.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from rankaware_optim import calibrate
from rankaware_optim.demo import BATCH, CALIBRATED_RANKS, SEEDS, STEPS, train

RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    """EfficientNet-lite0 on scikit-learn's digits: the demo's calibration."""
    recipe = calibrate(
        train,
        torch.optim.AdamW,
        ranks=CALIBRATED_RANKS,
        steps=STEPS,
        seeds=SEEDS,
        batch=BATCH,
        warmup=0.0,
        name="efficientnet-lite0-digits",
    )
    print(recipe.save(RECIPES / f"{recipe.name}.toml"))


if __name__ == "__main__":
    main()
