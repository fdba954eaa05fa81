"""Which runs predict the best rate of a target length best? Plans of equal cost, simulated.

    python benchmarks/calibration/planned.py               # results/planned.json and .md, four minutes on one core
    python benchmarks/calibration/planned.py --studies 20  # a quick look, not written

Runs of 250 and 1,000 steps predict the best rate for a target of 4,000 or 8,000 steps. Every plan costs as much as two
target runs. Ranks are 4 and 64, under Init[A]. Bowls, noise and cliffs are those of `coverage.py`, but the optimum
moves with the length. How it moves is drawn in three ways: from the fit's own prior; rising by .5 octaves an octave up
to 1,000 steps and not later; falling by .2 throughout. Full finetuning is not tried. Regret is the share of the gain
that the quoted rate loses at ranks 4, 16 and 64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
import numpy as np
import torch
from calibration.coverage import SCATTER, SEEDS, SWEEPS, TRIED, WIDTH, Bowl, World, bowls_of
from calibration.studies import Simulated, searched
from recording import machine, record, shown

from rankaware_optim import MuA, RankAwareWarning, Reference
from rankaware_optim.calibration._schedule import Schedule, Task
from rankaware_optim.calibration._study import _SLOPES
from rankaware_optim.calibration._trials import Cell, Trials
from rankaware_optim.calibration.fit import Trend
from rankaware_optim.laws import checked_multiplier

RESTS_ON = ("search", "calibration")
LENGTHS, TARGETS, PRICE = (250, 1000), (4000, 8000), 2
ASKED, GUESS_SD = (4, 16, 64), 1.0
Moves = Callable[[np.random.Generator, float], float]  # octaves from the target's best rate


# --- plans ----------------------------------------------------------------------------------------------------------


class AsManySteps(Schedule):
    """A schedule that spends the same number of steps on each length."""

    def _due(self, mine: Mapping[Task, Trials], tasks: Sequence[Task]) -> Task:
        return min(tasks, key=lambda task: (len(mine[task]) + 1) * self._cost(task))


class HighestLonger(AsManySteps):
    """The same as `AsManySteps`, with only the highest rank at the longer length."""

    def _rotate(
        self, tried: Trials, task: Task, ranks: Sequence[int | None], weights: Mapping[int | None, float]
    ) -> Cell:
        return super()._rotate(tried, task, ranks if task == self.tasks[0] else [self.anchor], weights)


@dataclass(frozen=True)
class Plan:
    """A plan: its name, lengths in steps (0: the target's), class of schedule, and whether it ends by confirming."""

    name: str
    lengths: tuple[int, ...]
    kind: type[Schedule] = Schedule
    confirm: bool = False


PLANS = (
    Plan("the package's", LENGTHS),
    Plan("the package's, confirmed", LENGTHS, confirm=True),
    Plan("as many steps of each length", LENGTHS, AsManySteps),
    Plan("the same, the highest rank alone at the longer", LENGTHS, HighestLonger),
    Plan("short runs alone", LENGTHS[:1]),
    Plan("longer runs alone", LENGTHS[1:]),
    Plan("runs of the target's length", (0,)),
)


# --- truths ---------------------------------------------------------------------------------------------------------


def drawn(target: int, rng: np.random.Generator) -> Mapping[int, float]:
    """Draw from the fit's prior how far the best rate of each length is from the target's, in octaves."""
    trend = Trend(target, LENGTHS, *_SLOPES["A"])
    moved = rng.multivariate_normal(trend.mean()[:2], trend.covariance()[:2, :2])
    return dict(zip(LENGTHS, moved.tolist(), strict=True))


TRUTHS: dict[str, Callable[[int, np.random.Generator], Mapping[int, float]]] = {
    "the prior": drawn,
    "rises to 1,000 steps": lambda target, rng: {250: -1.0, 1000: 0.0},
    "falls throughout": lambda target, rng: {n: 0.2 * math.log2(target / n) for n in LENGTHS},
}


# --- one calibration ------------------------------------------------------------------------------------------------


def simulated(
    plan: Plan, target: int, moved: Mapping[int, float], bowls: Mapping[int, Bowl], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Simulate one study. For each rank in `ASKED`, yield whether the band held the truth, its width, and regret."""
    lengths = tuple(steps or target for steps in plan.lengths)
    schedule = plan.kind(TRIED, SEEDS, lengths, budget=PRICE * target, target_steps=target, confirm=plan.confirm)
    study = Simulated(torch.optim.AdamW, MuA(), TRIED, lengths, SEEDS, target_steps=target, kind=schedule.kind)
    study._settle(Reference(TRIED[-1], float(TRIED[-1]), fan_in=WIDTH), WIDTH)
    base = study._start + rng.normal(0, GUESS_SD) - 1.0  # the package's first guess is too high
    best = {rank: base + rng.normal(0, SCATTER) for rank in ASKED}
    off = {**moved, target: 0.0}
    worlds = {n: World({rank: x + off[n] for rank, x in best.items()}, bowls, rng) for n in {*lengths, target}}
    run = lambda trial, x: worlds[trial.steps or lengths[0]].run(trial.rank or 0, trial.seed, x)  # noqa: E731
    recipe = searched(study, schedule, 0.0, run)
    for rank, x in best.items():
        rate, at = recipe.at(rank, alpha=float(rank)), replace(study.settled(), rank=rank, alpha=float(rank))
        own = x + math.log2(checked_multiplier(study.centred_law(), at.as_factor(), study.settled()))
        low, quoted, high = (math.log2(v) - own for v in (rate.low, rate.lr, rate.high))
        regret = worlds[target].bowls[rank].at(quoted, 0.0)
        yield {"held": low <= 0 <= high, "width": high - low, "error": (low + high) / 2, "regret": regret}


def row_of(plan: Plan, target: int, truth: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the table."""
    regret = 100 * np.array([one["regret"] for one in found])
    return {
        "target": target,
        "best rate over the length": truth,
        "plan": plan.name,
        "regret, %: mean": float(regret.mean()),
        "95th": float(np.quantile(regret, 0.95)),
        "99th": float(np.quantile(regret, 0.99)),
        "band holds it, %": 100 * float(np.mean([one["held"] for one in found])),
        "width, octaves": float(np.median([one["width"] for one in found])),
        "bias": f"{np.mean([one['error'] for one in found]):+.2f}",
    }


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--studies", default=40, show_default=True, help="Of each line; fewer are a look, not written.")
@click.option("--seed", default=0, show_default=True)
def main(studies: int, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RankAwareWarning)
    bowls, rows = list(map(bowls_of, SWEEPS)), []
    for target in TARGETS:
        for truth, move in TRUTHS.items():
            for plan in PLANS:
                found = []
                for i in range(studies):
                    rng = np.random.default_rng([seed, target, i])
                    found += [*simulated(plan, target, move(target, rng), bowls[i % len(bowls)], rng)]
                rows.append(row_of(plan, target, truth, found))
                click.echo("  ".join(map(shown, rows[-1].values())))
    if studies >= 40:
        record("planned", "Plans of one price for a target length", rows, {**machine(1), "seed": seed}, NOTES)


NOTES = (
    "Price: the steps of two runs of the target's length. The package's plan: three runs of the short length at the "
    "highest rank, two at the other, then both ranks at the longer length; confirmed: half of the price goes to one "
    "run of the target's length. Three ranks a study; regret is on the bowl of the rank asked, without noise.",
)


if __name__ == "__main__":
    main()
