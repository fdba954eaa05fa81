"""The evidence for a moved rate, as a phrase for the report's "why"."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..laws import Constant, Falling, LoRAPlus, MuA
from ._plan import Assignment, Plan

_AS_TUNED = "as tuned"
# From the most to the least certain. A move in several steps has the phrase of its least certain
# step.
_ORDER = (
    "theory, measured",
    "measured, small runs",
    "theory",
    "theory, against small runs",
    "untested",
    "a guess, as for sign-like optimizers",
    "a rule of thumb",
)


def evidence(plan: Plan, made: Assignment) -> str:
    """Return the evidence for the rate that `plan` gave a factor. Only the default law and µA were
    tested.
    """
    law = plan.law
    if plan.recipe is not None:
        return "calibrated, see its band"
    if isinstance(law, (Constant, LoRAPlus)):
        return "not moved" if made.multiplier == 1.0 else "its authors' advice"
    found = list(_moves(plan, made))
    if not found and made.multiplier == 1.0:
        return _AS_TUNED
    inner = law.law if isinstance(law, Falling) else law
    known = found and isinstance(inner, MuA) and inner.ratio == 1.0
    return max(found, key=_ORDER.index) if known else "as that law says"


def _moves(plan: Plan, made: Assignment) -> Iterator[str]:
    """Yield a phrase for each way in which a factor differs from the reference."""
    at, measured = plan.reference, isinstance(plan.law, Falling)
    of_family = _of_family(plan, made.init)
    adam, init = plan.family == "sign-like", "B" if made.init == "B" else "A"
    if made.role == "full" or at.method == "full":
        if made.role != "full" or at.method != "full":
            yield "a rule of thumb"
    elif not math.isclose(made.rank or 1, at.rank or 1):
        fall = -math.log(made.scaling / at.scaling) / math.log((made.rank or 1) / (at.rank or 1))
        seen = min(abs(fall), abs(fall - 1.0)) < 0.05  # alpha follows the rank, or is kept
        of_b = "measured, small runs" if measured else "theory, against small runs"
        yield (
            (of_b if init == "B" else "theory, measured" if seen else "theory")
            if adam
            else of_family
        )
    elif not math.isclose(made.scaling, at.scaling):
        yield "theory" if adam else of_family
    if plan.options.per_layer_width or not math.isclose(plan.width, at.fan_in or plan.width):
        at_b = measured and init == "B" and made.role != "full"
        yield "untested" if at_b else of_family if plan.family == "unknown" else "theory"
    if plan.batch_multiplier != 1.0:
        yield "a rule of thumb"


def _of_family(plan: Plan, init: str | None) -> str:
    """Return the evidence for a family's form if rank or alpha differ
    (benchmarks/results/law_check.md, at Init[A]).
    """
    if plan.family == "unknown":
        return "a guess, as for sign-like optimizers"
    return "theory" if init == "B" else "measured, small runs"
