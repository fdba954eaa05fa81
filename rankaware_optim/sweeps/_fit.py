"""This module fits a recipe to the runs of an existing learning-rate sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.optim import Optimizer

from .._checks import MOST_TRIALS, check_range
from .._near_misses import explain_near_misses
from .._optimizers import get_optimizer_class
from .._types import Reference
from ..calibration import versions_used, what_is_unknown
from ..errors import CalibrationError
from ..fitting import (
    Observation,
    centred_law,
    diverged,
    end_of,
    fit_observations,
    prior_of,
)
from ..laws import PRIOR_LAW, Law, checked_multiplier, recordable_law
from ..recipe import ANY_WIDTH, Recipe, infer_scaling, recipe_of
from ._read import Source, Sweep, SweepRun, read_sweep

DEMO_SWEEP = Path(__file__).with_name("demo_sweep.csv")  # EfficientNet-lite0 on digits
# The uncertainty of the optimum if the best learning rate is the lowest or the highest one that was
# tried, as a standard deviation in octaves: judgement
_END_SD = 1.0


@explain_near_misses
def fit_sweep(
    sweep: Source,
    *,
    optimizer: type[Optimizer] | str = "AdamW",
    name: str = "sweep",
    law: str | Law = PRIOR_LAW,
    full_fan_in: float | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
) -> Recipe:
    """Fit a recipe to an existing learning-rate sweep, no matter which tool produced it.

    For each rank, the function fits a curve to the losses to find the best learning rate. The
    scaling law then describes how the best learning rate depends on the rank. The lowest learning
    rate where a run diverged becomes the recipe's ceiling. If the best learning rate of a rank
    is the lowest or the highest that was tried, the 90 % interval becomes wider, and the recipe's
    `notes` explain why.

    A sweep must have the columns rank, lr (the learning rate per optimizer step) and
    loss. If the sweep contains LoRA runs, it also needs the column alpha. For a run of
    full finetuning, set the column rank to "full". If a run diverged, set the column
    loss to "diverged" or inf. Runs without a loss (an empty cell or NaN) are left out,
    and a note says how many there are. The optional columns are rslora, init ("A" or
    "B", by default "A", where B starts at zero as in PEFT), fan_in (the mean of the
    adapted layers), seed, model, batch, steps and start (the loss before training). If
    the sweep has no column fan_in (the width of the model), the recipe cannot convert
    learning rates to full finetuning or to another LoRA init.

    Args:
        sweep: the runs of one model, as a CSV file, a dataframe, or a list with one dict per run.
            Exports of experiment trackers can be read without changes.
        optimizer: the optimizer of the sweep, as a class or a name. The formula of the law depends
            on it.
        name: the recipe's name.
        law: the scaling law between ranks, by default µA. If A starts at zero, the fit also expects
            that best learning rates fall with rank.
        full_fan_in: the largest fan-in of the adapted layers, on which full finetuning's learning
            rate depends. By default it is the fan_in of the rows of full finetuning, or of the LoRA
            rows if there are none.
        columns: the column for each field, such as {"lr": "config.lr", "loss": "eval/loss"}. Other
            fields are found by their names or common alternatives, such as learning_rate,
            lora_alpha, r or eval_loss. `recipe.source` lists the columns that were read.
        where: use only rows with these values, such as {"State": "finished"}.

    Returns:
        The recipe.

    Raises:
        CalibrationError: the file cannot be read; a column does not exist; no row meets the
            conditions in `where`; a cell is missing or impossible (the message names the line); the
            sweep has several models, batch sizes, inits or widths; the sweep has only one learning
            rate or more than 2,000 runs; or every run diverged.

    >>> points = [(rank, x) for rank in (8, 64) for x in range(-14, -8)]
    >>> rows = [
    ...     {"rank": r, "alpha": r, "lr": 2.0**x, "loss": 1 + 0.1 * (x + 11) ** 2}
    ...     for r, x in points
    ... ]
    >>> recipe = fit_sweep(rows)
    >>> 2**-11.5 < recipe.fitted_lr < 2**-10.5
    True
    """
    optimizer = get_optimizer_class(optimizer)
    if full_fan_in is not None:
        check_range("fan_in", full_fan_in, "full_fan_in", CalibrationError)
    # A recipe stores its law in a file, so only laws that can be written and read back are allowed.
    bound = recordable_law(law).bind(optimizer, {})
    read = read_sweep(sweep, columns, where)
    _check_one_model(read)
    ranks, full = read.ranks, read.full
    runs = [*read.lora, *full]
    reference = _reference(read)
    # Full finetuning depends on the largest width, which only the rows of full finetuning contain.
    full_width = full_fan_in or (full or runs)[0].fan_in
    prior = prior_of(reference, ranks, full_width)
    # The law converts all learning rates to the reference before the fit. The fit then estimates
    # how the sweep deviates from the law.
    centred = centred_law(bound, reference, prior.pivot)
    observations = list(_at_reference(runs, reference, centred))
    fit = fit_observations(observations, prior)
    if fit is None:
        count, lowest = len(runs), min(run.lr for run in runs)
        raise CalibrationError(
            f"All {count} runs of the sweep diverged, so the best learning rate is unknown.",
            f"Add runs with learning rates below {lowest:.3g}, the lowest learning rate so far.",
        )
    tried = [*ranks, None] if full else ranks  # None is full finetuning
    notes = (*what_is_unknown(fit, observations, *tried), *read.notes)
    # If the best learning rate is at the end of the range, the true optimum may be far outside. The
    # errors of several ranks then have the same sign and do not average out, so the uncertainty of
    # the base learning rate is increased directly.
    at_end = [bool(end_of(observations, rank)) for rank in tried]
    fit.covariance[0, 0] += (_END_SD * np.mean(at_end)) ** 2
    return recipe_of(
        fit,
        bound,
        reference,
        name=name,
        scaling_rule=infer_scaling(run.reference for run in runs),
        full_fan_in=full_width,
        ranks=tuple(ranks),
        full_seen=bool(full),
        optimizer=f"{optimizer.__module__}.{optimizer.__qualname__}",
        steps=runs[0].steps,
        versions=versions_used(),
        source=_source(sweep, read),
        notes=notes,
        tensors=_tensors(runs, observations),
    )


def _source(sweep: Source, read: Sweep) -> dict[str, str]:
    """Return the sweep's file name and its columns in the form that `Recipe.source` stores.

    A column of the sweep is only listed if its name differs from its field's name in
    `SweepRun`.
    """
    source = {}
    if isinstance(sweep, (str, Path)):
        source["sweep"] = Path(sweep).name
    if read.renamed:
        pairs = (f"{field} from {column}" for field, column in read.renamed.items())
        source["columns"] = ", ".join(pairs)
    return source


def _tensors(
    runs: Sequence[SweepRun], observations: Sequence[Observation]
) -> dict[str, np.ndarray[Any, Any]]:
    """Convert the runs to the arrays that `Recipe.tensors` stores.

    The array `own_lr` contains the learning rates that the runs used. The array `lr` contains the
    same learning rates converted to the reference configuration.
    """
    lost = diverged(observations)
    rows = []
    for run, o in zip(runs, observations, strict=True):
        row = {
            "rank": run.rank or 0,
            "seed": run.seed,
            "lr": 2.0**o.x,
            "own_lr": run.lr,
            "value": run.loss,
            "diverged": o in lost,
            "start": run.start,
        }
        rows.append(row)
    # `start` is an array, so it is only stored if every run has a value.
    if None in [row["start"] for row in rows]:
        for row in rows:
            del row["start"]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _check_one_model(sweep: Sweep) -> None:
    """Raise an error if no single recipe can be fitted to all runs of the sweep.

    All runs must use the same model, init, width, batch size and number of steps. The sweep must
    have at least two learning rates and at most 2,000 runs.
    """
    runs = sweep.runs
    if (count := len(runs)) > MOST_TRIALS:
        raise CalibrationError(
            f"The sweep has {count:,} runs, but a recipe can be fitted to at most {MOST_TRIALS:,}"
            " runs.",
            "Pass where= to select fewer runs, or remove runs whose learning rates are far from the"
            " best ones.",
        )
    if len({run.lr for run in runs}) < 2:
        lr = runs[0].lr
        raise CalibrationError(
            f"All runs of the sweep have the same learning rate {lr:g}, but a recipe needs runs"
            " with at least two different learning rates.",
            "Add runs with other learning rates, preferably six learning rates for each rank.",
        )
    for name in ("model", "batch", "steps"):
        _check_same(name, runs, sweep)
    for name in ("init", "fan_in"):
        _check_same(name, sweep.lora, sweep)
    _check_same("fan_in", sweep.full, sweep)


def _check_same(name: str, runs: Sequence[SweepRun], sweep: Sweep) -> None:
    """Raise an error if a field has different values in different runs."""
    values = list(dict.fromkeys(getattr(run, name) for run in runs))
    if len(values) < 2:
        return
    column, value = sweep.columns.get(name, name), values[-1]
    condition, found = {column: value}, ", ".join(map(repr, values))
    count = len(values)
    raise CalibrationError(
        f"All runs of the sweep must have the same {name}, but the sweep contains {count} values of"
        f" {name}: {found}.",
        f"Select the runs with one of these values. For example, pass where={condition} (in a"
        f" shell: --where '{column}={value}').",
    )


def _reference(sweep: Sweep) -> Reference:
    """Choose the reference configuration, which the base learning rate applies to.

    The function chooses the middle rank of the sweep, and the lowest alpha that was tried with this
    rank. If the sweep has no LoRA runs, the function chooses full finetuning.
    """
    if not sweep.lora:
        return sweep.full[0].reference
    # The middle rank is the safest reference, because no other rank is far away from it.
    rank = sweep.ranks[(len(sweep.ranks) - 1) // 2]
    of_rank = [run.reference for run in sweep.lora if run.rank == rank]
    return min(of_rank, key=lambda reference: reference.alpha or 0.0)


def _at_reference(
    runs: Sequence[SweepRun], reference: Reference, law: Law
) -> Iterator[Observation]:
    """Yield each run as an observation, after converting its learning rate to the reference.

    If the model's width is unknown, the function assumes a typical width. The assumed width has
    little effect on a conversion between LoRA ranks, but a large effect on a conversion between
    LoRA and full finetuning. If a conversion between LoRA and full finetuning is needed, the
    function therefore raises an error.
    """
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    for run in runs:
        own = run.reference
        if own.method != reference.method and not own.fan_in:
            raise CalibrationError(
                "The sweep has runs of LoRA and of full finetuning. To compare these runs, the fit"
                " needs the model's width, but the sweep has no fan_in for some of them.",
                "Write the model's width into the column fan_in, or remove the rows whose rank is"
                " 'full'.",
            )
        here = replace(own, fan_in=own.fan_in or ANY_WIDTH)
        # The law's multiplier leads from the reference to this run, so dividing by it leads back.
        octaves = math.log2(checked_multiplier(law, here.as_factor(), there))
        yield run.observed_at(math.log2(run.lr) - octaves)
