"""`fit_sweep`: the calibration's fit on the rows of a sweep from any tool."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch.optim import Optimizer

from .._checks import MOST_RANKS, MOST_TRIALS, check_init, is_within, range_of, shown
from .._optimizers import get_optimizer_class
from .._printing import times
from .._types import Reference, Scaling, infer_scaling
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
from ..laws import PRIOR_LAW, Law, bound_law, checked_multiplier, recordable_law
from ..recipe import ANY_WIDTH, Z90, Recipe, recipe_of
from ._runs import (
    GridEnd,
    Runs,
    Source,
    ends_of,
    observation_of,
    only_value,
    place_of,
    read_sweep,
    with_alpha,
)

# By hand, all of them. A best rate at an end of its grid is a bound: octaves by which the optimum
# may be beyond it, and below the lowest rate.
_EDGE_SD, _BELOW = 1.0, 0.5
_UNSURE = 0.75  # octaves: a base rate with a larger standard deviation gets a note
_SAME_SCALING = 1e-3  # octaves
_OPEN = 0.8  # share of the prior's sd above which the data hardly determine the drift


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
    warmup: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Fit a recipe to an existing learning-rate sweep from any tool.

    A rank's loss against log2 of the rate is modelled as a bowl with a cliff, and the best rates
    are shrunk towards the law. What the data do not determine is in the recipe's `notes` and widens
    its band: a best rate at an edge of its grid, a single rank, a loss that hardly depends on the
    rate. Diverged runs set the ceiling.

    Args:
        sweep: rows of one model, such as df.to_dict('records') of a dataframe, or a CSV file, with
            the columns rank, lr (per step) and loss. Optional are alpha, rslora, init, method
            ("lora" or "full"), fan_in, seed, model, batch, steps and start (the loss before
            training). A rank of "full" is full finetuning, a loss of "diverged" one that diverged.
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
        warmup: share of the steps with a rising rate, from 0 to 1, if known.
        settings: the optimizer's settings. They are only recorded.

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
    check_init(init, "The sweep's init is", CalibrationError, known=("A", "B", None))
    _check_within("fan_in", fan_in)
    _check_within("full_fan_in", full_fan_in, "fan_in")
    _check_within("batch", batch)
    _check_within("steps", steps)
    _check_within("warmup", warmup, "share")
    optimizer = get_optimizer_class(optimizer)
    bound = bound_law(recordable_law(law), optimizer, {})
    read = read_sweep(sweep)
    runs = with_alpha(read.runs, alpha)
    steps = only_value(runs, "steps", steps)
    places, full_width = _places(runs, init, fan_in, full_fan_in, batch)
    _check_enough(runs)
    ranks = sorted({place.rank for place in places if place.rank is not None})
    reference = _middle(places, ranks)
    prior = prior_of(reference, ranks, full_width)
    centred = centred_law(bound, reference, prior.pivot)
    observations = list(_at_reference(runs, places, reference, centred))
    fit = fit_observations(observations, prior)
    if fit is None:
        raise CalibrationError(
            f"Every one of {len(runs)} runs diverged.", "Add lower rates to the sweep."
        )
    fit = _bounded(fit, ends_of(observations))
    notes = [*read.notes, *_notes_on_grid(runs, ranks), *_notes_on_fit(fit, ranks)]
    if steps is None:
        notes.append(
            "the sweep does not give its steps, on which the best rate depends"
        )
    return recipe_of(
        fit,
        bound,
        reference,
        name=name,
        scaling_rule=_scaling_rule(places),
        full_fan_in=full_width,
        ranks=tuple(ranks),
        full_seen=any(run.rank is None for run in runs),
        optimizer=f"{optimizer.__module__}.{optimizer.__qualname__}",
        settings=settings or {},
        steps=steps,
        warmup=warmup,
        versions=versions_used(),
        notes=tuple(notes),
        tensors=_tensors(runs, observations),
    )


def _check_within(name: str, value: object, range_: str = "") -> None:
    """Raise if an argument is outside the range of this name, by default its own."""
    range_ = range_ or name
    if value is not None and not is_within(range_, value):
        raise CalibrationError(
            f"{name} is {shown(value)}.", f"Give {range_of(range_)}.", name
        )


def _places(
    runs: Runs,
    init: Literal["A", "B"] | None,
    fan_in: float | None,
    full_fan_in: float | None,
    batch: float | None,
) -> tuple[list[Reference], float | None]:
    """Return the runs' configurations, with the arguments where rows have no value, and the width
    of full finetuning. Raise if the rows are of several models, batches, inits or widths.
    """
    lora = [run for run in runs if run.rank is not None]
    full = [run for run in runs if run.rank is None]
    only_value(runs, "model")
    batch = only_value(runs, "batch", batch)
    init = only_value(lora, "init", missing=init or "A")
    fan_in = only_value(lora, "fan_in", fan_in)
    full_fan_in = only_value(full, "fan_in", full_fan_in) or fan_in
    places = []
    for run in runs:
        width = full_fan_in if run.rank is None else fan_in
        places.append(place_of(replace(run, init=init, fan_in=width, batch=batch)))
    return places, full_fan_in


def _middle(places: Sequence[Reference], ranks: Sequence[int]) -> Reference:
    """Return the configuration of the middle one of the ranks swept, at its lowest alpha, or full
    finetuning if there are none.
    """
    if not ranks:
        return places[0]
    rank = ranks[(len(ranks) - 1) // 2]
    of_rank = [place for place in places if place.rank == rank]
    return min(of_rank, key=lambda place: place.alpha or 0.0)


def _at_reference(
    runs: Runs, places: Sequence[Reference], reference: Reference, law: Law
) -> Iterator[Observation]:
    """Yield the runs as observations, whose rates the law has moved to the reference."""
    # where no width is known, a usual one nearly cancels between ranks
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    for run, place in zip(runs, places, strict=True):
        if place.method != reference.method and not place.fan_in:
            raise CalibrationError(
                "The sweep has full finetuning and LoRA, but no fan-in to compare them.",
                "Give a fan-in, or leave out the rows of full finetuning.",
            )
        here = replace(place, fan_in=place.fan_in or ANY_WIDTH)
        octaves = math.log2(checked_multiplier(law, here.as_factor(), there))
        yield observation_of(run, math.log2(run.lr) - octaves)


def _check_enough(runs: Runs) -> None:
    """Raise if the runs cannot be fitted, or not in reasonable time."""
    if len(runs) > MOST_TRIALS:
        raise CalibrationError(
            f"{len(runs)} runs are more than a fit allows, {MOST_TRIALS}.",
            "Select those near the best rates.",
        )
    losses = {run.loss for run in runs}
    rates: dict[int | None, set[float]] = {}
    for run in runs:
        rates.setdefault(run.rank, set()).add(run.lr)
    if len(rates) > MOST_RANKS:
        raise CalibrationError(
            f"The sweep has more than {MOST_RANKS} ranks.", "Select some of them."
        )
    if max(map(len, rates.values())) == 1:
        raise CalibrationError(
            "No rank was tried at more than one rate, so the best rate is unknown.",
            "Sweep at least two rates, better six.",
        )
    if len(losses) == 1 and math.isfinite(runs[0].loss):
        raise CalibrationError(
            f"The loss is {runs[0].loss:g} at every rate, so the best rate is unknown.",
            "Check which column holds the loss, and that the runs trained.",
        )


def _scaling_rule(places: Sequence[Reference]) -> Scaling:
    """Return how the scaling follows the rank."""
    scalings: dict[int, float] = {}
    for place in places:
        if place.rank is None:
            continue
        known = scalings.setdefault(place.rank, place.scaling)
        if abs(math.log2(place.scaling / known)) > _SAME_SCALING:
            return "unknown"  # a rank at several alphas follows no rule
    return infer_scaling(dict(sorted(scalings.items())))


def _notes_on_grid(runs: Runs, ranks: Sequence[int]) -> Iterator[str]:
    """Yield sentences on ranks where the grid of rates does not hold the best one."""
    ended = {run.rank for run in runs if math.isfinite(run.loss)}
    for rank in ranks:
        if rank not in ended:
            yield (
                f"rank {rank}: every run diverged, so its rate is no measurement, and may"
                " diverge too"
            )
    at_rates = [observation_of(run, math.log2(run.lr)) for run in runs]
    for group, (x, end) in ends_of(at_rates).items():
        label = f"rank {group}" if group else "full finetuning"
        way = "below" if end == "lowest" else "above"
        yield (
            f"{label}: the best rate, {2.0**x:.3g}, is the {end} tried; the optimum may"
            f" be {way}"
        )


def _notes_on_fit(fit: Fit, ranks: Sequence[int]) -> Iterator[str]:
    """Yield sentences on what a fit does not determine."""
    base_sd, drift_sd, _ = np.sqrt(np.diag(fit.covariance))
    if base_sd > _UNSURE:
        yield (
            "the loss hardly determines the best rate: from end to end its band is"
            f" {times(2 * Z90 * base_sd)}"
        )
    if len(ranks) == 1:
        yield "one rank was swept, so only the law says how the rate moves with rank"
    elif ranks and drift_sd > _OPEN * fit.prior.drift_sd:
        yield (
            "the ranks swept hardly determine how the rate moves with rank: it mostly follows"
            " the law"
        )


def _bounded(fit: Fit, ends: Mapping[int | None, GridEnd]) -> Fit:
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
    return {
        "rank": np.array([run.rank or 0 for run in runs], np.int64),
        "seed": np.array([run.seed for run in runs], np.int64),
        "lr": np.array([2.0**o.x for o in observations]),
        "own_lr": np.array([run.lr for run in runs], np.float64),
        "value": np.array([run.loss for run in runs], np.float64),
        "diverged": np.array(diverged(observations), bool),
    }
