"""
Calibrate all ranks through transformers' Trainer
=================================================

Short runs at two ranks give a learning rate for every rank. A function builds the trainer of each run.
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
    """Return an untrained trainer with a model at the trial's rank."""
    config = peft.LoraConfig(
        r=trial.rank, lora_alpha=trial.rank, target_modules=["q_proj", "v_proj"]
    )
    args = TrainingArguments(
        "trainer-out", lr_scheduler_type="cosine", report_to="none", disable_tqdm=True
    )
    return Trainer(peft.get_peft_model(tiny.model(), config), args, train_dataset=data)


recipe = ra.calibrate(make_trainer, "adamw", ranks=(1, 16), steps=10)
print(recipe.at(rank=8))
