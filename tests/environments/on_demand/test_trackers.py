"""Real trackers, read back: rates by group, through Trainer's callback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankaware_optim import Reference, convert_lr

ROOT = Path(__file__).parents[3]
STEPS = 3


def tensorboard(folder: Path) -> dict[str, list[float]]:
    """The scalars of every event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            scalars[tag] = [event.value for event in events.Scalars(tag)]
    return scalars


def mlflow(folder: Path) -> dict[str, list[float]]:
    """The metrics of the one run in a local file store, by step: they are written as they come."""
    (metrics,) = folder.rglob("metrics")
    values = {}
    for path in metrics.rglob("*"):
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            rows = sorted((line.split() for line in lines), key=lambda row: int(row[2]))
            values[path.relative_to(metrics).as_posix()] = [float(r[1]) for r in rows]
    return values


READERS = {"tensorboard": tensorboard, "mlflow": mlflow}


def ran(folder: Path, tracker: str) -> Path:
    """The folder in which a separate process has trained, with no network to ask for."""
    own = {
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    module = "tests.environments.on_demand.trainer"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, tracker],
        cwd=folder,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("tracker", READERS)
def test_trackers_get_the_trained_rates(tracker, tmp_path):
    """Every step's base rate is logged, and the rate of the rank: one multiplier times it, on the Trainer's schedule."""
    metrics = READERS[tracker](ran(tmp_path, tracker))
    prefix = "" if tracker == "mlflow" else "train/"  # Trainer's own
    base, lr = metrics[f"{prefix}learning_rate"], metrics[f"{prefix}lr/r4"]
    assert len(base) == len(lr) == STEPS
    moved = convert_lr(1.0, from_="r=16,alpha=16", to=Reference(4, 8, fan_in=64)).lr
    assert lr == pytest.approx([b * moved for b in base], rel=1e-3)
    assert base == sorted(base, reverse=True)
    assert base[0] > base[-1]
