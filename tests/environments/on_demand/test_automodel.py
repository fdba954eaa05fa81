"""Tests of NeMo Automodel's adapters, optimizer and scheduler with the lines that `rankaware convert` prints."""

from __future__ import annotations

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

import rankaware_optim as ra
from rankaware_optim.cli import main

optim = pytest.importorskip(
    "nemo_automodel.components.optim.optimizer", exc_type=ImportError
)

WIDTH, STEPS = 16, 10


class Block(nn.Module):
    """A model with two layers that Automodel replaces by LoRA layers."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.config = None

    def forward(self, x):
        return self.q_proj(x) + self.v_proj(x).tanh()


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
def test_automodel_trains_at_the_printed_rate(style):
    """A and B have the printed rank and alpha, and the schedule peaks at the printed learning rate."""
    from nemo_automodel.components._peft.lora import (
        PeftConfig,
        apply_lora_to_linear_modules,
    )
    from nemo_automodel.components.training.step_scheduler import StepScheduler

    to = "r=64,alpha=16,fan_in=16"
    words = ["--from", "r=16,alpha=16", "--to", to, "--as", "automodel"]
    lines = yaml.safe_load(CliRunner().invoke(main, ["convert", "2e-4", *words]).output)
    torch.manual_seed(0)
    model = Block()
    config = PeftConfig(target_modules=["*_proj"], use_triton=False, **lines["peft"])
    assert apply_lora_to_linear_modules(model, config) == 2
    assert {(f.rank, f.scaling) for f in ra.inspect_model(model).factors} == {
        (64, 0.25)
    }

    (opt,) = optim.AdamWConfig(**lines["optimizer"]).build(model)
    data = torch.utils.data.DataLoader(torch.zeros(STEPS, 1), batch_size=1)
    steps = StepScheduler(1, 1, 1, data, num_epochs=1, preemption_signal=None)
    (schedule,) = optim.LRSchedulerConfig(
        lr_warmup_steps=2, lr_decay_style=style
    ).build([opt], steps)
    rates = []
    for _ in range(STEPS):
        (rate,) = {group["lr"] for group in opt.param_groups}
        rates.append(rate)
        model(torch.randn(4, WIDTH)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        schedule.step(1)
    lr = ra.convert_lr(2e-4, from_="r=16,alpha=16", to=to).lr
    assert max(rates) == pytest.approx(lr, rel=1e-3)
