"""Tests that errors name the remedy, for mistakes that people made. Mistakes with trainers are in `integrations`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import rankaware_optim as ra
from rankaware_optim.cli import main

from .test_examples import build

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "language-a.toml"


def wrapped(**settings: Any) -> Any:
    return ra.RankAwareOptimizer(build(8), torch.optim.AdamW, **settings)


def of_one_model_only() -> Any:
    """Wrap the LoRA matrices of two models, but pass only one of the models."""
    unet, encoder = build(8), build(4)
    both = [p for m in (unet, encoder) for p in m.parameters() if p.requires_grad]
    return ra.RankAwareOptimizer(both, torch.optim.AdamW, lr=1e-3, model=unet)


def interrupted_at_once() -> Any:
    def train(trial: ra.Trial) -> Any:
        raise KeyboardInterrupt
        yield 1.0

    ra.calibrate(train, "adamw", ranks=(4,), steps=10, progress=False)


def calibrated_by(**settings: Any) -> Any:
    return ra.calibrate(print, "adamw", ranks=(4, 8), steps=10, **settings)


CURES = {
    "learning_rate": (lambda: wrapped(learning_rate=2e-4), "Use lr="),
    "a README as recipe": (lambda: wrapped(recipe="README.md"), "Check the path"),
    "no adapter": (
        lambda: ra.RankAwareOptimizer(nn.Linear(3, 3), torch.optim.AdamW, lr=1e-3),
        "call peft.get_peft_model first",
    ),
    "a text encoder's factors": (of_one_model_only, r"model=\[unet, text_encoder\]"),
    "r=": (lambda: ra.Recipe.load(RECIPE).at(r=8), "Use rank= instead."),
    "workers=": (lambda: calibrated_by(workers=2), "Use storage="),
    "log_rates(3)": (lambda: ra.trainers.log_rates(3), r"log_rates\(trainer\)"),
    "Ctrl-C at once": (interrupted_at_once, "No trial has finished yet"),
}


@pytest.mark.parametrize("mistake", CURES)
def test_an_error_names_the_cure(mistake: str) -> None:
    """Each of these mistakes raises an error that says what to do instead."""
    attempt, cure = CURES[mistake]
    refusals = (ra.RankAwareError, ra.RankAwareWarning, TypeError, KeyboardInterrupt)
    with pytest.raises(refusals, match=cure):
        attempt()


COMMANDS = {
    "lr recipes/language-a.toml --rank 8 --alpha rank": "alpha 8",
    "lr recipes/language-a-inverse-rank.toml --alpha rank": "alpha 192",
    "convert 2e-4 --from r=16,alpha=16 --to r=64,alpha=64 --optimizer sgd": "rank 64",
    "convert 2e-4 r=16,alpha=16 r=64,alpha=64": "--from",
    "suggest --model adapter": "[ADAPTER]",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_or_explains_what_people_type(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command as people type it either prints the learning rate or says what to type instead."""
    monkeypatch.chdir(ROOT)
    ran = CliRunner().invoke(main, command.split())
    assert COMMANDS[command] in ran.output
