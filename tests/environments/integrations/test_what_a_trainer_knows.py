"""Tests of the facts that are read from real trainers: steps, batch, task, optimizer and learning rate."""

from __future__ import annotations

import math

import pytest
import torch

import rankaware_optim as ra
from rankaware_optim import LawError
from rankaware_optim.trainers import trainer_of

from .test_put_back import Module, lit
from .test_trainers import of_trl
from .trainers import (
    QUIET,
    arguments,
    lightning,
    llama,
    plain,
    random_states,
    sayings,
    tokens,
    transformers,
)

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*number of training batches"),
]
ONE_RANK = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}


def trainer(folder, **own):
    """Return a Trainer with 24 rows in batches of 2, whose adapters have one rank."""
    usual = {"max_steps": -1, "learning_rate": 3e-4}
    args = arguments(folder, **{**usual, **own})
    return transformers.Trainer(llama(**ONE_RANK), args, train_dataset=tokens())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from sayings().to_list()


# a Trainer's arguments, and the steps and the batch size of its run on 24 rows
RUNS = [
    ({"num_train_epochs": 3}, 36, 2),
    ({"num_train_epochs": 3, "gradient_accumulation_steps": 5}, 9, 10),
    ({"num_train_epochs": 0.5, "per_device_train_batch_size": 4}, 3, 4),
    ({"max_steps": 7}, 7, 2),
]


@pytest.mark.parametrize(("own", "steps", "batch"), RUNS)
def test_steps_and_batch_are_those_of_the_run(tmp_path, own, steps, batch):
    """The known steps are those that train() then runs, and reading them changes nothing."""
    made = trainer(tmp_path, **own)
    before, loaders = random_states(), [*made.accelerator._dataloaders]
    known = trainer_of(made)
    assert (known.known_steps(), known.batch) == (steps, batch)
    assert random_states() == before
    assert made.accelerator._dataloaders == loaders
    made.train()
    assert made.state.global_step == steps


def test_a_suggestion_is_for_the_trainers_run(tmp_path):
    """suggest_lr reads steps, model and optimizer from a trainer, and an argument overrides what it read."""
    made = trainer(tmp_path, num_train_epochs=100)
    found = ra.suggest_lr(made)
    assert found == ra.suggest_lr(made.model, steps=1200)
    assert found < ra.suggest_lr(made.model)
    assert "From the trainer: 1,200 steps, batch 2, weights in float32." in found.notes
    assert ra.suggest_lr(made, steps=100) == ra.suggest_lr(made.model, steps=100)
    lion = trainer(tmp_path, optim="lion_32bit")
    kind = trainer_of(lion).own_class()
    if kind is not None:  # bitsandbytes is installed
        assert ra.suggest_lr(lion) == ra.suggest_lr(made.model, kind, steps=36)


def test_a_run_without_a_length_is_said(tmp_path):
    """For a stream in Lightning the number of steps is unknown, and a note asks for steps=."""
    made, module, _ = lit(Module(), tmp_path, torch.zeros(8, 16))
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    found = ra.suggest_lr((made, module, loader))
    assert found == ra.suggest_lr(module)
    assert any(
        "unknown number of steps" in n and "Pass steps=" in n for n in found.notes
    )


def test_lightnings_steps_and_rate_are_read_without_a_run(tmp_path):
    """Without a run, Lightning's epochs and batches give the steps, and self.lr gives the learning rate."""
    made = lit(Module(lr=1e-4), tmp_path, torch.zeros(36, 16))
    known = trainer_of(made)
    assert (known.known_steps(), known.batch) == (3 * math.ceil(36 / 8), 8)
    assert known.steps() == known.known_steps()
    assert (known.own_rate().lr, known.own_rate().is_default) == (1e-4, False)
    assert "Your lr=0.0001" in ra.suggest_lr(made).notes[0]


