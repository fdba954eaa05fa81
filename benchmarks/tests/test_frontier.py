"""Tests of the frontier page: its optimizers, how learning rates are scored, and what its tables show."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from frontier import page, runs, scores
from frontier.adaptive import ADAPTIVE, SCHEDULE_FREE, optimizer
from frontier.page import Lost, score
from frontier.scores import OWN, Sweeps
from frontier.ways import FREE, LAW, ROOT, SUGGESTED, TENTH, seeds_of
from study.configurations import START
from study.domains import Domain, get_domain
from study.grids import FULL, Job
from torch import Tensor, nn

AT_A = "Init[A], s = 1"
TASK = "language"
HEAD_LR = 1e-3


class Network(nn.Module):
    """A model with an adapter and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapter = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.adapter(x))


def domain(heads: bool) -> Domain:
    """Return a task. If `heads` is true, its head has its own learning rate."""
    rates = {"head*": HEAD_LR} if heads else {}

    def nothing(*_: object) -> Iterator[None]:
        yield None

    return Domain("toy", 4, (4,), Network, nothing, nothing, nothing, 1, (3, 3), rates)


@pytest.mark.parametrize("way", ADAPTIVE)
def test_heads_are_trained_at_their_own_rates(way: str) -> None:
    """AdamW trains the head at its fixed learning rate, and the optimizer under test trains only the adapter."""
    model = Network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = optimizer(way, model, domain(True), 100, 1.0)
    if hasattr(opt, "train"):
        opt.train()
    model(torch.ones(2, 3)).sum().backward()
    opt.step()
    warm = HEAD_LR / 5  # the first of five steps
    for name, param in model.head.named_parameters():
        was = before[f"head.{name}"]
        moved = (was * (1 - warm * 0.01) - param).abs()
        torch.testing.assert_close(moved, torch.full_like(was, warm), rtol=1e-3, atol=0)
        assert param.grad is None or not param.grad.any()
    trained = {id(p) for group in opt.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.adapter.parameters()}


def losses(best: dict[int, float]) -> dict[Job, float | None]:
    """Return parabolas of loss around the best learning rate of each seed, and a loss of 2 before training."""
    done: dict[Job, float | None] = {}
    for seed, x0 in best.items():
        done[Job(TASK, START, FULL, 0.0, seed)] = 2.0
        for scheme, rank in ((AT_A, 4), (AT_A, 16), ("full", FULL)):
            for x in range(-9, -2):
                done[Job(TASK, scheme, rank, x, seed)] = 1.0 + 0.1 * (x - x0) ** 2
    return done


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    """Return a task whose two seeds prefer learning rates that are two octaves apart."""
    done = losses({0: -7.0, 1: -5.0})
    monkeypatch.setattr(scores, "runs_of", lambda task, steps: done)
    return Sweeps(TASK, OWN)


def test_a_rate_is_scored_on_the_seeds_asked(on: Sweeps) -> None:
    """A learning rate is scored on the seeds passed.

    It can beat the rate that is best on average over all seeds.
    """
    assert on.lowest(AT_A, 4) == -6.0
    assert on.lost_at(AT_A, 4, -6.0, [0, 1]) == pytest.approx(0.0)
    assert on.lost_at(AT_A, 4, -7.0, [0]) == pytest.approx(-0.1 / 0.9)
    assert on.lost_at(AT_A, 4, -7.0, [1]) == pytest.approx(0.3 / 0.9)


def test_a_run_is_measured_from_the_sweep_on_its_seed(on: Sweeps) -> None:
    """A run's loss is compared with that of the best learning rate on the same seed.

    A diverged run loses 500 %.
    """
    assert on.lost_by(AT_A, 4, 1.1, [0]) == pytest.approx(0.0)
    assert on.lost_by(AT_A, 4, 2.0, [1]) == pytest.approx(1.0)
    assert on.lost_by(AT_A, 4, None, [1]) == 5.0


def test_no_way_is_scored_on_the_seed_that_tuned_it(on: Sweeps) -> None:
    """A learning rate tuned on one seed is scored on the others.

    One that needs no run is scored on all seeds.
    """
    assert list(seeds_of(FREE[LAW], on, AT_A)) == [(0, [1]), (1, [0])]
    assert list(seeds_of(FREE[SUGGESTED], on, AT_A)) == [(0, [0, 1])]
    assert on.unseen(0, 1) == [0, 1]


def test_a_moved_rate_starts_at_rank_16(on: Sweeps) -> None:
    """ "keeping it" uses the best learning rate of rank 16 on one seed for every other rank and full
    finetuning.
    """
    kept = FREE["keeping it"].rates(on, AT_A, 1)
    assert kept == {4: pytest.approx(-5.0), FULL: pytest.approx(-5.0)}


def test_the_better_setting_counts_and_tasks_weigh_the_same() -> None:
    """The setting with the better mean counts, and every task has the same weight, however many cells it has."""
    losts = [
        Lost("Prodigy", "language", AT_A, 4, 0.1, "d_coef 1"),
        Lost("Prodigy", "language", AT_A, 64, 0.1, "d_coef 1"),
        Lost("Prodigy", "audio", AT_A, 4, 0.4, "d_coef 1"),
        Lost("Prodigy", "audio", AT_A, 4, 0.9, "d_coef 2"),
        Lost("Prodigy", "audio", AT_A, FULL, 0.0, "d_coef 2"),
    ]
    of_ranks = score(losts, "Prodigy", page.RANKS_A)
    assert of_ranks is not None
    assert of_ranks.setting == "d_coef 1"
    assert of_ranks.mean == pytest.approx(25.0)
    assert score(losts, "Prodigy", page.RANKS_KEPT) is None


def test_two_suggested_rates_are_two_settings(
    on: Sweeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of schedule-free AdamW's two learning rates the better one counts, not the mean of both."""
    asked_for = runs.jobs(get_domain(TASK), (SCHEDULE_FREE,), get_domain(TASK).steps)
    in_full = sorted({job for job in asked_for if job.rank == FULL and job.seed == 0})
    low, high = in_full
    monkeypatch.setattr(page, "on_file", lambda: {TASK: {low: 1.5, high: 1.1}})
    losts = list(page.adaptive(on, get_domain(TASK).steps))
    of_full = score(losts, SCHEDULE_FREE, page.TO_FULL)
    assert of_full is not None
    best = on.lost_by("full", FULL, 1.1, [0])
    assert of_full.mean == pytest.approx(100 * best)


def test_rules_of_thumb_name_what_they_are_about(on: Sweeps) -> None:
    """The square-root rule is scored only on LoRA ranks, and the rule of one tenth only on full finetuning."""
    assert FREE[ROOT].rates(on, AT_A, 1) == {4: pytest.approx(-4.0)}
    assert FREE[TENTH].rates(on, AT_A, 1) == {FULL: pytest.approx(-5 - math.log2(10))}


def test_a_run_of_each_arm_is_asked_for_once() -> None:
    """Every optimizer runs 100 and 400 steps, only Prodigy runs 800, and no run is listed twice."""
    language = list(runs.jobs(get_domain(TASK), tuple(ADAPTIVE), 800))
    by_length: dict[str, set[str]] = {}
    for job in language:
        _, way, steps = job.scheme.split(" | ")
        by_length.setdefault(steps, set()).add(way)
    every = set(ADAPTIVE)
    asked = {"100 steps": every, "400 steps": every, "800 steps": {"Prodigy"}}
    assert by_length == asked
    assert len(set(language)) == len(language)
