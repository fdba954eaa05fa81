"""Do the package's claims hold on two tasks that no choice saw?

    python benchmarks/study/suite.py --suite full --domain audio --domain time_series
    python benchmarks/calibration/make_recipes.py --domain audio --domain time_series --seed 1
    python benchmarks/calibration/longer.py sweep --domain audio     # then search; both for time_series too
    python benchmarks/laws/rest.py sweep --part "audio head"         # and "forecaster's norms and biases"
    python benchmarks/laws/decay.py sweep --domain audio             # and time_series
    python benchmarks/laws/other_optimizer.py sweep --domain audio   # and time_series
    python benchmarks/study/held_out.py                              # results/held_out.md

`audio` and `time_series` were added when every law, prior and default was in the package, and the rules of `longer.md`,
`rest.md`, `decay.md` and `other_optimizer.md` were committed. Each is run once and scored once. The figures of the
study's seven tasks are beside theirs.

**Rules**, committed before any run of the two. Over both tasks a claim holds where

* *a rate that is moved*: the default law's mean regret is at most that of keeping the rate, and that of the paper's law,
  or within half a point of the noise floor, in each of README's five settings;
* *a calibrated recipe*: its mean regret is at most twice that on the seven tasks, or within half a point of the noise
  floor, in each setting;
* *its bands*: at least 85 % of its 90 % bands hold the best rate;
* *a longer run*: a calibration of an eighth of the steps loses at most 1 % in the median and 5 % at the 95th percentile,
  and 88 % of its bands hold the best rate;
* *the rest of the model*: the default's mean regret is within .2 points of the lowest of the ways in `rest.md`;
* *weight decay*: the default's mean regret is within .2 points of the other way's;
* *another optimizer*: at least 85 % of the ratios lie within 1.645 times the left-out error of those that hold in
  `other_optimizer.md`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import click
from calibration import longer
from calibration.make_recipes import paths_of
from calibration.searches import rate_of
from laws import decay, other_optimizer, rest
from recording import RESULTS, block, machine, percent
from study.configurations import CONFIGS
from study.domains import HELD_OUT, STUDY
from study.moved_runs import sweeps
from study.regret import DEFAULT, FLOOR, MOVED_RUNS, RECIPE, Moved, means_of, moves
from study.runs_on_file import made_by, read
from study.suite import STORES, study_rates
from study.suite_tables import regrets_in, settings

from rankaware_optim import Recipe

RESTS_ON = ("laws.adam", "recipes", "scores", "horizon")
POINT, BANDS, LONG_BANDS, RATIOS = 0.01, 0.85, 0.88, 0.85
KEEPING, PAPER = "one rate everywhere", "the paper's law"
HEADS = ("claim", "of", "on the seven tasks", *HELD_OUT, "both", "holds")


class Claim(NamedTuple):
    """A row: what is claimed, its figures in words, and whether it holds on both tasks."""

    name: str
    of: str
    seven: str
    by_task: Sequence[str]
    both: str
    holds: bool

    def row(self) -> list[str]:
        verdict = "yes" if self.holds else "NO"
        return [self.name, self.of, self.seven, *self.by_task, self.both, verdict]


@click.command()
def main() -> None:
    """Write results/held_out.md from what is on file."""
    done = sweeps()
    moved = moves(done, ran=means_of(read(MOVED_RUNS), done))
    claims = [
        *moved_claims(moved),
        *recipe_claims(moved),
        *bands_claims(),
        *longer_claims(),
        *rest_claims(),
        *decay_claims(),
        *optimizer_claims(),
    ]
    stores = [
        folder / f"{task}.jsonl"
        for folder in (STORES, longer.STORE, decay.STORE, other_optimizer.STORE)
        for task in HELD_OUT
    ]
    explanation = (__doc__ or "").partition("\n\n")[2]
    parts = [
        "# Two tasks that no choice saw",
        explanation.strip("\n"),
        block("Claims", HEADS, [claim.row() for claim in claims]),
        made_by(machine(1), *(store for store in stores if store.exists())),
    ]
    (RESULTS / "held_out.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts[2:-1]))


# --- a rate that is moved, and recipes --------------------------------------------------------------------------------


def mean_of(
    moved: Sequence[Moved], way: str, setting: tuple[list[str], int], *tasks: str
) -> float | None:
    """The mean regret of a way over tasks; None where it has none."""
    mine = [each for each in moved if each.domain in tasks]
    regrets = regrets_in(mine, way, *setting)
    return statistics.fmean(regrets) if regrets else None


def moved_claims(moved: Sequence[Moved]) -> Iterator[Claim]:
    """The default law beside keeping the rate and the paper's law, and the noise floor."""
    ways = (DEFAULT, KEEPING, PAPER, FLOOR)
    for words, setting in settings().items():
        figures = [
            [mean_of(moved, way, setting, *tasks) for way in ways]
            for tasks in (STUDY, *((task,) for task in HELD_OUT), HELD_OUT)
        ]
        if figures[-1][0] is None:
            continue
        cells = [" / ".join(map(share, each)) for each in figures]
        ours, keeping, paper, floor = (each or 0.0 for each in figures[-1])
        near = ours <= floor + POINT / 2
        holds = near or ours <= min(keeping, paper)
        yield Claim(
            "the default law / keeping the rate / the paper's law / noise floor",
            words,
            cells[0],
            cells[1:-1],
            cells[-1],
            holds,
        )


