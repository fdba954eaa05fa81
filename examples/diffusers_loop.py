"""
The loop of diffusers' text-to-image scripts
============================================

This example trains a U-Net with adapters of rank 16. ``RankAwareOptimizer`` replaces the AdamW of diffusers' scripts.
"""

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig

import rankaware_optim as ra

torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)
unet.requires_grad_(False)
unet.add_adapter(
    LoraConfig(r=16, lora_alpha=16, target_modules=["to_k", "to_q", "to_v", "to_out.0"])
)

# the scripts have torch.optim.AdamW(lora_layers, lr=1e-4), tuned at their default of rank 4
opt = ra.RankAwareOptimizer(unet, torch.optim.AdamW, lr=1e-4, tuned_at="r=4,alpha=4")
print(opt.report())
schedule = get_scheduler(
    "cosine", optimizer=opt, num_warmup_steps=1, num_training_steps=4
)
noises = DDPMScheduler(num_train_timesteps=100)

for _ in range(4):
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    noise, times = torch.randn_like(latents), torch.randint(0, 100, (2,))
    predicted = unet(
        noises.add_noise(latents, noise, times), times, encoder_hidden_states=text
    ).sample
    loss = torch.nn.functional.mse_loss(predicted, noise)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    opt.step()
    schedule.step()
    opt.zero_grad()
    print(f"loss {loss.item():.3f}, base lr {opt.param_groups[0]['lr']:.2e}")
