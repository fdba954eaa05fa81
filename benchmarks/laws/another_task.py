"""How far off is a best rate that another task gives?

    python benchmarks/laws/another_task.py    # results/another_task.md

A user has a recipe of one task and trains another. The best rate of task i is moved by the default law to the width of
task j, at the same rank, alpha and init, and compared with the best rate of j. The tasks are the study's seven, the best
rates those of its sweeps (`results/suite`).

*The spread.* Each task is left out in turn. The root mean square of all errors among the other six is the standard
deviation of a band. The band is that times Student's t of the six tasks, since six tasks give it. It is judged by the
errors into the task left out, from each of the others.

*A shift.* The error may have a cause that a recipe knows: the width, steps or batch of the two tasks. A slope of the
error over each, in octaves, is fitted to the pairs of six tasks and corrects the errors into the one left out. √batch is
the package's own rule. A shift is honest if it makes those errors smaller.

Two more tasks, `audio` and `time_series`, which no choice saw, judge the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import torch
from recording import RESULTS, block, machine, number, write_explained, written_by
from scipy.stats import t as student
from study.configurations import CONFIGS, reference_at
from study.domains import HELD_OUT, STUDY, get_domain
from study.grids import Losses
from study.optima import best_rates
from study.runs_on_file import read_begun

from rankaware_optim import Falling
from rankaware_optim.laws import checked_multiplier

RESTS_ON = ("laws.adam",)
Z90 = 1.645
ANY_WIDTH = 1024.0  # to which all best rates are moved; it cancels
INITS = {
    init: [name for name, config in CONFIGS.items() if config.init == init]
    for init in ("A", "B")
}
# what may shift a best rate, in octaves
CAUSES: dict[str, Callable[[str], float]] = {
    "width": lambda task: math.log2(get_domain(task).widths[0]),
    "steps": lambda task: math.log2(get_domain(task).steps),
    "batch": lambda task: math.log2(get_domain(task).batch),
}


@cache
def runs() -> Losses:
    """The runs of every task."""
    done = {}
    for found in read_begun(RESULTS / "suite", (*STUDY, *HELD_OUT)).values():
        done.update(found)
    return done


@cache
def at_one_width(task: str, config: str) -> dict[int, float]:
    """log2 of the best rate by rank, moved by the law to one width for all tasks."""
    law = Falling().bind(torch.optim.AdamW, {})
    width, _ = get_domain(task).widths
    found = {}
    for rank, best in best_rates(runs(), task, config).items():
        there = replace(reference_at(config, rank), fan_in=ANY_WIDTH)
        here = replace(there, fan_in=width)
        found[rank] = best - math.log2(checked_multiplier(law, here.as_factor(), there))
    return found


def errors(source: str, target: str, init: str) -> list[float]:
    """Octaves by which a best rate of the source is too high for the target, at every rank that both have."""
    found = []
    for config in INITS[init]:
        ours, theirs = at_one_width(source, config), at_one_width(target, config)
        found += [ours[rank] - theirs[rank] for rank in ours.keys() & theirs.keys()]
    return found


def among(tasks: Sequence[str], init: str) -> list[float]:
    """The errors of all ordered pairs of tasks."""
    found = []
    for source in tasks:
        for target in tasks:
            if source != target:
                found += errors(source, target, init)
    return found


def into(target: str, tasks: Iterable[str], init: str) -> list[float]:
    """The errors from each of the other tasks into one."""
    found = []
    for source in tasks:
        if source != target:
            found += errors(source, target, init)
    return found


def spread(tasks: Sequence[str], init: str) -> float:
    """Standard deviation of a band on another task, octaves: with that of the normal distribution, as wide as t's."""
    wider = student.ppf(0.95, len(tasks) - 1) / Z90
    return float(wider * root_mean_square(among(tasks, init)))


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values) / len(values))


def held(found: Sequence[float], sd: float) -> str:
    """How many of some errors a 90 % band of this standard deviation holds."""
    inside = sum(abs(error) <= Z90 * sd for error in found)
    return f"{100 * inside / len(found):.0f} % of {len(found)}"


