"""Tests of `Rate`, a float that also has an interval, a ceiling and notes."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from torch.optim import AdamW

import rankaware_optim as ra

from .helpers.models import mlp, trained
from .helpers.recipes import RECIPE

RATE = ra.Rate(
    2e-4,
    low=1e-4,
    high=4e-4,
    ceiling=1e-2,
    notes=("A note.",),
    configuration="rank 16",
    reference=ra.Reference(16, 32),
)
SOURCES = {
    "a suggestion": lambda: ra.suggest_lr(ra.Reference(16, 32)),
    "a conversion": lambda: ra.convert_lr(1e-3, "r=16,alpha=32", "r=64"),
    "a recipe": lambda: RECIPE.at(16, alpha=32),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_answer_is_a_float(source):
    """The result of `suggest_lr`, `convert_lr` and `Recipe.at` works as a float in torch, JSON and arithmetic."""
    rate = SOURCES[source]()
    assert isinstance(rate, ra.Rate)
    assert AdamW(trained(mlp()), lr=rate).param_groups[0]["lr"] == rate.lr
    assert json.loads(json.dumps({"lr": rate})) == {"lr": rate.lr}
    for result in (rate * 2, rate / 2, 1 - rate, -rate, +rate, float(rate), rate.lr):
        assert type(result) is float
    assert 0 < rate < 1
    assert rate == rate.lr
    assert hash(rate) == hash(rate.lr)
    assert rate.reference is not None
    assert rate.reference.method == "lora"


def test_it_prints_all_and_formats_as_a_number():
    """Printing a `Rate` shows all its facts, formatting it gives the number, and its repr is one line."""
    lines = str(RATE).splitlines()
    assert lines[0].split() == ["lr", "0.0002"]
    assert lines[-1] == "note: A note."
    assert (f"{RATE}", f"{RATE:.2g}", f"{RATE:.1e}") == ("0.0002", "0.0002", "2.0e-04")
    assert repr(RATE) == "Rate(0.0002, low=0.0001, high=0.0004, ceiling=0.01)"
    assert repr(ra.Rate(1e-3, extrapolated=True)) == "Rate(0.001, extrapolated=True)"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_it_is_a_plain_float(protocol):
    """Pickling a `Rate` gives a plain float, so that loading needs no package, while copying returns the same object."""
    again = pickle.loads(pickle.dumps(RATE, protocol))
    assert (type(again), again) == (float, 2e-4)
    assert copy.copy(RATE) is RATE
    assert copy.deepcopy([RATE])[0] is RATE


def test_it_cannot_be_changed():
    """The attributes of a `Rate` cannot be changed, and `with_notes` returns a new `Rate`."""
    with pytest.raises(AttributeError, match="low"):
        RATE.low = 1.0
    with pytest.raises(AttributeError, match="low"):
        del RATE.low
    more = RATE.with_notes("Another.")
    assert (more, more.notes, more.low) == (2e-4, ("A note.", "Another."), 1e-4)
    assert RATE.notes == ("A note.",)


def test_an_unknown_end_is_none():
    """If a `Rate` has no interval, `low` and `high` are None and `band` is "unknown"."""
    rate = ra.Rate(1e-3)
    assert (rate.low, rate.high, rate.band) == (None, None, "unknown")
    assert "interval" not in str(rate)


@pytest.mark.parametrize("known", [{"low": 1e-4}, {"high": 4e-3}])
def test_an_interval_with_one_unknown_end_is_unknown(known):
    """If a `Rate` has only one end of the interval, `band` is "unknown"."""
    assert ra.Rate(1e-3, **known).band == "unknown"


def test_a_checkpoint_of_the_wrapper_holds_plain_floats():
    """An optimizer state that was saved with a `Rate` as learning rate loads with weights_only=True as plain floats."""
    model = mlp((16,))
    opt = ra.RankAwareOptimizer(model, AdamW, lr=ra.suggest_lr(model))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert {type(group["lr"]) for group in loaded["param_groups"]} == {float}


def test_the_wrapper_takes_the_configuration_from_the_rate():
    """The wrapper converts a `Rate` from the configuration that the `Rate` belongs to, even if tuned_at= is not passed."""
    model = mlp((4, 64, 64), scalings=2.0)
    rate = ra.suggest_lr(model)
    assert rate.reference.rank == 64
    opt = ra.RankAwareOptimizer(model, AdamW, lr=rate)
    same = ra.RankAwareOptimizer(
        model, AdamW, lr=rate.lr, tuned_at=ra.Reference(64, 128)
    )
    assert opt.rates.groups == same.rates.groups
    stated = ra.RankAwareOptimizer(model, AdamW, lr=rate, tuned_at="r=64,alpha=128")
    assert stated.rates.groups == same.rates.groups
    other = ra.RankAwareOptimizer(
        model, AdamW, lr=ra.Rate(1e-3, reference=ra.Reference(4, 8))
    )
    assert {part.lr for part in other.rates.groups if part.rank == 4} == {1e-3}


def test_another_configuration_than_the_rates_is_an_error():
    """Passing a `Rate` for rank 16 with a tuned_at= of rank 8 raises an error that names both."""
    with pytest.raises(ra.OptimizerError, match=r"tuned_at= describes rank 8.*rank 16"):
        ra.RankAwareOptimizer(mlp((16,)), AdamW, lr=RATE, tuned_at="r=8,alpha=32")
