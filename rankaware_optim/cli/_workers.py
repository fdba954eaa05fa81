"""Several processes of `rankaware calibrate` on this machine, each on a GPU of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from ..errors import CalibrationError
from ._options import INTERRUPTED

_DEVICES = "CUDA_VISIBLE_DEVICES"
_GRACE_S = 10.0  # for a worker to end by itself


def run_workers(count: int) -> int:
    """Run this command `count` times at once, worker i with GPU i, and return an exit code.

    The workers meet in the study's storage, and all write the recipe. The first one prints. When it
    has ended, a worker that does not end is stopped.
    """
    if "calibrate" not in sys.orig_argv:
        raise CalibrationError(
            "--workers runs the command of this process again, and it is not rankaware's.",
            "Run rankaware calibrate in a shell.",
        )
    command = [sys.executable, *sys.orig_argv[1:], "--workers", "1", "--force"]
    # The workers inherit that Ctrl-C is ignored. This process passes it on.
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers = []
    for i, environment in enumerate(_environments(count)):
        quiet = ["--quiet"] if i else []
        workers.append(subprocess.Popen([*command, *quiet], env=environment))
    try:
        signal.signal(signal.SIGINT, interrupted)
        code = workers[0].wait()
    except KeyboardInterrupt:
        code = INTERRUPTED
        for worker in workers:
            worker.terminate()
    for worker in workers:
        _end(worker)
    return code


def _environments(count: int) -> list[dict[str, str]]:
    """Return the workers' environments: one visible GPU each, and a share of the CPU threads."""
    import torch

    gpus = [str(i) for i in range(torch.cuda.device_count())]
    if _DEVICES in os.environ:
        gpus = os.environ[_DEVICES].split(",")
    shared = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
    environments = []
    for i in range(count):
        own = {_DEVICES: gpus[i % len(gpus)]} if gpus else {}
        environments.append({**shared, **os.environ, **own})
    return environments


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Wait until a worker has ended, and stop one that does not."""
    for stop in (worker.terminate, worker.kill):
        try:
            worker.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            stop()
