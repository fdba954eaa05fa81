"""
Calibrate all ranks through transformers' Trainer
=================================================

This example runs short trials at two ranks, and finds a learning rate for every rank. A function builds a new
trainer for each trial.
"""

import peft
import tiny
from transformers import Trainer, TrainingArguments

import rankaware_optim as ra

data = [
    {"input_ids": row, "labels": row}
    for row in tiny.tokenizer()(tiny.TEXTS)["input_ids"]
]


def make_trainer(trial: ra.Trial) -> Trainer:
    """Return an untrained trainer whose model has the rank of the trial."""
    config = peft.LoraConfig(
        r=trial.rank, lora_alpha=trial.rank, target_modules=["q_proj", "v_proj"]
    )
    args = TrainingArguments(
        "trainer-out", lr_scheduler_type="cosine", report_to="none", disable_tqdm=True
    )
    return Trainer(peft.get_peft_model(tiny.model(), config), args, train_dataset=data)


recipe = ra.calibrate(make_trainer, "adamw", ranks=(1, 16), steps=10)
print(recipe.at(rank=8))
