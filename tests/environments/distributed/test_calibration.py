"""A calibration under DDP and FSDP: one process decides, and both see its rates, prunings, errors and recipe."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankaware_optim as ra

from ...helpers.calibrations import BEST, DIM, STEPS, Net, bowl, calibrate

RANKS = (2, 4)


def wrapped(form: str, rank: int) -> nn.Module:
    net = Net(rank)
    for (
        parameter
    ) in net.parameters():  # the same on both, as a launcher's seed would have it
        dist.broadcast(parameter.data, src=0)
    if form == "ddp":
        return DistributedDataParallel(net)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(
        net, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    )


def seen_by_all(form: str, storage: str | None, trials: int) -> dict[str, Any]:
    """What this process saw of a real training on its own half of the data, and the recipe it was given."""
    seen: list[tuple[Any, ...]] = []

    def train(trial):
        model = wrapped(form, trial.rank)
        opt = trial.optimizer(model)
        source = torch.Generator().manual_seed(2 * trial.seed + dist.get_rank())
        taken = 0
        try:
            while True:
                x = torch.randn(8, DIM, generator=source)
                loss = (model(x) - x.roll(1, dims=1)).square().mean()
                opt.zero_grad()
                loss.backward()
                opt.step()
                taken += 1
                yield loss.detach()
        finally:
            seen.append((trial.number, trial.rank, trial.seed, trial.lr, taken))

    recipe = calibrate(
        train, ranks=RANKS, trials=trials, storage=storage, progress=False
    )
    return {"seen": seen, "recipe": recipe}


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_all_see_one_study(pair, form):
    """Rank, seed, rate and steps of every trial, and the recipe to the bit, are the same on both processes."""
    first, second = pair.run(seen_by_all, form, None, 5)
    assert first["seen"] == second["seen"]
    assert len(first["seen"]) == 5
    assert_same(first["recipe"], second["recipe"])


def assert_same(first: ra.Recipe, second: ra.Recipe) -> None:
    assert (first.fitted_lr, first.law, first.notes) == (
        second.fitted_lr,
        second.law,
        second.notes,
    )
    for key, value in first.tensors.items():
        assert np.array_equal(
            value, second.tensors[key], equal_nan=value.dtype.kind == "f"
        ), key


def test_a_joint_study_is_stored_once_and_resumed(pair, tmp_path):
    """Only one process writes the storage; the same call later runs the rest alone."""
    path = str(tmp_path / "study.journal")
    pair.run(seen_by_all, "ddp", path, 2)
    again = pair.run(seen_by_all, "ddp", path, 4)
    assert [len(answer["seen"]) for answer in again] == [2, 2]
    study = optuna.load_study(study_name="calibration", storage=ra_storage(path))
    assert len(study.trials) == 4
    assert_same(again[0]["recipe"], again[1]["recipe"])


def ra_storage(path: str) -> Any:
    from rankaware_optim.calibration._storage import open_storage

    return open_storage(path)


def pruned_together() -> list[int]:
    """Steps of each trial where the values differ by process, and only their mean or the first's pruner says stop."""
    steps: list[int] = []

    def train(trial):
        trial.optimizer(Net(trial.rank))
        taken = 0
        try:
            for taken in range(1, trial.steps + 1):
                own = 0.5 * (dist.get_rank() - 0.5)
                yield (
                    own
                    + (9.0 if trial.number > 2 else 2.0)
                    + 0.01 * trial.number
                    - 0.05 * taken
                )
        finally:
            steps.append(taken)

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=4)
    recipe = calibrate(train, ranks=RANKS, trials=5, pruner=pruner)
    # the mean of both
    assert recipe.tensors["curve"][0, 0] == pytest.approx(2.0 - 0.05)
    return steps


def test_all_prune_at_the_same_step(pair):
    """A run is pruned on both processes at once, by the mean of their values."""
    first, second = pair.run(pruned_together)
    assert first == second
    assert min(first) < STEPS == max(first)


def diverging_on_one() -> list[int]:
    steps: list[int] = []

    def train(trial):
        trial.optimizer(Net(trial.rank))
        u, taken = math.log2(trial.lr) - BEST, 0
        try:
            for taken in range(1, trial.steps + 1):
                lost = u > 1 and taken > 3 and dist.get_rank() == 1
                yield (
                    math.nan
                    if lost
                    else 2.3 + (bowl(min(u, 1)) - 2.3) * min(taken / 10, 1)
                )
        finally:
            steps.append(taken)

    calibrate(train, ranks=RANKS, trials=8)
    return steps


def test_divergence_on_one_is_divergence_on_all(pair):
    """A value that is not finite on one process ends the run on both at the same step."""
    first, second = pair.run(diverging_on_one)
    assert first == second
    assert min(first) == 4


def refused(**options: Any) -> str:
    def train(trial):
        trial.optimizer(Net(trial.rank))
        yield from [1.0] * STEPS

    with pytest.raises(ra.CalibrationError) as caught:
        calibrate(train, ranks=RANKS, trials=2, **options)
    return str(caught.value)


def away() -> str:
    return refused(storage="/proc/nowhere/study.journal")


def another_configuration(path: str) -> str:
    return refused(storage=path, steps=STEPS + 1)


def test_what_one_cannot_decide_all_are_told(pair, tmp_path):
    """A storage that is away, or of another configuration, is the same error on both; nobody waits for ever."""
    first, second = pair.run(away)
    assert first == second
    assert "/proc/nowhere" in first
    path = str(tmp_path / "study.journal")
    pair.run(seen_by_all, "ddp", path, 1)
    first, second = pair.run(another_configuration, path)
    assert first == second
    assert "made with steps=20, not 21" in first
