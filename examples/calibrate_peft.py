"""
Calibrate a PEFT model
======================

This example runs short trials at two ranks. The resulting recipe gives a learning rate for any other rank.
"""

import peft
import tiny
import torch

import rankaware_optim as ra

rows = tiny.tokenizer()(tiny.TEXTS, return_tensors="pt")["input_ids"]


def train(trial):
    """Train a model at the rank of the trial, and yield the loss of each step."""
    config = peft.LoraConfig(
        r=trial.rank, lora_alpha=trial.rank, target_modules=["q_proj", "v_proj"]
    )
    torch.manual_seed(trial.seed)
    model = peft.get_peft_model(tiny.model(), config)
    opt = trial.optimizer(model, weight_decay=0.01)
    for _ in range(trial.steps):
        batch = rows[torch.randint(len(rows), (8,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        yield loss


recipe = ra.calibrate(train, torch.optim.AdamW, ranks=(1, 16), steps=20, batch=8)
print(recipe)

# %%
# Read the rate at a rank that was not tried.

print(recipe.at(rank=8))

# %%
# Train with the recipe. It replaces ``lr=`` and ``tuned_at=``.

config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
model = peft.get_peft_model(tiny.model(), config)
opt = ra.RankAwareOptimizer(model, torch.optim.AdamW, recipe=recipe)
print(opt.report())
