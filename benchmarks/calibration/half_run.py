"""Is half a run enough? Four trials of an eighth of a run at one rank, from a rate that may be far off.

    python benchmarks/calibration/half_run.py    # results/half_run.md, some minutes on two cores

A user has a guess of the rate, moved from elsewhere or suggested. `calibrate(ranks=(r,), steps=N / 8, target_steps=N,
trials=4, lr_range=(guess / 16, 16 * guess))` costs half of a run of N steps. The recipe's rates are scored at r, and at
other ranks. Regret is a share of the gain. Nothing is trained: losses come from stored sweeps, by the study's spline.

**Rules**, written before any way was scored.

*Two sets of cells.* (1) "An eighth": the six tasks of `study/longer.py`, N of 200, 400 and 800 steps, tuned at each of
its three LoRA arms. A trial's loss is that of a run of N / 8 steps. The rate is scored on the mean loss of runs of N
steps, at the rank tuned and, at Init[A], at the other rank (16 and 128). (2) "One length": nine tasks of the study
in three configurations, tuned at rank 64, a trial as long as the run. The rate is scored at every rank on file, and in
full finetuning. The goal counts the rank tuned and LoRA's ranks within a factor of 16 of it. Rank 1 and full
finetuning are shown.

*Draws.* 30 a cell. The guess is the sweep's best rate at the tuned rank (in the set "an eighth", at N steps), wrong by
up to three octaves: one uniform draw in each thirtieth of −3 to 3. Seeds come in an order that is drawn. It is given
as `lr_range`, a factor of 16 to either side. Beside it stands a search without a guess, from the package's first rate,
which happens to lie near the best rates of these tasks.

*The goal*: a median of at most 1 % and a 95th percentile of at most 6 %, in each of the two sets over all its tasks.

**Other ways were tried** (frozen answers of the guide). The first trial two octaves above the guess
loses more, three rates at once and the study's prior on the shape too. A larger margin below the fitted optimum, where
trials are shorter than the run, gains 2 points on the two language models and loses up to 1 where best rates rise with
the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from typing import NamedTuple

import click
import numpy as np
import torch
from calibration.make_recipes import rate_of
from calibration.simulated import reference_of, run
from calibration.studies import STEPS, search
from calibration.surfaces import Surface, study_surfaces, surface_of
from internals import Options, Settled, calibrated_recipe
from recording import RESULTS, block, machine, made_on, number
from study.domains import HELD_OUT, STUDY
from study.grids import FULL, Job
from study.longer import AT_A, MARK, on_file, steps_of
from study.loss_curves import DIVERGED

from rankaware_optim.laws import PRIOR_LAW, get_law

RESTS_ON = ("calibration",)
EIGHTH, ONE = "an eighth", "one length"
TUNED = 64  # of the surfaces of one length
NEAR = 16  # factor between ranks within which the goal counts
OFF = 3.0  # octaves by which the guess is wrong at most
RANGE = 4.0  # octaves on either side of the guess
RUNS, FOUR = (3, 4, 5, 6, 8), 4
DRAWS = 30
GOAL = (0.01, 0.06)  # most that is lost: median, 95th percentile
FROM, NONE = "from the guess", "without a guess"


# --- what is tuned --------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What is tuned: the surface of the trials, that of the run, the rank, and the steps of both."""

    within: str
    trials: Surface
    run: Surface
    rank: int
    steps: int
    target: int

    @property
    def best(self) -> float:
        """log2 of the best rate of the run's sweep."""
        return min(self.run.rates[self.rank], key=self.run.mean[self.rank])


@cache
def cells() -> list[Cell]:
    return [*of_an_eighth(), *of_one_length()]


def of_an_eighth() -> Iterator[Cell]:
    """The cells whose trials have an eighth of the run's steps."""
    arms = ((AT_A, 16), (AT_A, 128), ("Init[B], s = 1", 64))
    for task, done in on_file().items():
        for config, rank in arms:
            for target in (200, 400, 800):
                steps = target // 8
                on = (
                    surface_of(task, config, of_length(done, each))
                    for each in (steps, target)
                )
                yield Cell(EIGHTH, *on, rank, steps, target)


def of_length(done: Mapping[Job, float | None], steps: int) -> dict[Job, float | None]:
    """The runs of a length under their configurations' names, and the losses before training."""
    kept = {}
    for job, loss in done.items():
        config, mark, _ = job.scheme.partition(MARK)
        if not mark or steps_of(job.scheme) == steps:
            kept[job._replace(scheme=config)] = loss
    return kept


def of_one_length() -> Iterator[Cell]:
    for on in study_surfaces((*STUDY, *HELD_OUT)):
        yield Cell(ONE, on, on, TUNED, STEPS, STEPS)


