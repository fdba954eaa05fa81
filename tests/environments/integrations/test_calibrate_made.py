"""Tests of calibration with a function that returns a new trainer of transformers, TRL or Lightning
for each trial.

An existing trainer runs the same trials. What they leave behind is tested in
test_calibrate_built.py.
"""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch

import rankaware_optim as ra
from rankaware_optim import CalibrationError, RankAwareError, RankAwareOptimizer
from rankaware_optim.calibration import _runner

from ...helpers.models import batches, mlp
from .trainers import (
    QUIET,
    STEPS,
    AdamW,
    arguments,
    different_words,
    lightning,
    llama,
    loss_of,
    prompts,
    sayings,
    tokenizer,
    transformers,
    trl,
)

pytestmark = QUIET


def calibrate(make, *, ranks=(2, 4), trials=3, **options):
    return ra.calibrate(make, AdamW, ranks=ranks, steps=STEPS, trials=trials, **options)


def pruned(monkeypatch, steps=math.inf):
    """Stop every trial after the given number of steps, by default never."""
    stops = lambda calibration, run: len(run.curve) >= steps  # noqa: E731
    monkeypatch.setattr(_runner, "is_behind", stops)


# --- transformers and TRL -------------------------------------------------------------------------------------------


def model_of(trial):
    """Return a Llama with adapters at the trial's rank."""
    one_rank = {"rank_pattern": {}, "alpha_pattern": {}}
    return llama(r=trial.rank, lora_alpha=trial.rank, **one_rank)


def maker(folder, **own):
    """Return a `make_trainer` for tiny Llamas.

    Its attributes keep the trainers, and the last arguments with a copy made before the run.
    """

    def make(trial):
        usual = {"max_steps": -1, "save_strategy": "steps", "save_steps": 1}
        args = arguments(folder, **{**usual, **own})
        make.args, make.found = args, copy.copy(args)
        data = {"train_dataset": sayings(64), "eval_dataset": sayings(8)}
        made = transformers.Trainer(model_of(trial), args, **data)
        make.trainers.append(made)
        return made

    make.trainers = []
    return make


def reward_maker(folder, kind, **own):
    def make(trial):
        online = {"num_generations": 2, "max_completion_length": 4, "beta": 0.0}
        settings = {"max_steps": -1, "logging_steps": 3, **online, **own}
        args = arguments(folder, getattr(trl, f"{kind}Config"), **settings)
        more = {"train_dataset": prompts(), "processing_class": tokenizer()}
        made = getattr(trl, f"{kind}Trainer")(
            model_of(trial), different_words, args=args, **more
        )
        make.trainers.append(made)
        return made

    make.trainers = []
    return make


def logged(trainer, name):
    """Return the values that a trainer has logged under a name, in the order of the steps."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_trainers_values_are_its_losses(tmp_path, monkeypatch):
    """The value of a step is the loss over all its batches, and every trial has its own optimizer
    with `settings`.
    """
    make = maker(tmp_path, gradient_accumulation_steps=2)
    pruned(monkeypatch)
    recipe = calibrate(make, settings={"weight_decay": 0.25})
    curves = recipe.tensors["curve"].tolist()
    for trainer, curve in zip(make.trainers, curves, strict=True):
        assert trainer.state.global_step == STEPS
        assert curve == pytest.approx(logged(trainer, "loss"))
        assert isinstance(trainer.optimizer.optimizer, RankAwareOptimizer)
    assert recipe.settings["weight_decay"] == 0.25
    assert recipe.ranks == (2, 4)


@pytest.mark.parametrize(
    ("kind", "own"), [("RLOO", {}), ("GRPO", {"num_iterations": 2})]
)
def test_a_trainer_of_rewards_is_calibrated_by_them(tmp_path, monkeypatch, kind, own):
    """For GRPO and RLOO the value of a step is minus the logged reward, because their loss is about zero."""
    make = reward_maker(tmp_path, kind, **own)
    pruned(monkeypatch)
    recipe = calibrate(make, trials=2)
    times = own.get("num_iterations", 1)
    curves = recipe.tensors["curve"].tolist()
    for trainer, curve in zip(make.trainers, curves, strict=True):
        values = [-reward for reward in logged(trainer, "reward")]
        assert curve == pytest.approx(np.repeat(values, times).tolist())
    assert "minus the reward" in recipe.notes[-1]


def test_a_trainer_that_logs_no_reward_is_refused(tmp_path):
    """If a trainer has reward functions but logs no reward, an error asks for score=."""

    def make(trial):
        trainer = maker(tmp_path)(trial)
        trainer.reward_funcs = [different_words]
        return trainer

    with pytest.raises(CalibrationError, match=r"logs no reward.*Pass score="):
        calibrate(make, trials=1)


@pytest.mark.parametrize("given", [{}, {"batch": 99.0}])
def test_batch_and_warmup_are_read_off_the_arguments(tmp_path, given):
    """The recipe has the warm-up of the trainer's arguments, and their batch size unless another
    one is passed.
    """
    own = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make = maker(tmp_path, warmup_steps=3, **own)
    recipe = calibrate(make, **given)
    assert recipe.batch == recipe.reference.batch == given.get("batch", 4)
    assert recipe.warmup == 3 / STEPS
    assert vars(make.args) == vars(make.found)


def fail(trainer):
    raise AssertionError


def test_a_pruned_trainer_stops(tmp_path, monkeypatch):
    """A trial that is stopped early ends at that step and is not evaluated."""
    make = maker(tmp_path)
    pruned(monkeypatch, 3)
    with pytest.raises(CalibrationError, match="stopped early"):
        calibrate(make, score=fail, trials=2)
    assert [trainer.state.global_step for trainer in make.trainers] == [3, 3]


@pytest.mark.parametrize(
    "score", [None, lambda trainer: trainer.evaluate()["eval_loss"]]
)
def test_an_evaluation_may_be_the_score(tmp_path, score):
    """A trial's score is the loss on the evaluation data, or what score= returns."""
    make = maker(tmp_path)
    recipe = calibrate(make, score=score)
    assert recipe.score == ("loss" if score is None else "own")
    evaluated = [trainer.evaluate()["eval_loss"] for trainer in make.trainers]
    assert recipe.tensors["value"].tolist() == pytest.approx(evaluated, rel=1e-6)


