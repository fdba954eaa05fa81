"""How do best rates move with the width, up to the width of real models, and how do they move with the rank there?

At widths that a CPU trains (64 to 384) the candidates hardly differ: see "Which width" in benchmarks/README.md.

**Networks.** The study's Llama of four layers at widths 512, 1024, 2048 and 4096, with MLPs 5/2 times as wide and heads
of 32. All are pretrained in the same way on the device: 1,000 steps of 16 × 64 tokens of the Brown corpus, AdamW at
2e-3·192/width. Then they train on the study's task of Python, 64 steps of 8 × 64 tokens. Float32, matrix products in
TF32.

**Runs.** Init[A] and Init[B] at s = 1, ranks 4, 16, 64, 256 and 1024 as far as the width allows, and full finetuning.
Seed 0 runs at whole octaves around a first guess, on a grid that grows at an edge; then two seeds run at five half
octaves around the lowest. The first guess is the best rate of the study's Llama of width 192, moved by the package's
law. There are two estimators, the middle of the basin and the cliff. Noise is half the difference of the two seeds' own
estimates, rms over cells.

**Order**, the most informative first. Rank 16 and full at every width, where the laws of width differ by an octave.
Then Init[B]'s other ranks at 4096 and 512, where its forms differ by an octave. Then the same ranks at 2048 and 1024,
and last Init[A]'s. One command spends at most 2.5, 2.5, 4 and 9 minutes on the four widths, so that each gets its share
of the device's time.

**Hypotheses.** n is the mean fan-in of the adapted layers, weighted by size: 679, 1358, 2716 and 5432. From the
narrowest to the widest network, three octaves of width, the best rate at rank 16 moves by these octaves:

    Init[A]   -1.4 by µA; -1.5 by n^-1/2; 0 if one rate holds
    Init[B]   -3.0 by µA; -2.0 by the package, µA's times n^1/3; -1.5 by n^-1/2; 0 if one rate holds
    full      -3.0 by µA and by 1/n; -1.5 by n^-1/2; 0 if one rate holds

At Init[B] the rate moves from rank 4 to rank 256 at width 512, and from rank 4 to rank 1024 at width 4096, by these
octaves: -2.1 and -2.7 with the package's fall, r^-1/3; -2.6 and -3.5 with the former default, a fall of r^-1/2 above a
knee of 4; -.1 and 0 by µA alone, which is the paper's law. From rank 16 to full at width 4096 these are -2.8, -4.0 and
0.

**Rules**, committed before any run. A law moves a best rate to where another was found. Its error is the difference of
the two in octaves, rms over all such moves and both estimators. In each question the package's law stands if its error
is at most .35 and at most .1 above the lowest. If not, the law with the lowest error takes its place, if it is the
lowest by each estimator alone, and also at the two largest widths alone. Else nothing is settled.

1. Init[B] between ranks: all ordered pairs at one width.
2. Init[B] to full finetuning: every rank to full at one width.
3. Init[A] between ranks: all ordered pairs at one width.
4. Init[A] to full finetuning: every rank to full at one width.
5. In width: each of Init[A] and Init[B] at rank 16, and full, between all ordered pairs of widths.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import permutations
from typing import Any, NamedTuple

import click
import torch
from gpu.estimates import (
    WHICH,
    Around,
    Found,
    alone,
    estimate,
    noise,
    rates_of,
    rms,
)
from gpu.setup import Boxed, Setup
from recording import block, made_with, number
from study.configurations import CONFIGS, START, run_in, start_of, starts
from study.domains import Domain, language
from study.domains._adapters import adapt
from study.domains._llama import (
    LAYERS,
    VOCABULARY,
    llama,
    new_llama,
    token_loss,
    windows,
)
from study.grids import FULL, Job, Listed, Wanting
from study.runs_on_file import complete, machines, read
from study.suite import study_rates

from rankaware_optim import Constant, Falling, Law, MuA, Power, Reference
from rankaware_optim.calibration import seeded

SOURCE, _, AT_B = CONFIGS
STORE, MLP, COMMON = "width.jsonl", 5 / 2, 16
STUDY_MEAN = 263.1  # mean fan-in of the study's Llama of width 192
# minutes that a command spends on a width
BOXES = {
    512: 2.5,
    1024: 2.5,
    2048: 4.0,
    4096: 9.0,
}


@dataclass(frozen=True)
class Shape:
    """Size of the experiment: widths, ranks, steps of training and pretraining, seeds, and windows a batch."""

    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    steps: int
    pretraining: int
    seeds: int
    batch: int

    def ranks_at(self, width: int) -> tuple[int, ...]:
        return tuple(rank for rank in self.ranks if rank <= width)


WHOLE = Shape(
    (512, 1024, 2048, 4096), (4, 16, 64, 256, 1024), 64, 1000, 2, language.BATCH
)
SMALLEST = Shape((32, 64), (4, 16), 2, 0, 1, 2)  # no pretraining, random tokens


def shape_of(setup: Setup) -> Shape:
    return SMALLEST if setup.smallest else WHOLE


# --- running --------------------------------------------------------------------------------------------------------


def domain_of(width: int, setup: Setup) -> Domain:
    """The language task on a Llama of this width. The Llama stays on the device, and every run trains a copy."""
    shape = shape_of(setup)

    def build(rank: int | None, alpha: float, init: str, seed: int) -> torch.nn.Module:
        start = network(width, shape.pretraining, setup.device)
        return adapt(copy.deepcopy(start), rank, alpha, init, seed, LAYERS).to(
            setup.device
        )

    own = {
        "name": name_of(width),
        "steps": shape.steps,
        "batch": shape.batch,
        "build": build,
    }
    made_up = (
        {}
        if shape.pretraining
        else {"batches": made_up_batches, "evaluate": made_up_loss}
    )
    return replace(language.DOMAIN, **own, **made_up)


def name_of(width: int) -> str:
    return f"Llama {width}"


@cache
def network(width: int, pretraining: int, device: str) -> torch.nn.Module:
    if pretraining:
        return llama(width, round(MLP * width), pretraining, device)
    with seeded(0):
        return new_llama(width, round(MLP * width)).requires_grad_(False).to(device)


@cache
def made_up_tokens() -> torch.Tensor:
    return torch.randint(
        3, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(0)
    )


def made_up_batches(seed: int, batch: int) -> Iterator[torch.Tensor]:
    yield from windows(made_up_tokens(), batch, seed)


@torch.no_grad()
def made_up_loss(model: torch.nn.Module) -> float:
    return float(token_loss(model, next(windows(made_up_tokens(), 4, 1))))


Key = tuple[int, str, int]  # width, configuration, rank


def cells(shape: Shape) -> list[Key]:
    """Every cell, in the order of the docstring: the most informative first."""
    outer = (*shape.widths[-1:], *shape.widths[:1])
    by_worth = (
        *outer,
        *(width for width in reversed(shape.widths) if width not in outer),
    )
    first = [
        (width, *each)
        for width in by_worth
        for each in ((AT_B, COMMON), ("full", FULL), (SOURCE, COMMON))
    ]
    rest = [
        (w, c, r)
        for c in (AT_B, SOURCE)
        for w in by_worth
        for r in shape.ranks_at(w)
        if r != COMMON
    ]
    return first + rest


def cell_of(key: Key) -> tuple[str, str, int]:
    width, config, rank = key
    return name_of(width), config, rank


def task_of(key: Key, shape: Shape) -> Wanting:
    cell, x = cell_of(key), guess(key)
    if shape is WHOLE:
        return Around(cell, x, shape.seeds)
    return Listed(
        [
            Job(*cell, x + half / 2, seed)
            for half in range(-2, 3)
            for seed in range(shape.seeds)
        ]
    )


def guess(key: Key) -> int:
    """First guess of log2 rate: the study's best at width 192, moved by the package's law, to the octave."""
    _, config, _ = key
    at_study = FULL if config == "full" else COMMON
    known = study_rates("language", config)[at_study]
    return round(
        by_law(Falling())(Place(config, at_study, STUDY_MEAN), place_of(key), known)
    )


def run(setup: Setup) -> None:
    """Pretrain, and run the missing runs until the time is over."""
    torch.set_float32_matmul_precision("high")
    shape, store, spent = shape_of(setup), setup.folder / STORE, dict[int, float]()
    for key in cells(shape):
        begun, width = time.monotonic(), key[0]
        until = min(
            setup.until, begun + 60 * BOXES.get(width, math.inf) - spent.get(width, 0.0)
        )
        missing = [
            task
            for task in (starts(name_of(width), range(1)), task_of(key, shape))
            if task.wanted(read(store))
        ]
        if missing and begun < until:
            click.echo(f"width: {name_of(width)}, {key[1]}, rank {key[2]}")
            one, on = (
                partial(run_in, domain_of(width, setup)),
                provenance(width, setup),
            )
            for task in missing:
                complete(Boxed(task, until), one, store, 1, lambda said: None, on)
        spent[width] = spent.get(width, 0.0) + time.monotonic() - begun


@cache
def provenance(width: int, setup: Setup) -> dict[str, Any]:
    return setup.provenance(domain_of(width, setup))


# --- what was found -------------------------------------------------------------------------------------------------


def on_file(setup: Setup) -> dict[Key, Found]:
    """The estimates of every complete cell."""
    shape, done, found = shape_of(setup), read(setup.folder / STORE), {}
    for key in cells(shape):
        name, *_ = cell = cell_of(key)
        if Job(name, START, FULL, 0.0, 0) in done:
            start = start_of(name, done)
            both = estimate(done, cell, start, shape.seeds)
            if both is not None:
                found[key] = Found(both, alone(done, cell, start, shape.seeds), start)
    return found


class Place(NamedTuple):
    """A configuration at a rank, with the mean fan-in `width`."""

    config: str
    rank: int
    width: float

    @property
    def reference(self) -> Reference:
        if self.config == "full":
            return Reference(method="full", fan_in=self.width)
        return Reference(
            self.rank,
            self.rank,
            init="B" if self.config == AT_B else "A",
            fan_in=self.width,
        )


def place_of(key: Key) -> Place:
    width, config, rank = key
    return Place(config, rank, mean_fan_in(width))


def mean_fan_in(width: int) -> float:
    """Mean fan-in weighted by size: q, k, v, o, gate and up have fan-in `width`, and down has MLP · width."""
    return width * (4 + 2 * MLP + MLP * MLP) / (4 + 3 * MLP)


# --- the rules ------------------------------------------------------------------------------------------------------


def by_law(law: Law) -> Callable[[Place, Place, float], float]:
    """(here, there, log2 of the rate here) -> log2 of the rate there."""
    return lambda here, there, x: (
        x + math.log2(law.multiplier(there.reference.as_factor(), here.reference))
    )


PACKAGE = "µA, falling at B"
LAWS: dict[str, Law] = {
    PACKAGE: Falling(),
    "µA, r^-1/2 above 4 at B": Falling(4.0, 0.5),
    "µA": MuA(),
    "one rate": Constant(),
    "r^-1/2": Power(exponent=-0.5, law=Constant()),
}
MOVES: dict[str, Callable[[Place, Place, float], float]] = {
    **{name: by_law(law) for name, law in LAWS.items()},
    "n^-1/2": lambda here, there, x: x - math.log2(there.width / here.width) / 2,
    "1/n": lambda here, there, x: x - math.log2(there.width / here.width),
}
IN_RANK, IN_WIDTH = tuple(LAWS), (*LAWS, "n^-1/2", "1/n")


class Question(NamedTuple):
    """Moves by which laws are judged.

    Args:
        name: the question in words.
        laws: names of the laws to judge, the package's first. It wins if another is the same on these moves.
        asks: (source, target) -> whether the question has this move.
    """

    name: str
    laws: tuple[str, ...]
    asks: Callable[[Key, Key], bool]


def between_ranks(config: str) -> Callable[[Key, Key], bool]:
    return lambda a, b: a[0] == b[0] and a[1] == b[1] == config


def to_full(config: str) -> Callable[[Key, Key], bool]:
    return lambda a, b: a[0] == b[0] and (a[1], b[1]) == (config, "full")


def in_width(config: str) -> Callable[[Key, Key], bool]:
    return lambda a, b: a[1:] == b[1:] == (config, FULL if config == "full" else COMMON)


QUESTIONS = (
    Question("Init[B] between ranks", IN_RANK, between_ranks(AT_B)),
    Question("Init[B] to full finetuning", IN_RANK[:-1], to_full(AT_B)),
    Question("Init[A] between ranks", IN_RANK, between_ranks(SOURCE)),
    Question("Init[A] to full finetuning", IN_RANK[:-1], to_full(SOURCE)),
    *(
        Question(f"{config} in width", IN_WIDTH, in_width(config))
        for config in (SOURCE, AT_B, "full")
    ),
)
Rates = Mapping[Key, float]


def errors(question: Question, by: Iterable[Rates]) -> dict[str, float]:
    """Rms error in octaves of every law over a question's moves, by law; nan if no move is on file.

    Args:
        question: the question.
        by: best rates (log2) by cell, one mapping for each estimator.
    """
    by = list(by)
    return {
        law: rms(
            MOVES[law](place_of(a), place_of(b), rates[a]) - rates[b]
            for rates in by
            for a, b in permutations(rates, 2)
            if question.asks(a, b)
        )
        for law in question.laws
    }


def verdict(question: Question, by: Sequence[Rates]) -> str:
    """The rule's verdict on a question, in words."""
    every = errors(question, by)
    if math.isnan(every[PACKAGE]):
        return f"{question.name}: not known: fewer than two cells are on file."
    best = min(every, key=every.__getitem__)
    said = f"{PACKAGE} is {every[PACKAGE]:.2f} octaves off, the best law, {best}, {every[best]:.2f}"
    if every[PACKAGE] <= min(0.35, every[best] + 0.1):
        return f"{question.name}: the package's law holds ({said})."
    widest = sorted({key[0] for rates in by for key in rates})[-2:]
    at_widest = [
        {key: x for key, x in rates.items() if key[0] in widest} for rates in by
    ]
    apart = [errors(question, each) for each in (*([rates] for rates in by), at_widest)]
    if best != PACKAGE and all(
        min(each, key=each.__getitem__) == best for each in apart
    ):
        return f"{question.name}: {best} in place of the package's law ({said})."
    return f"{question.name}: nothing is settled ({said})."


