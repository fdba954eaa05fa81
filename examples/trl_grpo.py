"""
TRL's GRPOTrainer
=================

Call ``attach`` after you build the trainer, because ``GRPOTrainer`` does not accept an optimizer class. The trainers
for DPO, KTO and RLOO work in the same way.
"""

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import rankaware_optim as ra

trainer = GRPOTrainer(
    tiny.model(),
    tiny.cats,  # rewards the number of cats
    args=GRPOConfig(
        "grpo-out",
        max_steps=2,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=6,
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=Dataset.from_dict({"prompt": tiny.TEXTS}),
    processing_class=tiny.tokenizer(),
    peft_config=LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "v_proj"]),
)
report = ra.attach(trainer, torch.optim.AdamW, lr=2e-5, tuned_at="r=16,alpha=32")
print(report)
trainer.train()
