"""Does a domain's score measure what it should? Reinforcement learning and vision-language against their controls.

Each is trained at rank 16, Init[A], s = 1, at rate 2^-10, on three seeds. The rate was written down before any run.
Reinforcement: accuracy at temperature 1 before training (which is what a rate of 0 leaves), after GRPO, and after GRPO
with rewards dealt to the wrong prompts. Vision-language: how much worse, in nats a token, a held-out caption fits
another picture than its own; and the same after training with every picture beside another one's caption.

    python benchmarks/study/controls.py             # results/controls.json and .md, a few minutes
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import click
import torch
from recording import machine, record
from study.configurations import START, run_in
from study.domains import Domain
from study.domains.reinforcement import DOMAIN as REINFORCEMENT
from study.domains.reinforcement import SHUFFLED
from study.domains.vision_language import DOMAIN as VISION_LANGUAGE
from study.domains.vision_language import MISMATCHED, gap
from study.grids import FULL, Job, or_inf
from study.training import WARMUP

RESTS_ON = ()  # outcomes: made again at a release
SCHEME, RANK, X, SEEDS = "Init[A], s = 1", 16, -10.0, 3
ACCURACY, GAP = "accuracy", "gap, nats a token"


@click.command()
def main() -> None:
    """Train the domains and their controls, print the table, and write it."""
    torch.set_num_threads(1)
    on = machine(1)
    right, wrong = (
        replace(domain, evaluate=gap) for domain in (VISION_LANGUAGE, MISMATCHED)
    )
    rows = [
        row(REINFORCEMENT, "before training: a rate of 0", ACCURACY, -1.0, START),
        row(REINFORCEMENT, "trained", ACCURACY, -1.0),
        row(SHUFFLED, "rewards dealt to the wrong prompts", ACCURACY, -1.0),
        row(right, "before training: a new projector", GAP, 1.0, START),
        row(right, "trained", GAP, 1.0),
        row(wrong, "every picture with another's caption", GAP, 1.0),
    ]
    record("controls", "Controls", rows, on, [(__doc__ or "").partition("\n\n    ")[0]])


def row(
    domain: Domain, what: str, measure: str, sign: float, scheme: str = SCHEME
) -> dict[str, Any]:
    """A row of the table: mean and seeds of a control. `sign` turns the domain's score into the measure."""
    rank = FULL if scheme == START else RANK
    found = [
        sign * or_inf(run_in(domain, Job(domain.name, scheme, rank, X, seed), WARMUP))
        for seed in range(SEEDS)
    ]
    by_seed = ", ".join(f"{value:.3f}" for value in found)
    mean = statistics.fmean(found)
    return {
        "domain": domain.name,
        "what": what,
        "measure": measure,
        "mean": mean,
        "by seed": by_seed,
    }


if __name__ == "__main__":
    main()