# --- one draw -------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a draw's recipe loses at a rank; `FULL` is full finetuning.

    Args:
        tuned: the rank tried.
        runs: the trials.
        rank: where the rate is scored.
        lost: its regret; `DIVERGED` where every trial diverged.
    """

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
    def is_near(self) -> bool:
        """Whether the goal counts the rank."""
        low, high = sorted((self.rank, self.tuned))
        return low != FULL and high <= NEAR * low


def all_outcomes(ways: Sequence[str], draws: int, workers: int) -> list[Outcome]:
    on_each = partial(outcomes, ways=ways, draws=draws)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(chain.from_iterable(pool.map(on_each, range(len(cells())))))


def outcomes(index: int, ways: Sequence[str], draws: int) -> list[Outcome]:
    """The outcomes of a cell at every rank on file, by ways and numbers of trials."""
    torch.set_num_threads(1)
    of, found = cells()[index], []
    name = of.within, of.run.domain, of.run.config, of.rank, of.target
    for draw in range(draws):
        rng = np.random.default_rng((index, draw))
        seeds = tuple(int(seed) for seed in rng.permutation(of.trials.seeds)[:2])
        off = OFF * (2 * (draw + rng.uniform()) / draws - 1)
        for way in ways:
            guess = of.best + off if way == FROM else None
            for runs, lost in regrets_of(of, guess, seeds):
                for rank, regret in lost.items():
                    found.append(Outcome(*name, way, runs, draw, rank, regret))
    return found


def regrets_of(
    of: Cell, guess: float | None, seeds: tuple[int, ...]
) -> Iterator[tuple[int, dict[int, float]]]:
    """The number of trials, and what the recipe then loses, by rank. guess: log2 of the rate, if there is one."""
    around = None
    if guess is not None:
        around = 2.0 ** (guess - RANGE), 2.0 ** (guess + RANGE)
    options = Options(
        torch.optim.AdamW,
        get_law(PRIOR_LAW),
        (of.rank,),
        seeds,
        of.steps,
        trials=max(RUNS),
        lr_range=around,
        target_steps=of.target,
    )
    reference = reference_of(of.trials, of.rank)
    settled = Settled(reference, of.trials.full_fan_in, {})
    made = search(options, settled, 0.0, partial(run, of.trials))
    for runs, calibration in enumerate(made, start=1):
        if runs not in RUNS:
            continue
        if calibration.fit() is None:
            yield runs, dict.fromkeys(of.run.mean, DIVERGED)
            continue
        recipe, lost = calibrated_recipe(calibration), {}
        for rank, regret in of.run.mean.items():
            rate, _, _ = rate_of(recipe, of.run.config, rank)
            lost[rank] = regret(rate)
        yield runs, lost


# --- the page -------------------------------------------------------------------------------------------------------

PLACES = (
    "an eighth: rank tuned",
    "at 8 times or an eighth of it",
    "one length: rank tuned",
    "within a factor of 16",
)


@click.command()
@click.option("--draws", default=DRAWS, show_default=True, help="Of every cell.")
@click.option("--workers", default=2, show_default=True)
def main(draws: int, workers: int) -> None:
    """Simulate all draws, and write results/half_run.md."""
    on, found = machine(1), all_outcomes((FROM, NONE), draws, workers)
    parts = [
        "# Half a run",
        (__doc__ or "").strip(),
        *verdicts(found),
        block(
            "Lost by the number of trials, %: median / 95th percentile",
            ("way", "trials", *PLACES),
            list(of_ways(found)),
        ),
        block(
            "Lost by four trials from the guess, %: median / 95th percentile",
            (
                "task",
                "an eighth",
                "one length",
                "one length, rank 1",
                "an eighth, full",
                "one length, full",
            ),
            list(of_tasks(found)),
        ),
        made_on(on),
    ]
    (RESULTS / "half_run.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts[2:-1]))


def verdicts(found: Sequence[Outcome]) -> Iterator[str]:
    """Which numbers of trials meet the goal, in sentences."""
    for within in (EIGHTH, ONE):
        lost = {
            runs: lost_by(found, FROM, runs, within, (True, False)) for runs in RUNS
        }
        met = [str(runs) for runs, each in lost.items() if meets(each)]
        said = ", ".join(f"{runs}: {in_words(each)}" for runs, each in lost.items())
        yield (
            f"{within.capitalize()}, from the guess: the goal is met by {', '.join(met) or 'no number of'} trials"
            f" ({said})."
        )


def of_ways(found: Sequence[Outcome]) -> Iterator[list[str]]:
    for way in (FROM, NONE):
        for runs in RUNS:
            cells = [
                in_words(lost_by(found, way, runs, within, (tuned,)))
                for within in (EIGHTH, ONE)
                for tuned in (True, False)
            ]
            yield [way, str(runs), *cells]


def of_tasks(found: Sequence[Outcome]) -> Iterator[list[str]]:
    """Rows of the table: what four trials lose on each task, and where the goal counts nothing."""
    for task in dict.fromkeys(o.task for o in found):
        mine = [o for o in found if o.task == task and o.way == FROM and o.runs == FOUR]
        near = [
            [o.lost for o in mine if o.within == within and o.is_near]
            for within in (EIGHTH, ONE)
        ]
        far = [
            [o.lost for o in mine if o.within == within and o.rank == rank]
            for within, rank in ((ONE, 1), (EIGHTH, FULL), (ONE, FULL))
        ]
        yield [task, *map(in_words, near), *map(in_words, far)]


def lost_by(
    found: Sequence[Outcome],
    way: str,
    runs: int,
    within: str,
    tuned: Sequence[bool],
) -> list[float]:
    """The regrets that the goal counts, at the rank tuned (True), at others (False), or at both."""
    asked = way, runs, within
    return [
        o.lost
        for o in found
        if (o.way, o.runs, o.within) == asked
        and o.is_near
        and (o.rank == o.tuned) in tuned
    ]


def in_words(lost: Sequence[float]) -> str:
    """Median / 95th percentile, in %."""
    if not lost:
        return "–"
    median, high = np.quantile(lost, (0.5, 0.95))
    return f"{number(100 * median, 1)} / {number(100 * high, 1)}"


def meets(lost: Sequence[float]) -> bool:
    """Whether regrets meet the goal."""
    median, high = np.quantile(lost, (0.5, 0.95))
    return bool(median <= GOAL[0] and high <= GOAL[1])


if __name__ == "__main__":
    main()
