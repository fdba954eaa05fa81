"""Does the code as it is find the rates of the searches on file? Some of them are made again.

    python benchmarks/calibration/searches_again.py    # results/searches_again.json and .md, ten minutes

The searches of against_sweep.py and short_long.py take hours, so they may be older than the code. Here one of `EVERY`
calibrations is made again, with its seeds. Where the rates are equal, no change of the code since then touched it. The
rest may come from the code, or from a processor that rounds differently.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import click
import torch
from calibration import against_sweep_scores, searches, short_long
from recording import machine, record

RESTS_ON = ("search.adam", "calibration.adam")
EVERY = 14
NOTES = (
    f"One of {EVERY} calibrations on file. Rates: those of the ranks and of full finetuning that the search names. "
    "Octaves: the largest difference of a rate from that on file.",
)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--workers", default=2, show_default=True)
def main(workers: int) -> None:
    on, spawn = machine(1), get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        rows = list(pool.map(row_of, on_file()))
    record("searches_again", "Searches on file, made again", rows, on, NOTES)


def on_file() -> list[dict[str, Any]]:
    """One of `EVERY` calibrations."""
    ours = (searches.LORA, searches.WITH_FULL, short_long.SHORT, short_long.MOVED)
    searches_made = (*against_sweep_scores.on_file(), *short_long.on_file())
    return [row for row in searches_made if row["plan"] in ours][::EVERY]


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """Make a search again, and compare its rates."""
    if "times" in row:
        task = short_long.Task(row["name"], row["times"])
        made = short_long.searched(task, row["config"], row["plan"])
        what = f"{task.name} × {task.times}, {row['config']}, {row['plan']}"
    else:
        of = searches.Search(*(row[name] for name in searches.Search._fields))
        made = searches.searched(of)
        what = f"{of.domain}, {of.config}, {of.plan}, {of.share:g} of the sweep, seed {of.seed}"
    octaves = max(differences(row, made))
    return {
        "search": what,
        "on file": f"commit {row['commit']}",
        "runs on file": len(row["runs"]),
        "runs now": len(made["runs"]),
        "octaves": f"{octaves:.1g}",
        "equal": octaves < 1e-3,
    }


def differences(row: dict[str, Any], made: dict[str, Any]) -> Iterator[float]:
    now = json.loads(json.dumps(made["rates"]))  # ranks as strings, as on file
    for rank, (lr, *_) in row["rates"].items():
        yield abs(math.log2(now[rank][0] / lr))


if __name__ == "__main__":
    main()
