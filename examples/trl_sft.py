"""
TRL's SFTTrainer
================

Call ``attach`` after you build the trainer, and before you call ``train()``.
"""

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import rankaware_optim as ra

trainer = SFTTrainer(
    tiny.model(),
    SFTConfig(
        "sft-out",
        max_steps=4,
        max_length=32,
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({"text": tiny.TEXTS}),
    processing_class=tiny.tokenizer(),
    peft_config=LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "v_proj"]),
)
report = ra.attach(trainer, torch.optim.AdamW, lr=2e-4, tuned_at="r=16,alpha=32")
print(report)
trainer.train()
print(trainer.optimizer.report())  # after the schedule's end, so the rates are 0
