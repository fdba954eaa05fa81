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


def selected(runs: Sequence[SweepRun], chosen: Mapping[str, Any]) -> tuple[SweepRun, ...]:
    """Return the runs of one model, batch, init and number of steps. Missing values are filled in.

    Beside LoRA rows that state an init, one without has the default, "A".
    """
    for name, wanted in chosen.items():
        if name == "init" and any(run.init for run in runs if run.rank is not None):
            runs = [run if run.init or run.rank is None else replace(run, init="A") for run in runs]
        values = sorted({getattr(run, name) for run in runs} - {None})
        if wanted is None and len(values) > 1:
            raise CalibrationError(
                f"The sweep mixes {len(values)} values of {name}: {', '.join(map(str, values))}.",
                f"A recipe is for one of them: choose it by {name}=.",
            )
        value = values[0] if wanted is None and values else wanted
        runs = [
            replace(run, **{name: value}) for run in runs if getattr(run, name) in (None, value)
        ]
        if not runs:
            raise CalibrationError(
                f"No row of the sweep has {name}={wanted!r}.",
                f"It has {', '.join(map(str, values))}.",
            )
    return tuple(runs)


def known_alpha(runs: Sequence[SweepRun], alpha: float | str | None) -> tuple[SweepRun, ...]:
    """Return the runs with `alpha` filled in for LoRA rows without one. "rank" means the row's
    rank.
    """
    if alpha not in (None, "rank") and not is_within("alpha", alpha):
        raise CalibrationError(
            f"alpha is {shown(alpha)}.", f"Give {range_of('alpha')}, or 'rank' if it follows it."
        )
    made = tuple(
        (
            replace(run, alpha=float(run.rank if alpha == "rank" else alpha))
            if run.rank is not None and run.alpha is None and alpha is not None
            else run
        )
        for run in runs
    )
    if len({run.alpha is None for run in made if run.rank is not None}) > 1:
        raise CalibrationError(
            "Some rows have an alpha and others do not.", "Give an alpha for those without."
        )
    return made


def observation_of(run: SweepRun, group: int | None, x: float) -> Observation:
    """Return a run as an observation in `group` at log2 rate x. Without a start loss its score is
    used as the start.
    """
    start = run.start if run.start is not None else run.loss if math.isfinite(run.loss) else 0.0
    return Observation(group, run.seed, x, run.loss, start, run.loss, returned=True)


def site_of(
    run: SweepRun, reference: Reference, fan_in: float | None
) -> tuple[Reference, Reference]:
    """Return the configuration of `run`, and the reference, both with a fan-in.

    If alpha is unknown, the effective multiplier is taken as 1 at the reference and proportional to
    1/√rank. If no fan-in is known, a usual one is used, which nearly cancels between ranks.
    """
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    width = fan_in or there.fan_in
    if run.rank is None:
        if reference.method == "lora" and (reference.fan_in is None and fan_in is None):
            raise CalibrationError(
                "The sweep has full finetuning and LoRA, but no fan-in to compare them.",
                "Give a fan-in, or leave out the rows of full finetuning.",
            )
        return Reference(method="full", fan_in=width), there
    init: Any = run.init or "A"
    if run.alpha is None:
        scaling = math.sqrt((reference.rank or 1) / run.rank)
        return replace(Reference.from_scaling(run.rank, scaling, init=init), fan_in=width), there
    return Reference(run.rank, run.alpha, run.rslora, init, width), there


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


def ends_of(seen: Sequence[Observation]) -> dict[int | None, GridEnd]:
    """Return, by rank, the best rates at an end of the grid. A tie with a rate inside the grid does
    not count.
    """
    found: dict[int | None, GridEnd] = {}
    for rank in dict.fromkeys(o.rank for o in seen):
        curve = mean_losses((round(o.x, 6), o.value) for o in seen if o.rank == rank)
        best = [
            x for x, loss in curve.items() if loss == min(curve.values()) and math.isfinite(loss)
        ]
        for end, x in (("lowest", min(curve)), ("highest", max(curve))):
            if len(curve) > 1 and best == [x]:
                found[rank] = GridEnd(x, end)
    return found
