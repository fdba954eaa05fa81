"""torchtune's LoRA layers, seen and trained as its recipes train them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankaware_optim import (
    RankAwareOptimizer,
    Reference,
    inspect_model,
    rank_aware_param_groups,
)
from rankaware_optim.testing import check_convention

from ...helpers.oracle import check_initialize, oracle, output_of
from ...helpers.real_adapters import cases_of, read

peft = pytest.importorskip("torchtune.modules.peft", exc_type=ImportError)


by_name = pytest.mark.parametrize(
    "case", cases_of("torchtune"), ids=lambda case: case.name
)


@by_name
@pytest.mark.parametrize(("rank", "alpha"), [(2, 3.0), (4, 8.0)])
def test_a_layer_is_read_as_declared(case, rank, alpha):
    """Convention, rank, fans, scaling, init and the rest's kind are those of torchtune's own arguments."""
    assert read(case.make(rank, alpha)) == case.expected(rank, alpha)


@by_name
def test_a_layer_computes_and_trains_as_read(case):
    """The ones-probe moves the output by scaling × rank × fan-in, and reparametrised trainings agree."""
    found = check_convention(case.make, *case.inputs(), run=output_of)
    assert (found.probe is not None) is case.probed
    assert oracle(case.make, *case.inputs()) < 1e-9


@by_name
@pytest.mark.parametrize("init", ["A", "B"])
def test_a_layer_is_initialised(case, init):
    """`initialize` keeps every bit of the output, and the init is known after training."""
    check_initialize(case.make(4, 12), case.inputs(), init)


class Block(nn.Module):
    """Two adapted layers of different rank, frozen but for their adapters as torchtune's recipes do it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = peft.LoRALinear(16, 32, rank=4, alpha=8)
        self.down = peft.LoRALinear(32, 16, rank=8, alpha=8)
        peft.set_trainable_params(self, peft.get_adapter_params(self))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def test_the_layers_are_read_as_declared():
    """Rank, scaling, fan-in and init are those of torchtune's own arguments."""
    factors = {f.name: f for f in inspect_model(Block()).factors}
    seen = {
        name: (f.role, f.rank, f.scaling, f.fan_in, f.init)
        for name, f in factors.items()
    }
    assert seen == {
        "up.lora_a.weight": ("A", 4, 2.0, 16.0, "A"),
        "up.lora_b.weight": ("B", 4, 2.0, 16.0, "A"),
        "down.lora_a.weight": ("A", 8, 1.0, 32.0, "A"),
        "down.lora_b.weight": ("B", 8, 1.0, 32.0, "A"),
    }


def test_a_training_loop_of_a_few_steps():
    """A loop like torchtune's single-device recipe trains as the native class with our groups does."""
    losses = []
    for wrap in (True, False):
        model = Block()
        at = Reference(rank=8, alpha=8)
        if wrap:
            opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=at)
        else:
            opt = torch.optim.AdamW(
                rank_aware_param_groups(model, lr=1e-2, tuned_at=at)
            )
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
        curve = []
        for _ in range(8):
            loss = (model(x) - x).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
