"""Tests that calling a public function with a misnamed argument raises an error that names the right argument."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from torch.optim import AdamW

import rankaware_optim as ra

from .helpers.models import mlp

RECIPE = Path(__file__).parents[1] / "recipes" / "language-a.toml"


class TakesAnything(AdamW):
    def __init__(self, params, lr, *, init_lr=None, **others):
        super().__init__(params, lr)


def wrapped(optimizer=AdamW, **settings):
    return ra.RankAwareOptimizer(mlp(), optimizer, **{"lr": 1e-3, **settings})


def read_at(*args, **kwargs):
    return ra.Recipe.load(RECIPE).at(*args, **kwargs)


NEAR_MISSES = {
    "tuned_on=": (lambda: wrapped(tuned_on="r=16,alpha=32"), "tuned_on=.*tuned_at="),
    "tuned=": (lambda: wrapped(tuned="r=16,alpha=32"), "tuned=.*tuned_at="),
    "a class that takes anything": (
        lambda: wrapped(TakesAnything, tuned="r=16,alpha=32"),
        "tuned=.*tuned_at=",
    ),
    "a slip of the finger": (lambda: wrapped(metod="lora"), "metod=.*method="),
    "at(r=)": (lambda: read_at(r=16), "argument r=.*rank="),
    "at('full')": (lambda: read_at("full"), "'full'.*method='full'"),
    "at(rank='full')": (lambda: read_at(rank="full"), "'full'.*method='full'"),
    "a reference's r=": (lambda: ra.Reference(r=16, lora_alpha=32), "r=.*rank="),
    "a calibration's r=": (
        lambda: ra.calibrate(print, "adamw", r=16),
        "argument r=.*ranks=",
    ),
    "a calibration's rank=": (
        lambda: ra.calibrate(print, "adamw", rank=16),
        "rank=.*ranks=",
    ),
    "another name in suggest_lr": (
        lambda: ra.suggest_lr(mlp(), optimiser="adamw"),
        "optimiser=.*optimizer=",
    ),
    "another name in convert_lr": (
        lambda: ra.convert_lr(1e-3, "r=8,alpha=8", tow="r=16"),
        "tow=.*to=",
    ),
    "judge(learning_rate=)": (
        lambda: ra.Recipe.load(RECIPE).judge(learning_rate=1e-3),
        "learning_rate=.*lr=",
    ),
    "another name in compare_laws": (
        lambda: ra.sweeps.compare_laws([], ["mua"], optimiser="adamw"),
        "optimiser=.*optimizer=",
    ),
    "another name in fit_sweep": (
        lambda: ra.sweeps.fit_sweep([], optimiser="adamw"),
        "optimiser=.*optimizer=",
    ),
}
SWAPPED = {
    "RankAwareOptimizer": lambda model: ra.RankAwareOptimizer(AdamW, model, lr=1e-3),
    "suggest_lr": lambda model: ra.suggest_lr("adamw", model),
    "calibrate": lambda model: ra.calibrate("adamw", model),
    "attach": lambda model: ra.attach(AdamW, model, lr=1e-3),
}


@pytest.mark.parametrize("call", NEAR_MISSES)
def test_a_near_miss_is_answered_by_the_call_that_was_meant(call):
    """The error for a misnamed argument is a TypeError that names this argument and the argument to use."""
    attempt, words = NEAR_MISSES[call]
    with pytest.raises(ra.RankAwareError, match=words) as caught:
        attempt()
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("name", SWAPPED)
def test_a_model_in_the_place_of_the_optimizer_is_noticed(name):
    """If the model and the optimizer are swapped, the error says so and shows the right order."""
    with pytest.raises(ra.RankAwareError, match=rf"swapped.* Call {name}\("):
        SWAPPED[name](nn.Linear(2, 2))


def test_settings_that_a_class_takes_are_no_near_miss():
    """An optimizer class gets its own arguments, even if their names resemble arguments of this package."""
    opt = wrapped(TakesAnything, init_lr=1.0, epoch=3)
    assert isinstance(opt, TakesAnything)


def test_an_argument_that_is_near_nothing_is_pythons_error():
    """An argument that resembles no known one raises Python's own TypeError."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'quux'"):
        read_at(quux=1)
