"""`fit_sweep`: the fit of a calibration, applied to the runs of a sweep that exists."""

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
# Octaves: standard deviation of the optimum if the best learning rate is the lowest or highest one
# that was tried: judgement
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
    """Fit a recipe to an existing learning-rate sweep from any tool.

    At each rank the loss against log2 of the learning rate is modelled as a bowl with a cliff. The
    fitted best learning rates are shrunk towards the scaling law. Where the data do not determine
    something, the 90 % interval widens and a sentence in the recipe's `notes` says so: for example
    a best learning rate at the end of its grid, or a loss that hardly depends on it. Runs that
    diverged set the ceiling.

    A sweep needs the columns rank, lr (per step) and loss, and alpha for LoRA. A rank of "full" is
    full finetuning. A loss of "diverged" or inf is a run that diverged. A run without a loss (an
    empty cell, or NaN) has no result and is left out; a note counts such runs. Optional columns are
    rslora, init ("A", where B starts at zero as in PEFT, the default, or "B"), fan_in (the mean
    over the adapted layers), seed, model, batch, steps and start (the loss before training).
    Without a fan_in the recipe has no learning rate for full finetuning or for the other init.

    Args:
        sweep: the runs of one model: a CSV file, a dataframe, or a list with one dict per run. The
            export of a tracker can be read as it is.
        optimizer: the optimizer of the sweep, a class or a name. It decides the law's form.
        name: the recipe's name.
        law: the scaling law between ranks, by default µA. The fit's prior adds how much best
            learning rates fall with rank when A starts at zero.
        full_fan_in: the largest fan-in of the adapted layers, on which full finetuning's learning
            rate depends. By default the fan_in of the rows of full finetuning, else of LoRA's.
        columns: which column holds which field, such as {"lr": "config.lr", "loss": "eval/loss"}.
            Fields that are not listed are found by their own name or a usual one, such as
            learning_rate, lora_alpha, r or eval_loss. `recipe.source` lists the columns read.
        where: use only rows with these values, such as {"State": "finished"}.

    Returns:
        The recipe.

    Raises:
        CalibrationError: the file cannot be read; a column does not exist; `where` leaves no row; a
            cell is missing or impossible, with its line; the sweep mixes models, batches, inits or
            widths, has only one learning rate or more than 2,000 runs; or every run diverged.

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
    bound = recordable_law(law).bind(optimizer, {})
    read = read_sweep(sweep, columns, where)
    _check_one_model(read)
    ranks, full = read.ranks, read.full
    runs = [*read.lora, *full]
    reference = _reference(read)
    # Full finetuning depends on the largest width, which only its own rows can know.
    full_width = full_fan_in or (full or runs)[0].fan_in
    prior = prior_of(reference, ranks, full_width)
    # The fit sees learning rates that the law, at the means of the prior, has converted to the
    # reference. What it finds is the departure from the law.
    centred = centred_law(bound, reference, prior.pivot)
    observations = list(_at_reference(runs, reference, centred))
    fit = fit_observations(observations, prior)
    if fit is None:
        raise CalibrationError(
            f"All {len(runs)} runs of the sweep diverged.",
            "Add runs at lower learning rates.",
        )
    tried = [*ranks, None] if full else ranks  # None is full finetuning
    notes = (*what_is_unknown(fit, observations, *tried), *read.notes)
    # A best learning rate at the end of its grid is a bound, not a measurement. Its error has one
    # sign, so errors of several ranks do not average out.
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
    """Return the file of a sweep, and the fields that were read from columns with other names, as
    a recipe records them.
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
    """Return `Recipe.tensors`: the runs at their own learning rates, and converted to the
    reference.
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
    # An array needs a value of every run.
    if None in [row["start"] for row in rows]:
        for row in rows:
            del row["start"]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _check_one_model(sweep: Sweep) -> None:
    """Raise an error if the runs are too many, have one learning rate, or belong to several models,
    inits, widths, batches or lengths.
    """
    runs = sweep.runs
    if len(runs) > MOST_TRIALS:
        raise CalibrationError(
            f"The sweep has {len(runs):,} runs, but a fit accepts at most {MOST_TRIALS:,}.",
            "Keep the runs whose learning rates are closest to the best ones.",
        )
    if len({run.lr for run in runs}) < 2:
        raise CalibrationError(
            f"All runs of the sweep have the learning rate {runs[0].lr:g}.",
            "Add runs at other learning rates: at least two are needed, and six are better.",
        )
    for name in ("model", "batch", "steps"):
        _check_same(name, runs, sweep)
    for name in ("init", "fan_in"):
        _check_same(name, sweep.lora, sweep)
    _check_same("fan_in", sweep.full, sweep)


def _check_same(name: str, runs: Sequence[SweepRun], sweep: Sweep) -> None:
    """Raise an error if the runs have several values of a field."""
    values = list(dict.fromkeys(getattr(run, name) for run in runs))
    if len(values) < 2:
        return
    column = sweep.columns.get(name, name)
    raise CalibrationError(
        f"The sweep mixes {len(values)} values of {name}: {', '.join(map(repr, values))}.",
        f"A recipe belongs to one of them. Choose one, for example with where={{{column!r}:"
        f" {values[-1]!r}}} (in a shell, --where '{column}={values[-1]}').",
    )


def _reference(sweep: Sweep) -> Reference:
    """Return the configuration of the middle one of the ranks swept, at its lowest alpha; full
    finetuning if no LoRA rank was swept.
    """
    if not sweep.lora:
        return sweep.full[0].reference
    rank = sweep.ranks[(len(sweep.ranks) - 1) // 2]
    of_rank = [run.reference for run in sweep.lora if run.rank == rank]
    return min(of_rank, key=lambda reference: reference.alpha or 0.0)


def _at_reference(
    runs: Sequence[SweepRun], reference: Reference, law: Law
) -> Iterator[Observation]:
    """Yield the runs as observations, with their learning rates converted to the reference by the
    law.

    If no width is known, a usual one is assumed. It nearly cancels between ranks, but not between
    LoRA and full finetuning.
    """
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    for run in runs:
        own = run.reference
        if own.method != reference.method and not own.fan_in:
            raise CalibrationError(
                "The sweep has full finetuning and LoRA, but no fan-in to compare them.",
                "Add the column fan_in, or remove the rows of full finetuning.",
            )
        here = replace(own, fan_in=own.fan_in or ANY_WIDTH)
        octaves = math.log2(checked_multiplier(law, here.as_factor(), there))
        yield run.observed_at(math.log2(run.lr) - octaves)
