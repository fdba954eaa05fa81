"""Is the smooth part of the fit's noise needed? Simulated calibrations with it and without, paired.

    python benchmarks/calibration/smooth_noise.py    # results/smooth_noise.md, ten minutes

Half of the noise, and half of the error of the shape, were alike for runs within an octave. *Without*: every run's noise
and error of shape is its own, and runs of a seed still share a level. *.25*: the error of the shape is a quarter of the
gap besides, for a fifth. *No level*: without, and seeds share no level.

**Simulated**: five plans of `simulated.py` on all of the study's surfaces, the same draws for each model. **Sweeps**: the
study's sweeps of one seed, of the lowest rank, of the lowest and the highest, and of all ranks and full finetuning,
fitted as `fit_sweep` does, and scored at their own ranks on the mean of all seeds. *LoRA* and *full* are mean regret, %
of the gain, *held* the share of real best rates inside 90 % bands. Differences are paired and in points; brackets hold
95 %, by resampling the tasks.

**Rule**, set before this run, though after a look at fewer draws. What is left out goes if in simulated searches no
difference over all plans is larger than .1 points of regret or 2 of what is held. The error of the shape becomes a quarter
if without it bands of sweeps hold less, with it no less, and regret is the same.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np
from calibration import simulated
from calibration.simulated import PLANS, rate_of, real_best, reference_of
from calibration.surfaces import Surface, study_surfaces
from recording import block, machine, made_on, number, write_explained
from study.grids import FULL, Losses
from study.runs_on_file import read
from study.suite import STORES
from torch.optim import AdamW

from rankaware_optim import RankAwareWarning, Recipe
from rankaware_optim.fitting import (
    Observation,
    _loss_model,
    centred_law,
    fit_observations,
    prior_of,
)
from rankaware_optim.fitting._loss_model import NOISE, SEED, SHAPE, Arm, Array
from rankaware_optim.laws import PRIOR_LAW, bound_law, checked_multiplier, get_law
from rankaware_optim.recipe import recipe_of

RESTS_ON = ("search.adam", "calibration.adam", "scores")
DRAWS, RESAMPLED = 5, 4000


class Score(NamedTuple):
    """A rate's regret, a share of the gain, and whether its band holds, None if that is not known."""

    task: str
    plan: str
    full: bool
    regret: float
    held: bool | None


def as_it_was(arm: Arm, optima: Array, plateau: float) -> Array:
    """The log likelihood with the smooth part. One basis diagonalizes both covariances for every σ."""
    gaps = _loss_model._gaps(arm.x - optima[:, None], plateau)
    white = np.eye(len(arm.x))
    smooth = np.exp(-0.5 * (arm.x[:, None] - arm.x) ** 2)
    paired = arm.seeds[:, None] == arm.seeds
    noise = paired * (SEED**2 + smooth / 2) + white / 2
    error = np.outer(SHAPE * arm.y, SHAPE * arm.y) * (smooth + white) / 2
    whiten = np.linalg.inv(np.linalg.cholesky(noise))
    variances, basis = np.linalg.eigh(whiten @ error @ whiten.T)
    basis = whiten.T @ basis
    precision = 1.0 / (NOISE**2 + np.maximum(variances, 0.0)[:, None])
    ones = basis.sum(axis=0)[:, None]
    miss = arm.y @ basis - gaps @ basis
    weight = (ones**2 * precision).sum(axis=0)
    misfit = np.square(miss) @ precision - (miss @ (ones * precision)) ** 2 / weight
    logdet = np.linalg.slogdet(noise)[1] - np.log(precision).sum(axis=0)
    return np.moveaxis(-0.5 * (misfit + logdet + np.log(weight)), -1, 0)


def changed(**constants: float) -> Callable[..., Array]:
    """The package's log likelihood with other constants."""
    now = _loss_model._log_likelihood

    def likelihood(*given: Any) -> Array:
        with patch.multiple(_loss_model, **constants):
            return now(*given)

    return likelihood


