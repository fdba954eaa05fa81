"""A calibration by a process whose signs of life come often and are soon missed.

Its arguments are the storage, and how long the one long step of its first trial takes, in seconds. It begins when it
reads a line, says "step" when that step begins, and at last what its recipe is and the warnings.
"""

from __future__ import annotations

import math
import sys
import time
import warnings

import torch

import rankaware_optim as ra
from rankaware_optim.calibration import _storage

from .calibrations import Net

STEPS, TRIALS = 10, 6
BEAT_S = 0.3
SILENT_S = BEAT_S * _storage.MISSED


def main(storage: str, seconds: float) -> None:
    _storage.BEAT_S = BEAT_S
    waited = []

    def train(trial):
        trial.optimizer(Net(trial.rank))
        u = math.log2(trial.lr) + 7
        for step in range(trial.steps):
            if step == 5 and not waited:
                waited.append(trial.number)
                print("step", flush=True)
                time.sleep(seconds)
            yield 2.3 - step * 0.2 / (1 + u * u) + 0.01 * torch.rand(1).item()

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recipe = ra.calibrate(
            train, "adamw", ranks=(2, 4), steps=STEPS, trials=TRIALS, storage=storage
        )
    print(
        len(recipe.tensors["lr"]),
        recipe.fitted_lr,
        *(str(warning.message) for warning in said),
        flush=True,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    import optuna  # noqa: F401

    sys.stdin.readline()
    main(sys.argv[1], float(sys.argv[2]))
