"""Ways to a learning rate: what each needs, costs and rests on, and the rates that it names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from frontier.runs import AT_A
from frontier.scores import OURS, Sweeps
from laws.suggested import COMMON_WIDTHS, suggested
from study.configurations import CONFIGS, LORAPLUS, TUNED
from study.grids import FULL
from study.moving import Shift, by_law, kept

from rankaware_optim.laws import DEFAULT_LAW, get_law

Rates = dict[int, float]  # log2 of the rate by rank


@dataclass(frozen=True)
class Way:
    """A way that names rates without a run of its own.

    Args:
        rates: (sweeps, configuration, seed of the sweep that tuned rank 16) -> log2 rates at the other ranks.
        needs: what must be there.
        settings: in words.
        advised_by: who says so.
        added: to the name of the configuration that is trained.
        configs: those in which it says something.
    """

    rates: Callable[[Sweeps, str, int], Rates]
    needs: str
    settings: str
    advised_by: str
    added: str = ""
    configs: Sequence[str] = tuple(CONFIGS)


def one_rate(lr: float) -> Callable[[Sweeps, str, int], Rates]:
    def rates(on: Sweeps, config: str, seed: int) -> Rates:
        return dict.fromkeys(on.targets(config), math.log2(lr))

    return rates


def tinker(on: Sweeps, config: str, seed: int, exponent: float) -> Rates:
    """Tinker's formula: a rate by width for all ranks, a tenth of it for full finetuning."""
    full = math.log2(5e-5) + exponent * math.log2(2000 / COMMON_WIDTHS[on.task])
    lora = full + math.log2(10)
    return {rank: full if rank == FULL else lora for rank in on.targets(config)}


def suggestion(on: Sweeps, config: str, seed: int) -> Rates:
    return {rank: suggested(on.task, config, rank) for rank in on.targets(config)}


def tuned(on: Sweeps, config: str, seed: int) -> float:
    """log2 of the best rate of rank 16 in the sweep of one seed."""
    return on.best_by_seed(config, TUNED)[seed]


def by_root(on: Sweeps, config: str, seed: int) -> Rates:
    """The rate falls by the root of the rank. The rule says nothing of full finetuning."""
    x = tuned(on, config, seed)
    return {
        rank: x - math.log2(rank / TUNED) / 2
        for rank in on.targets(config)
        if rank != FULL
    }


def a_tenth(on: Sweeps, config: str, seed: int) -> Rates:
    """The converse of "LoRA's rate is ten times that of full finetuning"."""
    return {FULL: tuned(on, config, seed) - math.log2(10)}


def moved(
    on: Sweeps, config: str, seed: int, shift: Callable[[str, str], Shift], added: str
) -> Rates:
    """The best rate of rank 16 in a sweep of one seed, moved."""
    x = tuned(on, config + added, seed)
    by = shift(on.task, config)
    return {rank: x + by(TUNED, rank) for rank in on.targets(config)}


def by_default_law(task: str, config: str) -> Shift:
    return by_law(task, config, get_law(DEFAULT_LAW))


def not_at_all(task: str, config: str) -> Shift:
    return kept


def from_16(
    shift: Callable[[str, str], Shift], added: str = ""
) -> Callable[[Sweeps, str, int], Rates]:
    return partial(moved, shift=shift, added=added)


NOTHING, A_RATE = "nothing", "a rate tuned at rank 16"
LAW, SUGGESTED = "the default law", "`suggest_lr`"
ROOT, TENTH = "× √(16 / r)", "a tenth in full finetuning"
FREE: Mapping[str, Way] = {
    "2e-4": Way(one_rate(2e-4), NOTHING, "at every rank", "QLoRA's paper"),
    "3e-4": Way(one_rate(3e-4), NOTHING, "at every rank", "alpaca-lora"),
    "Tinker's formula": Way(
        partial(tinker, exponent=0.781),
        NOTHING,
        "5e-5 × 10 × (2000 / width)^.781, a tenth of it in full finetuning",
        "tinker-cookbook, the exponent of Llama; by Qwen's, .0775, rates are lower",
    ),
    SUGGESTED: Way(suggestion, NOTHING, "task='other'", OURS),
    "keeping it": Way(
        from_16(not_at_all), A_RATE, "alpha / rank as it is", "what most do"
    ),
    "LoRA+ 16, kept": Way(
        from_16(not_at_all, LORAPLUS),
        A_RATE,
        "B's rate is 16 times A's, tuned so at rank 16",
        "LoRA+'s paper",
        LORAPLUS,
        (AT_A,),
    ),
    ROOT: Way(
        by_root,
        A_RATE,
        "where alpha grows with the rank",
        "a rule of thumb",
        configs=(AT_A,),
    ),
    TENTH: Way(
        a_tenth,
        A_RATE,
        "rank 16's rate / 10",
        "LoRA Without Regret, at alpha 32 and the other way round",
    ),
    LAW: Way(from_16(by_default_law), A_RATE, "`tuned_at=`", OURS),
}


def seeds_of(way: Way, on: Sweeps, config: str) -> Iterator[tuple[int, list[int]]]:
    """The seed of the sweep that a way has, and those on which it is scored."""
    if way.needs == NOTHING:
        yield 0, on.unseen()
    elif way.added:
        # the sweep of LoRA+ has one seed
        yield 0, [0]
    else:
        for seed in range(on.seeds(config, TUNED)):
            yield seed, on.unseen(seed)
