"""Every optimizer class of the packages that are installed: its family, and whether it trains at the rates that it was given.

    python benchmarks/ecosystem/optimizers.py     # results/optimizers.md, some minutes on a core

A class is in the table that gives families by its name. The table's family is compared with a coordinate check: real
steps on LoRA factors of ranks 4, 16 and 64 on a layer of 64 × 64, at the rates that the form of each family gives, at
alpha = rank and alpha = 16, with A or B at zero. The slope of log2 of the output's change against log2 of the rank is 0
where the form is the optimizer's. The rule, committed before the run:

* the check finds a family if its form's slopes have an rms of at most 0.25 and every other form's at least twice as
  much. The forms are sign-like, spectral and gradient-like;
* it finds relative-scale, instead, where four times larger weights make four times larger steps, within a fifth;
* over ranks it finds sign-like, spectral or gradient-like by how far the output moves at rank 64 and at rank 4, at one
  rate, under torch's AdamW, Muon (of both shape factors) and SGD: with 1, 8 and 128 tokens in a batch, the same batch in
  every step (gradients that agree) or others (that do not), A or B at zero. The rms difference of the slopes to a form is
  at most 0.25 and to every other family's twice as much (`displacement.py`);
* where it finds none, or the class cannot be stepped so, the table's family is that of the published update rule, or
  unknown.

Under constant gradients ours, the native class at one rate and the native class with groups by hand are compared: does
each factor go its multiple of the native displacement (within a tenth), and are its entries, its singular values or its
direction and the gradient's alike, as its family says? The same methods as in the environment's test.

A public method other than `step` that moves a parameter farther at a larger rate is another way to step; it must move
ours as by hand.

That each trains as the native class with groups by hand, and goes on so from a saved state, the environment's tests say.
"""

from __future__ import annotations

import gc
import math
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from internals import FORMS, optimizer_family
from laws.coordinate_check import CoordinateCheck
from recording import machine, record
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).parents[2]))

import rankaware_optim as ra
from tests.environments.optimizers.cases import (
    CASES,
    CLASSES,
    NEEDS,
    PACKAGES,
    REFUSED,
)
from tests.environments.optimizers.displacement import (
    JUDGED,
    NOT_BY_RATE,
    OF_ANOTHER_FORM,
    distances_over_rank,
    family_of_distances,
    judged,
    ways_to_step,
)

RESTS_ON = ("laws", "families")
CHECKED = ("sign-like", "spectral", "gradient-like")
RANKS, WIDTH, TOKENS, STEPS = (4, 16, 64), 64, 128, 4
MOST, TIMES = 0.25, 2.0  # the rule
PATIENCE_S = 300
NOTES = [
    "check: the family that the coordinate check finds, and the rms of its form's slopes; over ranks: the same by the"
    " output's displacement at ranks 4 and 64, and the rms difference to the form's; in brackets the nearest form and its"
    " rms where none is found. known by: the check, ranks, the update rule where both find none, another, or were not"
    " possible, or nothing.",
    "displacement: under constant gradients. as given: at each factor's rate, and in its family's form where that is"
    " sign-like, spectral or gradient-like; else why that cannot be judged so. another way to step: a public method that"
    " moves parameters by the rate. Ours moves there by the multiplied one, as by hand; × gives the ratio where not.",
    "native: what the native class raised by itself.",
    "In adv_optm's Muon and AdaMuon the check finds Adam's form, since they rescale an update to Adam's rms; with"
    " rms_rescaling=False it finds Muon's (0.06 and 0.03). So does torch's Muon with adjust_lr_fn='match_rms_adamw'"
    " (Adam's form 0.09, Muon's of that shape 0.04). Whether their best rates move with the rank as Adam's was not run:"
    " their family is Muon's. Over ranks, too, adv_optm's Muon moves as Adam.",
]


@dataclass(frozen=True)
class Form(ra.Law):
    """The form of one family at every rank, whatever the optimizer."""

    family: str = "sign-like"
    name: ClassVar[str] = "form"

    def multiplier(self, factor: ra.Factor, reference: ra.Reference) -> float:
        init = "B" if factor.init == "B" else "A"
        at = reference.as_factor()
        here = init, factor.rank or 1, factor.scaling, factor.fan_in
        there = reference.init, at.rank or 1, at.scaling, at.fan_in
        return self.rate(*here) / self.rate(*there)

    def rate(self, *site: Any) -> float:
        return FORMS[self.family].rate(*site, TOKENS, "original")


