"""The options of a calibration, and the order of its trials: ranks and seeds in turn, a budget of
steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from .._checks import MOST_RANKS, is_positive, is_whole, is_within, plain
from .._rate import Rate
from ..errors import CalibrationError
from ..fitting import all_rose, below_cliff
from ..laws import Law
from ._constants import (
    BRACKET,
    FAR,
    MOST_BRACKET,
    OF_OTHERS,
    PER_SEED,
    SHORT_RUNS,
    TRIALS_PER_RANK,
)
from ._trials import Setting, Trials


@dataclass(frozen=True)
class Options:
    """What a calibration tries, and for which target run.

    The fields are the arguments of `calibrate`. The ranks are sorted, full finetuning last. Two are
    set by what it calibrates.

    suggested: a rate of the model that is known without a trial, around which it is searched.
    noisy: whether runs differ by chance, as in their rewards. Where they do by no more, the recipe
        has the suggested rate.

    Raises:
        CalibrationError: one is impossible, or they contradict each other.
    """

    optimizer: type[Optimizer]
    law: Law
    ranks: Sequence[int | None]
    seeds: Sequence[int]
    steps: int
    trials: int | None = None
    budget: int | None = None
    full_trials: int = 0
    lr_range: tuple[float, float] | None = None
    target_steps: int | None = None
    batch: float | None = None
    warmup: float | None = None
    seed: int = 0
    name: str = "calibration"
    suggested: Rate | None = None
    noisy: bool = False

    def __post_init__(self) -> None:
        for name in _CHECKS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        in_order = sorted(self.ranks, key=lambda rank: (rank is None, rank or 0))
        object.__setattr__(self, "ranks", tuple(in_order))
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
        if self.target < self.steps:
            raise CalibrationError(
                f"target_steps={self.target} is less than the {self.steps} steps of a trial.",
                "Lower a trial's steps: an eighth of the target's is enough.",
                "target_steps",
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
    def octaves(self) -> tuple[float, float] | None:
        """log2 of the rates of `lr_range`."""
        if self.lr_range is None:
            return None
        low, high = self.lr_range
        return math.log2(low), math.log2(high)

    @property
    def floor(self) -> float:
        """log2 of the lowest rate. Short trials make low rates look best, so on their word alone
        the search does not go below the suggested one.
        """
        is_free = self.suggested is None or self.octaves is not None
        if is_free or self.octaves_to_target < FAR:
            return -math.inf
        assert self.suggested is not None
        return math.log2(self.suggested.lr)

    @property
    def target(self) -> int:
        """The steps of the target run."""
        return self.steps if self.target_steps is None else self.target_steps

    @property
    def octaves_to_target(self) -> float:
        """log2 of the target's steps over those of a trial."""
        return math.log2(self.target / self.steps)

    @property
    def optimizer_name(self) -> str:
        return f"{self.optimizer.__module__}.{self.optimizer.__qualname__}"

    @property
    def most(self) -> int:
        """The largest number of trials of the search."""
        if self.trials is not None:
            return self.trials
        if self.budget is not None:
            return max(TRIALS_PER_RANK, SHORT_RUNS * self.budget // self.steps)
        return TRIALS_PER_RANK * len(self.ranks)

    @property
    def searches(self) -> int:
        """The likely number of trials of the search."""
        if self.budget is None:
            return self.most
        return min(self.most, self.budget // self.steps - self.full_trials)

    @property
    def expected(self) -> int:
        """The likely number of all trials."""
        return self.searches + self.full_trials

    @property
    def most_steps(self) -> int:
        """The largest number of steps of all trials."""
        return self.budget or self.expected * self.steps

    @property
    def price(self) -> str:
        """What all trials cost, in words."""
        most = f"at most {self.most_steps:,} steps"
        if self.budget is not None:
            return f"{most} in all"
        return f"{self.expected} trials × {self.steps:,} steps = {most}"


# --- the order of the trials ----------------------------------------------------------------------


def next_setting(options: Options, trials: Trials) -> Setting | None:
    """Return what to try after the trials so far, or None if the study is complete."""
    ended = trials.counted()
    if ended.hopeless():
        return None
    begun = Trials((*ended, *trials.running()))
    search = begun.at(*options.lora) if options.full_trials else begun
    full = len(begun) - len(search)
    left = math.inf
    if options.budget is not None:
        left = options.budget - trials.spent(options.steps)
    payable = left - (options.full_trials - full) * options.steps
    if len(search) < options.most and payable >= options.steps:
        return _next_of_search(options, search)
    if full < options.full_trials and left >= options.steps:
        seeds = options.seeds
        return Setting(None, seeds[full // PER_SEED % len(seeds)])
    return None


def _next_of_search(options: Options, search: Trials) -> Setting:
    """Return the highest rank until its rates are bracketed, then the rank with the fewest trials.
    Each has four runs at a seed before the next seed.

    A diverged run has little information, so it counts less than the others. A pruned run counts in
    full.
    """
    observations = search.observations()
    all_too_high = observations and all_rose(below_cliff(observations))
    most = MOST_BRACKET if all_too_high else BRACKET
    is_bracketing = len(search) < min(most, options.searches - len(options.ranks) + 1)
    ranks = [options.anchor] if is_bracketing else options.ranks
    diverged = search.diverged()
    settings = [trial.setting for trial in search]
    lost = [trial.setting for trial in search if trial.number in diverged]

    def due(setting: Setting) -> tuple[int, ...]:
        runs = settings.count(setting)
        fruitful = runs - lost.count(setting)
        return fruitful // PER_SEED, options.seeds.index(setting.seed), fruitful, runs

    return min(
        (Setting(rank, seed) for rank in ranks for seed in options.seeds), key=due
    )


def caution(options: Options) -> str:
    """Return a warning if a budget pays for too few runs to find all ranks' rates, else ""."""
    runs = options.searches
    needed = BRACKET + OF_OTHERS * (len(options.ranks) - 1)
    if options.budget is None or runs >= min(needed, options.most):
        return ""
    return (
        f"A budget of {options.budget} steps leaves the search {runs} of the {needed} runs that it"
        " needs, so the rates may be far off. Give a larger budget, or fewer full trials."
    )


# --- single arguments -----------------------------------------------------------------------------


def _is_distinct(values: object, fits: Callable[[Any], bool]) -> bool:
    """Return whether `values` is a non-empty sequence of distinct values that all fit."""
    if not isinstance(values, Sequence):
        return False
    return 0 < len(values) == len({*filter(fits, values)})


def _are_ranks(value: Any) -> bool:
    fit = _is_distinct(value, lambda rank: rank is None or is_whole(rank))
    return fit and len(value) <= MOST_RANKS


def _is_range(value: Any) -> bool:
    """Return whether `value` is two rates, the lower first."""
    two = _is_distinct(value, is_positive) and len(value) == 2
    return two and value[0] < value[1]


# A check of each argument, and the cure in the error message.
_COUNT = "Give a whole number of at least 1."
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "ranks": (
        _are_ranks,
        f"Give at most {MOST_RANKS} distinct positive whole numbers, such as (4, 64), and None for"
        " full.",
    ),
    "seeds": (
        lambda v: _is_distinct(v, lambda seed: is_within("seed", seed)),
        "Give distinct whole numbers, such as (0, 1).",
    ),
    "steps": (is_whole, _COUNT),
    "trials": (is_whole, _COUNT),
    "budget": (is_whole, _COUNT),
    "full_trials": (lambda v: is_whole(v, 0), _COUNT),
    "lr_range": (_is_range, "Give two positive rates, the lower first."),
    "target_steps": (is_whole, _COUNT),
    "batch": (is_positive, "Give a positive number, or leave it out."),
    "warmup": (
        lambda v: is_within("share", v) and v < 1,
        "Give a share of the steps, below 1, or leave it out.",
    ),
    "seed": (
        lambda v: is_whole(v, 0) and v < 2**32,
        "Give a whole number from 0 to 2³² - 1.",
    ),
    "name": (
        lambda v: isinstance(v, str) and v != "" and v.isprintable(),
        "Give a name of printable characters, such as 'digits'.",
    ),
}
_OPTIONAL = {"trials", "budget", "lr_range", "target_steps", "batch", "warmup"}


def _checked(name: str, value: object) -> object:
    """Return an argument of `calibrate` with Python's own numbers. Raise a `CalibrationError` if it
    is impossible.
    """
    value = plain(value)
    if value is None and name in _OPTIONAL:
        return None
    fits, cure = _CHECKS[name]
    if not fits(value):
        raise CalibrationError(f"{name} is {value!r}.", cure, name)
    return value
