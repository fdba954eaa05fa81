"""What the tests of calibration train: a tiny net, and made-up losses whose best learning rate is
known.
"""

from __future__ import annotations

import math
import random
from itertools import count

import torch
from torch import nn

import rankaware_optim as ra

from .models import PlainLoRA

DIM = 32
STEPS = 20
AdamW = torch.optim.AdamW


class Net(nn.Module):
    """A net of two layers that are adapted at `rank`, or trained in full if `rank` is None."""

    def __init__(self, rank: int | None, scaling: float = 2.0, init: str = "A") -> None:
        super().__init__()
        layers = [nn.Linear(DIM, DIM, bias=False) for _ in range(2)]
        self.layers = nn.ModuleList(
            layers
            if rank is None
            else [PlainLoRA(w, rank, scaling, init) for w in layers]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def losses(model, optimizer, seed):
    """Train without end on the outputs of a random teacher, and yield the losses."""
    source = torch.Generator().manual_seed(seed)
    teacher = torch.randn(DIM, DIM, generator=source) / 6
    while True:
        x = torch.randn(DIM, DIM, generator=source)
        loss = (model(x) - (x @ teacher).tanh()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def train(trial):
    model = Net(trial.rank)
    yield from losses(model, trial.optimizer(model), trial.seed)


BEST = -7.0  # log2 of the best base learning rate of a bowl


def bowl(u: float) -> float:
    """Return the loss at u octaves above the optimum: it rises slowly below, fast above, and to 9
    at most.
    """
    return min(0.3 + 0.06 * (math.exp(min(2 * u, 20)) - 2 * u - 1), 9.0)


def made_up(
    best=lambda rank: BEST,
    *,
    scaling=lambda rank: 2.0,
    init="A",
    noise=0.01,
    **settings,
):
    """Return a loop whose loss falls from 2.3 into a bowl around log2 of the best base learning
    rate, with little noise.
    """

    def train(trial):
        trial.optimizer(Net(trial.rank, scaling(trial.rank), init), **settings)
        end = bowl(math.log2(trial.lr) - best(trial.rank))
        for step in count():
            yield 2.3 + (end - 2.3) * min(step / 10, 1.0) + noise * random.random()

    return train


def valued(value, returned=lambda u, trial: None):
    """Return a loop that yields `value(u, step, trial)` at u octaves above the best learning rate,
    and returns a score.
    """

    def train(trial):
        trial.optimizer(Net(trial.rank))
        u = math.log2(trial.lr) - BEST
        for step in range(trial.steps):
            yield value(u, step, trial)
        return returned(u, trial)

    return train


def falling(noise=0.0):
    """Return a loop whose loss falls as fast as the learning rate allows, and rises from an octave
    above the best learning rate.
    """

    def train(trial):
        trial.optimizer(Net(trial.rank))
        u = math.log2(trial.lr) - BEST
        for step in range(trial.steps):
            gain = -0.01 * step
            if u < 1:
                gain = 2.0 - 2.0 * math.exp(-3 * 2**u * (step + 1) / trial.steps)
            yield 2.3 - gain + noise * random.random()

    return train


def sloping(trial, params=None, **settings):
    """Yield losses along a line that falls faster at a higher learning rate."""
    trial.optimizer(Net(trial.rank) if params is None else params, **settings)
    yield from (2.0 - (0.05 + 0.1 * trial.lr) * step for step in range(trial.steps))


def runs(recipe) -> int:
    """Return how many trials a recipe has."""
    return len(recipe.tensors["lr"])


def counted(trials):
    """Return Optuna's trials that completed, diverged or were stopped early."""
    return [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]


def states(trials):
    """Return the names of the states of Optuna's trials."""
    return [trial.state.name for trial in trials]


def calibrate(train, *, ranks=(4, 16), steps=STEPS, optimizer=AdamW, **options):
    return ra.calibrate(train, optimizer, ranks=ranks, steps=steps, **options)
