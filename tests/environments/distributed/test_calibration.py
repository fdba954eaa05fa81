"""Tests of a calibration under DDP and FSDP, in which one process decides for both.

Both processes get the same learning rates, early stops, errors and recipe.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import optuna
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rankaware_optim as ra
from rankaware_optim.calibration import _runner
from rankaware_optim.calibration._storage import open_storage

from ...helpers.calibrations import BEST, DIM, STEPS, Net, bowl, calibrate, made_up
from ...helpers.llama import llama_config

RANKS = (2, 4)


def wrapped(form: str, rank: int) -> nn.Module:
    net = Net(rank)
    # both processes start from the same weights, as with a common seed
    for parameter in net.parameters():
        dist.broadcast(parameter.data, src=0)
    if form == "ddp":
        return DistributedDataParallel(net)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(
        net, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    )


def seen_by_all(form: str, storage: str | None, trials: int) -> dict[str, Any]:
    """Return the trials as this process saw them, with real training on its half of the data, and its recipe."""
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
    """Both processes get the same rank, seed, learning rate and steps in every trial, and the same recipe."""
    first, second = pair.run(seen_by_all, form, None, 5)
    assert first["seen"] == second["seen"]
    assert len(first["seen"]) == 5
    assert first["recipe"] == second["recipe"]


def test_a_joint_study_is_stored_once_and_resumed(pair, tmp_path):
    """Only one process writes to the storage, and a second call with more trials runs only those
    that are missing.
    """
    path = str(tmp_path / "study.journal")
    pair.run(seen_by_all, "ddp", path, 2)
    again = pair.run(seen_by_all, "ddp", path, 4)
    assert [len(answer["seen"]) for answer in again] == [2, 2]
    study = optuna.load_study(study_name="calibration", storage=open_storage(path))
    assert len(study.trials) == 4
    assert again[0]["recipe"] == again[1]["recipe"]


def printed() -> list[str]:
    """Return the lines that a calibration prints in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        calibrate(made_up(noise=0.0), ranks=RANKS, trials=3)
    return err.getvalue().splitlines()


def test_one_process_prints(pair):
    """The first process prints a line for each trial and the result, and the second prints nothing."""
    first, second = pair.run(printed)
    assert [line[:9] for line in first if line.startswith("trial")] == [
        f"trial {number}/3" for number in (1, 2, 3)
    ]
    assert any(line.startswith("Best learning rate") for line in first)
    assert second == []


def parting(trial: ra.Trial, step: int) -> float:
    """Return a value that differs between the processes.

    Only the mean of both values, which the first process judges, decides when to stop.
    """
    level = 9.0 if trial.number > 2 else 2.0
    own = 0.5 * (dist.get_rank() - 0.5)
    return own + level + 0.01 * trial.number - 0.05 * step


def lost_on_one(trial: ra.Trial, step: int) -> float:
    """Return nan in the second process after the third step if the learning rate is too high."""
    u = math.log2(trial.lr) - BEST
    if u > 1 and step > 3 and dist.get_rank() == 1:
        return math.nan
    return 2.3 + (bowl(min(u, 1)) - 2.3) * min(step / 10, 1)


def steps_with(value: Callable[[ra.Trial, int], float], trials: int) -> Any:
    """Return the number of steps of each trial, and the first value of the first trial."""
    steps: list[int] = []

    def train(trial):
        trial.optimizer(Net(trial.rank))
        taken = 0
        try:
            for taken in range(1, trial.steps + 1):
                yield value(trial, taken)
        finally:
            steps.append(taken)

    def lags(calibration: Any, run: Any) -> bool:
        return len(run.curve) >= 4 and run.curve[-1] > 5

    with mock.patch.object(_runner, "is_behind", lags):
        recipe = calibrate(train, ranks=RANKS, trials=trials)
    return steps, recipe.tensors["curve"][0, 0].item()


def test_all_stop_at_the_same_step(pair):
    """Both processes stop a run early by the mean of their values, and also if one of the two values is nan."""
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
    """If the storage cannot be reached or has another configuration, both processes raise the same error."""
    first, second = pair.run(refused, "/proc/nowhere/study.journal", STEPS)
    assert first == second
    assert "/proc/nowhere" in first
    path = str(tmp_path / "study.journal")
    pair.run(seen_by_all, "ddp", path, 1)
    first, second = pair.run(refused, path, STEPS + 1)
    assert first == second
    assert "made with steps=20, not 21" in first


# --- an existing model ----------------------------------------------------------------------------------------------


def in_place(form: str) -> dict[str, Any]:
    """Return the recipe of a calibration of an existing model, and whether its weights were put back."""
    torch.manual_seed(0)
    model = wrapped(form, 4)
    before = [p.detach().clone() for p in model.parameters()]

    def train(trial):
        opt = trial.optimizer(model)
        source = torch.Generator().manual_seed(2 * trial.seed + dist.get_rank())
        for _ in range(trial.steps):
            x = torch.randn(8, DIM, generator=source)
            loss = (model(x) - x.roll(1, dims=1)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            yield loss.detach()

    recipe = ra.calibrate(train, "adamw", model=model, steps=STEPS, progress=False)
    after = [*model.parameters()]
    return {"recipe": recipe, "same": all(map(torch.equal, before, after))}


def test_a_model_under_ddp_is_put_back_on_every_process(pair):
    """After a calibration of an existing model under DDP, both processes have the same recipe and
    their old weights.
    """
    first, second = pair.run(in_place, "ddp")
    assert first["recipe"] == second["recipe"]
    assert first["same"]
    assert second["same"]


def sharded_in_place() -> str:
    with pytest.raises(ra.CalibrationError) as caught:
        in_place("fsdp")
    return str(caught.value)


def test_a_model_under_fsdp_is_refused_in_place(pair):
    """A calibration of an existing model under FSDP raises an error on both processes, because they
    hold shards.
    """
    first, second = pair.run(sharded_in_place)
    assert first == second
    assert "FSDP or DeepSpeed shards it" in first


def through_trainer(folder: str, recipe: ra.Recipe | None) -> dict[str, Any]:
    """Return the recipe and the trained weights of a Trainer on two processes.

    The Trainer is calibrated first, unless a recipe is passed.
    """
    warnings.simplefilter("ignore")  # those of transformers and accelerate
    import peft
    import transformers

    torch.manual_seed(0)
    config = llama_config(num_hidden_layers=1)
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    rows = [[7 if i % 4 else i % 32] * 8 for i in range(64)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = transformers.TrainingArguments(
        folder,
        max_steps=16,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=2,
        dataloader_pin_memory=False,
        **quiet,
    )
    trainer = transformers.Trainer(model, args, train_dataset=data)
    if recipe is None:
        recipe = ra.calibrate(trainer, "adamw", steps=4, progress=False)
    ra.attach(trainer, "adamw", recipe=recipe)
    trainer.train()
    trained = [p.detach().clone() for p in trainer.model.parameters()]
    return {"recipe": recipe, "weights": trained}


def test_a_trainer_under_ddp_is_calibrated_by_all_and_trains_as_a_fresh_one(
    pair, tmp_path
):
    """A calibrated Trainer on two processes ends with exactly the weights of a new Trainer with the
    same recipe.
    """
    pytest.importorskip("peft")
    first, second = pair.run(through_trainer, str(tmp_path), None)
    assert first["recipe"] == second["recipe"]
    fresh, _ = pair.run(through_trainer, str(tmp_path), first["recipe"])
    assert all(map(torch.equal, first["weights"], fresh["weights"]))
    assert all(map(torch.equal, first["weights"], second["weights"]))
