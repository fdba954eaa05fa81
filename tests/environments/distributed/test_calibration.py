"""A calibration under DDP and FSDP: one process decides, and both see its rates, prunings, errors and recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankaware_optim as ra
from rankaware_optim.calibration._storage import open_storage

from ...helpers.calibrations import BEST, DIM, STEPS, Net, bowl, calibrate

RANKS = (2, 4)


def wrapped(form: str, rank: int) -> nn.Module:
    net = Net(rank)
    # the same on both, as a launcher's seed would have it
    for parameter in net.parameters():
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
    assert first["recipe"] == second["recipe"]


def test_a_joint_study_is_stored_once_and_resumed(pair, tmp_path):
    """Only one process writes the storage; the same call later runs the rest alone."""
    path = str(tmp_path / "study.journal")
    pair.run(seen_by_all, "ddp", path, 2)
    again = pair.run(seen_by_all, "ddp", path, 4)
    assert [len(answer["seen"]) for answer in again] == [2, 2]
    study = optuna.load_study(study_name="calibration", storage=open_storage(path))
    assert len(study.trials) == 4
    assert again[0]["recipe"] == again[1]["recipe"]


def parting(trial: ra.Trial, step: int) -> float:
    """Values that differ by process: only their mean, by the first's pruner, says when to stop."""
    level = 9.0 if trial.number > 2 else 2.0
    own = 0.5 * (dist.get_rank() - 0.5)
    return own + level + 0.01 * trial.number - 0.05 * step


def lost_on_one(trial: ra.Trial, step: int) -> float:
    """At rates that are too high the second process has no finite value from the fourth step on."""
    u = math.log2(trial.lr) - BEST
    if u > 1 and step > 3 and dist.get_rank() == 1:
        return math.nan
    return 2.3 + (bowl(min(u, 1)) - 2.3) * min(step / 10, 1)


def steps_with(value: Callable[[ra.Trial, int], float], trials: int) -> Any:
    """The steps of each trial, and the first value of the first."""
    steps: list[int] = []

    def train(trial):
        trial.optimizer(Net(trial.rank))
        taken = 0
        try:
            for taken in range(1, trial.steps + 1):
                yield value(trial, taken)
        finally:
            steps.append(taken)

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=4)
    recipe = calibrate(train, ranks=RANKS, trials=trials, pruner=pruner)
    return steps, recipe.tensors["curve"][0, 0].item()


def test_all_stop_at_the_same_step(pair):
    """By the mean of their values both processes prune a run, and both leave one whose value is lost on one of them."""
    first, second = pair.run(steps_with, parting, 5)
    assert first == second
    steps, value = first
    assert min(steps) < STEPS == max(steps)
    assert value == pytest.approx(2.0 - 0.05)
    first, second = pair.run(steps_with, lost_on_one, 8)
    assert first == second
    assert min(first[0]) == 4


def refused(storage: str, steps: int) -> str:
    def train(trial):
        trial.optimizer(Net(trial.rank))
        yield from [1.0] * STEPS

    with pytest.raises(ra.CalibrationError) as caught:
        calibrate(train, ranks=RANKS, trials=2, storage=storage, steps=steps)
    return str(caught.value)


def test_what_one_cannot_decide_all_are_told(pair, tmp_path):
    """A storage that is away, or of another configuration, is the same error on both; nobody waits for ever."""
    first, second = pair.run(refused, "/proc/nowhere/study.journal", STEPS)
    assert first == second
    assert "/proc/nowhere" in first
    path = str(tmp_path / "study.journal")
    pair.run(seen_by_all, "ddp", path, 1)
    first, second = pair.run(refused, path, STEPS + 1)
    assert first == second
    assert "made with steps=20, not 21" in first
