"""The frontier: optimizers as their authors run them, rates scored on unseen seeds, and what a table takes of them."""

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
    """An adapter and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.adapter = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.adapter(x))


def domain(heads: bool) -> Domain:
    """A task whose head has a rate of its own."""
    rates = {"head*": HEAD_LR} if heads else {}

    def nothing(*_: object) -> Iterator[None]:
        yield None

    return Domain("toy", 4, (4,), Network, nothing, nothing, nothing, 1, (3, 3), rates)


@pytest.mark.parametrize("way", ADAPTIVE)
def test_heads_are_trained_at_their_own_rates(way: str) -> None:
    """What has a fixed rate moves by AdamW's first step of it, at its warm-up; the rest by the way's own optimizer."""
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
    """Bowls around the best rate of each seed, at ranks 4 and 16 and in full; 2 before training."""
    done: dict[Job, float | None] = {}
    for seed, x0 in best.items():
        done[Job(TASK, START, FULL, 0.0, seed)] = 2.0
        for scheme, rank in ((AT_A, 4), (AT_A, 16), ("full", FULL)):
            for x in range(-9, -2):
                done[Job(TASK, scheme, rank, x, seed)] = 1.0 + 0.1 * (x - x0) ** 2
    return done


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    """A task whose two seeds prefer rates two octaves apart."""
    done = losses({0: -7.0, 1: -5.0})
    monkeypatch.setattr(scores, "runs_of", lambda task, steps: done)
    return Sweeps(TASK, OWN)


def test_a_rate_is_scored_on_the_seeds_asked(on: Sweeps) -> None:
    """On a seed its own best rate loses less than nothing beside the rate that is best in the mean; more elsewhere."""
    assert on.lowest(AT_A, 4) == -6.0
    assert on.lost_at(AT_A, 4, -6.0, [0, 1]) == pytest.approx(0.0)
    assert on.lost_at(AT_A, 4, -7.0, [0]) == pytest.approx(-0.1 / 0.9)
    assert on.lost_at(AT_A, 4, -7.0, [1]) == pytest.approx(0.3 / 0.9)


def test_a_run_is_measured_from_the_sweep_on_its_seed(on: Sweeps) -> None:
    """A run's loss is compared with the best rate's on the same seed; a diverged run loses 500 %."""
    assert on.lost_by(AT_A, 4, 1.1, [0]) == pytest.approx(0.0)
    assert on.lost_by(AT_A, 4, 2.0, [1]) == pytest.approx(1.0)
    assert on.lost_by(AT_A, 4, None, [1]) == 5.0


def test_no_way_is_scored_on_the_seed_that_tuned_it(on: Sweeps) -> None:
    """A rate of one seed's sweep is scored on the others, and one that needs no run on all."""
    assert list(seeds_of(FREE[LAW], on, AT_A)) == [(0, [1]), (1, [0])]
    assert list(seeds_of(FREE[SUGGESTED], on, AT_A)) == [(0, [0, 1])]
    assert on.unseen(0, 1) == [0, 1]


def test_a_moved_rate_starts_at_rank_16(on: Sweeps) -> None:
    """Keeping takes the best rate of rank 16 in the sweep of one seed to every other rank and to full finetuning."""
    kept = FREE["keeping it"].rates(on, AT_A, 1)
    assert kept == {4: pytest.approx(-5.0), FULL: pytest.approx(-5.0)}


def test_the_better_setting_counts_and_tasks_weigh_the_same() -> None:
    """Of two settings a column has the better mean, over tasks and not over cells."""
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
    """Schedule-free AdamW was run at two rates: a column has the better one, not their mean."""
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
    """The root of the rank names LoRA's rates, a tenth that of full finetuning: no rule is scored where it is silent."""
    assert FREE[ROOT].rates(on, AT_A, 1) == {4: pytest.approx(-4.0)}
    assert FREE[TENTH].rates(on, AT_A, 1) == {FULL: pytest.approx(-5 - math.log2(10))}


def test_a_run_of_each_arm_is_asked_for_once() -> None:
    """Every way is run at own steps and at 400, only Prodigy at the longest, and no run twice."""
    language = list(runs.jobs(get_domain(TASK), tuple(ADAPTIVE), 800))
    by_length: dict[str, set[str]] = {}
    for job in language:
        _, way, steps = job.scheme.split(" | ")
        by_length.setdefault(steps, set()).add(way)
    every = set(ADAPTIVE)
    asked = {"100 steps": every, "400 steps": every, "800 steps": {"Prodigy"}}
    assert by_length == asked
    assert len(set(language)) == len(language)