def test_a_dpo_trainer_is_recognised(tmp_path):
    """For LoRA in DPO no learning rate is published, so suggest_lr raises an error unless another
    task is passed.
    """
    made = of_trl("DPO", llama(), tmp_path)
    with pytest.raises(LawError, match=r"DPO.*[Cc]alibrate"):
        ra.suggest_lr(made)
    assert ra.suggest_lr(made, task="other") > 0
    assert trainer_of(of_trl("GRPO", llama(), tmp_path)).task == "rl"


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (5e-5, "The default learning_rate=5e-05, which nobody tuned, is"),
        (2e-5, "Your learning_rate=2e-05 is about"),
    ],
)
def test_the_trainers_own_rate_is_judged(tmp_path, capfd, lr, words):
    """suggest_lr and calibrate both judge the trainer's own learning rate, and say if it is a default."""
    made = trainer(tmp_path, learning_rate=lr, num_train_epochs=2)
    assert ra.suggest_lr(made).notes[0].startswith(words)
    ra.calibrate(made, "adamw", steps=6, trials=2)
    said = capfd.readouterr().err.splitlines()
    verdict = [line for line in said if line.startswith(words)]
    assert len(verdict) == 1
    assert "too low" in verdict[0]
    assert made.args.learning_rate == lr


def test_a_rate_that_is_passed_is_judged(tmp_path, capfd):
    """calibrate judges the learning rate passed as lr= instead of the trainer's, and an impossible
    one is an error.
    """
    options = {"steps": 6, "trials": 2, "target_steps": 12}
    first = ra.calibrate(trainer(tmp_path), "adamw", progress=False, **options)
    recipe = ra.calibrate(trainer(tmp_path), "adamw", lr=first.lr, **options)
    assert recipe.fitted_lr == first.fitted_lr
    said = capfd.readouterr().err
    assert f"Your lr={first.lr:.3g} is as good as" in said
    assert "learning_rate=" not in said
    for wrong in (0.0, -1e-4, math.nan, "fast"):
        with pytest.raises(ra.RankAwareError, match="lr is"):
            ra.calibrate(trainer(tmp_path), "adamw", lr=wrong, **options)


@pytest.mark.parametrize(("lr", "where"), [(3e-3, "inside"), (1e-9, "outside")])
def test_attach_says_where_a_rate_lies(tmp_path, lr, where):
    """Without tuned_at=, the report of attach says whether lr= lies inside the suggestion's interval."""
    made = trainer(tmp_path)
    report = ra.attach(made, "adamw", lr=lr)
    band = ra.suggest_lr(made).band
    assert f"is {where} the 90 % interval" in report.notes[-1]
    assert band in report.notes[-1]
    tuned = ra.attach(trainer(tmp_path), "adamw", lr=lr, tuned_at="r=16,alpha=16")
    assert "ra.suggest_lr" not in str(tuned.notes)


