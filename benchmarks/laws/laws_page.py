"""Which law holds for which optimizer: exponents by formula and by check, and what small sweeps say of each family.

    python benchmarks/laws/laws_page.py        # no training: results/laws.md from results/laws.json

**The check**, measured at f0b956a9: at every rank (4 to 64) and width (256 to 2048), the rate at which four steps of the
real optimizer class change the output of an adapter on a square layer by an rms of 1. The inputs and output gradients of
`tokens` independent tokens stay fixed. Rates are means over 6, 2 and 1 draws at 4, 64 and 512 tokens. Exponents are the
least-squares slopes of log2 rate on log2 rank and log2 width. The formula's are fitted to the package's multipliers on
the same grid. The scaling s goes as r^-gamma. The bar was set before the check, for Adam's family.

**A real sweep**, frozen at 90ee785b (`git show 90ee785b:benchmarks/results/law_check.md`): image generation at ranks 4 to
64, a rate moved between ranks, rms octaves with alpha = rank and with alpha kept.

* *SGD with momentum*: one rate is .41 and 2.78 octaves off, the default (its form at one rank) .41 and 1.02.
* *Muon*: one rate .19 and 1.35, the default (its form at one rank) .19 and .48.
* *LAMB and Adafactor* together: one rate .79 and .13, µA's form of their family .43 and .20. Adafactor alone is nearer to
  one rate (.17, its form .28), and keeps it.
* *LARS* was not run. It keeps one rate.

Adam's law is scored on large models by `large_models.md` and on the study's tasks by `study.md`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import click
import numpy as np
from recording import RESULTS, block, number, write_explained, written_by
from recording import machine as this_machine

from rankaware_optim import MuA, Reference

RESTS_ON = ("laws", "families")
MEASURED = RESULTS / "laws.json"
RANKS, WIDTHS = (4, 8, 16, 32, 64), (256, 512, 1024, 2048)
BARS = {"sign-like": 0.1}
HEADS = (
    *("optimizer", "family", "init", "gamma", "tokens"),
    *("rank: formula", "rank: check", "rank: off"),
    *("width: formula", "width: check", "width: off"),
)
Row = Mapping[str, Any]
Exponents = Mapping[str, float]


@click.command()
def main() -> None:
    """Write results/laws.md."""
    document = json.loads(MEASURED.read_text())
    rows = [(row, formula(row)) for row in document["rows"]]
    measured = document["machine"]
    write_explained(
        "laws",
        "Which law holds for which optimizer",
        __doc__,
        "\n".join(verdicts(rows)),
        block("Exponents of the best rate", HEADS, list(cells(rows))),
        "The check's machine: "
        + ", ".join(f"{key} {value}" for key, value in measured.items())
        + ".\n\n"
        + written_by(this_machine(1)),
    )


def formula(row: Row) -> Exponents:
    """Exponents of the law's multipliers in rank and in width, by least squares on the check's grid."""
    law = MuA(tokens=row["tokens"], family=row["family"])
    grid = list(itertools.product(RANKS, WIDTHS))
    origin = reference(row, *grid[0])
    moved = [
        math.log2(law.multiplier(reference(row, *at).as_factor(), origin))
        for at in grid
    ]
    design = np.array(
        [(1.0, math.log2(rank), math.log2(width)) for rank, width in grid]
    )
    _, in_rank, in_width = np.linalg.lstsq(design, np.array(moved), rcond=None)[0]
    return {"rank": float(in_rank), "width": float(in_width)}


def reference(row: Row, rank: int, width: int) -> Reference:
    alpha = float(rank) ** (1.0 - row["gamma"])
    return Reference(rank, alpha, init=row["init"], fan_in=float(width))


def verdicts(rows: list[tuple[Row, Exponents]]) -> Iterator[str]:
    """An optimizer's largest differences, and whether they meet the bar of its family."""
    for name in dict.fromkeys(row["optimizer"] for row, _ in rows):
        mine = [(row, own) for row, own in rows if row["optimizer"] == name]
        family = mine[0][0]["family"]
        worst = {
            of: max(abs(own[of] - row[of]) for row, own in mine)
            for of in ("rank", "width")
        }
        said = f"* {name} ({family}): worst {worst['rank']:.2f} in rank, {worst['width']:.2f} in width"
        if family in BARS:
            met = "met" if max(worst.values()) <= BARS[family] else "MISSED"
            said += f", bar {BARS[family]:g}: {met}"
        yield said + "."


def cells(rows: list[tuple[Row, Exponents]]) -> Iterator[list[str]]:
    for row, own in rows:
        named = [row["optimizer"], row["family"], row["init"]]
        line = [*named, f"{row['gamma']:g}", str(row["tokens"])]
        for of in ("rank", "width"):
            exponents = (own[of], row[of], own[of] - row[of])
            line += [number(each, sign=True) for each in exponents]
        yield line


if __name__ == "__main__":
    main()
