"""The options of a calibration, checked at the door, and the order in which ranks and seeds are
tried.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.optim import Optimizer

from .._checks import (
    MOST_RANKS,
    RANGES,
    is_positive,
    plain,
    shown,
)
from .._optimizers import get_optimizer_class
from .._rate import Rate
from ..errors import CalibrationError
from ..fitting import all_rose, below_cliff, diverged
from ..laws import Law, recordable_law
from ._constants import BRACKET, FAR, MOST_BRACKET, PER_SEED, TRIALS_PER_RANK
from ._trials import Setting, Trials

T = TypeVar("T")
# one character or more, none of which controls a terminal or is half of another
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


@dataclass(frozen=True)
class Options:
    """What a calibration tries, and for which target run.

    All fields but the last two are arguments of `calibrate`. The optimizer's class and the law are
    looked up by name, and the ranks are sorted, with full finetuning (None) last.

    Args:
        suggested: the learning rate that `suggest_lr` has for the model. The search starts there.
        noisy: whether the values of a run are rewards, which differ much by chance. If chance
            explains how the runs differ, the recipe has the suggested learning rate.

    Raises:
        CalibrationError: an argument is impossible, or two contradict each other.
        OptimizerError, LawError: no optimizer or law has the name.
    """

    optimizer: type[Optimizer]
    law: Law
    ranks: Sequence[int | None]
    seeds: Sequence[int]
    steps: int
    trials: int | None = None
    full_trials: int = 0
    lr_range: tuple[float, float] | None = None
    target_steps: int | None = None
    batch: float | None = None
    name: str = "calibration"
    suggested: Rate | None = None
    noisy: bool = False

    def __post_init__(self) -> None:
        checked = {
            "optimizer": get_optimizer_class(self.optimizer),
            "law": recordable_law(self.law),
            "ranks": _ranks(self.ranks),
            "seeds": _seeds(self.seeds),
            "steps": _count("steps", self.steps),
            "trials": _optional(_count, "trials", self.trials),
            "full_trials": _count("full_trials", self.full_trials, least=0),
            "lr_range": _optional(_lr_range, "lr_range", self.lr_range),
            "target_steps": _optional(_count, "target_steps", self.target_steps),
            "batch": _optional(_positive, "batch", self.batch),
            "name": _name(self.name),
        }
        # the class is frozen, so that nobody changes an option after it was checked
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.full_trials and None in self.ranks:
            raise CalibrationError(
                f"full_trials is {self.full_trials}, but ranks={list(self.ranks)} already has full"
                " finetuning (None).",
                "Remove full_trials=, or take None out of ranks=.",
            )
        if self.target < self.steps:
            raise CalibrationError(
                f"target_steps is {self.target}, but each trial has {self.steps} steps.",
                f"Pass at least target_steps={self.steps}, or a lower steps=.",
            )

    @property
    def lora(self) -> list[int]:
        """The LoRA ranks: all ranks but full finetuning."""
        return [*filter(None, self.ranks)]

    @property
    def anchor(self) -> int | None:
        """The highest LoRA rank. The search brackets the optimum there, before it tries others."""
        return max(self.lora, default=None)

    @property
    def octaves(self) -> tuple[float, float] | None:
        """log2 of the lowest and the highest learning rate of `lr_range`, None without it."""
        if self.lr_range is None:
            return None
        low, high = sorted(map(math.log2, self.lr_range))
        return low, high

    @property
    def floor(self) -> float:
        """log2 of the lowest learning rate that the search may try, minus infinity if any.

        Short trials make low learning rates look best. So if the trials are much shorter than the
        run, the search does not go below the suggested learning rate, unless `lr_range` was passed.
        """
        if self.suggested is None or self.lr_range or self.octaves_to_target < FAR:
            return -math.inf
        return math.log2(self.suggested.lr)

    @property
    def target(self) -> int:
        """The optimizer steps of the target run."""
        return self.target_steps or self.steps

    @property
    def octaves_to_target(self) -> float:
        """How many octaves more steps the target run has than a trial: log2 of their ratio."""
        return math.log2(self.target / self.steps)

    @property
    def optimizer_name(self) -> str:
        return f"{self.optimizer.__module__}.{self.optimizer.__qualname__}"

    @property
    def searches(self) -> int:
        """The number of trials of the search. The `full_trials` come after it."""
        return self.trials or TRIALS_PER_RANK * len(self.ranks)

    @property
    def runs(self) -> int:
        """The number of all trials."""
        return self.searches + self.full_trials

    @property
    def tried(self) -> tuple[int | None, ...]:
        """All ranks that are tried, by the search or after it, full finetuning last."""
        return (*self.lora, None) if self.full_trials else tuple(self.ranks)

    @property
    def price(self) -> str:
        """What all trials cost, in words."""
        whole = f" (the run has {self.target:,})" if self.target > self.steps else ""
        total = f"at most {self.runs * self.steps:,} steps in all"
        return f"{self.runs} trials of {self.steps:,} steps{whole}, {total}"


# --- checks of the arguments ----------------------------------------------------------------------
# Each of these returns the value as `Options` keeps it, with NumPy's numbers as Python's, or raises
# a `CalibrationError` that names the argument.


def _optional(check: Callable[[str, object], T], name: str, value: object) -> T | None:
    return None if value is None else check(name, value)


def _count(name: str, value: object, least: int = 1) -> int:
    number = plain(value)
    if value is None:
        raise CalibrationError(
            f"{name}= was not passed to calibrate.",
            f"Pass {name}=, for example steps=500: the optimizer steps of one trial.",
        )
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise CalibrationError(
            f"{name} is {shown(value)}.", f"Pass a whole number of at least {least}."
        )
    return number


def _positive(name: str, value: object) -> float:
    number = plain(value)
    if not is_positive(number):
        raise CalibrationError(
            f"{name} is {shown(value)}.", "Pass a positive finite number."
        )
    return number


def _lr_range(name: str, value: object) -> tuple[float, float]:
    ends = plain(value)
    is_pair = isinstance(ends, (list, tuple)) and len(ends) == 2
    if not is_pair or not all(map(is_positive, ends)):
        raise CalibrationError(
            f"{name} is {shown(value)}.",
            "Pass the lowest and the highest learning rate, two positive finite numbers, such as"
            " lr_range=(1e-5, 1e-2).",
        )
    low, high = ends
    return low, high


def _ranks(value: object) -> tuple[int | None, ...]:
    """Return the ranks in order, full finetuning last."""
    ranks = plain(value)
    if value is None or isinstance(value, (str, bytes)) or not _is_listed(ranks):
        what = f"ranks is {shown(value)}"
        if value is None:
            what = "ranks= was not passed to calibrate"
        raise CalibrationError(
            f"{what}.",
            "If train builds a model for each trial, pass the lowest and the highest LoRA rank that"
            " you want to use, such as ranks=[8, 64], and None for full finetuning. If train uses a"
            " model that exists already, pass that as model=, and no ranks=.",
        )
    for rank in ranks:
        if rank is not None and not _is_whole("rank", rank):
            raise CalibrationError(
                f"ranks is {shown(value)}, but {shown(rank)} is no rank.",
                "Pass whole numbers of at least 1, and None for full finetuning.",
            )
    in_order = sorted({*ranks}, key=lambda rank: (rank is None, rank or 0))
    if len(in_order) > MOST_RANKS:
        raise CalibrationError(
            f"ranks has {len(in_order)} ranks.", f"Pass at most {MOST_RANKS} ranks."
        )
    return tuple(in_order)


def _seeds(value: object) -> tuple[int, ...]:
    seeds = plain(value)
    if not _is_listed(seeds):
        raise CalibrationError(
            f"seeds is {shown(value)}.",
            "Pass a list of whole numbers, such as seeds=[0, 1].",
        )
    for seed in seeds:
        if not _is_whole("seed", seed):
            raise CalibrationError(
                f"seeds is {shown(value)}, but {shown(seed)} is no seed.",
                "Pass whole numbers of at most 64 bits, such as seeds=[0, 1].",
            )
    return tuple(dict.fromkeys(seeds))


def _is_listed(value: object) -> bool:
    return isinstance(value, (list, tuple, range)) and len(value) > 0


def _is_whole(name: str, value: object) -> bool:
    """Return whether a value is a whole number in the range of `name`."""
    low, high = RANGES[name]
    return (
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    )


def _name(value: object) -> str:
    if not isinstance(value, str) or not _PRINTABLE.fullmatch(value):
        raise CalibrationError(
            f"name is {shown(value)}.",
            "Pass a string of at least one character, without control characters.",
        )
    return value


# --- the order of the trials ----------------------------------------------------------------------


def next_setting(options: Options, trials: Trials) -> Setting | None:
    """Return what to try after the trials so far, or None if the study is complete."""
    begun = Trials((*trials.counted(), *trials.running()))
    search = begun.at(*options.ranks)
    full = len(begun) - len(search)
    if len(search) < options.searches:
        return _next_of_search(options, search)
    if full < options.full_trials:
        seeds = options.seeds
        return Setting(None, seeds[full // PER_SEED % len(seeds)])
    return None


def _next_of_search(options: Options, search: Trials) -> Setting:
    """Return the rank and seed of the next trial of the search.

    While the first trials bracket the optimum, it is the highest rank. Afterwards it is the rank
    with the fewest trials. Each rank has four trials with a seed before the next seed. A trial that
    diverged says little, so it counts less than others. A trial that was stopped early counts in
    full.
    """
    observations = search.observations()
    lost = diverged(observations)
    all_too_high = observations and all_rose(below_cliff(observations, lost))
    to_bracket = MOST_BRACKET if all_too_high else BRACKET
    # but every other rank has at least one trial
    of_others = len(options.ranks) - 1
    is_bracketing = len(search) < min(to_bracket, options.searches - of_others)
    ranks = [options.anchor] if is_bracketing else options.ranks
    settings = [run.setting for run in search]
    fruitless = [run.setting for run in search if run.observation in lost]

    # Sorted by: the round of four trials; the place of the seed, so that one seed is finished
    # before the next; trials that did not diverge; and all trials.
    def due(setting: Setting) -> tuple[int, ...]:
        runs = settings.count(setting)
        fruitful = runs - fruitless.count(setting)
        return fruitful // PER_SEED, options.seeds.index(setting.seed), fruitful, runs

    return min(
        (Setting(rank, seed) for rank in ranks for seed in options.seeds), key=due
    )