# --- the tables -----------------------------------------------------------------------------------------------------


def blocks(setup: Setup) -> Iterator[str]:
    """The verdicts and the tables of the runs on file."""
    found, store = on_file(setup), setup.folder / STORE
    if not found:
        return
    by = [rates_of(found, which) for which in WHICH]
    floor = ", ".join(
        f"{number(noise(found, which))} by the {which}" for which in WHICH
    )
    yield f"## Width\n\n{' '.join(verdict(q, by) for q in QUESTIONS)} Noise of a rate, octaves: {floor}."
    yield block("Best rates, log2 (seed by seed)", RATE_HEADS, list(rate_rows(found)))
    rows = [
        [q.name, *(number(errors(q, by).get(law)) for law in MOVES)] for q in QUESTIONS
    ]
    yield block("Error of a law, octaves", ["question", *MOVES], rows)
    yield "### Experiment\n\n**" + (__doc__ or "").partition("\n\n**")[2].strip()
    yield made_with(machines(store))


RATE_HEADS = (
    "width",
    "mean fan-in",
    "configuration",
    "rank",
    *WHICH,
    "loss before",
    "lowest",
)


def rate_rows(found: Mapping[Key, Found]) -> Iterator[list[str]]:
    for key, each in sorted(found.items()):
        width, config, rank = key
        seeds = {
            which: [getattr(one, which, None) for one in each.by_seed]
            for which in WHICH
        }
        rates = [
            f"{number(getattr(each.both, w))} ({', '.join(number(x, 1) for x in seeds[w])})"
            for w in WHICH
        ]
        at = [str(width), number(mean_fan_in(width), 0), config, str(rank or "–")]
        yield [
            *at,
            *rates,
            number(each.start, 3),
            number(min(each.both.means.values()), 3),
        ]
