"""Placement of workers on one machine: GPUs and threads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..errors import CalibrationError

DEVICES = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
SAFE_PATH = "PYTHONSAFEPATH"
_OURS = "rankaware"  # its value where we set it
AUTO = 0  # workers: one per GPU, or one per two cores without GPUs


def placed(
    workers: int, devices: Sequence[str], cores: int, threads: int | None = None
) -> list[dict[str, str]]:
    """Return the environment variables of each of `workers` processes.

    GPUs are distributed evenly and in order. If there are more workers than GPUs, neighbours share
    one. Several workers share the cores, unless `threads` is given. A single worker keeps torch's
    default.

    >>> placed(AUTO, ["0", "1"], cores=8)
    [{'CUDA_VISIBLE_DEVICES': '0', 'OMP_NUM_THREADS': '4'}, {'CUDA_VISIBLE_DEVICES': '1', 'OMP_NUM_THREADS': '4'}]
    """
    workers = workers or len(devices) or max(1, cores // 2)
    if threads is None and workers > 1:
        threads = max(1, cores // workers)
    found: list[dict[str, str]] = [{} for _ in range(workers)]
    for i, environment in enumerate(found):
        start, end = (at * len(devices) // workers for at in (i, i + 1))
        if devices:
            environment[DEVICES] = ",".join(devices[start : max(end, start + 1)])
        if threads is not None:
            environment[THREADS] = str(threads)
    return found


def visible_devices(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the GPUs that this process may use: their names in CUDA_VISIBLE_DEVICES, or numbers if
    it is not set.

    count: the number of GPUs that torch finds, 0 if unknown.

    Raises:
        CalibrationError: the variable has GPUs that do not exist.
    """
    if DEVICES not in environment:
        return [str(i) for i in range(count)]
    named = [name.strip() for name in environment[DEVICES].split(",")]
    named = named[
        : next((i for i, name in enumerate(named) if name in ("", "-1")), None)
    ]  # as CUDA reads it
    if 0 < count < len(named):
        raise CalibrationError(
            f"{DEVICES} is {environment[DEVICES]!r}, but torch finds {count} of these GPUs.",
            "Give only existing GPUs.",
        )
    return named


def chosen_devices(asked: Sequence[str] | None, visible: Sequence[str]) -> list[str]:
    """Return the GPUs asked for, by default all visible ones.

    Raises:
        CalibrationError: one does not exist, or is given twice.
    """
    if asked is None:
        return list(visible)
    absent = [name for name in asked if name not in visible]
    if absent:
        there = f"the visible ones are {', '.join(visible)}" if visible else "no GPU is visible"
        raise CalibrationError(
            f"There is no GPU {', '.join(absent)} here: {there}.",
            "Give others, or leave --devices out.",
        )
    if len(set(asked)) < len(asked):
        raise CalibrationError(f"--devices {','.join(asked)} has a GPU twice.", "Give each once.")
    return list(asked)


def machine_devices() -> list[str]:
    """Return the visible GPUs. CUDA is not initialised, since it reads CUDA_VISIBLE_DEVICES only
    once.
    """
    import torch

    return visible_devices(os.environ, torch.cuda.device_count())


def machine_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def in_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def outside_folder() -> Iterator[None]:
    """Start workers that import nothing from the current folder while they start. Python 3.10 has
    no way to say so.
    """
    with in_environment({} if SAFE_PATH in os.environ else {SAFE_PATH: _OURS}):
        yield


def started_outside_folder() -> None:
    """In a worker: let the processes that it starts find their modules as usual."""
    if os.environ.get(SAFE_PATH) == _OURS:
        del os.environ[SAFE_PATH]