def recipe_claims(moved: Sequence[Moved]) -> Iterator[Claim]:
    """A calibrated recipe's mean regret, beside the noise floor."""
    for words, setting in settings().items():
        figures = [
            [mean_of(moved, way, setting, *tasks) for way in (RECIPE, FLOOR)]
            for tasks in (STUDY, *((task,) for task in HELD_OUT), HELD_OUT)
        ]
        seven, both = figures[0][0], figures[-1][0]
        if seven is None or both is None:
            continue
        cells = [" / ".join(map(share, each)) for each in figures]
        floor = figures[-1][1] or 0.0
        holds = both <= max(2 * seven, floor + POINT / 2)
        yield Claim(
            "a calibrated recipe / noise floor",
            words,
            cells[0],
            cells[1:-1],
            cells[-1],
            holds,
        )


def bands_claims() -> Iterator[Claim]:
    """The share of the recipes' bands that hold the best rate, at all ranks swept and in full finetuning."""
    both = bands_of(*HELD_OUT)
    if both is None:
        return
    yield Claim(
        "its 90 % bands hold",
        "all settings",
        share(bands_of(*STUDY)),
        [share(bands_of(task)) for task in HELD_OUT],
        share(both),
        both >= BANDS,
    )


def bands_of(*tasks: str) -> float | None:
    held = []
    for task in tasks:
        full = study_rates(task, "full")
        for config in CONFIGS:
            best = study_rates(task, config) | full
            for path in paths_of(task, config):
                recipe = Recipe.load(path)
                for rank, x in best.items():
                    _, low, high = rate_of(recipe, config, rank)
                    held.append(low <= 2.0**x <= high)
    return statistics.fmean(held) if held else None


def share(value: float | None) -> str:
    return "–" if value is None else percent(value)


# --- the other pages --------------------------------------------------------------------------------------------------


def longer_claims() -> Iterator[Claim]:
    """What a calibration of an eighth of the steps loses, as the package widens its bands."""
    by_tasks = [
        list(longer.rated(longer.runs_on_file(tasks), longer.as_the_package))
        for tasks in (longer.TASKS, *((task,) for task in HELD_OUT), HELD_OUT)
    ]
    if not by_tasks[-1]:
        return
    judged = [longer.judged_by_bar(rates) if rates else None for rates in by_tasks]
    cells = [" / ".join(map(percent, each)) if each else "–" for each in judged]
    median, high, bands = longer.judged_by_bar(by_tasks[-1])
    holds = median <= POINT and high <= 5 * POINT and bands >= LONG_BANDS
    yield Claim(
        "a longer run: median / 95th percentile / bands that hold",
        "an eighth of the steps",
        cells[0],
        cells[1:-1],
        cells[-1],
        holds,
    )


def rest_claims() -> Iterator[Claim]:
    """The ways to choose the rest's rate, one a row: the base rate is the default."""
    cells = [each for part in rest.PARTS.values() for each in rest.swept(part)]
    held = [each for part in rest.HELD_PARTS.values() for each in rest.swept(part)]
    if not held:
        return
    means = {
        way: statistics.fmean(cell.regret(rest.ways(cell)[way]) for cell in held)
        for way in rest.ways(held[0])
    }
    for way, both in means.items():
        by_task = [
            [
                cell.regret(rest.ways(cell)[way])
                for cell in held
                if cell.part.task == task
            ]
            for task in HELD_OUT
        ]
        seven = statistics.fmean(cell.regret(rest.ways(cell)[way]) for cell in cells)
        lowest = both <= min(means.values()) + POINT / 5
        yield Claim(
            "the rest of the model",
            way,
            percent(seven),
            [share(statistics.fmean(each) if each else None) for each in by_task],
            percent(both),
            lowest,
        )


def decay_claims() -> Iterator[Claim]:
    """Both ways to move a decay; the first is the default."""
    held = decay.arms_on_file(HELD_OUT)
    if not held:
        return
    arms = decay.arms_on_file()
    means = {
        way: statistics.fmean(decay.moved(held, shrinkage=way == decay.WAYS[1]))
        for way in decay.WAYS
    }
    for way, both in means.items():
        shrinkage = way == decay.WAYS[1]
        by_task = [
            list(decay.moved({task: held[task]}, shrinkage)) if task in held else []
            for task in HELD_OUT
        ]
        yield Claim(
            "weight decay",
            way,
            percent(statistics.fmean(decay.moved(arms, shrinkage))),
            [share(statistics.fmean(each) if each else None) for each in by_task],
            percent(both),
            both <= min(means.values()) + POINT / 5,
        )


def optimizer_claims() -> Iterator[Claim]:
    """The ratios of the optimizers whose ratio holds, and how many lie in its band."""
    runs, held = other_optimizer.runs_on_file(), other_optimizer.runs_on_file(HELD_OUT)
    for name, kind, ratio in other_optimizer.ratios(runs):
        if not (ratio.holds and held):
            continue
        by_task = other_optimizer.by_task(held, name, kind)
        every = [each for ratios in by_task.values() for each in ratios]
        reach = 1.645 * ratio.error
        inside = statistics.fmean(abs(each - ratio.octaves) <= reach for each in every)
        yield Claim(
            f"{name} against AdamW, octaves",
            kind,
            f"{ratio.octaves:+.2f} ± {reach:.2f}",
            [in_octaves(by_task.get(task, [])) for task in HELD_OUT],
            percent(inside),
            inside >= RATIOS,
        )


def in_octaves(ratios: Sequence[float]) -> str:
    return ", ".join(f"{each:+.1f}" for each in ratios) or "–"


if __name__ == "__main__":
    main()
