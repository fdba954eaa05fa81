"""Audio: a causal 1-D convolution over English speech learns the waveforms of instruments.

It hears eight samples at a time and says the next eight, each as one of 64 levels. Speech is Debian's
`asterisk-core-sounds-en-wav` (CC BY-SA 3.0), instruments are its `timgm6mb-soundfont` (GPL 2). The network is pretrained
on its first use, with a fixed seed (under a minute), and kept in the cache.
"""

from __future__ import annotations

import io
import struct
import wave
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankaware_optim.calibration import seeded

from . import Domain
from ._adapters import adapt
from ._assets import Asset, debian_files, made_once
from ._batches import drawn
from ._pretraining import trained_on

SPEECH = Asset(
    "debian",
    "asterisk-core-sounds-en-wav=1.6.1-1",
    "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
)
INSTRUMENTS = Asset(
    "debian",
    "timgm6mb-soundfont=1.3-5",
    "034abdfb296d9353433513dad5dbdcab46425ee6008fc02fe7039b46e75edc54",
)
# samples a frame and a window, levels of a sample, channels
FRAME, WINDOW, LEVELS, WIDTH, KERNEL = 8, 1024, 64, 64, 5
BATCH, PRETRAINING, SILENT = 8, 600, 1e-3
HELD_OUT, EVERY = 256, 8  # windows scored, of every eighth
LAYERS = r"blocks\.\d+\.(wide|narrow)$"


class Block(nn.Module):
    """A convolution over this frame and the four before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Conv1d(WIDTH, 2 * WIDTH, KERNEL)
        self.narrow = nn.Conv1d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x.transpose(1, 2)).transpose(1, 2)
        before = F.pad(normed, (KERNEL - 1, 0))
        out: Tensor = x + self.narrow(F.silu(self.wide(before)))
        return out


class Waveform(nn.Module):
    """From windows (n, WINDOW) to logits (n, LEVELS, FRAME, frames) of the frame after each (230,000 parameters)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, WIDTH, FRAME, FRAME)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.leave = nn.Conv1d(WIDTH, LEVELS * FRAME, 1)

    def forward(self, windows: Tensor) -> Tensor:
        x = self.enter(windows[:, None])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.leave(x).unflatten(1, (LEVELS, FRAME))
        return logits


def build(rank: int | None, alpha: float, init: str, seed: int) -> nn.Module:
    model = Waveform()
    model.load_state_dict(weights())
    return adapt(model.requires_grad_(False), rank, alpha, init, seed, LAYERS)


def weights() -> dict[str, Tensor]:
    return made_once("waveform-speech-v1", _pretrained)


def batches(seed: int, batch: int) -> Iterator[Tensor]:
    trained, _ = split()
    for chosen in drawn(len(trained), batch, seed):
        yield trained[chosen]


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Cross-entropy of each frame but the first, nats a sample."""
    frames = levels(windows).unflatten(1, (-1, FRAME)).transpose(1, 2)
    return F.cross_entropy(model(windows)[..., :-1], frames[..., 1:])


@torch.no_grad()
def evaluate(model: nn.Module) -> float:
    _, held_out = split()
    return float(loss(model, held_out[:HELD_OUT]))


def levels(samples: Tensor) -> Tensor:
    """The level of each sample, on a logarithmic scale: mu-law, with as many values as levels."""
    mu = LEVELS - 1
    louder = (
        samples.sign()
        * torch.log1p(mu * samples.abs())
        / torch.log1p(torch.tensor(float(mu)))
    )
    return ((louder + 1) / 2 * mu).round().long()


@cache
def split() -> tuple[Tensor, Tensor]:
    """Windows of instruments, to train on and held out, shuffled with a fixed seed."""
    windows = made_once("windows-instruments-v1", _instruments)["windows"]
    held_out = torch.arange(len(windows)) % EVERY == EVERY - 1
    order = torch.randperm(
        int(held_out.sum()), generator=torch.Generator().manual_seed(0)
    )
    return windows[~held_out], windows[held_out][order]


def windows_of(samples: Tensor) -> Tensor:
    """Windows (n, WINDOW) of a waveform in (-1, 1), without silent ones, each with a peak of 1."""
    cut = samples[: len(samples) // WINDOW * WINDOW].view(-1, WINDOW)
    heard = cut[cut.std(1) > SILENT]
    return heard / heard.abs().amax(1, keepdim=True)


def _instruments() -> dict[str, Tensor]:
    """The samples of a SoundFont: all that its chunk `smpl` holds, signed integers of two bytes."""
    (file,) = debian_files(INSTRUMENTS, ".sf2")
    start = file.index(b"smpl") + 8
    (size,) = struct.unpack("<I", file[start - 4 : start])
    return {"windows": windows_of(_decoded(file[start : start + size]))}


def _speech() -> Tensor:
    spoken = []
    for file in debian_files(SPEECH, ".wav"):
        with wave.open(io.BytesIO(file)) as read:
            spoken.append(_decoded(read.readframes(read.getnframes())))
    return windows_of(torch.cat(spoken))


def _decoded(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.int16).float() / 2**15


def _pretrained() -> dict[str, Tensor]:
    """The network's weights after 600 steps of AdamW at 1e-3 on English speech."""
    with seeded(0):
        model = Waveform()
    windows = _speech()
    chosen = (windows[which] for which in drawn(len(windows), 4 * BATCH, 0))
    return trained_on(model, chosen, loss, PRETRAINING)


DOMAIN = Domain(
    "audio",
    60,
    (4, 16, 64),
    build,
    batches,
    loss,
    evaluate,
    BATCH,
    (288.0, 320.0),
    score="nats a sample",
)
