"""The line search of suggest_lr: the rate it finds, what it leaves behind, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rankaware_optim import InvalidReferenceError, Reference
from rankaware_optim.transfer import suggest_lr
from rankaware_optim.transfer._line_search import line_search

from ..helpers.models import PlainLoRA


def product(a: float, b: float) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([value])) for value in (a, b)]


@pytest.mark.parametrize(
    ("a", "b", "far", "found"),
    [
        (1.0, 0.0, 0.25, -2),  # t·(1 + t) = 1/4
        (0.0, 1.0, 0.25, -2),
        (1.0, 0.0, 2.0**-9, -9),
        (2.0, 2.0, 2.25**2, -2),
    ],
)
def test_the_best_octave_is_found(a: float, b: float, far: float, found: int) -> None:
    """Along the signs of both factors' gradients, the rate of the lowest loss is found."""
    weights = product(a, b)
    assert (
        line_search(weights, lambda: (weights[0] * weights[1] - far).square().sum())
        == found
    )


def test_a_step_that_diverges_is_not_chosen() -> None:
    """A rate after which the loss is no number counts as the worst."""
    weight = nn.Parameter(torch.tensor([1.0]))
    # the larger the step the lower, but no number beyond 1 - 2^-4
    found = line_search([weight], lambda: (weight - (1 - 2.0**-4)).sqrt().sum())
    assert found == -4


def test_noise_is_the_same_at_every_rate() -> None:
    """A model with dropout has the same search each time, and the random state stays."""
    torch.manual_seed(1)
    layer, x = nn.Linear(8, 1), torch.randn(4, 8)

    def loss() -> Tensor:
        return (nn.functional.dropout(layer(x), 0.5) - 3.0).square().mean()

    state = torch.get_rng_state()
    found = {line_search(list(layer.parameters()), loss) for _ in range(3)}
    assert len(found) == 1
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("calls", [0, 1, 5, math.inf])
def test_weights_and_gradients_are_left(calls: float) -> None:
    """Weights and gradients are as before, also after an error at any time."""
    weights, left = product(1.0, 0.0), calls
    weights[0].grad = torch.tensor([7.0])

    def loss() -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError("out of memory")
        return (weights[0] * weights[1] - 0.25).square().sum()

    if calls < math.inf:
        with pytest.raises(RuntimeError, match="out of memory"):
            line_search(weights, loss)
    else:
        line_search(weights, loss)
    assert [weight.item() for weight in weights] == [1.0, 0.0]
    assert (weights[0].grad.item(), weights[1].grad) == (7.0, None)


# --- suggest_lr with a loss -----------------------------------------------------------------------------------------


class Headed(nn.Module):
    """An adapted layer and a head that trains beside it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = PlainLoRA(nn.Linear(16, 16, bias=False), 4)
            self.head = nn.Linear(16, 1)
            self.x = torch.randn(32, 16)

    def loss(self) -> Tensor:
        return (self.head(self.layer(self.x)) - 1.0).square().mean()


def factors_of(model: Headed) -> list[nn.Parameter]:
    return [model.layer.lora_A, model.layer.lora_B]


@pytest.mark.parametrize("optimizer", ["adamw", "Lion"])
def test_the_rate_is_half_way_to_the_search(optimizer: str) -> None:
    """With a loss, rate and band move half the octaves from AdamW's rate to the search's, and heads keep still."""
    model = Headed()
    plain = suggest_lr(model, optimizer)
    given = suggest_lr(model, optimizer, loss=model.loss)
    found = line_search(factors_of(model), model.loss)
    half = (found - math.log2(suggest_lr(model).lr)) / 2
    for name in ("lr", "low", "high"):
        moved = math.log2(getattr(given, name) / getattr(plain, name))
        assert moved == pytest.approx(half)
    assert given.reference == plain.reference
    assert any("half way" in note for note in given.notes)


def test_a_loss_needs_a_model() -> None:
    """A loss beside a bare reference is refused with a sentence."""
    with pytest.raises(InvalidReferenceError, match="A loss belongs to a model"):
        suggest_lr(Reference(rank=16, alpha=32), loss=lambda: torch.ones(()))


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(factor: float) -> None:
    """A loss that is finite at no rate is refused, and the weights stay."""
    model = Headed()
    with pytest.raises(InvalidReferenceError, match="is not finite"):
        suggest_lr(model, loss=lambda: factor * model.loss())
    assert not model.layer.lora_B.any()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    """Weights, buffers and mode are those of before, also with a batch norm that trains."""
    model = nn.Sequential(PlainLoRA(nn.Linear(4, 4), 2), nn.BatchNorm1d(4)).train(
        training
    )
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    suggest_lr(model, loss=lambda: (model(x) - 1.0).square().mean())
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(each.training is training for each in model)


def test_a_loss_of_other_weights_is_refused() -> None:
    """A loss that does not depend on the adapters is refused."""
    model = Headed()
    with pytest.raises(InvalidReferenceError, match="no gradient in the adapters"):
        suggest_lr(model, loss=lambda: model.head.weight.square().sum())
