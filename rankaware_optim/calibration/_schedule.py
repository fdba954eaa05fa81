"""This module checks the arguments of `calibrate`, and decides which LoRA rank and
random seed the search tries next.
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
# One or more characters. Control characters and lone surrogates are excluded, because the
# name is printed in terminals and stored as UTF-8.
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


@dataclass(frozen=True)
class Options:
    """The checked arguments of `calibrate`.

    Every field except `suggested` and `noisy` is an argument of `calibrate`. If the
    user passed the name of an optimizer or scaling law, this class looks up the object
    with this name. The LoRA ranks are sorted, and full finetuning (None) is the last
    entry.

    Args:
        suggested: the learning rate that `suggest_lr` suggests for the model. The search
            starts there.
        noisy: whether the values of a run are rewards, which vary a lot by chance. If
            chance explains the differences between the runs, the recipe uses the suggested
            learning rate.

    Raises:
        CalibrationError: an argument is invalid, or two arguments contradict each other.
        OptimizerError, LawError: no optimizer or law with this name exists.
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
                f"full_trials={self.full_trials} was passed, but ranks={list(self.ranks)}"
                " already includes full finetuning (None).",
                "Remove full_trials=, or remove None from ranks=.",
            )
        if self.target < self.steps:
            raise CalibrationError(
                f"target_steps={self.target} is less than steps={self.steps}, but a trial cannot"
                " be longer than the run that the recipe is for.",
                f"Pass target_steps={self.steps} or more, or a smaller steps=.",
            )

    @property
    def lora(self) -> list[int]:
        """Return the LoRA ranks that the calibration tries, without full finetuning."""
        return [*filter(None, self.ranks)]

    @property
    def anchor(self) -> int | None:
        """Return the highest LoRA rank, or None if only full finetuning is tried.

        The search brackets the best learning rate at the highest LoRA rank before it
        tries other ranks.
        """
        return max(self.lora, default=None)

    @property
    def octaves(self) -> tuple[float, float] | None:
        """Return log2 of the lowest and highest learning rates in `lr_range`, or None
        if `lr_range` was not passed.
        """
        if self.lr_range is None:
            return None
        low, high = sorted(map(math.log2, self.lr_range))
        return low, high

    @property
    def floor(self) -> float:
        """Return log2 of the lowest learning rate that the search may try.

        In short trials, learning rates that are too low for the whole run look best. If
        trials are much shorter than the run that the user plans, the search therefore
        never goes below the learning rate from `suggest_lr`. If the user passed
        `lr_range`, this limit does not apply. If there is no lower limit on the
        learning rate, the result is minus infinity.
        """
        if self.suggested is None or self.lr_range or self.octaves_to_target < FAR:
            return -math.inf
        return math.log2(self.suggested.lr)

    @property
    def target(self) -> int:
        """Return the number of optimizer steps of the long run for which the user wants
        a learning rate.
        """
        return self.target_steps or self.steps

    @property
    def octaves_to_target(self) -> float:
        """Return log2 of the number of steps of the run that the user plans, divided by
        the number of steps of a trial.
        """
        return math.log2(self.target / self.steps)

    @property
    def optimizer_name(self) -> str:
        return f"{self.optimizer.__module__}.{self.optimizer.__qualname__}"

    @property
    def searches(self) -> int:
        """Return the number of trials in the search, not counting the `full_trials`
        trials of full finetuning that follow.
        """
        return self.trials or TRIALS_PER_RANK * len(self.ranks)

    @property
    def runs(self) -> int:
        """Return the total number of trials of the calibration, including its trials of
        full finetuning (`full_trials`).
        """
        return self.searches + self.full_trials

    @property
    def tried(self) -> tuple[int | None, ...]:
        """Return all LoRA ranks that the calibration tries. Full finetuning (None)
        comes last.
        """
        return (*self.lora, None) if self.full_trials else tuple(self.ranks)

    @property
    def price(self) -> str:
        """Describe how many training steps a calibration takes, for example "8 trials
        of 250 steps".
        """
        whole = f" (the run has {self.target:,})" if self.target > self.steps else ""
        total = f"at most {self.runs * self.steps:,} steps in all"
        return f"{self.runs} trials of {self.steps:,} steps{whole}, {total}"


# --- checks of the arguments ----------------------------------------------------------------------
# Each function returns the checked value, or raises a `CalibrationError` that names the
# argument. NumPy numbers become Python numbers, because the options are stored as JSON.


def _optional(check: Callable[[str, object], T], name: str, value: object) -> T | None:
    return None if value is None else check(name, value)


def _count(argument: str, value: object, least: int = 1) -> int:
    number = plain(value)
    if argument == "steps" and value is None:
        raise CalibrationError(
            "steps= was not passed to calibrate().",
            "Pass the number of optimizer steps of one trial, for example steps=500.",
        )
    # bool is a subclass of int, but steps=True is a mistake
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise CalibrationError(
            f"{argument}={shown(value)} is not a whole number of at least {least}.",
            f"Pass {argument}={least} or a larger whole number.",
        )
    return number


def _positive(argument: str, value: object) -> float:
    number = plain(value)
    if not is_positive(number):
        raise CalibrationError(
            f"{argument}={shown(value)} is not a positive finite number.",
            f"Pass a positive number as {argument}=.",
        )
    return number


