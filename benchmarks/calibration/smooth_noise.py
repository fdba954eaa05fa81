"""Is the smooth part of the fit's noise needed? Simulated calibrations with it and without, paired.

    python benchmarks/calibration/smooth_noise.py    # results/smooth_noise.md, ten minutes

Half of the noise, and half of the error of the shape, were alike for runs within an octave. *Without*: every run's noise
and error of shape is its own, and runs of a seed still share a level. *No level* leaves that out too. Five plans of
`simulated.py` on all of the study's surfaces, the same draws for each model. *LoRA* and *full* are mean regret, % of the
gain, *held* the share of real best rates inside 90 % bands. Differences are paired and in points; brackets hold 95 %, by
resampling the tasks.

**Rule**, set before this run, though after a look at four draws. What is left out goes if no difference is larger than
.1 points of regret or 2 of what is held.
"""

from __future__ import annotations

import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import click
import numpy as np
from calibration import simulated
from calibration.simulated import FULL, PLANS, Outcome, Plan, is_held, rate_of, regret
from calibration.surfaces import study_surfaces
from recording import block, machine, made_on, number, write_explained

from rankaware_optim import RankAwareWarning
from rankaware_optim.fitting import _loss_model
from rankaware_optim.fitting._loss_model import NOISE, SEED, SHAPE, Arm, Array

RESTS_ON = ("search.adam", "calibration.adam", "scores")
DRAWS, RESAMPLED = 10, 4000


class Score(NamedTuple):
    """A rate's regret, a share of the gain, and whether its band holds, None if that is not known."""

    task: str
    plan: Plan
    full: bool
    regret: float
    held: bool | None


def without(arm: Arm, optima: Array, plateau: float, seed: float = SEED) -> Array:
    """The log likelihood of `_loss_model._log_likelihood`, where runs share only the level of their seed."""
    miss = arm.y - _loss_model._gaps(arm.x[None, :] - optima[:, None], plateau)
    precision = 1.0 / (NOISE**2 + np.square(SHAPE * arm.y)[:, None])  # (trials, σ)
    misfit = np.square(miss) @ precision
    logdet = -np.log(precision).sum(axis=0)
    total = weighted = 0.0
    for each in np.unique(arm.seeds):
        own = precision * (arm.seeds == each)[:, None]
        within = own.sum(axis=0)
        level = miss @ (own / within)
        between = 1.0 / ((seed * NOISE) ** 2 + 1.0 / within)
        misfit += level**2 * (between - within)
        logdet += np.log(within / between)
        total = total + between
        weighted = weighted + between * level
    misfit -= weighted**2 / total
    return np.moveaxis(-0.5 * (misfit + logdet + np.log(total)), -1, 0)


MODELS: dict[str, Callable[..., Array]] = {
    "as it is": _loss_model._log_likelihood,
    "without": without,
    "no level": partial(without, seed=0.0),
}


def scores(model: Callable[..., Array]) -> Iterator[Score]:
    """Every rate of every study with a model of the noise."""
    with patch.object(_loss_model, "_log_likelihood", model):
        for index, on in enumerate(study_surfaces()):
            for plan in PLANS:
                for draw in range(DRAWS):
                    recipe = simulated.calibrated(on, plan, (index, draw))
                    for rank in (*on.ranks, FULL):
                        found = rate_of(recipe, on, rank)
                        place = ("study", on.domain, on.config, plan, draw, rank)
                        of = Outcome(*place, *found, recipe.steepness)
                        lost = max(0.0, regret(of, of.rate))
                        yield Score(on.domain, plan, rank == FULL, lost, is_held(of))


def difference(pairs: Sequence[tuple[str, float]]) -> str:
    """The mean over tasks and its interval."""
    by_task = defaultdict(list)
    for task, value in pairs:
        by_task[task].append(100 * value)
    means = [statistics.fmean(each) for each in by_task.values()]
    drawn = np.random.default_rng(0).choice(means, (RESAMPLED, len(means)))
    low, high = np.quantile(drawn.mean(axis=1), [0.025, 0.975])
    mean = statistics.fmean(means)
    return f"{number(mean, 3, sign=True)} [{number(low, 3)}, {number(high, 3)}]"


def row_of(found: Sequence[Score], base: Sequence[Score]) -> Iterator[str]:
    """Cells of the table: LoRA, full and held, each with its difference."""
    pairs = list(zip(found, base, strict=True))
    for full in (False, True):
        mine = [(a, b) for a, b in pairs if a.full == full]
        mean = 100 * statistics.fmean(a.regret for a, _ in mine)
        differ = difference([(a.task, a.regret - b.regret) for a, b in mine])
        yield f"{number(mean)}, {differ}"
    known = [(a, b) for a, b in pairs if a.held is not None]
    mean = 100 * statistics.fmean(float(a.held or 0) for a, _ in known)
    differ = difference(
        [(a.task, float(a.held or 0) - (b.held or 0)) for a, b in known]
    )
    yield f"{number(mean)}, {differ}"


@click.command()
def main() -> None:
    """Write results/smooth_noise.md."""
    warnings.simplefilter("ignore", RankAwareWarning)
    on = machine(threads=1)
    found = {name: list(scores(model)) for name, model in MODELS.items()}
    base = found["as it is"]
    rows = [[name, "all", *row_of(of, base)] for name, of in found.items()]
    for name, plan in ((name, plan) for name in found for plan in PLANS):
        mine, others = ([s for s in of if s.plan == plan] for of in (found[name], base))
        label = f"{plan.ranks}, {plan.share:.0%}, {plan.full} full"
        rows.append([name, label, *row_of(mine, others)])
    write_explained(
        "smooth_noise",
        "Is the smooth part of the fit's noise needed?",
        __doc__,
        block("Regret and bands", ("noise", "plan", "LoRA", "full", "held"), rows),
        made_on(on),
    )


if __name__ == "__main__":
    main()
