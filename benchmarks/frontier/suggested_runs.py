"""Real runs at the suggested learning rate, where it lies below the rates of the stored sweeps.

    python benchmarks/frontier/suggested_runs.py --domain audio    # resumable: results/suggested/audio.jsonl

The stored sweeps of 400 and 800 steps (`study/longer.py`) surround the best learning rate. On these small tasks the
suggested rate lies one to four octaves below it, where losses were extrapolated. This script trains AdamW at the
suggested rate itself: ranks 16 and 128 with alpha = rank, and full finetuning, seed 0, by the study's own loop and
schedule. The rule is in `rules.md`, section 5. `calibration/finder_page.py` reads the runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
import torch
from frontier.runs import TASKS
from laws.suggested import suggested
from recording import RESULTS
from study import longer
from study.grids import FULL, Job, Listed
from study.longer import AT_A
from study.runs_on_file import complete, read_begun
from study.suite import provenance

RESTS_ON = ()
STORE = RESULTS / "suggested"
LENGTHS = (400, 800)
PLACES = {"lora": ((AT_A, 16), (AT_A, 128)), "full": (("full", FULL),)}


def job_of(task: str, config: str, rank: int, steps: int) -> Job:
    """The run at the suggested learning rate in a cell."""
    cell = longer.cell_of(task, config, rank, steps)
    return Job(*cell, round(suggested(task, config, rank), 2), 0)


def jobs(task: str, method: str) -> Iterator[Job]:
    """The runs of one task, the shorter ones first."""
    for steps in LENGTHS:
        for config, rank in PLACES[method]:
            yield job_of(task, config, rank, steps)


def on_file() -> dict[str, dict[Job, float | None]]:
    """The runs of each task that has any."""
    return read_begun(STORE, TASKS)


@click.command()
@click.option("--domain", "task", type=click.Choice(TASKS), required=True)
@click.option("--method", type=click.Choice([*PLACES]), default="lora")
def main(task: str, method: str) -> None:
    """Run what is missing of a task."""
    torch.set_num_threads(1)
    store = STORE / f"{task}.jsonl"
    todo = Listed([*jobs(task, method)])
    complete(todo, longer.run_one, store, 1, click.echo, provenance(task))


if __name__ == "__main__":
    main()
