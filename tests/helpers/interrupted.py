"""Ctrl-C at a given moment; and a process that calibrates in place while another sends it Ctrl-C, for its model.

Each round it says "go", calibrates until it is interrupted or done, and says how that ended and what differs.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

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


class CtrlC:
    """A context in which this process gets SIGINT when a function of this name is called for the n-th time, or returns.

    It comes `times` in a row. The functions are those of Optuna, filelock and this package.
    """

    def __init__(self, event: str, function: str, nth: int = 1, times: int = 1) -> None:
        self._at, self._before, self._times = (event, function), nth, times

    def __enter__(self) -> None:
        sys.setprofile(self._look)

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _look(self, frame: FrameType, event: str, value: object) -> None:
        code = frame.f_code
        if (event, code.co_name) != self._at or not any(
            f"{os.sep}{name}{os.sep}" in code.co_filename for name in _OURS
        ):
            return
        self._before -= 1
        if self._before <= 0:
            self._times -= 1
            if not self._times:
                sys.setprofile(None)
            os.kill(os.getpid(), signal.SIGINT)


_OURS = ("optuna", "filelock", "rankaware_optim")


def main(rounds: int) -> None:
    """Say "go", run, say how it ended, `rounds` times."""
    model = build()
    # imports first, which Ctrl-C would leave half done
    with suppress(ra.CalibrationError):
        ra.calibrate_in_place(model, step, AdamW, ranks=(2,), steps=2, trials=1)
    for number in range(rounds):
        before, ended = fingerprint(model), "done"
        options = {"seeds": (number,), "full_trains": ["0.base_layer.*"]}
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                print("go", flush=True)
                ra.calibrate_in_place(
                    model,
                    step,
                    AdamW,
                    ranks=(2, 8, None),
                    steps=8,
                    trials=12,
                    **options,
                )
            except (
                KeyboardInterrupt,
                ra.CalibrationError,
            ) as error:  # so few steps may gain nothing
                ended = type(error).__name__
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except KeyboardInterrupt:  # came after all was put back
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(ended, *changed(before, fingerprint(model)), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(int(sys.argv[1]))
