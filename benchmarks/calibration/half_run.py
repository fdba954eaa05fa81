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

**Outcome.** "From the guess" was chosen, and wins on the judging tasks. It is what `lr_range` does now: the first trial
has the rate in its middle. Three rates at once, and the study's prior on the shape, lose more on the choosing tasks. A
larger margin for the length gains 2 points on the two language models, and loses up to 1 where best rates rise
with the steps. On tasks left out its interval holds 0, so it does not enter. Five trials meet the goal in both sets;
four miss it by .3 points at the 95th percentile of the first.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from typing import NamedTuple

import click
import numpy as np
import torch
from calibration.simulated import reference_of, run
from calibration.studies import STEPS, search
from calibration.surfaces import Surface, study_surfaces, surface_of
from internals import Z90, Calibration, Options, Settled, calibrated_recipe
from recording import RESULTS, block, machine, made_on, number
from study.configurations import CONFIGS
from study.domains import HELD_OUT, STUDY
from study.grids import FULL, Job
from study.longer import AT_A, MARK, on_file, steps_of
from study.loss_curves import DIVERGED
from study.regret import in_points

from rankaware_optim import RankAwareWarning, Recipe
from rankaware_optim.fitting import _loss_model as shapes
from rankaware_optim.laws import PRIOR_LAW, get_law

RESTS_ON = ("search.adam", "calibration.adam", "scores")
EIGHTH, ONE, TWO = "an eighth", "one length", "an eighth, two ranks"
TUNED = 64  # of the surfaces of one length
NEAR = 16  # factor between ranks within which the goal counts
OFF = 3.0  # octaves by which the guess is wrong at most
RANGE = 4.0  # octaves on either side of the first trial, as in the package
RUNS, FOUR, SIXTEEN = (3, 4, 5, 6, 8), 4, 16
DRAWS = 30
GOAL = (0.01, 0.06)  # most that is lost: median, 95th percentile
MARGINS = (0.25, 0.5, 0.75, 1.0)  # octaves: the first is the package's
CHOOSING = ("image_generation", "language", "vision_language", "language_smollm2")
JUDGING = (
    "vision_classification",
    "reinforcement",
    "text_classification",
    "super_resolution",
    "audio",
    "time_series",
)
AT_B = "Init[B], s = 1"

AS_IT_IS, FROM, THREE = "as it is", "from the guess", "three at once"
NONE = "without a guess"
# octaves of the first trials above the guess
WAYS: Mapping[str, tuple[float, ...]] = {
    AS_IT_IS: (2.0,),
    FROM: (0.0,),
    THREE: (0.0, -2.0, 2.0),
    NONE: (),
}
CHOSEN = FROM
PACKAGE = FROM  # the way that is half a run, in the package
SHAPED = ", the study's shape"
ALL_WAYS = (*WAYS, *(way + SHAPED for way in (AS_IT_IS, FROM, THREE)))


# --- what is tuned --------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What is tuned: the surface of the trials, that of the run, the ranks tried, and the steps of both."""

    within: str
    trials: Surface
    run: Surface
    ranks: tuple[int, ...]
    steps: int
    target: int

    @property
    def best(self) -> float:
        """log2 of the best rate of the run's sweep, at the rank that is tried first."""
        rank = self.ranks[-1]
        return min(self.run.rates[rank], key=self.run.mean[rank])


@cache
def cells() -> list[Cell]:
    return [*of_an_eighth(), *of_one_length()]


def of_an_eighth() -> Iterator[Cell]:
    """The cells whose trials have an eighth of the run's steps."""
    tried = (
        (EIGHTH, AT_A, (16,)),
        (EIGHTH, AT_A, (128,)),
        (EIGHTH, AT_B, (64,)),
        (TWO, AT_A, (16, 128)),
    )
    for task, done in on_file().items():
        for within, config, ranks in tried:
            for target in (200, 400, 800):
                steps = target // 8
                on = (
                    surface_of(task, config, of_length(done, each))
                    for each in (steps, target)
                )
                yield Cell(within, *on, ranks, steps, target)


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
        yield Cell(ONE, on, on, (TUNED,), STEPS, STEPS)


