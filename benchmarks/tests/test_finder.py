"""Tests of the finder's evidence: which runs are trained again, and which runs belong to a number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calibration import finder
from calibration.finder import AROUND, WIDE, Ask, in_loop
from frontier import page
from study.configurations import START
from study.domains import Domain
from study.domains._adapters import adapt
from study.grids import FULL, Job
from study.longer import runs_of_length
from torch import Tensor, nn


@pytest.mark.parametrize("tuned", [16, FULL])
@pytest.mark.parametrize("way", [AROUND, WIDE])
def test_a_known_run_is_not_trained_again(
    tuned: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search reuses the finished runs that are on file and gives the same recipe, but other trial
    lengths train.
    """
    drawn: list[int] = []

    def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8, bias=False))
        return adapt(net.requires_grad_(False), rank, alpha, init, seed, "0")

    def batches(seed: int, batch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            drawn.append(seed)
            yield torch.randn(batch, 8, generator=generator)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - x).square().mean()

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return loss(model, torch.eye(8)).item()

    of: Any = build, batches, loss, evaluate
    toy = Domain("toy", 24, (4,), *of, batch=4, widths=(8.0, 8.0))
    monkeypatch.setattr(finder, "get_domain", lambda name: toy)
    known = finder.Known()
    ask = Ask("toy", tuned, way, 96, 4, 0)
    first = in_loop(ask, known)
    trained = len(drawn)
    again = in_loop(ask, known)
    assert again.lr == first.lr
    # only a run that diverged is trained again
    assert len(drawn) - trained < 24 < trained
    known_only = len(drawn)
    in_loop(ask._replace(parts=8), known)
    assert len(drawn) - known_only > 12


def test_a_length_has_its_own_runs_and_the_losses_before_training() -> None:
    """runs_of_length returns only runs with this number of steps, and the losses before training."""
    start, short, long = (
        Job("language", scheme, 16, -8.0, 0)
        for scheme in (START, "full | 50 steps", "full | 400 steps")
    )
    kept = runs_of_length({start: 9.0, short: 2.0, long: 1.0}, 50)
    assert kept == {start: 9.0, short._replace(scheme="full"): 2.0}


def test_the_frontier_has_the_searches_around_the_suggestion_for_its_length() -> None:
    """The frontier has only searches for its own number of steps that start at the suggestion, and
    range tests.

    A range test costs its own 100 steps.
    """
    assert {
        (found.way, found.runs) for found in page.long_searches() if found.runs < 0.3
    } == {(page.LIGHTNING, 0.25)}
    asked = [found.ask for found in finder.evidence()]
    mine = [each for each in asked if (*each[1:4],) == (16, AROUND, 400)]
    ways = [found.way for found in page.long_searches()]
    assert ways.count(page.QUARTERS) + ways.count(page.EIGHTHS) == len(mine) > 0
