"""`fit_sweep`: the calibration's fit on the rows of a sweep from any tool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch.optim import Optimizer

from .._checks import MOST_TRIALS
from .._optimizers import get_optimizer_class
from .._printing import times
from .._types import Reference, Scaling
from ..calibration import versions_used
from ..errors import CalibrationError
from ..fitting import (
    Fit,
    Observation,
    centred_law,
    diverged,
    fit_observations,
    prior_of,
)
from ..laws import PRIOR_LAW, Law, checked_multiplier, recordable_law
from ..recipe import ANY_WIDTH, Z90, Recipe, infer_scaling, recipe_of
from ._runs import Source, SweepRun, ends_of, read_sweep

# By hand, all of them. A best rate at an end of its grid is a bound: octaves by which the optimum
# may be beyond it, and below the lowest rate.
_EDGE_SD, _BELOW = 1.0, 0.5
_UNSURE = 0.75  # octaves: a base rate with a larger standard deviation gets a note
_SAME_SCALING = 1e-3  # octaves

Runs = Sequence[SweepRun]
Ends = Mapping[int | None, tuple[float, str]]


def fit_sweep(
    sweep: Source,
    *,
    optimizer: type[Optimizer] | str = "AdamW",
    name: str = "sweep",
    law: str | Law = PRIOR_LAW,
    alpha: float | Literal["rank"] | None = None,
    init: Literal["A", "B"] | None = None,
    fan_in: float | None = None,
    full_fan_in: float | None = None,
    batch: float | None = None,
    steps: int | None = None,
) -> Recipe:
    """Fit a recipe to an existing learning-rate sweep from any tool.

    A rank's loss against log2 of the rate is modelled as a bowl with a cliff, and the best rates
    are shrunk towards the law. What the data do not determine is in the recipe's `notes` and widens
    its band: a best rate at an edge of its grid, a loss that hardly depends on the rate. Diverged
    runs set the ceiling.

    Args:
        sweep: rows of one model, such as df.to_dict('records') of a dataframe, or a CSV file, with
            the columns rank, lr (per step) and loss. Optional are alpha, rslora, init, fan_in,
            seed, model, batch, steps and start (the loss before training). A rank of "full" is full
            finetuning, a loss of "diverged" one that diverged.
        optimizer: the optimizer of the sweep, a class or a name. It decides the law's form.
        name: the recipe's name.
        law: the law that maps rates between ranks, by default µA. The fall in rank at
            A = 0 is in the fit's prior.
        alpha: alpha of rows without one: a number, or "rank" if it follows the rank.
        init: the init of rows without one: "A" (B starts at zero, as in PEFT, the default) or "B"
            (A starts at zero).
        fan_in: the model's mean fan-in, for rows without one. If it stays unknown, the recipe has
            no rate for full finetuning or for the other init.
        full_fan_in: the largest fan-in of the adapted layers, on which the rate of full finetuning
            depends. By default `fan_in`.
        batch: examples or tokens per step, for rows without them.
        steps: number of steps of a run, for rows without one.

    Returns:
        The recipe.

    Raises:
        CalibrationError: a cell is impossible, alpha is missing, several models, batches, inits or
            widths are mixed, only one rate was tried, the loss is the same everywhere, or every run
            diverged.

    >>> points = [(rank, x) for rank in (8, 64) for x in range(-14, -8)]
    >>> rows = [{"rank": r, "lr": 2.0**x, "loss": 1 + 0.1 * (x + 11) ** 2} for r, x in points]
    >>> recipe = fit_sweep(rows, alpha="rank", steps=500)
    >>> 2**-11.5 < recipe.fitted_lr < 2**-10.5
    True
    """
    optimizer = get_optimizer_class(optimizer)
    bound = recordable_law(law).bind(optimizer, {})
    given = {
        "alpha": alpha,
        "init": "A" if init is None else init,
        "fan_in": fan_in,
        "batch": batch,
        "steps": steps,
    }
    full = given if full_fan_in is None else {**given, "fan_in": full_fan_in}
    runs, notes = read_sweep(sweep, given, full)
    runs = _of_one_model(runs)
    _check_enough(runs)
    ranks = sorted({run.rank for run in runs if run.rank is not None})
    reference = _middle(runs, ranks)
    widths = [run.fan_in for run in runs if run.rank is None]
    full_width = widths[0] if widths else full_fan_in or reference.fan_in
    prior = prior_of(reference, ranks, full_width)
    centred = centred_law(bound, reference, prior.pivot)
    observations = list(_at_reference(runs, reference, centred))
    fit = fit_observations(observations, prior)
    if fit is None:
        raise CalibrationError(
            f"Every one of {len(runs)} runs diverged.", "Add lower rates to the sweep."
        )
    ends = ends_of(observations)
    fit = _bounded(fit, ends)
    return recipe_of(
        fit,
        bound,
        reference,
        name=name,
        scaling_rule=_scaling_rule(runs),
        full_fan_in=full_width,
        ranks=tuple(ranks),
        full_seen=bool(widths),
        optimizer=f"{optimizer.__module__}.{optimizer.__qualname__}",
        steps=runs[0].steps,
        versions=versions_used(),
        notes=(*notes, *_notes(runs, fit, ends)),
        tensors=_tensors(runs, observations),
    )


def _of_one_model(runs: Runs) -> list[SweepRun]:
    """Return the runs with the one value of each column in all of them. Raise if they are of
    several models, inits, widths, batches or lengths.
    """
    lora = [run for run in runs if run.rank is not None]
    full = [run for run in runs if run.rank is None]
    same = {name: _only_value(runs, name) for name in ("model", "batch", "steps")}
    same |= {name: _only_value(lora, name) for name in ("init", "fan_in")}
    width = _only_value(full, "fan_in") or same["fan_in"]
    lora = [replace(run, **same) for run in lora]
    return lora + [replace(run, **{**same, "fan_in": width}) for run in full]


def _only_value(runs: Runs, name: str) -> Any:
    """Return the only value of a column, None if there is none."""
    values = sorted({getattr(run, name) for run in runs} - {None})
    if len(values) > 1:
        raise CalibrationError(
            f"The sweep mixes {len(values)} values of {name}: {', '.join(map(str, values))}.",
            "A recipe is for one of them: keep its rows.",
        )
    return values[0] if values else None


def _check_enough(runs: Runs) -> None:
    """Raise if the runs cannot be fitted, or not in reasonable time."""
    rates: dict[int | None, set[float]] = {}
    for run in runs:
        rates.setdefault(run.rank, set()).add(run.lr)
    if len(runs) > MOST_TRIALS:
        raise CalibrationError(
            f"{len(runs)} runs are more than a fit allows, {MOST_TRIALS}.",
            "Select those near the best rates.",
        )
    losses = {run.loss for run in runs}
    is_flat = len(losses) == 1 and math.isfinite(runs[0].loss)
    if is_flat or max(map(len, rates.values()), default=0) < 2:
        raise CalibrationError(
            "The best rate is unknown: no rank was tried at two rates, or the loss is the same at"
            " all of them.",
            "Sweep at least two rates, better six, and check which column holds the loss.",
        )


def _middle(runs: Runs, ranks: Sequence[int]) -> Reference:
    """Return the configuration of the middle one of the ranks swept, at its lowest alpha, or full
    finetuning if there are none.
    """
    if not ranks:
        return runs[0].place
    rank = ranks[(len(ranks) - 1) // 2]
    of_rank = [run.place for run in runs if run.rank == rank]
    return min(of_rank, key=lambda place: place.alpha or 0.0)


def _at_reference(runs: Runs, reference: Reference, law: Law) -> Iterator[Observation]:
    """Yield the runs as observations, whose rates the law has moved to the reference."""
    # where no width is known, a usual one nearly cancels between ranks
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    for run in runs:
        place = run.place
        if place.method != reference.method and not place.fan_in:
            raise CalibrationError(
                "The sweep has full finetuning and LoRA, but no fan-in to compare them.",
                "Give a fan-in, or leave out the rows of full finetuning.",
            )
        here = replace(place, fan_in=place.fan_in or ANY_WIDTH)
        octaves = math.log2(checked_multiplier(law, here.as_factor(), there))
        yield run.observed_at(math.log2(run.lr) - octaves)


def _scaling_rule(runs: Runs) -> Scaling:
    """Return how the scaling follows the rank: by no rule if a rank has several alphas."""
    lora = [run for run in runs if run.rank is not None]
    scalings = {run.rank or 0: run.place.scaling for run in lora}
    for run in lora:
        if abs(math.log2(run.place.scaling / scalings[run.rank or 0])) > _SAME_SCALING:
            return "unknown"
    return infer_scaling(scalings)


def _notes(runs: Runs, fit: Fit, ends: Ends) -> Iterator[str]:
    """Yield sentences on what the sweep does not determine."""
    ended = {run.rank for run in runs if math.isfinite(run.loss)}
    lost = {run.rank for run in runs if run.rank is not None} - ended
    for rank in sorted(lost):
        yield (
            f"rank {rank}: every run diverged, so its rate is no measurement, and may diverge too"
        )
    for of, (_, end) in ends.items():
        label = f"rank {of}" if of else "full finetuning"
        way = "below" if end == "lowest" else "above"
        yield f"{label}: the best rate is the {end} tried; the optimum may be {way}"
    sd = math.sqrt(fit.covariance[0, 0])
    if sd > _UNSURE:
        yield (
            "the loss hardly determines the best rate: from end to end its band is"
            f" {times(2 * Z90 * sd)}. Longer runs, a larger batch or a held-out score would"
        )


def _bounded(fit: Fit, ends: Ends) -> Fit:
    """Return the fit with the ranks at `ends` as wide bounds. Their errors have one sign and do not
    average out.
    """
    if not ends:
        return fit
    vertices = dict(fit.vertices)
    for rank, (x, end) in ends.items():
        vertices[rank] = (x - _BELOW if end == "lowest" else x, _EDGE_SD)
    bounded = fit.at(vertices)
    sds = np.array([sd for _, sd in vertices.values()])
    weights = 1.0 / (sds**2 + fit.prior.scatter**2)
    share = weights[[rank in ends for rank in vertices]].sum() / weights.sum()
    bounded.covariance[0, 0] += (share * _EDGE_SD) ** 2
    return bounded


def _tensors(
    runs: Runs, observations: Sequence[Observation]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return `Recipe.tensors`: the runs in reference coordinates, and at their own rates."""
    columns = {
        "rank": [run.rank or 0 for run in runs],
        "seed": [run.seed for run in runs],
        "lr": [2.0**o.x for o in observations],
        "own_lr": [run.lr for run in runs],
        "value": [run.loss for run in runs],
        "diverged": diverged(observations),
    }
    return {name: np.array(column) for name, column in columns.items()}