def main() -> None:
    """Check and train every class, print, and write results/optimizers.md."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # the same numbers, without a compiler
    rows = []
    for key in [*CLASSES, *(key for key in CASES if key not in CLASSES)]:
        rows.append(row(key))
        print(*rows[-1].values(), sep=" · ", flush=True)
        gc.collect()
    record(
        "optimizers",
        "Optimizers: families, and rates as given",
        rows,
        machine(torch.get_num_threads()) | versions(),
        NOTES,
    )


def versions() -> dict[str, str]:
    names = {package.partition(".")[0] for package in PACKAGES}
    distributions = packages_distributions()
    return {
        name: version(distributions[name][0])
        for name in sorted(names)
        if name in distributions
    }


def row(key: str) -> dict[str, str]:
    if key in REFUSED:
        return {
            "class": key,
            "family": "",
            "known by": f"refused: {REFUSED[key]}",
            "check": "",
            "over ranks": "",
            "displacement": "",
            "another way to step": "",
        }
    kind = CASES[key].kind
    family = optimizer_family(kind)
    found, words = checked(key, kind)
    over_ranks, words_of_ranks = checked_over_ranks(key)
    by = {over_ranks: "ranks", found: "check"}.get(family, "rule")
    return {
        "class": key,
        "family": family,
        "known by": "–" if family == "unknown" else by,
        "check": words,
        "over ranks": words_of_ranks,
        "displacement": as_displaced(key),
        "another way to step": other_ways(key),
    }


def as_displaced(key: str) -> str:
    """Whether factors move at their rates and in their family's form, or why that cannot be judged."""
    if key not in JUDGED:
        return ""
    try:
        with patience():
            found = judged(JUDGED[key])
    except Exception as error:
        return f"native: {type(error).__name__}"
    if not found.as_by_hand:
        return "NOT AS BY HAND"
    words = [NOT_BY_RATE.get(key, "ANOTHER RATE")] * bool(found.wrong_rates)
    words += [OF_ANOTHER_FORM.get(key, "ANOTHER FORM")] * bool(found.other_forms)
    return "; ".join(dict.fromkeys(words)) or "as given"


def other_ways(key: str) -> str:
    """The methods that step too, and whether ours is at the multiplied rate there."""
    if key not in JUDGED:
        return ""
    ways = ways_to_step(JUDGED[key])
    return ", ".join(
        name if math.isclose(times, 1.0, rel_tol=1e-3) else f"{name} × {times:.3g}"
        for name, times in ways.items()
    )


@contextmanager
def patience() -> Iterator[None]:
    """Raise where something does not end."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {PATIENCE_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE_S)
    try:
        yield
    finally:
        signal.alarm(0)


# --- the family -----------------------------------------------------------------------------------------------------


def checked(key: str, kind: type[Optimizer]) -> tuple[str, str]:
    """The family that the check finds, "" if none, and a cell of the table."""
    settings = NEEDS.get(key, {}).get("settings", {})
    try:
        with patience():
            if (
                3.2
                <= step_at(kind, settings, weights=4.0) / step_at(kind, settings)
                <= 4.8
            ):
                return "relative-scale", "relative-scale"
            slopes = {family: slope_of(kind, settings, family) for family in CHECKED}
    except Exception:
        return "", ""
    best, second = sorted(slopes, key=slopes.__getitem__)[:2]
    words = f"{best} {slopes[best]:.2f}"
    if slopes[best] <= MOST and slopes[second] >= TIMES * slopes[best]:
        return best, words
    return "", f"({words})"


def checked_over_ranks(key: str) -> tuple[str, str]:
    """The family by the output's displacement at two ranks, "unknown" if none, and a cell of the table."""
    try:
        with patience():
            distances = distances_over_rank(CASES[key])
    except Exception:
        return "unknown", ""
    family = family_of_distances(distances)
    form, distance = next(iter(distances.items()))
    words = f"{form} {distance:.2f}"
    return family, words if family != "unknown" else f"({words})"


def slope_of(kind: type[Optimizer], settings: dict[str, Any], family: str) -> float:
    """The rms slope of the output's change over ranks, at the rates of a family's form."""
    settings_of = {"width": WIDTH, "tokens": TOKENS, "steps": STEPS}
    check = CoordinateCheck(kind, Form(family), settings, **settings_of)
    squares = [
        check.slope(RANKS, lambda rank, gamma=gamma: (16 / rank) ** gamma, init) ** 2
        for gamma in (0, 1)
        for init in ("A", "B")
    ]
    return math.sqrt(sum(squares) / len(squares))


def step_at(
    kind: type[Optimizer], settings: dict[str, Any], weights: float = 1.0
) -> float:
    """How far a matrix moves in a few steps, at weights of this size."""
    generator = torch.Generator().manual_seed(0)
    start = weights * torch.randn(WIDTH, 16, generator=generator)
    param = torch.nn.Parameter(start.clone())
    opt: Any = kind([param], lr=1e-4, **settings)
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    if hasattr(opt, "train"):
        opt.train()
    for _ in range(STEPS):
        param.grad = torch.randn(WIDTH, 16, generator=generator)
        opt.step()
    return float((param.detach() - start).norm())


if __name__ == "__main__":
    main()
