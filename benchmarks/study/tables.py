"""Tables of `suite.py`: exponents, the paper's claims, regret. The rules of verdict were written before any run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

from calibration.make_recipes import path_of
from calibration.searches import ranks_of, rate_of
from study import contenders
from study.domains import get_domain, names
from study.domains._configs import CONFIGS, LORAPLUS, RSLORA, START, TWO_RATES, start_of
from study.domains._runs import FULL, Cell, Losses, curve
from study.domains._tables import best_rate, block, curves_by_seed, number, percent, slope, table_of

from rankaware_optim import Falling, Law, MuA, Recipe

HELD, DRIFT, OCTAVE = 0.1, 0.35, 0.5
RULES = (
    f"An exponent within {HELD} of the claimed one held, within {DRIFT} it held with a drift, else it did not hold. "
    f"Init[B]'s rate is full finetuning's where its mean over ranks lies within {OCTAVE} octaves, with a drift within "
    f"{2 * OCTAVE:g}: the mean, so look at the ranks too. These rules were written before any run."
)
T90 = {2: 6.31, 3: 2.92}  # Student's t, 90 % two-sided, by number of seeds
LAWS: dict[str, Law] = {"the paper's law": MuA(tokens=None), "µA at 8 tokens": MuA(), "µA, falling at B": Falling()}
REGRET = (
    "Regret is the share of the attainable gain that is lost, by the seeds that chose the best rates, on straight "
    "lines between the rates tried, beyond them at the last. `calibration.md` has that of two domains on fresh seeds, "
    "beside what the sweep itself loses on them."
)
JUMPS = (
    "Octaves from the best rate there to the rate moved there, at the lowest rank first: above 0 it is too high. From "
    "Init[A] to Init[B] the rank stays. At Init[B] the default law is µA, falling at B; elsewhere it is µA at 8 tokens."
)
SPLIT = MuA(split=True)  # what "two rates" are moved by, from the rank at which they are tuned


class Optimum(NamedTuple):
    """The best rate of a cell: log2, by the mean over seeds and seed by seed; None at an edge."""

    x: float | None
    by_seed: tuple[float | None, ...]


def tables(done: Losses, moved: Sequence[Moved], laws: Mapping[str, Law] = LAWS) -> list[str]:
    every = domains_in(done)
    exponent_rows = [row for domain in every for row in exponents(done, domain, laws)]
    claim_rows = [row for domain in every for row in claims(done, domain)]
    regret_rows = [regret_row(each) for each in moved]
    jump_rows = [row for domain in every for row in jumps(done, domain, laws)]
    heads = ["domain", "configuration", "ranks", "seeds", "measured", *laws]
    ways = ["way", "moves", "LoRA to LoRA: median", "worst", "moves", "LoRA to full: median", "worst"]
    return [
        block("(a) Exponent of the best rate in rank, with its 90 % interval over seeds", heads, exponent_rows),
        block("(b) The paper's claims", ["domain", "claim", "verdict", "numbers"], claim_rows),
        RULES,
        block(
            "(c) Regret of a rate moved from every rank to every other",
            ["domain", "configuration", *ways],
            regret_rows,
        ),
        REGRET,
        block("(d) Rates moved to full finetuning, and to the other init", ["domain", "from", "to", *laws], jump_rows),
        JUMPS,
    ]


def domains_in(done: Losses) -> list[str]:
    """Those with a loss before training and a configuration with a grid."""
    begun = {job.domain for job in done if job.scheme == START}
    return [name for name in names() if name in begun and schemes_in(done, name)]


def ranks_in(done: Losses, domain: str, scheme: str) -> list[int]:
    """The ranks that have three rates or more on every seed: of a suite cut short, those it came to."""
    seeds = seeds_in(done, domain, scheme)
    ranks = sorted({job.rank for job in done if job[:2] == (domain, scheme)})
    return [rank for rank in ranks if len(curve(done, (domain, scheme, rank), seeds)) >= 3]


def seeds_in(done: Losses, domain: str, scheme: str) -> int:
    return len({job.seed for job in done if job[:2] == (domain, scheme)})


def optimum(done: Losses, cell: Cell) -> Optimum:
    seeds = seeds_in(done, *cell[:2])
    means, start = curve(done, cell, seeds), start_of(cell[0], done)
    if not means:
        return Optimum(None, ())
    return Optimum(best_rate(means, start), tuple(best_rate(each, start) for each in curves_by_seed(done, cell, seeds)))


# --- exponents ------------------------------------------------------------------------------------------------------


class Exponent(NamedTuple):
    """Slope of log2 best rate over log2 rank: the mean over seeds, and half its 90 % interval; None for one seed."""

    ranks: tuple[int, ...]
    slope: float
    half: float | None
    seeds: int

    def __str__(self) -> str:
        return f"{self.slope:+.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")


def exponent_of(done: Losses, domain: str, scheme: str) -> Exponent | None:
    """None where fewer than two ranks have their best inside the grid."""
    found = {rank: optimum(done, (domain, scheme, rank)) for rank in ranks_in(done, domain, scheme)}
    usable = {rank: best.by_seed for rank, best in found.items() if best.by_seed and None not in best.by_seed}
    if len(usable) < 2:
        return None
    seeds = range(len(next(iter(usable.values()))))
    slopes = [slope({rank: best[seed] or 0.0 for rank, best in usable.items()}) for seed in seeds]
    spread = T90[len(slopes)] * statistics.stdev(slopes) / math.sqrt(len(slopes)) if len(slopes) in T90 else None
    return Exponent(tuple(usable), statistics.fmean(slopes), spread, len(slopes))


def exponents(done: Losses, domain: str, laws: Mapping[str, Law]) -> Iterator[list[str]]:
    for scheme in (*CONFIGS, *RSLORA):
        found = exponent_of(done, domain, scheme)
        if found is not None:
            by_law = [number(law_slope(domain, scheme, found.ranks, law), 2, sign=True) for law in laws.values()]
            yield [domain, scheme, ", ".join(map(str, found.ranks)), str(found.seeds), str(found), *by_law]


def law_slope(domain: str, scheme: str, ranks: Sequence[int], law: Law) -> float:
    return slope({rank: octaves(domain, scheme, rank, law) for rank in ranks})


@cache
def octaves(domain: str, config: str, rank: int, law: Law, origin: str | None = None) -> float:
    """`contenders.octaves` by the domain's name, made once."""
    return contenders.octaves(get_domain(domain), config, rank, law, origin)


