"""
Calibrate through TRL's GRPOTrainer
===================================

Its loss is about zero by construction, so a run's value is minus the reward that it logs.
"""

import peft
import tiny
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import rankaware_optim as ra


def cats(completions: list[str], **_: object) -> list[float]:
    """Reward the number of cats."""
    return [float(text.count("cat")) for text in completions]


def make_trainer(trial: ra.Trial) -> GRPOTrainer:
    """Return an untrained trainer with a model at the trial's rank."""
    args = GRPOConfig(
        "grpo-out",
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=6,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
    )
    config = peft.LoraConfig(
        r=trial.rank, lora_alpha=trial.rank, target_modules=["q_proj", "v_proj"]
    )
    return GRPOTrainer(
        peft.get_peft_model(tiny.model(), config),
        cats,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": tiny.TEXTS}),
        processing_class=tiny.tokenizer(),
    )


recipe = ra.calibrate_trainer(
    make_trainer, torch.optim.AdamW, ranks=(1, 16), steps=10, name="grpo"
)
print(recipe.at(rank=8))
