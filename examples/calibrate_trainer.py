"""
Calibrate an existing trainer
=============================

Four short trials find the learning rate for a transformers Trainer. After the trials, the trainer is in the same
state as before. The numbers are small so that the example runs in seconds. Without ``steps=``, each trial has a
quarter of the steps of the run.
"""

import peft
import tiny
from transformers import Trainer, TrainingArguments

import rankaware_optim as ra

data = [
    {"input_ids": row, "labels": row}
    for row in tiny.tokenizer()(tiny.TEXTS)["input_ids"]
]
config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
args = TrainingArguments(
    "trainer-out",
    max_steps=80,
    lr_scheduler_type="cosine",
    report_to="none",
    disable_tqdm=True,
)
model = peft.get_peft_model(tiny.model(), config)
trainer = Trainer(model, args, train_dataset=data)

recipe = ra.calibrate(trainer, "adamw", steps=20)
print(recipe.at(rank=8))
ra.attach(trainer, recipe=recipe)
trainer.train()
