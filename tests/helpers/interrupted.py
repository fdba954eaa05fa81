"""A process that calibrates in place, again and again, while another sends it Ctrl-C: is the model as it was?

Each round it says "go", calibrates until it is interrupted or done, and says how that ended and what differs.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress

import torch
from torch import nn
from torch.optim import AdamW

import rankaware_optim as ra

from .fingerprint import changed, fingerprint
from .models import PlainLoRA


def build() -> nn.Module:
    """Adapters, a trained head, BatchNorm's buffers, dropout, a found gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(
        PlainLoRA(nn.Linear(16, 16), 4),
        nn.BatchNorm1d(16),
        nn.Dropout(0.1),
        PlainLoRA(nn.Linear(16, 16), 4),
        nn.Linear(16, 2),
    )
    model(torch.randn(8, 16)).sum().backward()
    return model


def step(model: nn.Module, i: int) -> torch.Tensor:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    return (model(x) - x[:, :2]).square().mean()


def main(rounds: int) -> None:
    """Say "go", run, say how it ended, `rounds` times."""
    model = build()
    with suppress(ra.CalibrationError):  # imports first, which Ctrl-C would leave half done
        ra.calibrate_in_place(model, step, AdamW, ranks=(2,), steps=2, trials=1)
    for number in range(rounds):
        before, ended = fingerprint(model), "done"
        options = {"seeds": (number,), "full_trains": ["0.base_layer.*"]}
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                print("go", flush=True)
                ra.calibrate_in_place(model, step, AdamW, ranks=(2, 8, None), steps=8, trials=12, **options)
            except (KeyboardInterrupt, ra.CalibrationError) as error:  # so few steps may gain nothing
                ended = type(error).__name__
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # came after all was put back
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(ended, *changed(before, fingerprint(model)), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(int(sys.argv[1]))