# --- one draw -------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a draw's recipe loses at a rank; `FULL` is full finetuning.

    Args:
        tuned: the ranks tried.
        runs: the trials.
        rank: where the rate is scored.
        lost: its regret.
        with_margins: the same with each of `MARGINS`.
    """

    within: str
    task: str
    config: str
    tuned: tuple[int, ...]
    target: int
    way: str
    runs: int
    draw: int
    rank: int
    lost: float
    with_margins: tuple[float, ...]

    @property
    def is_near(self) -> bool:
        """Whether the goal counts the rank."""
        apart = [
            max(self.rank, tuned) / min(self.rank, tuned)
            for tuned in self.tuned
            if self.rank != FULL
        ]
        return min(apart, default=math.inf) <= NEAR


def outcomes(index: int, ways: Iterable[str], draws: int) -> list[Outcome]:
    """The outcomes of a cell at every rank on file, by ways and numbers of trials."""
    torch.set_num_threads(1)
    of, found = cells()[index], []
    if of.within == TWO:
        ways = {CHOSEN} & {*ways}
    for draw in range(draws):
        rng = np.random.default_rng((index, draw))
        seeds = tuple(int(seed) for seed in rng.permutation(of.trials.seeds)[:2])
        off = OFF * (2 * (draw + rng.uniform()) / draws - 1)
        for way in ways:
            for runs, recipe in recipes(of, way, of.best + off, seeds):
                for rank, regret in of.run.mean.items():
                    lost, *others = (
                        map(regret, rates_of(recipe, of.run, rank))
                        if recipe
                        else [DIVERGED] * (1 + len(MARGINS))
                    )
                    found.append(
                        Outcome(
                            of.within,
                            of.run.domain,
                            of.run.config,
                            of.ranks,
                            of.target,
                            way,
                            runs,
                            draw,
                            rank,
                            lost,
                            tuple(others),
                        )
                    )
    return found


def recipes(
    of: Cell, way: str, guess: float, seeds: tuple[int, ...]
) -> Iterator[tuple[int, Recipe | None]]:
    """The recipes of a way after the numbers of trials that are looked at; None where every run diverged."""
    wanted = (SIXTEEN,) if of.within == TWO else RUNS
    first = [guess + octaves for octaves in WAYS[way.removesuffix(SHAPED)]]
    around = None
    if first:
        around = 2.0 ** (first[0] - RANGE), 2.0 ** (first[0] + RANGE)
    options = Options(
        torch.optim.AdamW,
        get_law(PRIOR_LAW),
        of.ranks,
        seeds,
        of.steps,
        trials=max(wanted),
        lr_range=around,
        target_steps=of.target,
    )
    reference = reference_of(of.trials, of.ranks[-1])
    settled = Settled(reference, of.trials.full_fan_in, {})
    with shaped(way.endswith(SHAPED)):
        made = search(options, settled, 0.0, partial(run, of.trials), first)
        for runs, calibration in enumerate(made, start=1):
            if runs in wanted:
                yield runs, made_of(calibration)


def made_of(calibration: Calibration) -> Recipe | None:
    return calibrated_recipe(calibration) if calibration.fit() else None


def rates_of(recipe: Recipe, on: Surface, rank: int) -> list[float]:
    """log2 of the recipe's rate at a rank, and of its rates with each of `MARGINS`."""
    with warnings.catch_warnings():
        # extrapolations are asked for on purpose
        warnings.simplefilter("ignore", RankAwareWarning)
        rate = (
            recipe.at(method="full")
            if rank == FULL
            else recipe.at(rank, alpha=CONFIGS[on.config].alpha(rank))
        )
    low, high = math.log2(rate.low), math.log2(rate.high)
    best, sd = (low + high) / 2, (high - low) / 2 / Z90
    wanted = recipe.steepness * sd * sd / 2
    return [math.log2(rate.lr), *(best - min(wanted, most) for most in MARGINS)]


