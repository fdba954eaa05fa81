"""The options of a calibration, and the order of its trials: ranks and seeds in turn, a budget of
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch.optim import Optimizer

from .._checks import MOST_RANKS, check_lr, is_positive, is_whole, is_within
from ..errors import CalibrationError
from ..fitting import all_rose, below_cliff
from ..laws import Law
from ._constants import TRIALS_PER_RANK
from ._trials import Setting, Trials

_SHORT_RUNS = 10  # with a budget only: most trials, as a multiple of the whole runs that it allows
# Runs of the highest rank before any other rank, since losses of different ranks cannot be
# compared; the most such runs if all of them rise; and runs of every other rank without which its
# rate is not found.
_BRACKET, _MOST_BRACKET, _OF_OTHERS = 3, 8, 2
PER_SEED = 4  # runs of a rank at one seed before the next seed; runs of one seed share its noise


@dataclass(frozen=True)
class Schedule:
    """The plan of a calibration: `trials` of the search, then `full_trials` of full finetuning.

    The fields are the arguments of `calibrate`. The ranks are sorted, full finetuning last.

    Raises:
        CalibrationError: one is impossible, or they contradict each other.
    """

    ranks: tuple[int | None, ...]
    seeds: tuple[int, ...]
    steps: int
    trials: int | None = None
    budget: int | None = None
    full_trials: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            check_argument(field.name, getattr(self, field.name))
        in_order = sorted(self.ranks, key=lambda rank: (rank is None, rank or 0))
        object.__setattr__(self, "ranks", tuple(in_order))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        least = self.steps * (1 + self.full_trials)
        if self.budget is not None and self.budget < least:
            runs = "1 run" if self.full_trials == 0 else f"{1 + self.full_trials} runs"
            raise CalibrationError(
                f"budget={self.budget} is too small for {runs}, {least} steps in all.",
                f"Give at least {least} training steps. Thirty runs are usually enough.",
                "budget",
            )
        if self.full_trials and None in self.ranks:
            raise CalibrationError(
                f"full_trials={self.full_trials} follows trials of LoRA, but None is already among"
                " the ranks.",
                "Leave one of the two out.",
                "full_trials",
            )

    @property
    def lora(self) -> list[int]:
        """The ranks without full finetuning."""
        return [*filter(None, self.ranks)]

    @property
    def anchor(self) -> int | None:
        """The highest rank, at which rates are bracketed."""
        return max(self.lora, default=None)

    @property
    def total(self) -> int:
        """The largest number of trials of the search."""
        if self.trials is not None:
            return self.trials
        if self.budget is not None:
            return max(TRIALS_PER_RANK, _SHORT_RUNS * self.budget // self.steps)
        return TRIALS_PER_RANK * len(self.ranks)

    def expected(self) -> int:
        """Return the likely number of trials, for progress reports."""
        return self._searches() + self.full_trials

    def _searches(self) -> int:
        """Return the likely number of trials of the search."""
        if self.budget is None:
            return self.total
        return min(self.total, self.budget // self.steps - self.full_trials)

    def caution(self) -> str:
        """Return a warning if a budget pays for too few runs to find the rates of all ranks, else
        "".
        """
        runs = self._searches()
        needed = _BRACKET + _OF_OTHERS * (len(self.ranks) - 1)
        if self.budget is None or runs >= min(needed, self.total):
            return ""
        return (
            f"A budget of {self.budget} steps leaves the search {runs} of the {needed} runs that it"
            " needs, so the rates may be far off. Give a larger budget, or fewer full trials."
        )

    def next(self, trials: Trials) -> Setting | None:
        """Return what to try after the trials so far, or None if the study is complete."""
        ended = trials.counted()
        if ended.hopeless():
            return None
        begun = Trials((*ended, *trials.running()))
        search = begun.at(*self.lora) if self.full_trials else begun
        full = len(begun) - len(search)
        left = (
            math.inf if self.budget is None else self.budget - trials.spent(self.steps)
        )
        payable = left - (self.full_trials - full) * self.steps
        if len(search) < self.total and payable >= self.steps:
            return self._search(search)
        if full < self.full_trials and left >= self.steps:
            return Setting(None, self.seeds[full // PER_SEED % len(self.seeds)])
        return None

    def _search(self, search: Trials) -> Setting:
        """Return the highest rank until its rates are bracketed, then the rank with the fewest
        trials. Each has four runs at a seed before the next seed.

        A diverged run has little information, so it counts less than the others. A pruned run
        counts in full.
        """
        observations = search.observations()
        all_too_high = observations and all_rose(below_cliff(observations))
        most = _MOST_BRACKET if all_too_high else _BRACKET
        is_bracketing = len(search) < min(most, self._searches() - len(self.ranks) + 1)
        ranks = [self.anchor] if is_bracketing else self.ranks
        diverged = search.diverged()
        settings = [trial.setting for trial in search]
        lost = [trial.setting for trial in search if trial.number in diverged]

        def due(setting: Setting) -> tuple[int, ...]:
            runs = settings.count(setting)
            fruitful = runs - lost.count(setting)
            return fruitful // PER_SEED, self.seeds.index(setting.seed), fruitful, runs

        return min(
            (Setting(rank, seed) for rank in ranks for seed in self.seeds), key=due
        )


@dataclass(frozen=True)
class Options:
    """What a calibration is for: its optimizer, law, schedule and target run.

    The fields are the arguments of `calibrate`. lr_range: log2 of the rates. target_steps: by
    default those of a trial.

    Raises:
        CalibrationError: one is impossible, or they contradict each other.
    """

    optimizer: type[Optimizer]
    law: Law
    schedule: Schedule
    lr_range: tuple[float, float] | None = None
    target_steps: int | None = None
    batch: float | None = None
    warmup: float | None = None
    seed: int = 0
    name: str = "calibration"

    def __post_init__(self) -> None:
        for name in ("target_steps", "batch", "warmup", "seed", "name"):
            check_argument(name, getattr(self, name))
        if self.target < self.schedule.steps:
            raise CalibrationError(
                f"target_steps={self.target} is less than the {self.schedule.steps} steps of a"
                " trial.",
                "Lower a trial's steps: an eighth of the target's is enough.",
                "target_steps",
            )

    @property
    def target(self) -> int:
        """The steps of the target run."""
        return self.schedule.steps if self.target_steps is None else self.target_steps

    @property
    def is_short(self) -> bool:
        """Whether the target run has more steps than the trials."""
        return self.target != self.schedule.steps

    @property
    def octaves_to_target(self) -> float:
        """log2 of the target's steps over those of a trial."""
        return math.log2(self.target / self.schedule.steps)

    @property
    def optimizer_name(self) -> str:
        return f"{self.optimizer.__module__}.{self.optimizer.__qualname__}"