# --- claims ---------------------------------------------------------------------------------------------------------

CLAIMS = (
    ("Init[A], s = 1", -0.5, "Init[A], s = 1: the best rate falls as r^-1/2"),
    ("Init[A], s = 1/r", 0.0, "Init[A], s = 1/r: one rate for every rank"),
    ("Init[B], s = 1", 0.0, "Init[B], s = 1: one rate for every rank"),
)


def claims(done: Losses, domain: str) -> Iterator[list[str]]:
    for scheme, claimed, words in CLAIMS:
        found = exponent_of(done, domain, scheme)
        if found is not None:
            yield [domain, words, verdict(found.slope - claimed, HELD, DRIFT), f"r^({found})"]
    yield from to_full(done, domain)


def verdict(apart: float, held: float, drift: float) -> str:
    if abs(apart) <= held:
        return "held"
    return f"held with a drift of {apart:+.2f}" if abs(apart) <= drift else "did not hold here"


def to_full(done: Losses, domain: str) -> Iterator[list[str]]:
    scheme, full = "Init[B], s = 1", optimum(done, (domain, "full", FULL)).x
    apart = {} if full is None else {rank: x - full for rank, x in best_rates(done, domain, scheme).items()}
    if apart:
        said = verdict(statistics.fmean(apart.values()), OCTAVE, 2 * OCTAVE)
        numbers = ", ".join(f"{octaves:+.1f} at r = {rank}" for rank, octaves in apart.items())
        yield [domain, "Init[B]'s rate is full finetuning's, in the mean", said, f"octaves above full's: {numbers}"]


# --- regret ---------------------------------------------------------------------------------------------------------

Shift = Callable[[int, int], float]  # octaves from a source rank to a target


