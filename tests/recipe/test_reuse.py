"""Tests that the code in docs/recipes.md shares a recipe with another project through the Hub."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rankaware_optim as ra

from ..helpers.calibrations import Net

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
HUB = re.findall(r"^```py\n(hugging.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


def train(trial):
    """Yield the losses of a run whose best base learning rate is 2^-7."""
    trial.optimizer(Net(trial.rank))
    best = abs(math.log2(trial.lr) + 7)
    yield from (2.0 + best - 0.1 * step for step in range(trial.steps))


@pytest.fixture(scope="module")
def calibrated() -> ra.Recipe:
    return ra.calibrate(train, torch.optim.AdamW, ranks=(4, 64), steps=20)


def through_the_hub(recipe: ra.Recipe, folder: Path) -> object:
    """Run the code of docs/recipes.md with a folder in place of the Hub, and return the downloaded recipe."""
    recipe.save(folder / "adapter" / "recipe.toml")
    hub = folder / "hub"

    def upload_folder(repo_id: str, folder_path: str) -> None:
        shutil.copytree(folder_path, hub / repo_id)

    def hf_hub_download(repo_id: str, filename: str) -> str:
        return shutil.copy(hub / repo_id / filename, folder)

    fake = SimpleNamespace(upload_folder=upload_folder, hf_hub_download=hf_hub_download)
    names = {"ra": ra, "huggingface_hub": fake}
    (lines,) = HUB
    exec(lines, names)
    return names["recipe"]


def test_a_recipe_goes_to_another_project(calibrated, tmp_path, monkeypatch):
    """A recipe that was downloaded from the Hub gives its learning rate at another rank without a warning."""
    monkeypatch.chdir(tmp_path)
    given = through_the_hub(calibrated, tmp_path)
    opt = ra.RankAwareOptimizer(Net(32), torch.optim.AdamW, recipe=given)
    rates = [part.lr for part in opt.rates.groups]
    assert rates == pytest.approx([calibrated.at(rank=32).lr] * len(rates), rel=1e-9)
