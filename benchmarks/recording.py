"""What the benchmarks share: adapters in PEFT's layout, the machine's description, and the two result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

RESULTS = Path(__file__).parent / "results"
RANK = 16


def projections(hidden: int, kv: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """Fan-in and fan-out of the seven linear layers in a Llama block."""
    narrow, up = (hidden, kv), (hidden, intermediate)
    return {"q": (hidden, hidden), "k": narrow, "v": narrow, "o": (hidden, hidden)} | {
        "gate": up,
        "up": up,
        "down": (intermediate, hidden),
    }


LLAMA_8B_EIGHTH = projections(512, 128, 1792)  # 32 blocks; every width divided by 8
LLAMA_70B = projections(8192, 1024, 28672)  # 80 blocks


class Pair(nn.Module):
    """A LoRA pair named and declared as PEFT does it, without the frozen weight beside it."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(fan_in, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, fan_out, bias=False)})
        self.r = {"default": RANK}
        self.scaling = {"default": 2.0}
        nn.init.zeros_(self.lora_B["default"].weight)


def adapters(blocks: int, shapes: dict[str, tuple[int, int]]) -> nn.Module:
    """A model of LoRA pairs alone: `blocks` times `shapes`."""
    return nn.ModuleList(nn.ModuleDict({name: Pair(*fans) for name, fans in shapes.items()}) for _ in range(blocks))


def machine(threads: int) -> dict[str, Any]:
    """Where, with what and by which command the figures were made."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def cpu_model() -> str:
    """The processor's name: from /proc/cpuinfo where there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def record(name: str, title: str, rows: Sequence[dict[str, Any]], on: dict[str, Any], notes: Sequence[str]) -> None:
    """Print `rows` and write them to results/`name`.json and .md, with the machine and the notes."""
    RESULTS.mkdir(exist_ok=True)
    document = {"title": title, "machine": on, "notes": list(notes), "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    cells = [[shown(value) for value in row.values()] for row in rows]
    heads = list(rows[0])
    (RESULTS / f"{name}.md").write_text(markdown(title, heads, cells, on, notes))
    table = Table(*heads, title=title)
    for row in cells:
        table.add_row(*row)
    Console(width=160).print(table, *notes, on, sep="\n")


def markdown(title: str, heads: list[str], cells: list[list[str]], on: dict[str, Any], notes: Sequence[str]) -> str:
    """The result as one page of markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *cells]]
    where = ", ".join(f"{key} {value}" for key, value in on.items() if key != "command")
    parts = [f"# {title}", "\n".join(lines), *notes, f"Machine: {where}.", f"Command: `{on['command']}`"]
    return "\n\n".join(parts) + "\n"


def shown(value: object) -> str:
    """A cell: figures to three digits behind the point at most, a missing one as a dash, a bar as met or not."""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return "–" if value is None else str(value)