# --- the study's shape of the loss ------------------------------------------------------------------------------------

KEPT = 0.9  # share of the fitted weights; the rest is flat


@contextmanager
def shaped(wanted: bool) -> Iterator[None]:
    """Let fits have the choosing tasks' prior on the shape."""
    before = shapes._LOG_PRIOR
    if wanted:
        shapes._LOG_PRIOR = before + shape_prior()
    yield
    shapes._LOG_PRIOR = before


@cache
def shape_prior() -> np.ndarray:
    """log of the weight of every shape, by h, a and k apart, fitted to the choosing tasks by 30 rounds of EM."""
    sizes = [
        len(values)
        for values in (
            shapes.NOISE,
            shapes.REACH,
            shapes.STEEPNESS,
            shapes.CURVATURE,
        )
    ]
    fits = []
    for arm in choosing_arms():
        weights = shapes.bowls_of({TUNED: arm}).log_weight.reshape(-1, *sizes)
        fits.append(np.logaddexp.reduce(weights, axis=0))
    log = np.zeros(sizes)
    for _ in range(30):
        posterior = np.exp(fits + log - np.max(fits + log, (1, 2, 3, 4), keepdims=True))
        posterior /= posterior.sum((1, 2, 3, 4), keepdims=True)
        mean, log = posterior.mean(0), np.zeros(sizes)
        for axis in (1, 2, 3):
            others = tuple(at for at in range(4) if at != axis)
            share = KEPT * mean.sum(others, keepdims=True) + (1 - KEPT) / sizes[axis]
            log = log + np.log(share)
    return log.ravel()


def choosing_arms() -> Iterator[shapes.Arm]:
    """The sweeps of the choosing tasks, each rank apart."""
    arms = {}
    for of in cells():
        if of.run.domain not in CHOOSING:
            continue
        on = of.trials
        for rank in of.ranks if of.within == EIGHTH else on.ranks:
            rows = [
                (x, on.by_seed[rank, seed](x), seed)
                for seed in on.seeds
                for x in on.rates[rank]
            ]
            x, gap, seed = map(np.array, zip(*rows, strict=True))
            arm = shapes.Arm(x, np.minimum(gap - gap.min(), shapes.CAP), seed)
            arms[of.within, on.domain, on.config, of.steps, rank] = arm
    yield from arms.values()


# --- all draws --------------------------------------------------------------------------------------------------------


def all_outcomes(
    ways: Sequence[str], draws: int, workers: int, tasks: Sequence[str] | None = None
) -> list[Outcome]:
    indices = [
        index
        for index, of in enumerate(cells())
        if tasks is None or of.run.domain in tasks
    ]
    on_each = partial(outcomes, ways=ways, draws=draws)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(chain.from_iterable(pool.map(on_each, indices)))


def four_trials(draws: int = DRAWS, workers: int = 2) -> list[Outcome]:
    """What half a run loses by the package as it is: the outcomes of four trials in every cell, at every rank.

    `Outcome.within` is `EIGHTH` (trials of an eighth of the run) or `ONE` (nine tasks, trials of one length).
    """
    return [
        o
        for o in all_outcomes((PACKAGE,), draws, workers)
        if o.runs == FOUR and o.within != TWO
    ]


# --- scores ---------------------------------------------------------------------------------------------------------

Kept = Callable[[Outcome], float]


def own(of: Outcome) -> float:
    return of.lost


def with_margin(size: int) -> Kept:
    return lambda of: of.with_margins[size]


