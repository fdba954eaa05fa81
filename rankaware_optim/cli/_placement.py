"""Which worker gets which GPUs and how many threads, on one machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..errors import CalibrationError

DEVICES = "CUDA_VISIBLE_DEVICES"
THREADS = "OMP_NUM_THREADS"
AUTO = 0  # workers: one a GPU, without GPUs one for every two cores


def placed(workers: int, devices: Sequence[str], cores: int, threads: int | None = None) -> list[dict[str, str]]:
    """The environment variables of each of `workers` processes.

    GPUs are dealt out evenly and in order; where there are more workers than GPUs, neighbours share one. Several
    workers share the cores, unless `threads` says how many each takes. One alone keeps what torch takes by itself.

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
    """The GPUs that this process may use, by their names in CUDA_VISIBLE_DEVICES, or by number where that is not set.

    count: how many torch finds; 0 where it cannot tell.

    Raises:
        CalibrationError: the variable names GPUs that are not there.
    """
    if DEVICES not in environment:
        return [str(i) for i in range(count)]
    named = [name.strip() for name in environment[DEVICES].split(",")]
    named = named[: next((i for i, name in enumerate(named) if name in ("", "-1")), None)]  # as CUDA reads it
    if 0 < count < len(named):
        raise CalibrationError(
            f"{DEVICES} is {environment[DEVICES]!r}, and torch finds {count} of these GPUs.",
            "Name those that are there.",
        )
    return named


def chosen_devices(asked: Sequence[str] | None, visible: Sequence[str]) -> list[str]:
    """The GPUs asked for, all visible ones if none were.

    Raises:
        CalibrationError: one is not there, or is named twice.
    """
    if asked is None:
        return list(visible)
    absent = [name for name in asked if name not in visible]
    if absent:
        there = f"the visible ones are {', '.join(visible)}" if visible else "no GPU is visible"
        raise CalibrationError(
            f"There is no GPU {', '.join(absent)} here: {there}.", "Name others, or leave devices= out."
        )
    if len(set(asked)) < len(asked):
        raise CalibrationError(f"devices={','.join(asked)} names a GPU twice.", "Name each once.")
    return list(asked)


def machine_devices() -> list[str]:
    """The GPUs that are visible here. CUDA is not initialised: it reads CUDA_VISIBLE_DEVICES only once."""
    import torch

    return visible_devices(os.environ, torch.cuda.device_count())


def machine_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def in_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, and put them back as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})
