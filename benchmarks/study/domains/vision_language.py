"""Vision-language: a small Llama, pretrained on the Brown corpus, learns to name emoji seen by EfficientNet-lite0.

EfficientNet's last feature map of a 64 × 64 picture has 2 × 2 places. A new linear layer, trained at a fixed rate,
turns them into four soft tokens before the caption. The pictures are Twemoji (Twitter and contributors, CC-BY 4.0) from
npm's emoji-datasource-twitter, and their names are the captions.
"""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from . import Domain
from ._adapters import adapt
from ._assets import Asset, made_once
from ._batches import drawn
from ._efficientnet import pretrained
from ._llama import LAYERS, WIDTH, WIDTHS, llama, tokenizer

EMOJI = Asset(
    "npm",
    "emoji-datasource-twitter@16.0.0",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
)
BATCH, LENGTH, STEPS, HELD_OUT, FEATURES, BEGIN, END = 8, 16, 100, 256, 1280, 1, 2


class Batch(NamedTuple):
    pictures: Tensor  # (n, 4, 1280)
    captions: Tensor  # (n, 17) token ids: begin, the name, end, zeros


class Captioner(nn.Module):
    """A Llama that reads four soft tokens from a picture, and then the caption's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(FEATURES, WIDTH)
        self.llama: Any = llama()

    def forward(self, pictures: Tensor, captions: Tensor) -> Tensor:
        words = self.llama.get_input_embeddings()(captions[:, :-1])
        logits: Tensor = self.llama(
            inputs_embeds=torch.cat([self.projector(pictures), words], dim=1)
        ).logits
        return logits[:, -words.shape[1] :]


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    with seeded(seed):
        model = Captioner()
    return adapt(
        model.requires_grad_(False),
        rank,
        alpha,
        init,
        seed,
        LAYERS,
        saved=["projector"],
    )


@cache
def examples() -> Batch:
    """Features and caption of every emoji, shuffled, always in the same order; made once."""
    made = made_once("emoji-features-v1", _read)
    return Batch(made["pictures"], made["captions"].long())


@torch.no_grad()
def _read() -> dict[str, Tensor]:
    from PIL import Image

    with tarfile.open(EMOJI.path()) as archive:
        wanted = [
            m
            for m in archive
            if m.name.startswith(("package/emoji.json", "package/img/twitter/64/"))
        ]
        files = {
            m.name.removeprefix("package/"): archive.extractfile(m).read()
            for m in wanted
        }  # type: ignore[union-attr]
    rows = [
        row
        for row in json.loads(files["emoji.json"])
        if f"img/twitter/64/{row['image']}" in files
    ]
    shown = [
        Image.open(io.BytesIO(files[f"img/twitter/64/{row['image']}"])).convert("RGBA")
        for row in rows
    ]
    whole = torch.stack([_on_white(image) for image in shown])
    network = copy.deepcopy(
        pretrained()
    ).eval()  # the caller's network keeps its mode and statistics
    maps = torch.cat([network.forward_features(part) for part in whole.split(64)])  # type: ignore[operator]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    captions = torch.stack([_caption(row["name"].lower()) for row in rows])
    return {
        "pictures": maps.flatten(2).transpose(1, 2)[order],
        "captions": captions.to(torch.int16)[order],
    }


def _on_white(image: Any) -> Tensor:
    from PIL import Image

    white = (
        Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        .convert("RGB")
        .resize((64, 64))
    )
    pixels = torch.frombuffer(bytearray(white.tobytes()), dtype=torch.uint8).view(
        64, 64, 3
    )
    return (pixels.permute(2, 0, 1).float() - 127) / 128


def _caption(name: str) -> Tensor:
    ids = [BEGIN, *tokenizer().encode(name).ids[: LENGTH - 1], END]
    return torch.tensor(ids + [0] * (LENGTH + 1 - len(ids)))


def batches(seed: int, batch: int) -> Iterator[Batch]:
    every = examples()
    for chosen in drawn(len(every.captions) - HELD_OUT, batch, seed):
        yield Batch(every.pictures[chosen], every.captions[chosen])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch.pictures, batch.captions)
    return F.cross_entropy(
        logits.flatten(0, 1), batch.captions[:, 1:].flatten(), ignore_index=0
    )


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    every = examples()
    return float(
        loss(model, Batch(every.pictures[-HELD_OUT:], every.captions[-HELD_OUT:]))
    )


RATES = {"*projector*": 1e-3}
SCORE = "nats a token of a caption, of which the picture is worth 0.02"
DOMAIN = Domain(
    "vision_language",
    STEPS,
    (4, 16, 64, 192),
    build,
    batches,
    loss,
    evaluate,
    BATCH,
    WIDTHS,
    RATES,
    score=SCORE,
)
