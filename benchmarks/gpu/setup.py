"""Settings of a piece of the GPU kit: device, size, folder and time limit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from recording import machine
from study.domains import Domain, weights_hash
from study.grids import Job, Losses, Wanting

PACKAGES = ("optuna", "peft", "transformers", "bitsandbytes", "triton")


@dataclass(frozen=True)
class Setup:
    """Where and how long a piece runs.

    Args:
        device: "cuda" or "cpu".
        smallest: use a shape that a CPU runs in seconds.
        folder: where runs are kept.
        until: when to stop, on the clock `time.monotonic`.
    """

    device: str
    smallest: bool
    folder: Path
    until: float

    @property
    def name(self) -> str:
        """The card's name, or "cpu"."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def machine(self) -> dict[str, Any]:
        """Machine and versions for the rows that follow, without what changes from call to call.

        The code is left out too, since the page names it.
        """
        changing = ("rests on", "command", "date", "load_before")
        here = {key: value for key, value in machine(1).items() if key not in changing}
        precision = {"matmul": torch.get_float32_matmul_precision()}
        return {
            "device": self.name,
            "cuda": torch.version.cuda,
            **precision,
            **here,
            **versions(),
        }

    def provenance(self, domain: Domain) -> dict[str, Any]:
        """The machine and versions, and the hash of the network before training."""
        domain.warm()
        return {**self.machine(), "weights": weights_hash(domain)}

    def place(self, domain: Domain) -> Domain:
        """The domain with its network on the device. The domain's loss moves batches there."""
        build = domain.build
        return replace(domain, build=lambda *args: build(*args).to(self.device))


def versions() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Boxed:
    """A task that asks for one run at a time, and for none once its time is over."""

    task: Wanting
    until: float

    def wanted(self, done: Losses) -> list[Job]:
        return [] if time.monotonic() >= self.until else self.task.wanted(done)[:1]


def append(store: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a file of JSON lines."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows_in(store: Path) -> Iterator[dict[str, Any]]:
    """Every row on file, without truncated lines."""
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue
