"""Writes results: the description of the machine, Markdown pages, pictures, and numbers in table cells."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"


def machine(threads: int) -> dict[str, Any]:
    """Return how figures were made: commit, golden tables, machine, versions, date and command."""
    return {
        "commit": commit(),
        "rests on": rests_on(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
    }


def rests_on() -> str:
    """Return the golden tables on which the running script's page rests, in words."""
    named = getattr(sys.modules["__main__"], "RESTS_ON", None)
    if named is None:
        return "unknown"
    return " ".join(map(mark, named)) or "its machine and versions"


def mark(table: str) -> str:
    """Return a golden table as a page shows it: its name and its digest."""
    return f"{table}@{digest((GOLDEN / f'{table}.toml').read_bytes())}"


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:8]


def commit() -> str:
    """Return the commit of the working tree, followed by " and changes" if the code differs from it.

    Outside a clone, return "unknown".
    """
    git = [
        "git",
        "-C",
        str(RESULTS.parent),
        "describe",
        "--always",
        "--abbrev=8",
        "--exclude=*",
    ]
    code = [":/rankaware_optim", ":/benchmarks/*.py"]
    try:
        found = subprocess.run(
            git, check=True, capture_output=True, text=True
        ).stdout.strip()
        differs = subprocess.run(
            [*git[:3], "diff", "--quiet", "HEAD", "--", *code], check=False
        ).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found + " and changes" * (differs != 0)


def cpu_model() -> str:
    """Return the name of the processor, from /proc/cpuinfo if it exists."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (
        line.partition(":")[2].strip()
        for line in lines
        if line.startswith("model name")
    )
    return next(named, platform.processor() or platform.machine())


def in_fresh_process(script: str, *options: str) -> dict[str, Any]:
    """Run a script with these options in a new process, and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, script, *options], check=True, stdout=subprocess.PIPE
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def record(
    name: str,
    title: str,
    rows: Sequence[dict[str, Any]],
    on: dict[str, Any],
    notes: Sequence[str],
) -> None:
    """Print `rows`, and write them to results/<name>.md with the machine and the notes."""
    cells = [[shown(value) for value in row.values()] for row in rows]
    heads = list(rows[0])
    (RESULTS / f"{name}.md").write_text(page(title, heads, cells, on, notes))
    table = Table(*heads, title=title)
    for row in cells:
        table.add_row(*row)
    Console(width=160).print(table, *notes, on, sep="\n")


def draw(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure as a PNG with 64 colours, which needs a third of the space."""
    from PIL import Image  # comes with matplotlib

    with io.BytesIO() as file:
        figure.savefig(file, dpi=dpi, format="png")
        picture = Image.open(file).convert("RGB")
        picture.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


# --- markdown -------------------------------------------------------------------------------------------------------


def page(
    title: str,
    heads: Sequence[str],
    cells: Sequence[Sequence[str]],
    on: dict[str, Any],
    notes: Any,
) -> str:
    """Return a page with a title, a table, notes, the machine and the command."""
    return (
        "\n\n".join([f"# {title}", table_of(heads, cells), *notes, made_on(on)]) + "\n"
    )


def write_explained(name: str, title: str, doc: str | None, *parts: str) -> None:
    """Write results/<name>.md, and print all parts but the last.

    The page has the script's docstring without its first paragraph, and then the parts. The last
    part says how the figures were made.
    """
    explanation = (doc or "").partition("\n\n")[2].strip("\n")
    text = "\n\n".join([f"# {title}", explanation, *parts])
    (RESULTS / f"{name}.md").write_text(f"{text}\n")
    print(*parts[:-1], sep="\n\n")


def block(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a heading and a table."""
    return f"## {title}\n\n{table_of(heads, rows)}"


def table_of(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows]
    )


def made_on(on: Mapping[str, Any]) -> str:
    """Return the machine and the command, in words."""
    named = ", ".join(f"{key} {value}" for key, value in on.items() if key != "command")
    return f"Machine: {named}.\n\nCommand: `{on['command']}`"


def written_by(on: Mapping[str, Any]) -> str:
    """Return the golden tables and the command, for pages whose runs name their own machines."""
    return f"Rests on {on['rests on']}.\n\nCommand: `{on['command']}`"


def made_with(machines: Iterable[Mapping[str, Any]]) -> str:
    """Return the machines of runs in words, each once, and the hashes of their networks."""
    listed = list(machines)
    each = {
        ", ".join(
            f"{key} {value}"
            for key, value in one.items()
            if key != "weights" and value is not None
        )
        for one in listed
    }
    weights = ", ".join(
        dict.fromkeys(str(one["weights"]) for one in listed if "weights" in one)
    )
    on = "; ".join(sorted(each)) or "not noted"
    return f"Machine: {on}." + (f" Networks: {weights}." if weights else "")


def shown(value: object) -> str:
    """Return a cell's text.

    A float has three decimals below 10 and one above, None is a dash, and a bool is yes or NO.
    """
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3f}" if value < 10 else f"{value:.1f}"
    return "–" if value is None else str(value)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Return a number with `digits` decimals, or a dash if it is None or not finite."""
    return (
        "–"
        if value is None or not math.isfinite(value)
        else f"{value:{'+' if sign else ''}.{digits}f}"
    )


def percent(share: float) -> str:
    """Return a regret in percent, or "diverged" if it is not finite."""
    return "diverged" if not math.isfinite(share) else number(100 * share, 1) + " %"
