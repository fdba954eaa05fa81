"""
Your own loop with PEFT
=======================

The learning rate was tuned at rank 16 and alpha 32. The optimizer converts this learning rate to rank 64.
"""

import peft
import tiny
import torch

import rankaware_optim as ra

torch.manual_seed(0)
config = peft.LoraConfig(r=64, lora_alpha=64, target_modules=["q_proj", "v_proj"])
model = peft.get_peft_model(tiny.model(), config)
rows = tiny.tokenizer()(tiny.TEXTS, return_tensors="pt")["input_ids"]

opt = ra.RankAwareOptimizer(model, torch.optim.AdamW, lr=2e-4, tuned_at="r=16,alpha=32")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=6)
print(opt.report())

# %%
# The loop does not change. The schedule sets the base learning rate, and each step multiplies it.

for batch in rows.split(8):
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    schedule.step()
    print(f"loss {loss.item():.3f}, base lr {opt.param_groups[0]['lr']:.2e}")
