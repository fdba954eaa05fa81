"""A calibration to be killed: forks, for every folder it reads, a process that calibrates there and saves a recipe.

Started as a script, so that Python and torch are imported once. A line is a folder, or a folder, a tab and the seconds
after which the process is killed; the answer is its exit status.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim.calibration import _storage

STEPS, TRIALS = 10, 6


class Pair(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(rank, 8))
        self.lora_B = nn.Parameter(torch.zeros(8, rank))
        self.r, self.scaling = rank, 1.0


def train(trial):
    trial.optimizer(Pair(trial.rank))
    u = math.log2(trial.lr) + 7
    for step in range(trial.steps):
        time.sleep(0.002)
        yield 2.3 - step * 0.2 / (1 + u * u) + 0.01 * torch.rand(1).item()


def main(folder: Path) -> None:
    recipe = ra.calibrate(
        train,
        "adamw",
        ranks=(2, 4),
        steps=STEPS,
        trials=TRIALS,
        storage=folder / "study.journal",
        progress=False,
    )
    recipe.save(folder / "recipe.toml")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _storage.BEAT_S = 0.05  # the killed are soon missed
    import optuna  # noqa: F401

    for line in sys.stdin:
        folder, _, seconds = line.rstrip("\n").partition("\t")
        child = os.fork()
        if not child:
            main(Path(folder))
            os._exit(0)
        if seconds:
            time.sleep(float(seconds))
            # not waited for yet, so the number is still its own
            os.kill(child, signal.SIGKILL)
        print(os.waitpid(child, 0)[1], flush=True)
