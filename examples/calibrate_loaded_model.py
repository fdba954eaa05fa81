"""
Calibrate a model that is loaded once
=====================================

A large base is loaded once. Each trial adapts it at its rank, and takes its adapters off again, which leaves the base as
it was, to the last bit.
"""

import peft
import tiny
import torch

import rankaware_optim as ra

base = tiny.model()
rows = tiny.tokenizer()(tiny.TEXTS, return_tensors="pt")["input_ids"]


def train(trial):
    """Adapt the base at the trial's rank, train, and take the adapters off."""
    torch.manual_seed(trial.seed)
    config = peft.LoraConfig(
        r=trial.rank, lora_alpha=trial.rank, target_modules=["q_proj", "v_proj"]
    )
    model = peft.get_peft_model(base, config)
    try:
        opt = trial.optimizer(model, weight_decay=0.01)
        for _ in range(trial.steps):
            batch = rows[torch.randint(len(rows), (8,))]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
            yield loss
    finally:
        model.unload()


recipe = ra.calibrate(
    train, torch.optim.AdamW, ranks=(1, 16), steps=20, batch=8, name="tiny"
)
print(recipe.at(rank=8))
