"""A fixture that runs functions in two gloo processes.

A test module may set environment variables for the processes, and third-party warnings to ignore.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

import pytest

from .worker import WORLD

START_S, RUN_S = 90, 240  # DeepSpeed compiles an operator on its first use
AFTER_A_FAILURE_S = 5


class Pair:
    """Sends a function to two processes and collects the results.

    If a process does not answer or raises an error, the test fails. ignored: (message, category,
    module) of third-party warnings to ignore.
    """

    def __init__(
        self,
        ignored: tuple[tuple[str, type[Warning], str], ...] = (),
        **environment: str,
    ) -> None:
        self.ignored = ignored
        self.environment = environment
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the results of `function(*args)` in both processes, in the order of their ranks.

        The function must be at the top level of a module, and its results must be picklable.
        """
        if not self.processes:
            self._start()
        message = pickle.dumps((function, args, self.ignored))
        for connection in self.connections:
            connection.send_bytes(message)
        try:
            return self._answers()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes, self.connections = [], []

    def _start(self) -> None:
        key = secrets.token_bytes(16)
        group_port = _free_port()
        path = os.pathsep.join(filter(None, sys.path))
        own = {**self.environment, "PYTHONPATH": path, "TEST_KEY": key.hex()}
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            listener._listener._socket.settimeout(START_S)  # type: ignore[attr-defined]
            script = str(Path(__file__).with_name("worker.py"))
            for rank in range(WORLD):
                ports = [str(group_port), str(listener.address[1])]
                command = [sys.executable, script, str(rank), *ports]
                made = subprocess.Popen(command, env={**os.environ, **own})
                self.processes.append(made)
            accepted = [listener.accept() for _ in range(WORLD)]
        by_rank = {connection.recv(): connection for connection in accepted}
        self.connections = [by_rank[rank] for rank in range(WORLD)]

    def _answers(self) -> list[Any]:
        """Return the results of both processes in the order of their ranks.

        If one process fails, the other gets only a few seconds more, because it may be waiting for
        the first.
        """
        answers: dict[int, Any] = {}
        failures: list[str] = []
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        while waiting:
            ready = wait(list(waiting), AFTER_A_FAILURE_S if failures else RUN_S)
            if not ready:
                failures.append(f"No answer from rank {sorted(waiting.values())}.")
                break
            for connection in ready:
                rank = waiting.pop(connection)
                fine, answers[rank] = pickle.loads(connection.recv_bytes())
                if not fine:
                    failures.append(f"rank {rank}: {answers[rank]}")
        if failures:
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(WORLD)]


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Yield a Pair of processes.

    The module may set IGNORED, a list of warnings to ignore, and define `environment`, a function
    that returns environment variables.
    """
    environment = getattr(request.module, "environment", dict)
    made = Pair(getattr(request.module, "IGNORED", ()), **environment())
    yield made
    made.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
