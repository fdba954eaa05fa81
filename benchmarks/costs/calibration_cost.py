"""Processor time that a calibration needs between two runs, as trials add up.

    python benchmarks/costs/calibration_cost.py    # results/calibration_cost.md, half a minute

Runs have ten steps and cost nothing themselves: two ranks, made-up noisy losses around 2^-7, a study in memory. Each
row is a number of trials, with the mean over the ten trials around it. The time includes a bracket, a proposal, a fit,
reports and storage.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from made_up import train
from recording import machine, record

import rankaware_optim as ra

RESTS_ON = ()  # times: made again at a release
AT = (31, 100, 200, 400)
BAR = (200, 50.0)  # at 200 trials, milliseconds a trial at most


def main() -> None:
    """Run one study, print the table, and write it to the results. Exit with status 1 if the bar is missed."""
    torch.set_num_threads(1)
    on, begun = machine(threads=1), []

    def timed(trial: Any) -> Iterator[float]:
        begun.append(time.process_time())
        yield from train(trial)

    ra.calibrate(
        timed, "adamw", ranks=(2, 64), steps=10, trials=AT[-1] + 6, progress=False
    )
    cost = {at: (begun[at + 5] - begun[at - 5]) * 100 for at in AT}
    rows = [
        {"trials": at, "ms a trial": ms, "met": at != BAR[0] or ms <= BAR[1]}
        for at, ms in cost.items()
    ]
    notes = [
        f"Bar: {BAR[1]:g} ms at {BAR[0]} trials. Means over ten trials, processor time of one thread."
    ]
    record(
        "calibration_cost", "What a calibration costs between two runs", rows, on, notes
    )
    sys.exit(not all(row["met"] for row in rows))


if __name__ == "__main__":
    main()