def by_task(
    found: Sequence[Outcome],
    way: str,
    runs: int = FOUR,
    sets: Sequence[str] = (EIGHTH, ONE),
    lost: Kept = own,
) -> dict[str, float]:
    """A way's score on each task: the mean over its sets of the mean regret that the goal counts."""
    regrets: dict[str, dict[str, list[float]]] = {}
    for o in found:
        if (o.way, o.runs) == (way, runs) and o.within in sets and o.is_near:
            in_set = regrets.setdefault(o.task, {}).setdefault(o.within, [])
            in_set.append(min(lost(o), 1.0))
    return {
        task: statistics.fmean(map(statistics.fmean, of_task.values()))
        for task, of_task in regrets.items()
    }


def mean_of(scores: Mapping[str, float], tasks: Iterable[str] | None = None) -> float:
    """A way's score over tasks: those named that it has, or all."""
    wanted = scores if tasks is None else scores.keys() & {*tasks}
    return statistics.fmean(scores[task] for task in wanted)


def differences(
    found: Sequence[Outcome], way: str, other: str, tasks: Iterable[str]
) -> str:
    """What a way loses more than another with four trials, over tasks: the mean in points, and its interval."""
    one, two = (by_task(found, each) for each in (way, other))
    return in_points([[one[task] - two[task]] for task in tasks if task in one])