# --- single arguments -----------------------------------------------------------------------------


def _is_distinct(values: object, fits: Callable[[Any], bool]) -> bool:
    """Return whether `values` is a non-empty sequence of distinct values that all fit."""
    return isinstance(values, Sequence) and 0 < len(values) == len(
        {*filter(fits, values)}
    )


def _are_ranks(value: Any) -> bool:
    return (
        _is_distinct(value, lambda r: r is None or is_whole(r))
        and len(value) <= MOST_RANKS
    )


def _are_seeds(value: Any) -> bool:
    return _is_distinct(value, lambda s: is_whole(s, -(2**63) + 1) and s < 2**63)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


# A check of each argument, and the cure in the error message.
_COUNT = "Give a whole number of at least 1."
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ranks": (
        _are_ranks,
        f"Give at most {MOST_RANKS} distinct positive whole numbers, such as (4, 64), and None for"
        " full.",
    ),
    "seeds": (_are_seeds, "Give distinct whole numbers, such as (0, 1)."),
    "steps": (is_whole, _COUNT),
    "target_steps": (is_whole, _COUNT),
    "trials": (is_whole, _COUNT),
    "budget": (is_whole, _COUNT),
    "full_trials": (lambda v: is_whole(v, 0), _COUNT),
    "batch": (is_positive, "Give a positive number, or leave it out."),
    "warmup": (
        lambda v: is_within("share", v),
        "Give a share of the steps, 0 to 1, or leave it out.",
    ),
    "seed": (
        lambda v: is_whole(v, 0) and v < 2**32,
        "Give a whole number from 0 to 2³² - 1.",
    ),
    "name": (_is_name, "Give a name of printable characters, such as 'digits'."),
}
_OPTIONAL = {"target_steps", "trials", "budget", "batch", "warmup"}


def check_argument(name: str, value: object) -> None:
    """Raise a `CalibrationError` if a single argument of `calibrate` is impossible."""
    if value is None and name in _OPTIONAL:
        return
    fits, cure = _CHECKS[name]
    if not fits(value):
        raise CalibrationError(f"{name} is {value!r}.", cure, name)


def octaves(lr_range: Any) -> tuple[float, float] | None:
    """Return log2 of the two rates of `lr_range`."""
    if lr_range is None:
        return None
    low = high = 1.0
    if (
        isinstance(lr_range, Sequence)
        and not isinstance(lr_range, str)
        and len(lr_range) == 2
    ):
        low, high = (check_lr(lr, "lr_range") for lr in lr_range)
    if low >= high:
        raise CalibrationError(
            f"lr_range is {lr_range!r}.", "Give two rates, the lower first.", "lr_range"
        )
    return math.log2(low), math.log2(high)
