"""What real trainers know of their run: steps, batch, task, optimizer and their own learning rate, which is judged."""

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
    llama,
    plain,
    random_states,
    sayings,
    tokens,
    transformers,
)

pytestmark = QUIET
ONE_RANK = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}


def trainer(folder, **own):
    """A Trainer of 24 rows, two a batch, whose adapters have one rank."""
    usual = {"max_steps": -1, "learning_rate": 3e-4}
    args = arguments(folder, **{**usual, **own})
    return transformers.Trainer(llama(**ONE_RANK), args, train_dataset=tokens())


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from sayings().to_list()


# 24 rows: arguments, and the steps and the batch of the run
RUNS = [
    ({"num_train_epochs": 3}, 36, 2),
    ({"num_train_epochs": 3, "gradient_accumulation_steps": 5}, 9, 10),
    ({"num_train_epochs": 0.5, "per_device_train_batch_size": 4}, 3, 4),
    ({"max_steps": 7}, 7, 2),
]


@pytest.mark.parametrize(("own", "steps", "batch"), RUNS)
def test_steps_and_batch_are_those_of_the_run(tmp_path, own, steps, batch):
    """They are what train() then counts, and looking at them changes nothing."""
    made = trainer(tmp_path, **own)
    before, loaders = random_states(), [*made.accelerator._dataloaders]
    known = trainer_of(made)
    assert (known.known_steps(), known.batch) == (steps, batch)
    assert random_states() == before
    assert made.accelerator._dataloaders == loaders
    made.train()
    assert made.state.global_step == steps


def test_a_suggestion_is_for_the_trainers_run(tmp_path):
    """Steps, model and optimizer are read; what was read is a note, and what is passed goes before it."""
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
    """A stream in Lightning has no length: the suggestion is that of about 780 steps, and a note asks for steps=."""
    made, module, _ = lit(Module(), tmp_path, torch.zeros(8, 16))
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    found = ra.suggest_lr((made, module, loader))
    assert found == ra.suggest_lr(module)
    assert any(
        "unknown number of steps" in n and "Pass steps=" in n for n in found.notes
    )


def test_lightnings_steps_and_rate_are_read_without_a_run(tmp_path):
    """Epochs, batches and accumulation give the steps, self.lr the rate, and no run is begun."""
    made = lit(Module(lr=1e-4), tmp_path, torch.zeros(36, 16))
    known = trainer_of(made)
    assert (known.known_steps(), known.batch) == (3 * math.ceil(36 / 8), 8)
    assert known.steps() == known.known_steps()
    assert (known.own_rate().lr, known.own_rate().is_default) == (1e-4, False)
    assert "Your lr=0.0001" in ra.suggest_lr(made).notes[0]


def test_a_dpo_trainer_is_recognised(tmp_path):
    """For LoRA in DPO no published rate is known, which the error says, unless another task is named."""
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
    """By the suggestion's first note and by the last lines of a search; a default is called one."""
    made = trainer(tmp_path, learning_rate=lr, num_train_epochs=2)
    assert ra.suggest_lr(made).notes[0].startswith(words)
    ra.calibrate(made, "adamw", steps=6, trials=2)
    said = capfd.readouterr().err.splitlines()
    verdict = [line for line in said if line.startswith(words)]
    assert len(verdict) == 1
    assert "too low" in verdict[0]
    assert made.args.learning_rate == lr


def test_a_rate_that_is_passed_is_judged(tmp_path, capfd):
    """lr= goes before the trainer's own rate; it is no rate to search, and an impossible one is an error at once."""
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
    """Without tuned_at= the report compares the rate with the suggestion's interval; a tuned one is not compared."""
    made = trainer(tmp_path)
    report = ra.attach(made, "adamw", lr=lr)
    band = ra.suggest_lr(made).band
    assert f"is {where} the 90 % interval" in report.notes[-1]
    assert band in report.notes[-1]
    tuned = ra.attach(trainer(tmp_path), "adamw", lr=lr, tuned_at="r=16,alpha=16")
    assert "ra.suggest_lr" not in str(tuned.notes)


def test_the_names_in_the_log_are_explained_once(tmp_path, capfd):
    """At the start of a run whose rates differ from the base rate one line says which of the logged ones train."""
    made = plain(llama(), tmp_path, max_steps=2)
    ra.attach(made, "adamw", lr=1e-3, tuned_at="r=16,alpha=16")
    made.train()
    said = [
        line for line in capfd.readouterr().err.splitlines() if "in the logs" in line
    ]
    assert len(said) == 1
    assert said[0].endswith("lr/r4, lr/r8")