def test_the_seed_is_the_trials(tmp_path):
    """Trials with the same seed see the same data, whatever seed the trainer's arguments have.

    Another seed gives other data.
    """
    firsts = {}

    def make(trial):
        trainer = maker(tmp_path, seed=11)(trial)
        inner = trainer.compute_loss

        def watched(model, inputs, *args, **kwargs):
            if trainer.state.global_step == 0:
                rows = str(inputs["input_ids"].tolist())
                firsts.setdefault(trial.seed, set()).add(rows)
            return inner(model, inputs, *args, **kwargs)

        trainer.compute_loss = watched
        return trainer

    calibrate(make, ranks=(2,), trials=8)
    assert [len(seen) for seen in firsts.values()] == [1, 1]
    assert firsts[0] != firsts[1]


def with_optimizer(folder):
    def make(trial):
        trainer = maker(folder)(trial)
        trainer.create_optimizer()
        return trainer

    return make


# --- Lightning ------------------------------------------------------------------------------------------------------


class Bare(lightning.LightningModule):
    """A module that configures no optimizer."""

    def __init__(self, trial):
        super().__init__()
        self.trial = trial
        self.net = mlp((trial.rank, trial.rank), seed=trial.seed)

    def training_step(self, batch, index):
        return loss_of(self.net, batch[0])

    def validation_step(self, batch, index):
        self.log("val_loss", loss_of(self.net, batch[0]))


class Scheduled(Bare):
    """A module that configures the trial's optimizer with a schedule."""

    def configure_optimizers(self):
        opt = self.trial.optimizer(self, weight_decay=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, steps)
        by_step = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": opt, "lr_scheduler": by_step}


class ByHand(Scheduled):
    """A module with manual optimization."""

    def __init__(self, trial):
        super().__init__(trial)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        opt = self.optimizers()
        opt.zero_grad()
        loss = loss_of(self.net, batch[0])
        self.manual_backward(loss)
        opt.step()
        self.lr_schedulers().step()
        return loss


class Own(Bare):
    """A module that creates an optimizer without asking the trial."""

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-3)


def loader(count=4):
    data = torch.utils.data.TensorDataset(torch.cat(list(batches(count))))
    return torch.utils.data.DataLoader(data, batch_size=8, num_workers=0)


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(2)


