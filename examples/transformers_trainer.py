"""
transformers' Trainer
=====================

Call ``attach`` after you build the trainer. The weight decay, the betas and the schedule still come from the
trainer's arguments.
"""

import peft
import tiny
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import rankaware_optim as ra

config = peft.LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "v_proj"])
model = peft.get_peft_model(tiny.model(), config)
rows = tiny.tokenizer()(tiny.TEXTS)["input_ids"]
data = Dataset.from_dict({"input_ids": rows, "labels": rows})
args = TrainingArguments(
    "trainer-out",
    max_steps=4,
    weight_decay=0.01,
    lr_scheduler_type="cosine",
    logging_steps=1,
    report_to="none",
)

trainer = Trainer(model, args, train_dataset=data)
report = ra.attach(trainer, torch.optim.AdamW, lr=2e-4, tuned_at="r=16,alpha=32")
print(report)
trainer.train()
