"""Injected errors in a tensor operation while a model is calibrated in place.

Each error is raised once, at a call drawn from all calls that an undisturbed run makes. Afterwards the model must be as
before, or the error must name the tensors that are not.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import torch
from attacks.outcomes import Attack, Outcomes
from made_up import Pair
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rankaware_optim as ra


class Injected(RuntimeError):
    """The error that is injected."""


# --- in place -------------------------------------------------------------------------------------------------------


class RaisesAt(TorchDispatchMode):
    """Counts tensor operations, and raises once, at operation number `at`."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if self.count == self.at:
            raise Injected(f"injected at operation {self.at}, {func}")
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """Two pairs on layers of 8 × 8, with a norm after each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.head = (
            Pair(4),
            nn.BatchNorm1d(8),
            Pair(4),
            nn.Linear(8, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for pair in (self.first, self.second):
            x = self.norm(
                x @ pair.weight.T + pair.scaling * (x @ pair.lora_A.T) @ pair.lora_B.T
            )
        return self.head(x)


def step(model: nn.Module, i: int) -> torch.Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(i % 4))
    loss: torch.Tensor = (model(x) - x[:, :2]).square().mean()
    return loss


def in_place(model: nn.Module, at: int) -> int:
    """Calibrate in place with an error at operation `at`; return the number of operations."""
    with RaisesAt(at) as mode:
        ra.calibrate_in_place(
            model,
            step,
            "adamw",
            ranks=(2, 8, None),
            steps=6,
            trials=5,
            progress=False,
            full_trains=["*.weight"],
        )
    return mode.count


def values(model: nn.Module) -> dict[str, Any]:
    """Every tensor by name with its id, values and gradient, and every module's mode."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found: dict[str, Any] = {
        name: (
            id(t),
            t.detach().clone(),
            t.requires_grad,
            None if t.grad is None else t.grad.clone(),
        )
        for name, t in tensors
    }
    return found | {
        f"mode of {name}": module.training for name, module in model.named_modules()
    }


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return torch.equal(a, b)
        return (
            all(map(alike, a, b))
            if isinstance(a, tuple) and isinstance(b, tuple)
            else bool(a == b)
        )

    return [
        key
        for key in {**before, **after}
        if key not in before or key not in after or not alike(before[key], after[key])
    ]


def run_in_place(seed: int, count: int, folder: Path) -> Outcomes:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chance, outcomes = random.Random(seed), Outcomes()
    torch.manual_seed(0)
    model = Net()
    step(model, 0).backward()
    total = in_place(model, 0)
    for number in range(count):
        # half of them among the last operations, where the model is restored
        at = (
            chance.randint(max(1, total - 200), total)
            if number % 2
            else chance.randint(1, total)
        )
        outcomes.attempt((seed, number, at), lambda at=at: put_back(model, at))
    return outcomes


def put_back(model: nn.Module, at: int) -> None:
    before, state, said = values(model), torch.get_rng_state(), ""
    try:
        in_place(model, at)
    except (Injected, ra.RankAwareError) as error:
        said = str(error)
    found = differing(before, values(model))
    if not torch.equal(torch.get_rng_state(), state):
        found.append("the global random state")
    unsaid = [name for name in found if name not in said]
    if unsaid:
        raise AssertionError(
            f"left changed, but the error ({said!r}) does not name: {unsaid}"
        )


ATTACKS = (Attack("errors, in place", 300, 50, run_in_place),)
