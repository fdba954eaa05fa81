"""What `suggest_lr` says for the study's tasks, at price 0: no run of a task enters it."""

from __future__ import annotations

import math

from study.configurations import reference_at
from study.domains import get_domain
from study.grids import FULL

from rankaware_optim import Reference
from rankaware_optim.transfer import Suggestion, suggest_lr

# The most common fan-in of each task's adapted layers, of two as common the first layer's: what `suggest_lr` reads off
# the network itself.
COMMON_WIDTHS = {
    "image_generation": 128,
    "vision_classification": 192,
    "language": 192,
    "reinforcement": 128,
    "vision_language": 192,
    "text_classification": 384,
    "language_smollm2": 576,
    "audio": 320,
    "time_series": 128,
}


def width_of(task: str, rank: int) -> float:
    """The width that a suggestion counts; at rank `FULL` the largest fan-in."""
    return get_domain(task).widths[1] if rank == FULL else float(COMMON_WIDTHS[task])


def suggestion_of(task: str, config: str, rank: int) -> Suggestion:
    """The suggestion for a task in a configuration at a rank, or in full finetuning at rank `FULL`."""
    width = width_of(task, rank)
    if rank == FULL:
        return suggest_lr(Reference(method="full", fan_in=width))
    at = reference_at(config, rank)
    return suggest_lr(Reference(at.rank, at.alpha, init=at.init, fan_in=width))


def suggested(task: str, config: str, rank: int) -> float:
    """log2 of the suggested rate."""
    return math.log2(suggestion_of(task, config, rank).lr)