def lit(folder, kind=Scheduled, data=lambda: (loader(), loader(2)), **own):
    """Return a `make_trainer` for Lightning, with checkpoints on by default, which keeps its modules."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    usual = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0}
    options = {**usual, **quiet, "logger": False, **own}

    def make(trial):
        made, module = data(), kind(trial)
        make.modules.append(module)
        trainer = lightning.Trainer(default_root_dir=str(folder), **options)
        return trainer, module, *(made if isinstance(made, tuple) else (made,))

    make.modules = []
    return make


def by_hand(trial):
    """Train as Lightning trains `Scheduled` with four batches an epoch."""
    net = mlp((trial.rank, trial.rank), seed=trial.seed)
    opt = trial.optimizer(net, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, trial.steps)
    for i in range(trial.steps):
        loss = loss_of(net, list(batches(4))[i % 4])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        yield loss
    return ending(net)


def ending(net):
    """Return a score for a model after its run."""
    return loss_of(net, list(batches(5))[4]).item()


@pytest.mark.parametrize("kind", [Scheduled, ByHand])
def test_lightning_is_as_a_loop_of_ones_own(tmp_path, kind):
    """Lightning gives exactly the same losses and recipe as a training loop written by hand."""
    score = {"score": lambda trainer: ending(trainer.lightning_module.net)}
    through = calibrate(lit(tmp_path, kind), trials=4, **score)
    own = ra.calibrate(by_hand, AdamW, ranks=(2, 4), steps=STEPS, trials=4)
    curves = (recipe.tensors["curve"] for recipe in (through, own))
    assert np.array_equal(*curves, equal_nan=True)
    assert through.fitted_lr == own.fitted_lr
    assert through.settings == own.settings
    assert own.settings["weight_decay"] == 0.1
    assert list(tmp_path.iterdir()) == []


def test_a_module_without_an_optimizer_is_given_one(tmp_path):
    """A module without configure_optimizers trains with the trial's optimizer and `settings`."""
    recipe = calibrate(lit(tmp_path, Bare), trials=2, settings={"weight_decay": 0.5})
    assert recipe.settings["weight_decay"] == 0.5


@pytest.mark.parametrize("data", [loader, lambda: (loader(), loader(2)), Data])
@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`"
)
def test_lightnings_score_is_a_loss_of_data_held_out(tmp_path, data):
    """The score of a trial is the logged validation loss, or the loss on held-out training data."""
    make = lit(tmp_path, data=data)
    recipe = calibrate(make, trials=1)
    (net,) = (module.net for module in make.modules)
    rows = torch.cat(list(batches(2))) if data is not loader else held(loader())
    wanted = sum(loss_of(net, x).item() * len(x) for x in rows.split(8)) / len(rows)
    assert recipe.tensors["value"].tolist() == pytest.approx([wanted])


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step` but have no `val_dataloader`"
)
def test_a_tensor_can_be_a_loaders_data(tmp_path):
    """Rows can be held out of a tensor too, although its method `select` differs from that of a data set."""

    def rows():
        data = torch.cat(list(batches(4)))
        return torch.utils.data.DataLoader(data, batch_size=8)

    class Net(Scheduled):
        def training_step(self, batch, index):
            return super().training_step([batch], index)

    recipe = calibrate(lit(tmp_path, Net, data=rows), trials=1)
    assert np.isfinite(recipe.tensors["value"]).all()


def held(whole):
    """Return the tenth of a loader's rows that a trial holds out."""
    (data,) = whole.dataset.tensors
    chosen = random.Random(0).sample(range(len(data)), len(data) // 10)
    return data[sorted(chosen)]


def test_lightning_is_pruned(tmp_path, monkeypatch):
    """If a trial is stopped early, `fit` ends at that step."""
    make = lit(tmp_path)
    pruned(monkeypatch, 3)
    with pytest.raises(CalibrationError, match="stopped early"):
        calibrate(make, trials=2)
    assert [module.trainer.global_step for module in make.modules] == [3, 3]


# --- errors ------------------------------------------------------------------------------------------------

BAD = [
    (
        lambda folder: None,
        {},
        r"calibrate\(\) got a NoneType.*a function that takes a trial",
    ),
    (maker, {"score": "eval_loss"}, "score='eval_loss'"),
    (
        lambda folder: lambda trial: trial,
        {},
        "a generator function, but it returned a Trial",
    ),
    (
        lambda folder: lambda trial: (trial,),
        {},
        "a generator function, but it returned a tuple",
    ),
    (with_optimizer, {}, "already has an optimizer.*build a new trainer in every call"),
    (lambda folder: lit(folder, Own), {}, r"before it called trial\.optimizer"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD)
def test_bad_input_is_a_sentence(tmp_path, make, options, message):
    """If the function returns no trainer, or one that cannot be calibrated, an error says what to return."""
    with pytest.raises(RankAwareError, match=message):
        calibrate(make(tmp_path), **options)
