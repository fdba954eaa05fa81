"""The digits at alpha = rank: the loop of recipes/efficientnet-lite0-digits.toml, and of the package's demo sweep."""

from __future__ import annotations

import copy
import re
from collections.abc import Generator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from study.domains._efficientnet import BATCH, LAYERS, pretrained
from study.domains.digits_vision import STEPS, digits, evaluate
from torch import Tensor, nn

from rankaware_optim import RankAwareOptimizer

CALIBRATED_RANKS, SEEDS = (4, 64), (0, 1)


def fit(
    model: nn.Module, opt: RankAwareOptimizer, seed: int
) -> Generator[Tensor, None, None]:
    """Train for `STEPS` steps at constant rates on random batches, drawn from `seed`."""
    images, labels, _, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.detach()


def build(rank: int | None) -> nn.Module:
    """Return EfficientNet-lite0 with a new classifier, with LoRA of alpha = rank or with the same
    layers trained whole.

    It is in eval mode, so that batch norm stays frozen, and channels last, which is faster. The
    global seed decides the draws.
    """
    import peft

    model = copy.deepcopy(pretrained())
    model.reset_classifier(10)
    model.eval()
    if rank is None:
        trained = re.compile(LAYERS.removesuffix("$") + r"\.weight$|^classifier")
        for name, param in model.named_parameters():
            param.requires_grad_(bool(trained.match(name)))
    else:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=LAYERS,
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(model, config).eval()
    to: Any = model.to  # whose stubs lack memory_format
    faster: nn.Module = to(memory_format=torch.channels_last)
    return faster


@cache
def untrained(seed: int) -> float:
    """Return the held-out loss of the network with its new classifier before training. It is equal
    for all ranks.
    """
    torch.manual_seed(seed)
    return evaluate(build(None))
