"""A calibration's workers as tasks of a Ray cluster that share one storage.

Ray decides where they run and restarts killed ones. The calibration's schedule decides what they
run. Ray Tune is not used, because its searchers and schedulers would replace that schedule and the
pruner.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from .._checks import is_number, is_whole
from .._warn import warn
from ..errors import CalibrationError
from ..recipe import Recipe, differences
from ._progress import Show
from ._provenance import train_source, versions_used
from ._runner import Runner
from ._storage import check_shared, first_line, journal_head

_LOOK_S = 2.0  # seconds between two checks of the workers' progress
_GRACE_S = 10.0  # seconds for workers to end by themselves
_CONNECT_S = 10.0  # seconds for a cluster to answer; ray.init itself waits for minutes


@dataclass(frozen=True)
class RayExecutor:
    """Runs the workers of `calibrate` as tasks of a Ray cluster. `executor="ray"` is one with all
    defaults.

    Args:
        workers: number of workers. By default one per GPU of the cluster, or one per two CPU cores
            without GPUs.
        gpus: GPUs per worker. By default 1, or 0 on a cluster without GPUs. Ray sets each worker's
            CUDA_VISIBLE_DEVICES.
        address: address of a cluster, as for `ray.init`. "local" starts a cluster on this machine
            for the time of the call. By default the cluster that this process is connected to, or
            the one that `ray.init()` finds.

    Raises:
        CalibrationError: `workers` or `gpus` is not such a number.
    """

    workers: int | None = None
    gpus: float | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        if not (self.workers is None or is_whole(self.workers)):
            raise CalibrationError(
                f"workers is {self.workers!r}.",
                "Give a whole number of at least 1, or None.",
            )
        if not (self.gpus is None or (is_number(self.gpus) and self.gpus >= 0)):
            raise CalibrationError(
                f"gpus is {self.gpus!r}.",
                "Give the number of GPUs per worker, 0 or more.",
            )


def ray_executor(executor: object) -> RayExecutor:
    """Return the executor for the argument of `calibrate`.

    Raises:
        CalibrationError: it is no executor, Ray is not installed, or this process trains together
            with others.
    """
    if executor != "ray" and not isinstance(executor, RayExecutor):
        raise CalibrationError(
            f"executor is {executor!r}.", "Give 'ray', a RayExecutor, or leave it out."
        )
    if find_spec("ray") is None:
        raise CalibrationError(
            "executor='ray' needs Ray, which is not installed.",
            'In a clone of this package: pip install ".[ray]".',
        )
    if dist.is_available() and dist.is_initialized():
        raise CalibrationError(
            "executor='ray' starts its own workers, but torch.distributed has already started"
            " processes.",
            "Call it in one process, or leave executor= out.",
        )
    return executor if isinstance(executor, RayExecutor) else RayExecutor()


def run_on_ray(
    executor: RayExecutor, work: partial[Recipe], runner: Runner, show: Show
) -> None:
    """Run `work`, a call of `calibrate`, in several tasks until one of them finds the schedule
    complete.

    Args:
        executor: the workers and their resources.
        work: the call that every task makes.
        runner: of this process, which logs what the tasks do.
        show: shows how far they are.

    Raises:
        CalibrationError: the cluster cannot be reached, `train` cannot be sent there, or every
            worker was lost.
        Exception: an error of `work` in a task.
    """
    train = work.keywords["train"]
    storage = work.keywords["storage"]
    calibration = runner.calibration
    most = calibration.schedule.expected()

    @calibration.guard()
    def look() -> None:
        trials = calibration.trials()
        runner.log.look(trials)
        calibration.recall()
        show(len(trials.counted()), "on Ray", calibration.best())

    with _connected(executor.address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, gpus, cpus = share_out(nodes, executor.workers, executor.gpus)
        task = ray.remote(_work).options(
            num_cpus=cpus, num_gpus=gpus, name="calibration"
        )
        try:
            sent = ray.put(work)
        except TypeError as error:
            raise CalibrationError(
                f"train cannot be sent to Ray's workers: {first_line(error)}",
                "Define it in a module, and create what it needs inside it.",
            ) from error
        arguments = sent, code_of(train), journal_head(storage), cpus
        tasks = [task.remote(*arguments) for _ in range(min(workers, most))]
        try:
            _await_one(ray, tasks, look)
        except BaseException:
            for each in tasks:
                ray.cancel(each)
            raise
        finally:
            ray.wait(tasks, num_returns=len(tasks), timeout=_GRACE_S)


def _work(
    work: partial[Recipe], code: Mapping[str, str], head: bytes, threads: int
) -> None:
    """Run one worker, in a Ray process."""
    torch.set_num_threads(threads)
    host = socket.gethostname()
    other = differences(code, code_of(work.keywords["train"]))
    if other:
        raise CalibrationError(
            f"{host} runs different code from the host where the calibration was started: {other}.",
            "Install the same versions on every node, and share one folder of code.",
        )
    check_shared(work.keywords["storage"], head, host)
    work()


def code_of(train: Any) -> dict[str, str]:
    """Return what must be equal on all nodes. Code that Ray sends by value, as from a script,
    always is.
    """
    by_value = getattr(train, "__module__", "") == "__main__"
    return {**versions_used(), **({} if by_value else train_source(train).loop)}


def _await_one(ray: Any, tasks: Sequence[Any], look: Callable[[], None]) -> None:
    """Wait until a worker ends by itself, which means that the schedule is complete."""
    pending = list(tasks)
    errors = ray.exceptions
    lost = ""
    while pending:
        done, pending = ray.wait(pending, timeout=_LOOK_S)
        look()
        for task in done:
            try:
                ray.get(task)
            except errors.RayTaskError as error:
                if not isinstance(error.cause, errors.RaySystemError):
                    raise error.cause from error
                raise CalibrationError(
                    f"A Ray worker could not load train: {first_line(error.cause)}",
                    "Make its module importable on every node, by a shared folder or as an"
                    " installed package.",
                ) from error
            except errors.RayError as error:
                lost = first_line(error)
                warn(f"Ray lost a worker. The others continue: {lost}")
            else:
                return
    raise CalibrationError(
        f"Ray lost every worker: {lost}",
        "With the same storage= the same call continues where this one stopped.",
    )


# --- the cluster ----------------------------------------------------------------------------------


def share_out(
    nodes: Sequence[Mapping[str, float]],
    workers: int | None = None,
    gpus: float | None = None,
) -> tuple[int, float, int]:
    """Return how the workers share a cluster.

    Args:
        nodes: the resources of each node, by Ray's names.
        workers: number of workers. By default as many as the GPUs allow, or one per two CPU cores
            without GPUs.
        gpus: GPUs per worker.

    Returns:
        The number of workers, and the GPUs and CPU cores of each. The cores are those available on
            the node with the fewest cores per worker.

    Raises:
        CalibrationError: no node has room for a worker.

    >>> share_out([{"CPU": 16}, {"CPU": 32, "GPU": 4}])
    (4, 1, 8)
    """
    if gpus is None:
        gpus = int(any(node.get("GPU") for node in nodes))
    unit, size = ("GPU", gpus) if gpus else ("CPU", 2)
    room = 0
    total = 0.0
    cores = []
    for node in nodes:
        cpus = node.get("CPU", 0)
        if cpus and node.get("GPU", 0) >= gpus:
            holds = max(1, int(node[unit] // size))
            room += holds
            total += cpus
            cores.append(cpus // holds)
    count = workers or room
    if not count:
        raise CalibrationError(
            f"No node of the Ray cluster has a core and {gpus:g} GPUs.",
            "Start one, or give workers= and gpus=.",
        )
    return count, gpus, max(1, int(min((*cores, total // count))))


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Yield Ray, connected to a cluster. A connection made here is closed afterwards."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    at = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        host, _, port = at.rpartition(":")
        if port.isdecimal() and "/" not in host:
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        starts = {"include_dashboard": False} if address == "local" else {}
        ray.init(address=address, logging_level=logging.ERROR, **starts)
    except Exception as error:
        raise CalibrationError(
            f"The Ray cluster at {at!r} cannot be reached: {first_line(error)}",
            "Give the address of a running cluster (see `ray status`), or 'local' to start one on"
            " this machine.",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
