"""A sweep's arms: runs chosen and completed, where each stands for a law, and its loss over the rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .._types import Reference
from ..errors import CalibrationError
from ..recipe import ANY_WIDTH
from ._io import Run

if TYPE_CHECKING:
    from ..calibration.fit import Observation

__all__ = ["End", "curve_of", "ends_of", "known_alpha", "observation_of", "selected", "site_of"]


def selected(runs: Sequence[Run], chosen: Mapping[str, Any]) -> tuple[Run, ...]:
    """The runs of one model, batch, init and number of steps, each filled in where a row does not say it."""
    for name, wanted in chosen.items():
        values = sorted({getattr(run, name) for run in runs} - {None})
        if wanted is None and len(values) > 1:
            raise CalibrationError(
                f"The sweep mixes {len(values)} values of {name}: {', '.join(map(str, values))}.",
                f"A recipe is of one: choose by {name}=.",
            )
        value = values[0] if wanted is None and values else wanted
        runs = [replace(run, **{name: value}) for run in runs if getattr(run, name) in (None, value)]
        if not runs:
            raise CalibrationError(
                f"No row of the sweep has {name}={wanted!r}.", f"It has {', '.join(map(str, values))}."
            )
    return tuple(runs)


def known_alpha(runs: Sequence[Run], alpha: float | str | None) -> tuple[Run, ...]:
    """The runs with `alpha` filled in where a LoRA row does not say it; "rank": its rank."""
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and 0 < alpha < math.inf
    if alpha not in (None, "rank") and not number:
        raise CalibrationError(f"alpha is {alpha!r}.", "Give a positive number, or 'rank' where it follows the rank.")

    def filled(run: Run) -> Run:
        if run.rank is None or run.alpha is not None or alpha is None:
            return run
        return replace(run, alpha=float(run.rank if alpha == "rank" else alpha))

    made = tuple(map(filled, runs))
    said = {run.alpha is not None for run in made if run.rank is not None}
    if len(said) > 1:
        raise CalibrationError("Some rows say alpha and others do not.", "Give alpha= for those that do not.")
    return made


def observation_of(run: Run, arm: int | None, x: float) -> Observation:
    """A run as the fit sees it, in `arm`, at log2 rate x. Without a loss at the start, no run counts as risen."""
    from ..calibration.fit import Observation

    start = run.start if run.start is not None else run.loss if math.isfinite(run.loss) else 0.0
    return Observation(arm, run.seed, x, run.loss, start, run.loss, returned=True)


def site_of(run: Run, reference: Reference, fan_in: float | None) -> tuple[Reference, Reference]:
    """Where `run` stands, and the reference beside it, both with a fan-in.

    Where alpha was not told, the effective multiplier is taken as 1 at the reference and to follow 1/√rank. Where no
    fan-in is known a usual one stands in, which all but cancels between ranks.
    """
    there = replace(reference, fan_in=reference.fan_in or ANY_WIDTH)
    if run.rank is None:
        if reference.method == "lora" and (reference.fan_in is None and fan_in is None):
            raise CalibrationError(
                "The sweep has full finetuning beside LoRA, and no fan-in to compare them by.",
                "Give fan_in=, or leave out the rows of full finetuning.",
            )
        return Reference(method="full", fan_in=fan_in or there.fan_in), there
    width = fan_in or there.fan_in
    init: Any = run.init or "A"
    if run.alpha is None:
        scaling = math.sqrt((reference.rank or 1) / run.rank)
        return replace(Reference.from_scaling(run.rank, scaling, init=init), fan_in=width), there
    return Reference(run.rank, run.alpha, run.rslora, init, width), there


def curve_of(runs: Sequence[Run]) -> dict[float, float]:
    """{log2 rate: mean loss over seeds and repeats}, infinite where any of them diverged, by rising rate."""
    return _mean_losses([(math.log2(run.lr), run.loss) for run in runs])


def _mean_losses(points: Sequence[tuple[float, float]]) -> dict[float, float]:
    grid = {x: [loss for at, loss in points if at == x] for x in sorted({x for x, _ in points})}
    return {x: math.fsum(losses) / len(losses) for x, losses in grid.items()}


class End(NamedTuple):
    """A best rate that is an end of its grid: log2 of the rate, and which end."""

    x: float
    end: Literal["lowest", "highest"]


def ends_of(seen: Sequence[Observation]) -> dict[int | None, End]:
    """By rank, the best rates that nothing was tried beyond; a tie with a rate between is none."""
    found: dict[int | None, End] = {}
    for rank in dict.fromkeys(o.rank for o in seen):
        curve = _mean_losses([(round(o.x, 6), o.value) for o in seen if o.rank == rank])
        best = min(curve.values())
        at_best = [x for x, loss in curve.items() if loss == best]
        if len(curve) > 1 and math.isfinite(best) and len(at_best) == 1:
            if at_best[0] == min(curve):
                found[rank] = End(at_best[0], "lowest")
            elif at_best[0] == max(curve):
                found[rank] = End(at_best[0], "highest")
    return found
