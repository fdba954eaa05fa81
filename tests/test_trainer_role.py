"""Tests that support for another training library needs only a subclass of `Trainer` and a row in a table."""

from __future__ import annotations

import inspect

import pytest
import torch

import rankaware_optim as ra
from rankaware_optim.optimizer import RankAwareOptimizer
from rankaware_optim.trainers import OwnRate, Touched, Trainer, _table, trainer_of

from .helpers.models import batches, mlp, same, snapshot

AdamW = torch.optim.AdamW


class Loop:
    """A trainer of a library that this package does not know."""

    def __init__(self, model, steps, lr=1e-4, warmup=0):
        self.model, self.steps, self.lr, self.warmup = model, steps, lr, warmup
        self.make = lambda: AdamW(model.parameters(), lr=self.lr)
        self.report = lambda loss: False
        self.history = []

    def fit(self):
        opt = self.make()
        for x in batches(self.steps):
            loss = (self.model(x) - x[:, :3].sin()).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            self.history.append(loss.item())
            if self.report(loss.item()):
                break


class LoopTrainer(Trainer):
    """The subclass of `Trainer` that supports `Loop`."""

    def __init__(self, trainer):
        self.trainer, self.model = trainer, trainer.model
        self.source, self.batch = Loop.fit, 8.0

    @staticmethod
    def is_one(value):
        return isinstance(value, Loop)

    def steps(self):
        return self.trainer.steps

    def own_rate(self):
        return OwnRate("lr", self.trainer.lr)

    def warmup(self, steps):
        return self.trainer.warmup

    def attach(self, optimizer, settings):
        opt = RankAwareOptimizer(self.model, optimizer or "adamw", **settings)
        self.trainer.make = lambda: opt
        return opt.report()

    def touched(self):
        return Touched([self.model], [self.trainer])

    def for_trial(self, steps, whole):
        self.trainer.steps = steps
        return self

    def train(self, run):
        self.trainer.make = lambda: run.trial.optimizer(self.model, **run.settings)
        self.trainer.report = run.end_step
        self.trainer.fit()
        return run.result(self.trainer, lambda: None)


@pytest.fixture
def known(monkeypatch):
    """Add `LoopTrainer` to the table of trainers."""
    monkeypatch.setattr(_table, "TRAINERS", (*_table.TRAINERS, LoopTrainer))


def loop(**own):
    return Loop(mlp((4, 4), seed=0), 40, **own)


def test_without_its_row_it_is_no_trainer():
    """Without a row in the table, `attach` and `calibrate` raise an error that names the supported trainers."""
    with pytest.raises(ra.OptimizerError, match=r"got a Loop.*transformers"):
        ra.attach(loop(), "adamw", lr=1e-3)
    with pytest.raises(ra.CalibrationError, match=r"got a Loop.*transformers"):
        ra.calibrate(loop(), "adamw")


def test_with_its_row_everything_knows_it(known, capfd):
    """With a row in the table, a trainer works with `suggest_lr`, `calibrate` and `attach`, and is restored after trials."""
    made = loop()
    before, attributes = snapshot(made.model), dict(vars(made))
    suggested = ra.suggest_lr(made)
    assert suggested == ra.suggest_lr(made.model, steps=40)
    recipe = ra.calibrate(made, "adamw", steps=10, trials=2)
    assert same(snapshot(made.model), before)
    assert vars(made) == attributes
    assert made.history == []
    assert (recipe.steps, recipe.reference.batch) == (40, 8)
    assert "Your lr=0.0001 is" in capfd.readouterr().err
    assert ra.attach(made, recipe=recipe, other_lr=1e-3).rows
    made.fit()
    assert len(made.history) == 40
    assert made.history[-1] < made.history[0]


def test_a_warm_up_as_long_as_the_trial_is_an_error_before_it_trains(known):
    """If the trainer's warm-up is as long as the trial, `calibrate` raises an error before the first step."""
    made = loop(warmup=10)
    with pytest.raises(ra.CalibrationError, match="warm-up is as long"):
        ra.calibrate(made, "adamw", steps=10, trials=1, progress=False)
    assert made.history == []


def test_the_role_is_small():
    """A subclass of `Trainer` needs five methods besides `__init__` and `is_one`, and all of them have a docstring."""
    assert LoopTrainer.__abstractmethods__ == frozenset()
    needed = {*Trainer.__abstractmethods__} - {"__init__", "is_one"}
    assert needed == {"steps", "attach", "touched", "for_trial", "train"}
    assert all(inspect.getdoc(getattr(Trainer, name)) for name in needed)


def test_the_first_class_that_knows_an_object_is_taken():
    """A subclass comes before its base class in the table of trainers, and an unknown object has no trainer."""
    rows = _table.TRAINERS
    for i, kind in enumerate(rows):
        assert not any(issubclass(later, kind) for later in rows[i + 1 :])
    assert trainer_of(object()) is None