def test_the_names_in_the_log_are_explained_once(tmp_path, capfd):
    """If learning rates differ from the base, one line at the start of the run names those in the
    logs that train.
    """
    made = plain(llama(), tmp_path, max_steps=2)
    ra.attach(made, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
    made.train()
    said = [
        line for line in capfd.readouterr().err.splitlines() if "in the logs" in line
    ]
    assert len(said) == 1
    assert said[0].endswith("lr/r4, lr/r8")


# --- Lightning ------------------------------------------------------------------------------------------------------

# limits of a trainer on 5 batches, and the steps of its run
LIMITS = [
    ({"max_epochs": 2, "limit_train_batches": 3}, 6),
    ({"max_epochs": 2, "limit_train_batches": 0.4}, 4),
    ({"max_epochs": 3, "accumulate_grad_batches": 2}, 9),
    ({"max_epochs": 3, "max_steps": 7}, 7),
    ({"max_epochs": -1, "max_steps": 7}, 7),
]


@pytest.mark.parametrize(("limits", "steps"), LIMITS)
def test_lightnings_limits_are_counted(tmp_path, limits, steps):
    """Lightning's limits on batches, epochs and steps count towards the known steps as they do in a run."""
    usual = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    made = lightning.Trainer(default_root_dir=tmp_path, **usual, **quiet, **limits)
    data = torch.utils.data.TensorDataset(torch.zeros(40, 16))
    pair = made, Module(), torch.utils.data.DataLoader(data, batch_size=8)
    assert trainer_of(pair).known_steps() == steps
    assert trainer_of(pair).steps() == steps


def test_a_module_needs_a_learning_rate(tmp_path):
    """attach to a Lightning module without lr= and recipe= raises an error."""
    with pytest.raises(ra.OptimizerError, match=r"without a learning rate.*lr="):
        ra.attach(lit(Module(), tmp_path, torch.zeros(8, 16)), "adamw")


@pytest.mark.filterwarnings("ignore:Recipe .* was made with weight_decay")
def test_a_module_gets_the_settings_of_a_recipe(tmp_path):
    """A Lightning module without an optimizer trains with the recipe's settings, unless others are passed."""
    made = lit(Bare(), tmp_path, torch.randn(64, 16))
    options = {"steps": 6, "trials": 1, "progress": False}
    recipe = ra.calibrate(made, "adamw", settings={"weight_decay": 0.25}, **options)
    for own, decay in (({}, 0.25), ({"weight_decay": 0.5}, 0.5)):
        module = Bare()
        ra.attach((made[0], module), "adamw", recipe=recipe, **own)
        assert module.configure_optimizers().defaults["weight_decay"] == decay


class Bare(Module):
    """A module that configures no optimizer."""

    configure_optimizers = lightning.LightningModule.configure_optimizers


# --- what is known and what is not ----------------------------------------------------------------------------------


def test_a_rate_of_the_trainers_own_class_is_its_own(tmp_path):
    """If optimizer_cls_and_kwargs has a learning rate, suggest_lr judges this one, because it would train."""
    route = {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 7e-4})}
    known = trainer_of(plain(llama(), tmp_path, route=route, learning_rate=5e-5))
    assert known.own_rate() == ("lr", 7e-4, False)
    assert known.own_class() is torch.optim.AdamW


def test_the_dtype_is_that_of_most_weights_that_train(tmp_path):
    """The dtype of the run is that of most trainable weights. Frozen weights do not count."""
    model = llama()
    for param in model.parameters():
        param.data = param.data.bfloat16() if param.requires_grad else param.data
    assert trainer_of(plain(model, tmp_path)).dtype == torch.bfloat16
    model.requires_grad_(False)
    assert trainer_of(plain(model, tmp_path)).dtype is None


def test_attach_says_nothing_where_nothing_is_suggested(tmp_path):
    """For LoRA in DPO no learning rate is suggested, so attach works and its report has no note about one."""
    made = of_trl("DPO", llama(), tmp_path)
    report = ra.attach(made, "adamw", lr=1e-5)
    assert "ra.suggest_lr" not in str(report.notes)


def test_equal_rates_need_no_explanation(tmp_path, capfd):
    """If every learning rate equals the base, no line about the names in the logs is printed."""
    made = trainer(tmp_path, max_steps=1)
    ra.attach(made, "adamw")
    made.train()
    assert "in the logs" not in capfd.readouterr().err


def test_a_loss_that_is_not_a_number_ends_a_trial(tmp_path):
    """A trial ends as diverged if its loss is nan, which Trainer itself would not log."""
    made = trainer(tmp_path, num_train_epochs=2)
    inner, steps = made.compute_loss, []

    def compute_loss(*args, **kwargs):
        steps.append(1)
        loss = inner(*args, **kwargs)
        return loss * math.nan if len(steps) == 4 else loss

    made.compute_loss = compute_loss
    recipe = ra.calibrate(made, "adamw", steps=6, trials=2, progress=False)
    assert recipe.tensors["diverged"].tolist() == [True, False]
    assert recipe.tensors["steps"].tolist() == [4, 6]