def _lr_range(argument: str, value: object) -> tuple[float, float]:
    ends = plain(value)
    is_pair = isinstance(ends, (list, tuple)) and len(ends) == 2
    if not is_pair or not all(map(is_positive, ends)):
        raise CalibrationError(
            f"{argument}={shown(value)} is not a pair of positive learning rates.",
            "Pass the lowest and the highest learning rate of the search, for example"
            " lr_range=(1e-5, 1e-2).",
        )
    low, high = ends
    return low, high


def _ranks(value: object) -> tuple[int | None, ...]:
    """Check the LoRA ranks and return them in increasing order, with full finetuning
    (None) last.
    """
    ranks = plain(value)
    if value is None:
        raise CalibrationError(
            "ranks= was not passed to calibrate().",
            "Pass the lowest and the highest LoRA rank that you want to use, for example"
            " ranks=[8, 64]. If train() does not build a model but uses an existing one, pass"
            " model= instead.",
        )
    if isinstance(value, (str, bytes)) or not _is_listed(ranks):
        raise CalibrationError(
            f"ranks={shown(value)} is not a list of LoRA ranks.",
            "Pass the lowest and the highest LoRA rank that you want to use, for example"
            " ranks=[8, 64]. To try full finetuning as well, add None to the list.",
        )
    for rank in ranks:
        if rank is not None and not _is_whole("rank", rank):
            raise CalibrationError(
                f"ranks={shown(value)} contains {shown(rank)}, which is not a valid rank.",
                "Pass whole numbers of at least 1, or None for full finetuning.",
            )
    in_order = sorted({*ranks}, key=lambda rank: (rank is None, rank or 0))
    if len(in_order) > MOST_RANKS:
        raise CalibrationError(
            f"ranks= contains {len(in_order)} different ranks, but a calibration can try at"
            f" most {MOST_RANKS}.",
            "Pass only the lowest and the highest rank that you want to use, for example"
            " ranks=[8, 64].",
        )
    return tuple(in_order)


def _seeds(value: object) -> tuple[int, ...]:
    seeds = plain(value)
    if not _is_listed(seeds):
        raise CalibrationError(
            f"seeds={shown(value)} is not a list of random seeds.",
            "Pass a list of whole numbers, for example seeds=[0, 1].",
        )
    for seed in seeds:
        if not _is_whole("seed", seed):
            raise CalibrationError(
                f"seeds={shown(value)} contains {shown(seed)}, which is not a valid seed.",
                "Pass whole numbers that fit into 64 bits, for example seeds=[0, 1].",
            )
    return tuple(dict.fromkeys(seeds))


def _is_listed(value: object) -> bool:
    return isinstance(value, (list, tuple, range)) and len(value) > 0


def _is_whole(name: str, value: object) -> bool:
    """Return whether a value is a whole number in the range that the argument called
    `name` allows.
    """
    low, high = RANGES[name]
    return (
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    )


def _name(value: object) -> str:
    if not isinstance(value, str) or not _PRINTABLE.fullmatch(value):
        raise CalibrationError(
            f"The study cannot have the name {shown(value)}.",
            "Choose a name without control characters, for example"
            " storage='sqlite:///study.db#calibration'.",
        )
    return value


# --- the order of the trials ----------------------------------------------------------------------


def next_setting(options: Options, trials: Trials) -> Setting | None:
    """Return the rank and random seed of the next trial, or None if the calibration is
    complete.
    """
    # Running trials of other workers count too. Otherwise two workers would try the same rank
    # and seed.
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
    """Return the rank and random seed of the next trial of the search.

    The first trials of the search bracket the best learning rate at the highest LoRA
    rank. After the best learning rate is bracketed, the search always continues at the
    LoRA rank with the fewest trials. Each LoRA rank gets four trials with the same
    random seed before its trials use the next seed. In this comparison, a trial that
    diverged counts less than other trials, because it reveals little about the best
    learning rate. However, a trial that was stopped early counts as much as a completed
    trial.
    """
    observations = search.observations()
    lost = diverged(observations)
    # If the loss rose in every run, the optimum is still unknown, so bracketing continues.
    all_too_high = observations and all_rose(below_cliff(observations, lost))
    to_bracket = MOST_BRACKET if all_too_high else BRACKET
    # Bracketing must leave at least one trial for every other rank.
    of_others = len(options.ranks) - 1
    is_bracketing = len(search) < min(to_bracket, options.searches - of_others)
    ranks = [options.anchor] if is_bracketing else options.ranks
    settings = [run.setting for run in search]
    fruitless = [run.setting for run in search if run.observation in lost]

    # The setting with the smallest tuple is tried next. The order of the entries matters:
    # 1. completed rounds of four trials, so that all ranks advance together;
    # 2. the position of the seed, so that a seed is finished before the next one begins;
    # 3. the trials that did not diverge;
    # 4. all trials, so that a setting whose trials all diverge is not repeated forever.
    def due(setting: Setting) -> tuple[int, ...]:
        runs = settings.count(setting)
        fruitful = runs - fruitless.count(setting)
        return fruitful // PER_SEED, options.seeds.index(setting.seed), fruitful, runs

    return min(
        (Setting(rank, seed) for rank in ranks for seed in options.seeds), key=due
    )