def regrets(
    found: Sequence[Outcome], way: str, runs: int, within: str, tuned: bool | None
) -> list[float]:
    """The regrets that the goal counts, at the rank tuned or at others, or both (None)."""
    return [
        o.lost
        for o in found
        if (o.way, o.runs, o.within) == (way, runs, within)
        and o.is_near
        and tuned in (None, o.rank in o.tuned)
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


# --- the length -----------------------------------------------------------------------------------------------------


def left_out(
    found: Sequence[Outcome], way: str
) -> Iterator[tuple[str, int, float, float]]:
    """Each task of the first set: the size of the margin that the others choose, and its score by the first and by it."""
    scores = [
        by_task(found, way, sets=(EIGHTH,), lost=with_margin(size))
        for size in range(len(MARGINS))
    ]
    for task in scores[0]:
        others = scores[0].keys() - {task}
        size = min(range(len(MARGINS)), key=lambda at: mean_of(scores[at], others))
        yield task, size, scores[0][task], scores[size][task]


def length_difference(found: Sequence[Outcome], way: str) -> str:
    return in_points([[after - before] for _, _, before, after in left_out(found, way)])


# --- the page -------------------------------------------------------------------------------------------------------

PLACES = (
    "an eighth: rank tuned",
    "at 8 times or an eighth of it",
    "one length: rank tuned",
    "within a factor of 16",
)


def of_ways(found: Sequence[Outcome]) -> Iterator[list[str]]:
    """Rows of the table: a way with a number of trials, median / 95th percentile by place, and its score."""
    for way in dict.fromkeys(o.way for o in found):
        for runs in RUNS:
            cells = [
                in_words(regrets(found, way, runs, within, tuned))
                for within in (EIGHTH, ONE)
                for tuned in (True, False)
            ]
            score = mean_of(by_task(found, way, runs))
            yield [way, str(runs), *cells, number(100 * score)]


def of_tasks(found: Sequence[Outcome], way: str) -> Iterator[list[str]]:
    """Rows of the table: what four trials lose on each task, and where the goal counts nothing."""
    for task in dict.fromkeys(o.task for o in found):
        mine = [o for o in found if o.task == task]
        near = [
            in_words(regrets(mine, way, FOUR, within, None)) for within in (EIGHTH, ONE)
        ]
        far = [
            [
                o.lost
                for o in mine
                if (o.way, o.runs, o.within) == (way, FOUR, within)
                and not o.is_near
                and (o.rank == FULL) == full
            ]
            for full, within in ((False, ONE), (True, EIGHTH), (True, ONE))
        ]
        yield [task, *near, *map(in_words, far)]


def of_goal(found: Sequence[Outcome], way: str) -> Iterator[str]:
    """Whether each number of trials meets the goal, in sentences."""
    for within in (EIGHTH, ONE):
        lost = {runs: regrets(found, way, runs, within, None) for runs in RUNS}
        enough = [runs for runs in RUNS if meets(lost[runs])]
        said = "; ".join(f"{runs}: {in_words(each)}" for runs, each in lost.items())
        met = (
            f"{enough[0]} trials meet the goal"
            if enough
            else "no number of trials meets the goal"
        )
        yield f"{within.capitalize()}, {way}: {met} (trials: median / 95th percentile, %: {said})."


def of_margins(found: Sequence[Outcome], way: str) -> Iterator[list[str]]:
    """Rows of the table: a task left out, the margin that the others choose, and what it loses."""
    for task, size, before, after in left_out(found, way):
        chosen = with_margin(size)
        both = [
            by_task(found, way, SIXTEEN, (TWO,), lost)[task]
            for lost in (with_margin(0), chosen)
        ]
        numbers = (number(100 * each) for each in (before, after, *both))
        yield [task, number(MARGINS[size]), *numbers]


def of_sizes(found: Sequence[Outcome], way: str) -> Iterator[list[str]]:
    """Rows of the table: a size of the margin, and the score of four trials, and of sixteen at two ranks, by task."""
    for runs, within in ((FOUR, EIGHTH), (SIXTEEN, TWO)):
        for size, most in enumerate(MARGINS):
            scores = by_task(found, way, runs, (within,), with_margin(size))
            numbers = (number(100 * each) for each in scores.values())
            yield [str(runs), number(most), *numbers, number(100 * mean_of(scores))]


@click.command()
@click.option("--draws", default=DRAWS, show_default=True, help="Of every cell.")
@click.option("--workers", default=2, show_default=True)
def main(draws: int, workers: int) -> None:
    """Simulate all ways, and write results/half_run.md."""
    on = machine(1)
    on_choosing = all_outcomes(ALL_WAYS, draws, workers, CHOOSING)
    on_judging = all_outcomes((AS_IT_IS, CHOSEN, NONE), draws, workers, JUDGING)
    text = page(on_choosing, on_judging)
    (RESULTS / "half_run.md").write_text(f"{text}\n\n{made_on(on)}\n")
    click.echo(text)


def page(on_choosing: Sequence[Outcome], on_judging: Sequence[Outcome]) -> str:
    found = [*on_choosing, *on_judging]
    more = differences(on_judging, CHOSEN, AS_IT_IS, JUDGING)
    heads = ("way", "trials", *PLACES, "score")
    tasks = [*by_task(found, CHOSEN, sets=(EIGHTH,))]
    parts = [
        "# Half a run",
        __doc__ or "",
        f"On the judging tasks a search {CHOSEN} loses {more} points more than {AS_IT_IS}, with four trials.",
        *of_goal(found, CHOSEN),
        *of_goal(found, AS_IT_IS),
        f"The larger margin, on tasks left out: {length_difference(found, CHOSEN)} points more than .25 octaves.",
        block("Ways, on the choosing tasks", heads, list(of_ways(on_choosing))),
        block("Ways, on the judging tasks", heads, list(of_ways(on_judging))),
        block(
            "A larger margin for the length",
            ("trials", "at most", *tasks, "mean"),
            list(of_sizes(found, CHOSEN)),
        ),
        block(
            "The same on tasks left out",
            (
                "task",
                "margin of the others",
                "four: .25",
                "with it",
                "sixteen: .25",
                "with it",
            ),
            list(of_margins(found, CHOSEN)),
        ),
        block(
            "Four trials by task",
            (
                "task",
                "an eighth",
                "one length",
                "rank 1",
                "an eighth: full",
                "one length: full",
            ),
            list(of_tasks(found, CHOSEN)),
        ),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
