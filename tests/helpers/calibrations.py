"""What calibration's tests train: a tiny net, and made-up losses whose best rate is known."""

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
    """Two layers, adapted at `rank`, or trained whole where it is None."""

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
    """Train on a random teacher's outputs, for ever."""
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


BEST = -7.0  # log2 of a bowl's best base rate


def bowl(u: float) -> float:
    """A loss u octaves above its optimum: a gentle side, a cliff, and no better than untrained at most."""
    return min(0.3 + 0.06 * (math.exp(min(2 * u, 20)) - 2 * u - 1), 9.0)


def made_up(
    best=lambda rank: BEST,
    *,
    scaling=lambda rank: 2.0,
    init="A",
    noise=0.01,
    **settings,
):
    """A `train` whose loss falls from 2.3 to a bowl about log2 of the best base rate, with little noise."""

    def train(trial):
        trial.optimizer(Net(trial.rank, scaling(trial.rank), init), **settings)
        end = bowl(math.log2(trial.lr) - best(trial.rank))
        for step in count():
            yield 2.3 + (end - 2.3) * min(step / 10, 1.0) + noise * random.random()

    return train


def valued(value, returned=lambda u, trial: None):
    """A `train` that yields `value(u, step, trial)` at each step, u octaves above the best rate, and returns a score."""

    def train(trial):
        trial.optimizer(Net(trial.rank))
        u = math.log2(trial.lr) - BEST
        for step in range(trial.steps):
            yield value(u, step, trial)
        return returned(u, trial)

    return train


def falling(noise=0.0):
    """A `train` whose loss falls as fast as the rate lets it, and rises an octave above the best."""

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
    """A `train` whose loss falls by a line, the steeper the higher the rate."""
    trial.optimizer(Net(trial.rank) if params is None else params, **settings)
    yield from (2.0 - (0.05 + 0.1 * trial.lr) * step for step in range(trial.steps))


def runs(recipe) -> int:
    """How many trials a recipe has."""
    return len(recipe.tensors["lr"])


def counted(trials):
    """Optuna's trials that completed, diverged or were pruned."""
    return [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]


def states(trials):
    """The names of the states of Optuna's trials."""
    return [trial.state.name for trial in trials]


def calibrate(train, *, ranks=(4, 16), steps=STEPS, optimizer=AdamW, **options):
    return ra.calibrate(train, optimizer, ranks=ranks, steps=steps, **options)
