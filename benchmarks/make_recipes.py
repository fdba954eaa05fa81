"""Make the recipes in recipes/, each on a real network.

python benchmarks/make_recipes.py
"""

from __future__ import annotations

from pathlib import Path

from rankaware_optim.demo import calibrate_digits

RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    """EfficientNet-lite0 on scikit-learn's digits: the demo's calibration."""
    recipe = calibrate_digits("efficientnet-lite0-digits")
    print(recipe.save(RECIPES / f"{recipe.name}.toml"))


if __name__ == "__main__":
    main()
