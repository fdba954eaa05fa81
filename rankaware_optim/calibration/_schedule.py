"""The options of a calibration, and the order of its trials: ranks and seeds in turn."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NoReturn, get_type_hints

import msgspec
from msgspec import Meta
from torch.optim import Optimizer

from .._checks import MOST_RANKS, limits, plain
from .._optimizers import get_optimizer_class
from .._rate import Rate
from ..errors import CalibrationError
from ..fitting import all_rose, below_cliff, diverged
from ..laws import Law, recordable_law
from ._constants import BRACKET, FAR, MOST_BRACKET, PER_SEED, TRIALS_PER_RANK
from ._trials import Setting, Trials

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0.0, le=sys.float_info.max)]
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+$"
_CHECKED_ELSEWHERE = ("optimizer", "law", "suggested", "noisy")


@dataclass(frozen=True)
class Options:
    """What a calibration tries, and for which target run.

    The fields are the arguments of `calibrate`. The optimizer's class and the law are looked up,
    and the ranks sorted, full finetuning last. Two fields are set by what it calibrates.

    suggested: a rate of the model that is known without a trial, around which it is searched.
    noisy: whether runs differ by chance, as in their rewards. Where they do by no more, the recipe
        has the suggested rate.

    Raises:
        CalibrationError: one is impossible, or they contradict each other.
        OptimizerError, LawError: there is none of the name.
    """

    optimizer: type[Optimizer]
    law: Law
    ranks: Annotated[
        Sequence[Annotated[int, limits("rank")] | None],
        Meta(min_length=1, max_length=MOST_RANKS),
    ]
    seeds: Annotated[Sequence[Annotated[int, limits("seed")]], Meta(min_length=1)]
    steps: Count
    trials: Count | None = None
    full_trials: Annotated[int, Meta(ge=0)] = 0
    lr_range: tuple[Positive, Positive] | None = None
    target_steps: Count | None = None
    batch: Positive | None = None
    warmup: Annotated[float, Meta(ge=0.0, lt=1.0)] | None = None
    name: Annotated[str, Meta(pattern=_PRINTABLE)] = "calibration"
    suggested: Rate | None = None
    noisy: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "optimizer", get_optimizer_class(self.optimizer))
        object.__setattr__(self, "law", recordable_law(self.law))
        self._check_ranges()
        if self.full_trials and None in self.ranks:
            self._refuse("full_trials", "Leave it out, or None out of the ranks.")
        if self.target < self.steps:
            self._refuse("target_steps", f"Give at least a trial's {self.steps} steps.")
        in_order = sorted({*self.ranks}, key=lambda rank: (rank is None, rank or 0))
        object.__setattr__(self, "ranks", tuple(in_order))
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))

    def _check_ranges(self) -> None:
        for name, kind in get_type_hints(Options, include_extras=True).items():
            if name in _CHECKED_ELSEWHERE:
                continue
            value = plain(getattr(self, name))
            object.__setattr__(self, name, value)
            try:
                msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                self._refuse(name, f"{error}.")

    def _refuse(self, name: str, cure: str) -> NoReturn:
        raise CalibrationError(f"{name} is {getattr(self, name)!r}.", cure)

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
        low, high = sorted(map(math.log2, self.lr_range))
        return low, high

    @property
    def floor(self) -> float:
        """log2 of the lowest rate. Short trials make low rates look best, so on their word alone
        the search does not go below the suggested one.
        """
        if self.suggested is None or self.lr_range or self.octaves_to_target < FAR:
            return -math.inf
        return math.log2(self.suggested.lr)

    @property
    def target(self) -> int:
        """The steps of the target run."""
        return self.target_steps or self.steps

    @property
    def octaves_to_target(self) -> float:
        """log2 of the target's steps over those of a trial."""
        return math.log2(self.target / self.steps)

    @property
    def optimizer_name(self) -> str:
        return f"{self.optimizer.__module__}.{self.optimizer.__qualname__}"

    @property
    def searches(self) -> int:
        """The number of runs of the search, which comes before the full trials."""
        return self.trials or TRIALS_PER_RANK * len(self.ranks)

    @property
    def runs(self) -> int:
        """The number of all runs."""
        return self.searches + self.full_trials

    @property
    def price(self) -> str:
        """What all trials cost, in words."""
        total = f"at most {self.runs * self.steps:,} steps"
        return f"{self.runs} trials × {self.steps:,} steps = {total}"


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
    """Return the highest rank until its rates are bracketed, then the rank with the fewest trials.
    Each has four runs at a seed before the next seed.

    A diverged run has little information, so it counts less than the others. A pruned run counts in
    full.
    """
    observations = search.observations()
    lost = diverged(observations)
    all_too_high = observations and all_rose(below_cliff(observations, lost))
    to_bracket = MOST_BRACKET if all_too_high else BRACKET
    of_others = len(options.ranks) - 1
    is_bracketing = len(search) < min(to_bracket, options.searches - of_others)
    ranks = [options.anchor] if is_bracketing else options.ranks
    settings = [run.setting for run in search]
    fruitless = [run.setting for run in search if run.observation in lost]

    def due(setting: Setting) -> tuple[int, ...]:
        runs = settings.count(setting)
        fruitful = runs - fruitless.count(setting)
        return fruitful // PER_SEED, options.seeds.index(setting.seed), fruitful, runs

    return min(
        (Setting(rank, seed) for rank in ranks for seed in options.seeds), key=due
    )
