"""litgpt's LoRA linear layer, seen and trained."""

from __future__ import annotations

import pytest
import torch

from rankaware_optim import RankAwareOptimizer, Reference, inspect_model

lora = pytest.importorskip("litgpt.lora", exc_type=ImportError)


def layer(rank: int) -> torch.nn.Module:
    torch.manual_seed(0)
    made = lora.LoRALinear(16, 32, r=rank, lora_alpha=8)
    lora.mark_only_lora_as_trainable(made)
    return made


@pytest.mark.parametrize("rank", [4, 8])
def test_the_layer_is_read_as_declared(rank):
    """Rank, scaling, fan-in and init are those of litgpt's own arguments."""
    a, b = inspect_model(layer(rank)).factors
    assert (a.role, b.role) == ("A", "B")
    assert {(f.rank, f.scaling, f.fan_in, f.init) for f in (a, b)} == {(rank, 8 / rank, 16.0, "A")}


def test_it_trains_at_the_laws_rates():
    """A few steps lower the loss."""
    model = layer(4)
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-1, tuned_at=Reference(rank=16, alpha=8))
    x, y = torch.randn(8, 16), torch.randn(8, 32)
    losses = []
    for _ in range(10):
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
