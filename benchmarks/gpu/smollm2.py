"""The study's real LLM, SmolLM2-135M, with the full grid and three seeds, which would take too long on a CPU.

In `study/suite.py` SmolLM2-135M is a large domain, with one seed, no rank 1 and sparse grids. Here it is swept in the
same way as the small domains, in float32. The configurations of the paper's claims come first. Batches, seeds and the
draws of the adapters are the same as on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from gpu.setup import Boxed, Setup
from gpu.width import SMALLEST, domain_of
from recording import block, made_with
from study.configurations import CONFIGS, run_in, starts
from study.domains import Domain, get_domain
from study.grids import Job, Listed, Losses, Wanting
from study.regret import LAWS
from study.runs_on_file import complete, machines, read
from study.suite import COARSE, STORES, study
from study.suite_tables import claims, exponents

NAME = "language_smollm2"
SEEDS, HALF = 3, 3


class Sweep(NamedTuple):
    """A domain on the device, its tasks in order, and the file of its runs."""

    domain: Domain
    tasks: Sequence[Wanting]
    store: Path


def sweep_of(setup: Setup) -> Sweep:
    """The study's sweep. With `setup.smallest`, three rates at two ranks on a small made-up network."""
    if setup.smallest:
        domain = replace(domain_of(SMALLEST.widths[0], setup), name="made_up")
        jobs = [
            Job(domain.name, next(iter(CONFIGS)), rank, float(x), 0)
            for rank in (4, 16)
            for x in (-7, -6, -5)
        ]
        tasks: list[Wanting] = [starts(domain.name, range(1)), Listed(jobs)]
    else:
        domain = setup.place(replace(get_domain(NAME), large=False))
        swept = study(domain.ranks_swept, domain.ranks_swept, SEEDS, HALF, COARSE)
        tasks = [
            starts(NAME, range(SEEDS)),
            *(part.grid(part.cells(NAME)) for part in swept),
        ]
    return Sweep(domain, tasks, setup.folder / f"{domain.name}.jsonl")


def run(setup: Setup) -> None:
    """Run the missing runs until the time is over."""
    torch.set_float32_matmul_precision("highest")
    domain, tasks, store = sweep_of(setup)
    todo = [] if setup.over else [task for task in tasks if task.wanted(read(store))]
    on = setup.provenance(domain) if todo else {}
    for task in todo:
        if setup.over:
            return
        click.echo(f"{domain.name}: {len(read(store))} runs on file")
        one = partial(run_in, domain)
        complete(Boxed(task, setup.until), one, store, 1, lambda said: None, on)


def finished(done: Losses, sweep: Sweep) -> Losses:
    """The runs of complete cells."""
    if sweep.domain.name != NAME:
        return done
    cells = {job[:3] for job in done}
    parts = study(
        sweep.domain.ranks_swept, sweep.domain.ranks_swept, SEEDS, HALF, COARSE
    )
    whole = {
        cell
        for part in parts
        for cell in part.cells(NAME)
        if cell in cells and not part.grid([cell]).wanted(done)
    }
    return {
        job: loss
        for job, loss in done.items()
        if job[:3] in whole or job in sweep.tasks[0].jobs
    }


HEADS = ("domain", "configuration", "ranks", "seeds", "by the vertex", "by the cliff")


def blocks(setup: Setup) -> Iterator[str]:
    """Tables of exponents and claims, beside the exponents of the CPU's one seed."""
    sweep = sweep_of(setup)
    done = finished(read(sweep.store), sweep)
    if not done:
        return
    laws = {} if setup.smallest else LAWS
    rows = list(exponents(done, sweep.domain.name, laws))
    if not setup.smallest:
        on_cpu = exponents(read(STORES / f"{NAME}.jsonl"), NAME, laws)
        rows += [["the same on a CPU", *row[1:]] for row in on_cpu]
    yield block("SmolLM2: exponent of the best rate in rank", [*HEADS, *laws], rows)
    if not setup.smallest:
        yield block(
            "SmolLM2: the paper's claims",
            ["domain", "claim", "verdict", "numbers"],
            list(claims(done, NAME)),
        )
    yield made_with(machines(sweep.store))
