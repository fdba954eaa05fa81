"""litgpt's LoRA layers, seen and trained."""

from __future__ import annotations

import pytest
import torch

from rankaware_optim import RankAwareOptimizer, Reference
from rankaware_optim.testing import check_convention

from ...helpers.oracle import check_initialize, oracle, output_of
from ...helpers.real_adapters import cases_of, read

lora = pytest.importorskip("litgpt.lora", exc_type=ImportError)


def layer(rank: int) -> torch.nn.Module:
    torch.manual_seed(0)
    made = lora.LoRALinear(16, 32, r=rank, lora_alpha=8)
    lora.mark_only_lora_as_trainable(made)
    return made


by_name = pytest.mark.parametrize(
    "case", cases_of("litgpt"), ids=lambda case: case.name
)


@by_name
@pytest.mark.parametrize(("rank", "alpha"), [(2, 3.0), (4, 8.0)])
def test_a_layer_is_read_as_declared(case, rank, alpha):
    """Convention, rank, fans, scaling, init and the rest's kind are those of litgpt's own arguments."""
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


def test_it_trains_at_the_laws_rates():
    """A few steps lower the loss."""
    model = layer(4)
    opt = RankAwareOptimizer(
        model, torch.optim.AdamW, lr=1e-1, tuned_at=Reference(rank=16, alpha=8)
    )
    x, y = torch.randn(8, 16), torch.randn(8, 32)
    losses = []
    for _ in range(10):
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
