"""What is attacked: a small calibration on a storage, and a server that forks processes which may be killed.

The server is a separate process, so that Python and torch are imported once. It reads a job per line of JSON, {"what",
"storage" or "folder", "kill" (seconds, or null)}, and answers with the exit status.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from made_up import train

import rankaware_optim as ra
from rankaware_optim.calibration import _liveness

STEPS, TRIALS = 10, 6
SHIPPED = Path(__file__).parents[2] / "recipes" / "efficientnet-lite0-digits.toml"


def calibration(storage: Any, *, pause: float = 0.002, **options: Any) -> ra.Recipe:
    """Calibrate by six runs of ten steps around 2^-7, with `pause` seconds per step so that a kill may hit anywhere."""
    options = {"ranks": (2, 4), "steps": STEPS, "trials": TRIALS, "storage": storage, "progress": False, **options}
    return ra.calibrate(partial(train, pause=pause), "adamw", **options)


def saves(folder: Path) -> None:
    """Save two different recipes in turn to the same file, without end."""
    recipe = ra.Recipe.load(SHIPPED)
    path = folder / "recipe.toml"
    while True:
        recipe.save(path)
        other = replace(recipe, name="other", tensors={**recipe.tensors, "lr": 2.0 * recipe.tensors["lr"]})
        other.save(path)


def do(job: dict[str, Any]) -> None:
    """Do one job, in the forked process."""
    if job["what"] == "save":
        saves(Path(job["folder"]))
    storage = job["storage"]
    recipe = calibration(storage if "://" in storage else Path(storage), name=job.get("name", "calibration"))
    recipe.save(Path(job["folder"]) / "recipe.toml")


def main() -> None:
    """Fork a process for every line of standard input."""
    torch.set_num_threads(1)
    _liveness._BEAT_S = 0.05  # the next call soon misses the killed
    calibration(None, pause=0.0)  # imports everything that a victim needs

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            do(job)
            os._exit(0)
        if job["kill"] is not None:
            time.sleep(job["kill"])
            os.kill(child, signal.SIGKILL)  # not waited for yet, so its process id is not reused
        print(os.waitpid(child, 0)[1], flush=True)
