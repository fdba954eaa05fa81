"""
Calibrate TRL's GRPOTrainer
===========================

The loss of GRPO is always about zero, so the trials are compared by the reward that the trainer logs. If all trials
have the same reward, the recipe contains the learning rate from ``suggest_lr``, and a note tells you so.
"""

import peft
import tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import rankaware_optim as ra

args = GRPOConfig(
    "grpo-out",
    max_steps=40,
    num_generations=4,
    per_device_train_batch_size=4,
    max_completion_length=6,
    report_to="none",
    disable_tqdm=True,
    bf16=False,
)
config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
trainer = GRPOTrainer(
    peft.get_peft_model(tiny.model(), config),
    tiny.cats,  # rewards the number of cats
    args=args,
    train_dataset=Dataset.from_dict({"prompt": tiny.TEXTS}),
    processing_class=tiny.tokenizer(),
)

# without steps= a trial has a quarter of the run's steps, 100 at least
recipe = ra.calibrate(trainer, "adamw", steps=10)
print(recipe.at(rank=8))
ra.attach(trainer, recipe=recipe)
trainer.train()
