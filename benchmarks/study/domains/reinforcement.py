"""Reinforcement learning with a verifiable reward: GRPO trains a character-level Llama that half knows addition.

A step has 16 prompts, with eight answers each, drawn at temperature 1. An answer's reward is one half of its share of
right digits, plus one half if all are right. Advantages are rewards standardised within a prompt. The score is minus
the accuracy at temperature 1 on fixed prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from . import Domain
from ._adapters import adapt
from ._assets import made_once
from ._llama import LAYERS
from ._pretraining import trained_on

# an answer has three digits, leading zeros included
DIGITS, CHARACTERS = (
    3,
    "0123456789+=",
)
PROMPTS, SAMPLES, STEPS, SCORED, PRETRAINING = 16, 8, 100, 512, 280


class Batch(NamedTuple):
    prompts: Tensor  # (prompts, 6): two numbers of two digits, + and =
    answers: Tensor  # (prompts, 3)
    generator: torch.Generator


def new_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=3,
        num_attention_heads=4,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    model = new_model()
    model.load_state_dict(made_once("llama-addition-v1", _pretrain))
    return adapt(model.requires_grad_(False), rank, alpha, init, seed, LAYERS)


def _pretrain() -> dict[str, Tensor]:
    """Supervised training until about a quarter of the answers are right: 280 steps of 64 sums, AdamW at 1e-3."""
    with seeded(0):
        model = new_model()
    return trained_on(model, sums(0, 64), _supervised, PRETRAINING)


def _supervised(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of the right answers."""
    read = torch.cat([batch.prompts, batch.answers[:, :-1]], dim=1)
    logits = model(read).logits[:, -DIGITS:]
    return F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())


def batches(seed: int, batch: int) -> Iterator[Batch]:
    """Endless batches of prompts for `batch` answers, `SAMPLES` answers to a prompt."""
    return sums(seed, batch // SAMPLES)


def sums(seed: int, count: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        a, b = torch.randint(100, (2, count), generator=generator)
        plus, equals = torch.full((count,), 10), torch.full((count,), 11)
        prompts = torch.stack([a // 10, a % 10, plus, b // 10, b % 10, equals], dim=1)
        total = a + b
        yield Batch(
            prompts,
            torch.stack([total // 100, total // 10 % 10, total % 10], dim=1),
            generator,
        )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Policy-gradient loss −mean(advantage × log p) of answers that the current model draws."""
    prompts = batch.prompts.repeat_interleave(SAMPLES, dim=0)
    drawn = sampled(
        model,
        batch.prompts,
        torch.arange(len(batch.prompts)).repeat_interleave(SAMPLES),
        batch.generator,
    )
    rewards = rewards_of(drawn, batch.answers.repeat_interleave(SAMPLES, dim=0)).view(
        -1, SAMPLES
    )
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (
        rewards.std(1, keepdim=True) + 1e-4
    )
    logits = model(torch.cat([prompts, drawn[:, :-1]], dim=1)).logits[:, -DIGITS:]
    chosen = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
    return -(advantages.view(-1, 1) * chosen).mean()


@torch.no_grad()
def sampled(
    model: Any, prompts: Tensor, which: Tensor, generator: torch.Generator
) -> Tensor:
    """Answers (n, 3), as character indices drawn at temperature 1.

    The model reads each prompt once, and then each character once. Characters are equally likely if the model's
    logits are not finite.

    Args:
        model: the causal language model.
        prompts: (prompts, 6) character indices.
        which: (n,) the row of `prompts` for each answer.
        generator: draws the characters.
    """
    read = model(prompts, use_cache=True)
    kept, drawn = read.past_key_values, [_drawn(read.logits[which, -1], generator)]
    kept.batch_select_indices(which)
    while len(drawn) < DIGITS:
        drawn.append(
            _drawn(
                model(drawn[-1], past_key_values=kept, use_cache=True).logits[:, -1],
                generator,
            )
        )
    return torch.cat(drawn, dim=1)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logits.softmax(-1).nan_to_num(1.0), 1, generator=generator)


def rewards_of(drawn: Tensor, answers: Tensor) -> Tensor:
    right = drawn == answers
    return right.float().mean(1) / 2 + right.all(1).float() / 2


@torch.no_grad()
def evaluate(model: Any) -> float:
    """Minus the share of right answers to 512 fixed prompts, four draws each; NaN if the logits are not finite."""
    batch = next(sums(1 << 20, SCORED))
    if not model(batch.prompts).logits.isfinite().all():
        return math.nan
    which = torch.arange(SCORED).repeat(4)
    drawn = sampled(model, batch.prompts, which, torch.Generator().manual_seed(1))
    return -float((drawn == batch.answers[which]).all(1).float().mean())


DOMAIN = Domain(
    "reinforcement",
    STEPS,
    (4, 16, 64, 128),
    build,
    batches,
    loss,
    evaluate,
    PROMPTS * SAMPLES,
    (176.12435233160622, 344.0),
    score="minus accuracy",
)