class Moved(NamedTuple):
    """What a way of moving a rate loses: over all ordered pairs of ranks, and from every rank to full finetuning."""

    domain: str
    config: str
    way: str
    lora: tuple[float, ...]
    full: tuple[float, ...]


def moves(done: Losses, laws: Mapping[str, Law] = LAWS) -> list[Moved]:
    """Every way in every domain and configuration that was swept at two ranks."""
    return [each for domain in domains_in(done) for each in moves_in(done, domain, laws)]


def moves_in(done: Losses, domain: str, laws: Mapping[str, Law]) -> Iterator[Moved]:
    full = (domain, "full", FULL)
    has_full = bool(ranks_in(done, domain, "full"))
    for config in CONFIGS:
        for way, scheme, shift in ways(done, domain, config, laws):
            sources = {rank: best_at(done, (domain, scheme, rank)) for rank in ranks_in(done, domain, scheme)}
            pairs = [(a, b) for a in sources for b in sources if a != b]
            lora = [lost(done, (domain, scheme, b), (domain, config, b), sources[a] + shift(a, b)) for a, b in pairs]
            whole = [lost(done, full, full, x + shift(a, FULL)) for a, x in sources.items() if has_full]
            if lora:
                yield Moved(domain, config, way, tuple(lora), tuple(whole))


def regret_row(moved: Moved) -> list[str]:
    told = [[str(len(each)), *(figures(each) or ("–", "–"))] for each in (moved.lora, moved.full)]
    return [moved.domain, moved.config, moved.way, *told[0], *told[1]]


def figures(regrets: Sequence[float]) -> list[str]:
    """Their median and the worst, if there are any."""
    return [percent(statistics.median(regrets)), percent(max(regrets))] if regrets else []


COMPARED = {  # what the README compares, in its words
    "one rate everywhere": "one rate everywhere",
    "1/r": "1/r",
    "LoRA+ 16": "LoRA+ 16",
    "ten times full": "ten times full finetuning's",
    "the paper's law": "the paper's law",
    "µA at 8 tokens": 'this package, law="mua"',
    "µA, falling at B": "this package's default law",
    "calibrated recipe": "this package, calibrated",
}


def pooled(moved: Sequence[Moved], way: str) -> dict[str, tuple[list[float], list[float]]]:
    """A way's regrets in every domain, over its configurations: from rank to rank, and to full finetuning."""
    mine = [each for each in moved if each.way == way]
    by_domain = {each.domain: [m for m in mine if m.domain == each.domain] for each in mine}
    return {name: ([x for m in of for x in m.lora], [x for m in of for x in m.full]) for name, of in by_domain.items()}


TARGETS = ("another rank", "full finetuning")


def summary(moved: Sequence[Moved]) -> str:
    """The README's table: median and worst regret of a rate that is moved, a domain a column."""
    every, rows = list(dict.fromkeys(each.domain for each in moved)), []
    for which, target in enumerate(TARGETS):
        for way, words in COMPARED.items():
            if found := pooled(moved, way):
                shares = [found[domain][which] if domain in found else [] for domain in every]
                rows.append([target, words, *(" / ".join(figures(each)) or "–" for each in shares)])
    return table_of(["to", "the rate is moved by", *(domain.replace("_", " ") for domain in every)], rows)


def ways(done: Losses, domain: str, config: str, laws: Mapping[str, Law]) -> Iterator[tuple[str, str, Shift]]:
    """Name, the scheme that is trained, and how it moves a rate."""
    for name, law in laws.items():
        yield name, config, partial(by_law, domain, config, law)
    yield from by_recipe(done, domain, config)
    yield "one rate everywhere", config, lambda a, b: 0.0
    yield "1/r", config, lambda a, b: -math.log2((b or contenders.width_of(get_domain(domain))) / a)
    if (full := optimum(done, (domain, "full", FULL)).x) is not None:
        yield "ten times full", config, partial(ten_times_full, done, domain, config, full)
    yield "LoRA+ 16", config + LORAPLUS, lambda a, b: 0.0
    yield "two rates", config + TWO_RATES, lambda a, b: 0.0 if b else octaves(domain, config, FULL, SPLIT)


