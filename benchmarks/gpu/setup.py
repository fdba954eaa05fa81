"""Where a piece of the GPU kit runs: the device, its size, its folder and its time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
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
    """device: "cuda" or "cpu". smallest: a shape that a CPU runs in seconds. until: of `time.monotonic`."""

    device: str
    smallest: bool
    folder: Path
    until: float

    @property
    def name(self) -> str:
        """The card's own name."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def machine(self) -> dict[str, Any]:
        """Where the rows that follow were made, without what changes by call; the page names its own code."""
        changing = ("code", "command", "date", "load_before")
        here = {key: value for key, value in machine(1).items() if key not in changing}
        precision = {"matmul": torch.get_float32_matmul_precision()}
        return {"device": self.name, "cuda": torch.version.cuda, **precision, **here, **versions()}

    def provenance(self, domain: Domain) -> dict[str, Any]:
        """The machine, and the hash of the network before training."""
        domain.warm()
        return {**self.machine(), "weights": weights_hash(domain)}

    def place(self, domain: Domain) -> Domain:
        """A domain whose network lies on the device; its loss takes the batches there."""
        build = domain.build
        return replace(domain, build=lambda *args: build(*args).to(self.device))


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Boxed:
    """A task one run at a time, which wants no more once its time is over."""

    task: Wanting
    until: float

    def wanted(self, done: Losses) -> list[Job]:
        return [] if time.monotonic() >= self.until else self.task.wanted(done)[:1]


def append(store: Path, row: Mapping[str, Any]) -> None:
    """A row on a line of its own."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows_in(store: Path) -> Iterator[dict[str, Any]]:
    """Every row on file; a line cut short is left out."""
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def made_with(machines: Iterable[Mapping[str, Any]]) -> str:
    """The machines of runs, each once, in words; networks by their hashes."""
    listed = list(machines)
    each = {
        ", ".join(f"{key} {value}" for key, value in one.items() if key != "weights" and value is not None)
        for one in listed
    }
    weights = dict.fromkeys(str(one["weights"]) for one in listed if "weights" in one)
    return f"Machine: {'; '.join(sorted(each))}." + (f" Networks: {', '.join(weights)}." if weights else "")