# --- the tables -----------------------------------------------------------------------------------------------------


def left_out(init: str) -> list[list[str]]:
    """A row for each task left out, for all of them together, and for each that no choice saw."""
    rows, inside, count = [], 0.0, 0
    for task in STUDY:
        others = [other for other in STUDY if other != task]
        sd, found = spread(others, init), into(task, others, init)
        inside += sum(abs(error) <= Z90 * sd for error in found)
        count += len(found)
        rows.append(row(f"Init[{init}], {task}", sd, found))
    rows.append(
        [f"Init[{init}], all", "", "", f"{100 * inside / count:.0f} % of {count}"]
    )
    for task in HELD_OUT:
        rows.append(
            row(
                f"Init[{init}], {task}, by all seven",
                spread(STUDY, init),
                into(task, STUDY, init),
            )
        )
    return rows


def row(name: str, sd: float, found: Sequence[float]) -> list[str]:
    mean = math.fsum(found) / len(found)
    return [name, number(sd), number(mean, sign=True), held(found, sd)]


def shifts(init: str) -> list[list[str]]:
    """A row for each cause of a shift, fitted without the task that it corrects."""
    plain = [e for task in STUDY for e in into(task, STUDY, init)]
    rows = [[f"Init[{init}], none", "", number(root_mean_square(plain))]]
    for name, octaves in CAUSES.items():
        slopes, corrected = [], []
        for task in STUDY:
            others = [other for other in STUDY if other != task]
            slopes.append(slope(others, octaves, init))
            corrected += moved(task, octaves, slopes[-1], init)
        rows.append(
            [
                f"Init[{init}], {name}",
                f"{min(slopes):+.2f} to {max(slopes):+.2f}",
                number(root_mean_square(corrected)),
            ]
        )
    by_rule = [e for task in STUDY for e in moved(task, CAUSES["batch"], 0.5, init)]
    rows.append([f"Init[{init}], √batch", "+0.50", number(root_mean_square(by_rule))])
    return rows


def slope(tasks: Sequence[str], octaves: Callable[[str], float], init: str) -> float:
    """The slope of the errors over the octaves from target to source, by least squares through zero."""
    above = below = 0.0
    for source in tasks:
        for target in tasks:
            apart = octaves(source) - octaves(target)
            for error in errors(source, target, init) if source != target else ():
                above += apart * error
                below += apart**2
    return above / below


def moved(
    target: str, octaves: Callable[[str], float], by: float, init: str
) -> list[float]:
    """The errors into a task when each rate is moved by a slope."""
    found = []
    for source in STUDY:
        if source != target:
            apart = octaves(source) - octaves(target)
            found += [error - by * apart for error in errors(source, target, init)]
    return found


def outcome() -> str:
    """The constants, and what the two tables say of them."""
    of_a, of_b = (spread(STUDY, init) for init in ("A", "B"))
    return (
        f"**Outcome.** By all seven tasks the spread is {of_a:.1f} octaves at Init[A] and {of_b:.1f} at Init[B], which "
        "`rankaware_optim/recipe/_constants.py` holds. Every shift makes the errors into a task left out larger, √batch "
        "most: between tasks neither width nor steps nor batch says where the best rate is, and none is added. The tasks "
        "have 40 to 100 steps and widths of 176 to 816, so the spread says nothing of longer runs or of wider models: "
        "there a recipe refuses ([suggestion](suggestion.md))."
    )


def main() -> None:
    on = machine(1)
    spreads = [line for init in INITS for line in left_out(init)]
    causes = [line for init in INITS for line in shifts(init)]
    write_explained(
        "another_task",
        "Another task than the recipe's",
        __doc__,
        outcome(),
        block(
            "Each task left out",
            ["task", "spread by the others, octaves", "mean error", "90 % band holds"],
            spreads,
        ),
        block(
            "Shifts",
            ["shift by", "slope", "rms error into tasks left out, octaves"],
            causes,
        ),
        written_by(on),
    )


if __name__ == "__main__":
    main()
