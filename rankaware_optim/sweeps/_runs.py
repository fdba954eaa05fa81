"""A sweep's runs: selection, missing values, their configurations for a law, and their loss against
the rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .._checks import is_within, range_of, shown
from .._types import Reference
from ..errors import CalibrationError
from ..fitting import Observation
from ..recipe import ANY_WIDTH
from ._io import SweepRun

Runs = Sequence[SweepRun]


def selected(runs: Runs, chosen: Mapping[str, Any]) -> Runs:
    """Return the runs of one model, batch, init and number of steps. Missing values are filled in.

    Beside LoRA rows that state an init, one without has the default, "A".
    """
    for name, wanted in chosen.items():
        if name == "init" and any(run.init for run in runs if run.rank is not None):
            runs = [_with_init(run) for run in runs]
        runs = _of_one_value(runs, name, wanted)
    return runs


def _with_init(run: SweepRun) -> SweepRun:
    return run if run.init or run.rank is None else replace(run, init="A")


def _of_one_value(runs: Runs, name: str, wanted: Any) -> Runs:
    values = sorted({getattr(run, name) for run in runs} - {None})
    listed = ", ".join(map(str, values))
    if wanted is None and len(values) > 1:
        raise CalibrationError(
            f"The sweep mixes {len(values)} values of {name}: {listed}.",
            f"A recipe is for one of them: choose it by {name}=.",
        )
    value = values[0] if wanted is None and values else wanted
    matching = [run for run in runs if getattr(run, name) in (None, value)]
    if not matching:
        raise CalibrationError(
            f"No row of the sweep has {name}={wanted!r}.", f"It has {listed}."
        )
    return [replace(run, **{name: value}) for run in matching]


def with_alpha(runs: Runs, alpha: float | str | None) -> Runs:
    """Return the runs with `alpha` filled in for LoRA rows without one. "rank" means the row's
    rank.
    """
    if alpha not in (None, "rank") and not is_within("alpha", alpha):
        raise CalibrationError(
            f"alpha is {shown(alpha)}.",
            f"Give {range_of('alpha')}, or 'rank' if it follows it.",
        )
    if alpha is not None:
        runs = [_with_alpha(run, alpha) for run in runs]
    if len({run.alpha is None for run in runs if run.rank is not None}) > 1:
        raise CalibrationError(
            "Some rows have an alpha and others do not.",
            "Give an alpha for those without.",
        )
    return runs


def _with_alpha(run: SweepRun, alpha: float | str) -> SweepRun:
    if run.rank is None or run.alpha is not None:
        return run
    return replace(run, alpha=float(run.rank if alpha == "rank" else alpha))


def with_width(runs: Runs, fan_in: float | None, full_fan_in: float | None) -> Runs:
    """Return the runs with one fan-in for LoRA and one for full finetuning: that of the rows, else
    the argument.
    """
    if full_fan_in is None:
        full_fan_in = fan_in
    lora = _width([run for run in runs if run.rank is not None], fan_in)
    full = _width([run for run in runs if run.rank is None], full_fan_in)
    return [replace(run, fan_in=full if run.rank is None else lora) for run in runs]


def _width(runs: Runs, argument: float | None) -> float | None:
    widths = sorted({run.fan_in for run in runs if run.fan_in is not None})
    if len(widths) == 1:
        return widths[0]
    if len(widths) > 1 and argument is None:
        raise CalibrationError(
            f"The sweep mixes fan-ins: {', '.join(f'{n:g}' for n in widths)}.",
            "A recipe is for one model: give its mean fan-in.",
        )
    return argument


def reference_of(runs: Runs) -> Reference:
    """Return the configuration of the middle one of the ranks swept, or full finetuning if there
    are none.
    """
    batch = runs[0].batch
    ranks = sorted({run.rank for run in runs if run.rank is not None})
    if not ranks:
        return Reference(method="full", fan_in=runs[0].fan_in, batch=batch)
    rank = ranks[(len(ranks) - 1) // 2]
    run = min(
        (run for run in runs if run.rank == rank), key=lambda run: run.alpha or 0.0
    )
    alpha = float(rank) if run.alpha is None else run.alpha
    return Reference(rank, alpha, run.rslora, run.init or "A", run.fan_in, batch=batch)


def site_of(run: SweepRun, reference: Reference) -> tuple[Reference, Reference]:
    """Return the configuration of `run`, and the reference, both with a fan-in.

    If alpha is unknown, the effective multiplier is taken as 1 at the reference and proportional to
    1/√rank. If no fan-in is known, a usual one is used, which nearly cancels between ranks.
    """
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    width = run.fan_in or there.fan_in
    init = run.init or "A"
    if run.rank is None:
        if reference.method == "lora" and not (reference.fan_in or run.fan_in):
            raise CalibrationError(
                "The sweep has full finetuning and LoRA, but no fan-in to compare them.",
                "Give a fan-in, or leave out the rows of full finetuning.",
            )
        return Reference(method="full", fan_in=width), there
    if run.alpha is not None:
        return Reference(run.rank, run.alpha, run.rslora, init, width), there
    scaling = math.sqrt((reference.rank or 1) / run.rank)
    here = Reference.from_scaling(run.rank, scaling, init=init)
    return replace(here, fan_in=width), there


def observation_of(run: SweepRun, x: float) -> Observation:
    """Return a run as an observation at log2 rate x. Without a start loss its score is used as the
    start.
    """
    start = run.start
    if start is None:
        start = run.loss if math.isfinite(run.loss) else 0.0
    return Observation(run.rank, run.seed, x, run.loss, start, run.loss, returned=True)


def mean_losses(points: Iterable[tuple[float, float]]) -> dict[float, float]:
    """Return {log2 rate: mean loss} from (log2 rate, loss), by ascending rate; infinite if a run
    diverged.
    """
    by_rate: dict[float, list[float]] = {}
    for x, loss in points:
        by_rate.setdefault(x, []).append(loss)
    return {x: math.fsum(losses) / len(losses) for x, losses in sorted(by_rate.items())}


class GridEnd(NamedTuple):
    """A best rate at an end of its grid: log2 of the rate, and whether it is the "lowest" or the
    "highest".
    """

    x: float
    end: str


def ends_of(observations: Sequence[Observation]) -> dict[int | None, GridEnd]:
    """Return, by rank, the best rates at an end of the grid. A tie with a rate inside the grid does
    not count.
    """
    points: dict[int | None, list[tuple[float, float]]] = {}
    for o in observations:
        points.setdefault(o.rank, []).append((round(o.x, 6), o.value))
    ends: dict[int | None, GridEnd] = {}
    for rank, of_rank in points.items():
        losses = mean_losses(of_rank)
        rates, least = list(losses), min(losses.values())
        best = [x for x, loss in losses.items() if loss == least]
        if len(rates) == 1 or len(best) > 1 or not math.isfinite(least):
            continue
        if best[0] == rates[0]:
            ends[rank] = GridEnd(best[0], "lowest")
        elif best[0] == rates[-1]:
            ends[rank] = GridEnd(best[0], "highest")
    return ends
