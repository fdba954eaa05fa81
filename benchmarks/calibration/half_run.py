"""Is half a run enough? Four trials of an eighth of a run at one rank, from a rate that may be far off.

    python benchmarks/calibration/half_run.py    # results/half_run.md, some minutes on two cores

A user has a guess of the rate, moved from elsewhere or suggested. `calibrate(ranks=(r,), steps=N / 8, target_steps=N,
trials=4)` costs half of a run of N steps. The recipe's rates are scored at r, and at other ranks. Regret is a share of
the gain. Nothing is trained: losses come from stored sweeps, by the study's spline.

**Rules**, written before any way was scored.

*Two sets of cells.* (1) "An eighth": the six tasks of `study/longer.py`, N of 200, 400 and 800 steps, tuned at each of
its three LoRA arms. A trial's loss is that of a run of N / 8 steps. The rate is scored on the mean loss of runs of N
steps, at the rank tuned and, at Init[A], at the other rank (16 and 128). (2) "One length": nine tasks of the study
in three configurations, tuned at rank 64, a trial as long as the run. The rate is scored at every rank on file, and in
full finetuning. The goal counts the rank tuned and LoRA's ranks within a factor of 16 of it. Rank 1 and full
finetuning are shown.

*Draws.* 30 a cell. The guess is the sweep's best rate at the tuned rank (in the set "an eighth", at N steps), wrong by
up to three octaves: one uniform draw in each thirtieth of −3 to 3. Seeds come in an order that is drawn.

*Ways*, the simplest first, each with 3, 4, 5, 6 and 8 trials. "As it is": the package's search, whose first trial lies
two octaves above the guess, as it lies above the usual rate where no guess is given. "From the guess": the first trial
is the guess. "Three at once": the guess and two octaves on either side, one round for three workers; the rest as the
package refines. Each of them with the study's prior on the shape of the loss, which is fitted to the surfaces of the
choosing tasks only.

*Which tasks choose and which judge.* Image generation, language, vision-language and SmolLM2 choose. Vision
classification, reinforcement, text classification, super resolution, audio and time series judge. Nothing is looked at
on these before the choice is made. A way's score is the mean over tasks of its mean regret with four trials at the
ranks that the goal counts, both sets of cells alike; a regret counts as 1 at most, since no more than the gain is lost.
The way with the lowest score on the choosing tasks is chosen; within .1 points the simpler one.

*A win beyond the spread*: on the judging tasks the chosen way's score lies below that of "as it is", by a paired
difference whose 95 % interval, over 10,000 bootstraps of the tasks, is below 0. Then it enters the package, if the
calibrations of 16 runs in `simulated.py` do not lose more by it. Otherwise nothing does.

*The length* (added when the choosing tasks had been looked at, and before any other). There half of a run loses most
because a rate that is best at N / 8 is too high at N. On other tasks it is too low: best rates rise with the steps in
super resolution and audio (`longer.md`, frozen). So a split by tasks says nothing of a way that concerns the length.
Such ways are judged on the first set by leaving each of its six tasks out. The ways: the recipe's margin below the
fitted optimum, a·sd²/2 and at most .25 octaves, may be at most .5, .75 or 1 octave where a trial has an eighth of the
run's steps. The size with the lowest score on five tasks is scored on the sixth, with the way of the search that was
chosen above. It is a win if, with four trials, the interval of the differences from .25 octaves over the six tasks lies
below 0, and if with 16 trials at ranks 16 and 128 the mean difference is not above 0.

*The goal*: a median of at most 1 % and a 95th percentile of at most 6 %, in each of the two sets over all its tasks,
by the package as it is left. If four trials do not reach it, the page says how many do.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import click
import numpy as np
import torch
from calibration.simulated import rate_of, reference_of, run
from calibration.studies import STEPS, search
from calibration.surfaces import Surface, study_surfaces, surface_of
from internals import Options, Settled, calibrated_recipe
from study.domains import HELD_OUT, STUDY
from study.grids import FULL
from study.longer import AT_A, MARK, TASKS, on_file, steps_of

from rankaware_optim import RankAwareWarning
from rankaware_optim.laws import PRIOR_LAW, get_law

RESTS_ON = ("search.adam", "calibration.adam", "scores")
EIGHTH, ONE = "an eighth", "one length"
TUNED = 64  # of the surfaces of one length
NEAR = 16  # factor between ranks within which the goal counts
OFF = 3.0  # octaves by which the guess is wrong at most
RANGE = 4.0  # octaves on either side of the first trial, as in the package
RUNS = (3, 4, 5, 6, 8)
DRAWS = 30
CHOOSING = ("image_generation", "language", "vision_language", "language_smollm2")


class Cell(NamedTuple):
    """What is tuned: the surface of the trials, that of the run, the rank, and the steps of both."""

    within: str
    trials: Surface
    run: Surface
    rank: int
    steps: int
    target: int


@cache
def cells() -> list[Cell]:
    return [*eighths(), *of_one_length()]


def eighths() -> Iterator[Cell]:
    """The cells whose trials have an eighth of the run's steps."""
    for task, done in on_file().items():
        for config, ranks in {AT_A: (16, 128), "Init[B], s = 1": (64,)}.items():
            for target in (200, 400, 800):
                of_trials, of_run = (
                    surface_of(task, config, of_length(done, steps))
                    for steps in (target // 8, target)
                )
                for rank in ranks:
                    yield Cell(EIGHTH, of_trials, of_run, rank, target // 8, target)


def of_length(done, steps: int):
    """The runs of a length, under the names of their configurations, and the losses before training."""
    kept = {}
    for job, loss in done.items():
        config, mark, _ = job.scheme.partition(MARK)
        if not mark or steps_of(job.scheme) == steps:
            kept[job._replace(scheme=config)] = loss
    return kept


def of_one_length() -> Iterator[Cell]:
    for on in study_surfaces((*STUDY, *HELD_OUT)):
        yield Cell(ONE, on, on, TUNED, STEPS, STEPS)


class Outcome(NamedTuple):
    """What a draw's recipe loses at a rank; `FULL` is full finetuning."""

    within: str
    task: str
    config: str
    tuned: int
    target: int
    way: str
    runs: int
    draw: int
    rank: int
    lost: float

    @property
    def counts(self) -> bool:
        """Whether the goal counts it."""
        near = max(self.rank, self.tuned) <= NEAR * min(self.rank, self.tuned)
        return self.rank != FULL and near


AS_IT_IS, FROM, THREE, NONE = (
    "as it is",
    "from the guess",
    "three at once",
    "without a guess",
)
# octaves of the first trials from the guess
WAYS = {AS_IT_IS: (2.0,), FROM: (0.0,), THREE: (0.0, -2.0, 2.0), NONE: ()}


def outcomes(of: Cell, index: int, ways: Sequence[str], draws: int) -> Iterator[Outcome]:
    for draw in range(draws):
        rng = np.random.default_rng((index, draw))
        seeds = tuple(int(seed) for seed in rng.permutation(of.trials.seeds)[:2])
        off = OFF * (2 * (draw + rng.uniform()) / draws - 1)
        guess = min(of.run.rates[of.rank], key=of.run.mean[of.rank]) + off
        for way in ways:
            for runs, lost in by_way(of, way, guess, seeds):
                for rank, regret in lost.items():
                    yield Outcome(
                        of.within, of.run.domain, of.run.config, of.rank, of.target, way, runs, draw, rank, regret,
                    )


def by_way(of: Cell, way: str, guess: float, seeds: tuple[int, ...]) -> Iterator[tuple[int, dict[int, float]]]:
    first = [guess + octaves for octaves in WAYS[way]]
    around = first and (2.0 ** (first[0] - RANGE), 2.0 ** (first[0] + RANGE))
    options = Options(
        torch.optim.AdamW, get_law(PRIOR_LAW), (of.rank,), seeds, of.steps,
        trials=max(RUNS), lr_range=around or None, target_steps=of.target,
    )
    settled = Settled(reference_of(of.trials, of.rank), of.trials.full_fan_in, {})
    made = search(options, settled, 0.0, partial(run, of.trials), first)
    for runs, calibration in enumerate(made, start=1):
        if runs in RUNS:
            recipe = calibrated_recipe(calibration)
            yield runs, {rank: regret(rate_of(recipe, of.run, rank)[0]) for rank, regret in of.run.mean.items()}
