"""Damaged sweeps: tables with damaged bytes and cells, as CSV, TSV, JSON and JSON lines, which are read and fitted."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

from attacks.damage import VALUES, damaged_bytes
from attacks.outcomes import Attack, Outcomes

import rankaware_optim as ra
from rankaware_optim.sweeps import fit_sweep

DEMO = Path(ra.__file__).parent / "sweeps" / "demo_sweep.csv"
COLUMNS = (
    "method",
    "init",
    "rslora",
    "batch",
    "steps",
    "rank",
    "lr",
    "loss",
    "alpha",
    "fan_in",
    "seed",
    "odd",
)


def run(seed: int, count: int, folder: Path) -> Outcomes:
    warnings.simplefilter("ignore")
    chance, outcomes = random.Random(seed), Outcomes()
    with DEMO.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number in range(count):
        path = write(rows, chance, folder)
        outcomes.attempt(
            (seed, number), lambda path=path: use(path), ra.CalibrationError
        )
    return outcomes


def write(rows: list[dict[str, Any]], chance: random.Random, folder: Path) -> Path:
    """Write a few rows of one network of the demo's sweep, damaged, in one of the formats."""
    model = chance.choice(sorted({row["model"] for row in rows}))
    kept = [dict(row) for row in rows if row["model"] == model]
    kept = chance.sample(kept, chance.randint(1, 16))
    for _ in range(chance.randrange(4)):
        row = chance.choice(kept)
        row[chance.choice([*row, *COLUMNS])] = chance.choice(VALUES)
    kind = chance.choice(("csv", "tsv", "json", "jsonl"))
    text = io.StringIO()
    if kind in ("csv", "tsv"):
        names = list(dict.fromkeys(name for row in kept for name in row))
        writer = csv.DictWriter(text, names, delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(kept)
    else:
        lines = [json.dumps(row) for row in kept]
        text.write("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]")
    data = text.getvalue().encode("utf-8", "surrogatepass")
    path = folder / f"sweep.{kind}"
    path.write_bytes(damaged_bytes(data, chance) if chance.random() < 0.5 else data)
    return path


def use(path: Path) -> None:
    recipe = fit_sweep(path, optimizer="adamw")
    if not 0 < recipe.lr < math.inf:
        raise AssertionError(f"rate {recipe.lr}")
    str(recipe)


ATTACKS = (Attack("damaged sweeps", 12_000, 500, run),)