def by_recipe(done: Losses, domain: str, config: str) -> Iterator[tuple[str, str, Shift]]:
    """The recipe in recipes/, if it was made: its rate at the target, whatever the source."""
    if path_of(domain, config).exists():
        recipe = Recipe.load(path_of(domain, config))
        rates = {rank: math.log2(rate_of(recipe, config, rank)[0]) for rank in (*ranks_of(get_domain(domain)), FULL)}
        yield "calibrated recipe", config, lambda a, b: rates[b] - best_at(done, (domain, config, a))


def by_law(domain: str, config: str, law: Law, a: int, b: int) -> float:
    return octaves(domain, config, b, law) - octaves(domain, config, a, law)


def ten_times_full(done: Losses, domain: str, config: str, full: float, a: int, b: int) -> float:
    """From whatever rate to ten times full finetuning's own."""
    return full + (math.log2(10) if b else 0.0) - best_at(done, (domain, config, a))


def best_at(done: Losses, cell: Cell) -> float:
    """log2 of a cell's best rate, the grid's where the vertex lies outside."""
    found = optimum(done, cell).x
    means = curve(done, cell, seeds_in(done, *cell[:2]))
    return min(means, key=lambda x: means[x]) if found is None else found


def lost(done: Losses, trained: Cell, best: Cell, x: float) -> float:
    """Regret at 2^x, on straight lines between the rates tried.

    Beyond the grid of all seeds by the coarse pass of one, and beyond that too by its end.
    """
    seeds = seeds_in(done, *trained[:2])
    means = curve(done, trained, seeds)
    coarse = {at: loss for at, loss in curve(done, trained, 1).items() if not min(means) <= at <= max(means)}
    lowest = min(curve(done, best, seeds).values())
    return (between({**coarse, **means}, x) - lowest) / (start_of(trained[0], done) - lowest)


def between(means: Mapping[float, float], x: float) -> float:
    grid = sorted(means)
    x = min(max(x, grid[0]), grid[-1])
    low, high = max(at for at in grid if at <= x), min(at for at in grid if at >= x)
    share = 0.0 if low == high else (x - low) / (high - low)
    return means[low] if not share else (1.0 - share) * means[low] + share * means[high]


# --- from one configuration to another ------------------------------------------------------------------------------

INITS = ("Init[A], s = 1", "Init[B], s = 1")


def jumps(done: Losses, domain: str, laws: Mapping[str, Law]) -> Iterator[list[str]]:
    """How far a rate lies off that a law moves to full finetuning, and from Init[A] to Init[B] at its rank."""
    full = optimum(done, (domain, "full", FULL)).x
    for scheme in CONFIGS:
        found = best_rates(done, domain, scheme)
        if found and full is not None:
            off = [[x + by_law(domain, scheme, law, r, FULL) - full for r, x in found.items()] for law in laws.values()]
            yield [domain, scheme, "full finetuning", *map(listed, off)]
    a, b = (best_rates(done, domain, scheme) for scheme in INITS)
    if shared := [rank for rank in a if rank in b]:
        off = [[a[r] + across(domain, r, law) - b[r] for r in shared] for law in laws.values()]
        yield [domain, *INITS, *map(listed, off)]


def best_rates(done: Losses, domain: str, scheme: str) -> dict[int, float]:
    """log2 of the best rate at every rank that has it inside its grid."""
    found = {rank: optimum(done, (domain, scheme, rank)).x for rank in ranks_in(done, domain, scheme)}
    return {rank: x for rank, x in found.items() if x is not None}


def across(domain: str, rank: int, law: Law) -> float:
    """Octaves by which a law moves a rate from Init[A] to Init[B]."""
    a, b = INITS
    return octaves(domain, b, rank, law, a) - octaves(domain, a, rank, law)


def listed(off: Sequence[float]) -> str:
    return ", ".join(number(octave, 1, sign=True) for octave in off)


def schemes_in(done: Losses, domain: str) -> list[str]:
    """The configurations on file, in their order."""
    return [name for name in (*CONFIGS, *RSLORA) if ranks_in(done, domain, name)]