MODELS: dict[str, Callable[..., Array]] = {
    "as it was": as_it_was,
    "without": _loss_model._log_likelihood,
    "without, .25": changed(SHAPE=0.25),
    "no level": changed(SEED=0.0),
}


def scores(model: Callable[..., Array]) -> Iterator[Score]:
    """Every rate of every study and sweep with a model of the noise."""
    with patch.object(_loss_model, "_log_likelihood", model):
        for index, on in enumerate(study_surfaces()):
            for plan in PLANS:
                label = f"{plan.ranks}, {plan.share:.0%}, {plan.full} full"
                for draw in range(DRAWS):
                    recipe = simulated.calibrated(on, plan, (index, draw))
                    ranks = (*on.ranks, FULL)
                    yield from (score(on, label, recipe, rank) for rank in ranks)
            done = read(STORES / f"{on.domain}.jsonl")
            for seed, (label, ranks) in product(on.seeds, swept(on).items()):
                recipe = of_sweep(on, done, seed, ranks)
                yield from (score(on, label, recipe, rank) for rank in ranks)


def score(on: Surface, plan: str, recipe: Recipe, rank: int) -> Score:
    rate, low, high = rate_of(recipe, on, rank)
    best = real_best(on.domain, on.config, rank)
    held = None if best is None else low <= best <= high
    return Score(on.domain, plan, rank == FULL, max(0.0, on.mean[rank](rate)), held)


def swept(on: Surface) -> dict[str, list[int]]:
    """The ranks of the sweeps."""
    return {
        "sweep, one rank": on.ranks[:1],
        "sweep, two ranks": [on.ranks[0], on.ranks[-1]],
        "sweep, all ranks": [*on.ranks, FULL],
    }


def of_sweep(on: Surface, done: Losses, seed: int, ranks: Sequence[int]) -> Recipe:
    """The recipe of a seed's runs at whole octaves."""
    law, lora = bound_law(get_law(PRIOR_LAW), AdamW, {}), [r for r in ranks if r]
    reference = reference_of(on, lora[0])
    prior = prior_of(reference, lora, on.full_fan_in)
    centred, seen = centred_law(law, reference, prior.pivot), []
    for job, loss in done.items():
        scheme = on.config if job.rank else "full"
        if (job.scheme, job.seed) != (scheme, seed) or job.rank not in ranks:
            continue
        if job.x != round(job.x):
            continue
        at = reference_of(on, job.rank).as_factor()
        x = job.x - math.log2(checked_multiplier(centred, at, reference))
        end = math.inf if loss is None else loss
        place = (job.rank or None, seed, x, end, on.start, end)
        seen.append(Observation(*place, stopped=loss is None))
    fit = fit_observations(seen, prior)
    assert fit is not None
    others = {"ranks": tuple(lora), "full_seen": FULL in ranks}
    others |= {"full_fan_in": on.full_fan_in, "name": "sweep"}
    return recipe_of(fit, law, reference, **others)


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
        if not mine:
            yield "–"
            continue
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
    base = found["as it was"]
    plans = list(dict.fromkeys(of.plan for of in base))
    places = {
        "simulated": [plan for plan in plans if "sweep" not in plan],
        "sweeps": [plan for plan in plans if "sweep" in plan],
        **{plan: [plan] for plan in plans},
    }
    rows = []
    for (place, of_place), name in product(places.items(), MODELS):
        mine, others = (
            [s for s in of if s.plan in of_place] for of in (found[name], base)
        )
        rows.append([place, name, *row_of(mine, others)])
    write_explained(
        "smooth_noise",
        "Is the smooth part of the fit's noise needed?",
        __doc__,
        block("Regret and bands", ("plan", "noise", "LoRA", "full", "held"), rows),
        made_on(on),
    )


if __name__ == "__main__":
    main()
