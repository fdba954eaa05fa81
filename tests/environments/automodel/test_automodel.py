"""NeMo Automodel's own adapters, optimizer and scheduler, with the lines that `rankaware convert` prints."""

from __future__ import annotations

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import nn

from rankaware_optim.cli import main

optim = pytest.importorskip(
    "nemo_automodel.components.optim.optimizer", exc_type=ImportError
)

WIDTH, STEPS = 16, 10


class Block(nn.Module):
    """Two layers that Automodel's LoRA replaces."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.config = None

    def forward(self, x):
        return self.q_proj(x) + self.v_proj(x).tanh()


def printed(target):
    """The configuration that our command prints for a target, read as YAML."""
    asked = [
        "convert",
        "2e-4",
        "--from",
        "r=16,alpha=16,fan_in=16",
        "--to",
        target,
        "--as",
        "automodel",
    ]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    return yaml.safe_load(done.output)


def adapted(settings):
    from nemo_automodel.components._peft.lora import (
        PeftConfig,
        apply_lora_to_linear_modules,
    )

    torch.manual_seed(0)
    model = Block()
    config = PeftConfig(target_modules=["*_proj"], use_triton=False, **settings)
    assert apply_lora_to_linear_modules(model, config) == 2
    return model


def scheduler(optimizers, style):
    """Automodel's schedule over ten steps, two of them warm-up."""
    from nemo_automodel.components.training.step_scheduler import StepScheduler

    data = torch.utils.data.DataLoader(torch.zeros(STEPS, 1), batch_size=1)
    steps = StepScheduler(1, 1, 1, data, num_epochs=1, preemption_signal=None)
    return optim.LRSchedulerConfig(lr_warmup_steps=2, lr_decay_style=style).build(
        optimizers, steps
    )[0]


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("target", "multipliers"),
    [
        ("r=64,alpha=64,fan_in=16", None),
        ("r=16,alpha=32,fan_in=16", {"A": 1.0, "B": 0.5}),
    ],
)
def test_the_scheduler_keeps_the_printed_multipliers(target, multipliers, style):
    """At every step a factor's rate over the schedule's is the law's, or exact where alpha alone changes."""
    said = printed(target)
    model = adapted(said["peft"])
    settings = said["optimizer"]
    (opt,) = optim.AdamWConfig(**settings).build(model)
    schedule = scheduler([opt], style)
    names = {id(p): name for name, p in model.named_parameters()}
    for _ in range(STEPS):
        base = schedule.get_lr({})
        for group in opt.param_groups:
            role = {names[id(p)].split(".")[-2][-1] for p in group["params"]}
            assert len(role) == 1
            (role,) = role
            wanted = law(target) if multipliers is None else multipliers[role]
            assert group["lr"] == pytest.approx(base * wanted, rel=1e-5)
            if multipliers is not None:  # lr × weight_decay stays
                assert group["lr"] * group["weight_decay"] == pytest.approx(
                    base * 0.01, rel=1e-5
                )
        model(torch.randn(4, WIDTH)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        schedule.step(1)
    assert {group["lr_mult"] for group in opt.param_groups} != {1.0}


def law(target):
    """What our own optimizer gives the same factors."""
    import rankaware_optim as ra

    return ra.convert_lr(1.0, from_="r=16,alpha=16,fan_in=16", to=target).lr
