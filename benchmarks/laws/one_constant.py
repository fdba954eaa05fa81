"""Does one constant per task carry a rate across batch, length, warm-up and init, and to full finetuning?

    python benchmarks/laws/one_constant.py run --domain image_generation    # resumable: runs are kept as they end
    python benchmarks/laws/one_constant.py table                            # results/one_constant.json and .md

**Hypothesis.** Let τ = T·η and κ(m) = √(m + (2/π)·m²/b), with s the effective multiplier, r the rank and n the mean
fan-in of the adapted layers. Then the best rate η of every configuration satisfies

    Init[A]   s·κ(r)·τ·(1 + κ(n)·τ) = c
    Init[B]   hypot(s·κ(n)·τ, s·κ(n)·κ(r)·τ²) = c
    full      κ(n)·τ = c

with one c for the task, that is, for its network, data, batch, length and warm-up. T = 2 and b = 8 are fixed here,
before any run. The ratio law keeps c = 1 and uses only ratios of rates, so that all configurations move by the same
octaves.

**Runs.** Configurations: Init[A] r = 16 with s = 1 and with s = 1/r, Init[B] r = 64, and full. Changes, one at a time:
batch × 1/4 and × 4, steps × 1/4 and × 4, warm-up 5 and 30 %. Seed 0 runs at whole octaves around the study's best rate,
on a grid that grows at an edge. Then three seeds run at five half octaves around the lowest. Everything else is as in
the study. Where batch or steps are × 4, a run costs four times as much, so only one seed is run. Its first guess is as
far from the base's best rate as the best rate of × 1/4 is, on the other side. This was decided to save time, before any
run of those changes.

**Two estimators** of log2 of a best rate, each from all rates tried. The middle is the midpoint of the basin, where the
loss is above its lowest by at most 1 % of the gain or two standard errors of the change over half an octave. The cliff
is the rate above the lowest at which 10 % of the gain is lost.

**Rules**, committed before the runs. Errors are in octaves, over domains and the five changes:

1. Shifts. Each configuration's shift is predicted from that of Init[A], s = 1. The constant holds for shifts under two
   conditions. By both estimators, its rms error is below the ratio law's in all domains but at most one. And it is at
   most .1 above the rms error of one free slope per configuration, fitted on the other domains.
2. Levels. Each configuration's rate is predicted from that of Init[A], s = 1, under the same batch, length and warm-up.
   The constant holds for levels if, by both estimators, its rms error is below the ratio law's in all domains but at
   most one.
3. Moves. Every configuration's own rate is moved to the other batches and lengths. One way scales c by one exponent in
   the batch and one in the steps. The other scales the rate instead, by two exponents per configuration. Exponents are
   means over the other domains. The constant becomes a law of the package if it holds for shifts and for levels, and if
   a move by c loses 5 % of the gain at worst. If it does not, and moves by exponents per configuration lose 5 % at
   worst, the package gets those exponents.

Added after the runs at a quarter, and not part of any rule: the moves are shown beside the rate as it is and the
package's rule (√batch for Adam, nothing for the steps). Losses are beyond the noise floor of the cell where a rate
lands, as in the study. Where that cell has one seed, the floor is that of the task as it is.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import click
from recording import RESULTS, block, machine, number, percent
from study.configurations import CLIP, CONFIGS, built, optimizer, start_of, starts
from study.domains import Domain, get_domain
from study.grids import FULL, Job, Losses, Together, curve, losses_at, lowest, or_inf
from study.optima import cliff_of, crossing
from study.regret import noise_floor, share_lost
from study.runs_on_file import complete, made_by, read
from study.suite import provenance, study_rates
from study.training import WARMUP, train

from rankaware_optim import inspect_model
from rankaware_optim.laws._mua import Site, in_quadrature, sign_terms

RESTS_ON = ("laws.adam", "scores")
DOMAINS = ("image_generation", "vision_classification", "language", "reinforcement")
STORE = RESULTS / "one_constant"
SEEDS, WIDE = 3, 2  # seeds of the half octaves, whole octaves to either side at first
T, TOKENS = 2.0, 8.0
NEAR = 0.01  # share of the gain


class Arm(NamedTuple):
    """A change of the task: factors on batch and steps, share of warm-up, seeds, and whole octaves to either side."""

    batch: float = 1.0
    steps: float = 1.0
    warmup: float = WARMUP
    seeds: int = SEEDS
    wide: int = WIDE


ARMS = {  # the cheapest first
    "as it is": Arm(),
    "steps / 4": Arm(steps=0.25),
    "batch / 4": Arm(batch=0.25),
    "warm-up 30 %": Arm(warmup=0.3),
    "batch × 4": Arm(batch=4.0, seeds=1, wide=1),
    "steps × 4": Arm(steps=4.0, seeds=1, wide=1),
}
BASE, *CHANGES = ARMS
MIRRORED = {"batch × 4": "batch / 4", "steps × 4": "steps / 4"}
SOURCE, BY_RANK, AT_B = CONFIGS
RANKS = {SOURCE: 16, BY_RANK: 16, AT_B: 64, "full": FULL}


def cell_of(domain: str, config: str, arm: str) -> tuple[str, str, int]:
    return domain, f"{config} | {arm}", RANKS[config]


def changed(domain: Domain, arm: Arm) -> Domain:
    return replace(
        domain,
        steps=round(domain.steps * arm.steps),
        batch=round(domain.batch * arm.batch),
    )


def run_one(job: Job) -> float | None:
    """Held-out loss of a run; None where it diverged."""
    config, _, arm = job.scheme.partition(" | ")
    domain, own = get_domain(job.domain), ARMS.get(arm, Arm())
    model = built(domain, config, job.rank, job.seed)
    if not arm:  # before training
        return domain.evaluate(model)
    plain = job._replace(scheme=config)
    return train(
        changed(domain, own),
        model,
        optimizer(model, domain, plain),
        job.seed,
        CLIP,
        own.warmup,
    )


@dataclass(frozen=True)
class Around:
    """Jobs of a cell: whole octaves of seed 0 around `guess`, growing at an edge, then half octaves of all seeds."""

    cell: tuple[str, str, int]
    guess: int
    seeds: int = SEEDS
    wide: int = WIDE

    def wanted(self, done: Losses) -> list[Job]:
        low, high = self.guess - self.wide, self.guess + self.wide
        while True:
            jobs = [Job(*self.cell, float(x), 0) for x in range(low, high + 1)]
            if missing := [job for job in jobs if job not in done]:
                return missing
            best = lowest({job.x: or_inf(done[job]) for job in jobs})
            if low < best < high or high - low > 4 * WIDE:
                break
            low, high = low - (best <= low), high + (best >= high)
        fine = [
            Job(*self.cell, best + half / 2, seed)
            for half in range(-2, 3)
            for seed in range(self.seeds)
        ]
        return [job for job in fine if job not in done]


# --- estimates ------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """log2 of a best rate by both estimators (None where runs do not reach that far), and mean loss by log2 rate."""

    middle: float | None
    cliff: float | None
    means: Mapping[float, float]


def estimate(
    done: Losses, cell: tuple[str, str, int], start: float, seeds: int = SEEDS
) -> Estimate | None:
    """Estimate a cell's best rate; None where its half octaves are incomplete. `start` is the loss before training."""
    means = curve(done, cell, seeds)
    if len(means) < 5 or all(x.is_integer() for x in means):
        return None
    best = lowest(means)
    at_best = losses_at(done, cell, best, seeds)
    shift = means[best] - at_best[0]  # puts seed 0's octaves on the level of the means
    tried = {x: loss + shift for x, loss in curve(done, cell, 1).items()} | means
    gain = start - means[best]
    bottom = means[best] + max(NEAR * gain, 2 * standard_error(done, cell, best, seeds))
    left, right = crossing(tried, best, bottom, -1), crossing(tried, best, bottom, 1)
    middle = None if left is None or right is None else (left + right) / 2
    return Estimate(middle, cliff_of(tried, best, start), tried)


def standard_error(
    done: Losses, cell: tuple[str, str, int], best: float, seeds: int
) -> float:
    """Standard error over seeds of the change in loss from the best rate to half an octave beside it.

    This is the larger one of the two sides. It is 0 where both sides diverged, and where there is one seed.
    """
    at_best, beside = losses_at(done, cell, best, seeds), (best - 0.5, best + 0.5)
    changes = [
        [
            there - here
            for there, here in zip(
                losses_at(done, cell, x, seeds), at_best, strict=True
            )
        ]
        for x in beside
        if Job(*cell, x, seeds - 1) in done
    ]
    finite = [
        statistics.stdev(change)
        for change in changes
        if len(change) > 1 and math.isfinite(sum(change))
    ]
    return max(finite, default=0.0) / math.sqrt(seeds)


# --- predictions ----------------------------------------------------------------------------------------------------


@cache
def width(domain: str) -> float:
    """The mean fan-in of the adapted layers."""
    return statistics.fmean(
        f.fan_in
        for f in inspect_model(built(get_domain(domain), SOURCE, 4, 0)).factors
        if f.role == "A"
    )


def site(domain: str, config: str) -> Site:
    """Init, rank, scaling and fan-in of a configuration, which its condition depends on."""
    rank, init = (
        RANKS[config] or 1,
        "full" if config == "full" else "B" if config == AT_B else "A",
    )
    scaling = 1.0 / rank if config == BY_RANK else 1.0
    return Site(init, rank, scaling, width(domain))


def constant_at(at: Site, x: float) -> float:
    """c at the rate 2^x: p·τ + q·τ², or hypot(p·τ, q·τ²) at Init[B]."""
    (p, q), tau = sign_terms(TOKENS, at), T * 2.0**x
    return math.hypot(p * tau, q * tau**2) if at.init == "B" else p * tau + q * tau**2


def rate_for(at: Site, c: float) -> float:
    """log2 of the rate at which the condition is c."""
    p, q = (term / c for term in sign_terms(TOKENS, at))
    tau = (
        in_quadrature(p, q)
        if at.init == "B"
        else 2.0 / (p + math.sqrt(p * p + 4.0 * q))
    )
    return math.log2(tau / T)


def constant_of(domain: str, config: str, x: float) -> float:
    """c of a configuration at the rate 2^x."""
    return constant_at(site(domain, config), x)


def rate_at(domain: str, config: str, c: float) -> float:
    """log2 of the rate at which a configuration's condition is c."""
    return rate_for(site(domain, config), c)


def one_constant(domain: str, config: str, x: float) -> float:
    """log2 of a configuration's rate with the same c as the rate 2^x at Init[A], s = 1."""
    return rate_at(domain, config, constant_of(domain, SOURCE, x))


def ratio(domain: str, config: str, x: float) -> float:
    """log2 of a configuration's rate by the ratio law, from 2^x at Init[A], s = 1."""
    return x + rate_at(domain, config, 1.0) - rate_at(domain, SOURCE, 1.0)


# --- running --------------------------------------------------------------------------------------------------------


@click.group()
def main() -> None:
    """Test whether there is one constant per task."""


@main.command()
@click.option("--domain", "chosen", multiple=True, default=DOMAINS, show_default=True)
@click.option("--arm", "arms", multiple=True, default=tuple(ARMS), show_default=True)
@click.option("--workers", default=2, show_default=True)
def run(chosen: tuple[str, ...], arms: tuple[str, ...], workers: int) -> None:
    """Make missing runs: one change in every domain before the next change."""
    made = {domain: provenance(domain) for domain in chosen}
    for arm in arms:
        for domain in chosen:
            store, own = STORE / f"{domain}.jsonl", ARMS[arm]
            cells = [
                Around(
                    cell_of(domain, config, arm),
                    guess(domain, config, arm),
                    own.seeds,
                    own.wide,
                )
                for config in RANKS
            ]
            both = Together([starts(domain, range(SEEDS)), *cells])
            complete(both, run_one, store, workers, click.echo, made[domain])


def guess(domain: str, config: str, arm: str) -> int:
    """First guess of log2 rate: the study's best, rounded; for × 4, the lowest of × 1/4 mirrored at the base's."""
    if arm not in MIRRORED:
        return round(study_rates(domain, config)[RANKS[config]])
    done = read(STORE / f"{domain}.jsonl")
    base, quarter = (
        lowest(curve(done, cell_of(domain, config, which), SEEDS))
        for which in (BASE, MIRRORED[arm])
    )
    return round(2 * base - quarter)


# --- the page -------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A configuration under a change, with its estimated best rate."""

    domain: str
    config: str
    arm: str
    found: Estimate


def cells() -> Iterator[Cell]:
    for domain in DOMAINS:
        done = read(STORE / f"{domain}.jsonl")
        start = start_of(domain, done) if done else math.nan
        for config in RANKS:
            for arm in ARMS:
                found = estimate(
                    done, cell_of(domain, config, arm), start, ARMS[arm].seeds
                )
                if found is not None:
                    yield Cell(domain, config, arm, found)


@main.command()
def table() -> None:
    """Write the verdict and the tables from the runs on file."""
    found, on = (
        {(cell.domain, cell.config, cell.arm): cell.found for cell in cells()},
        machine(1),
    )
    by = [
        {
            key: x
            for key, each in found.items()
            if (x := getattr(each, which)) is not None
        }
        for which in WHICH
    ]
    verdict = [rule_1(by), rule_2(by), rule_3(found, by)]
    parts = [
        "# One constant a task, across batch, length, warm-up, init and full finetuning",
        " ".join(verdict),
        block(
            "Moves to a quarter and four times the batch or the steps: share of the gain lost",
            MOVE_HEADS,
            [*move_rows(found)],
        ),
        block(
            "Shifts and levels, rms error in octaves", ERROR_HEADS, list(error_rows(by))
        ),
        block(
            "Octaves an octave of batch or steps, by the middle",
            EXPONENT_HEADS,
            list(exponent_rows(found)),
        ),
        block("Best rates, log2", RATE_HEADS, list(rate_rows(found))),
        "**" + (__doc__ or "").partition("\n\n**")[2].strip(),
        made_by(on, *sorted(STORE.glob("*.jsonl"))),
    ]
    rows = [
        {
            "domain": domain,
            "configuration": config,
            "task": arm,
            "middle": each.middle,
            "cliff": each.cliff,
        }
        for (domain, config, arm), each in found.items()
    ]
    document = {"machine": on, "verdict": verdict, "rows": rows}
    (RESULTS / "one_constant.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "one_constant.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts[:-2]))


# --- rules 1 and 2 --------------------------------------------------------------------------------------------------

WHICH = ("middle", "cliff")
LAWS = {"one constant": one_constant, "ratio": ratio}
FREE = "free slope"
Rates = Mapping[tuple[str, str, str], float]  # log2, by domain, configuration and task
Errors = Callable[[Rates, str, str], Iterator[float]]


def rms(errors: Iterable[float]) -> float:
    squares = [e * e for e in errors]
    return math.sqrt(statistics.fmean(squares)) if squares else math.nan


def below(x: Rates, errors: Errors) -> list[str]:
    """The domains where one constant has a lower rms error than the ratio law."""
    return [
        d
        for d in DOMAINS
        if rms(errors(x, d, "one constant")) < rms(errors(x, d, "ratio"))
    ]


def pooled(x: Rates, errors: Errors, law: str) -> float:
    return rms(e for domain in DOMAINS for e in errors(x, domain, law))


def holds_for_shifts(by: Sequence[Rates]) -> bool:
    own, free = (
        max(pooled(x, shift_errors, law) for x in by) for law in ("one constant", FREE)
    )
    return own <= free + 0.1 and all(
        len(below(x, shift_errors)) >= len(DOMAINS) - 1 for x in by
    )


def holds_for_levels(by: Sequence[Rates]) -> bool:
    return all(len(below(x, level_errors)) >= len(DOMAINS) - 1 for x in by)


def rule_1(by: Sequence[Rates]) -> str:
    said = f"One constant {'holds' if holds_for_shifts(by) else 'does not hold'} for shifts: "
    return said + against(by, shift_errors, (*LAWS, FREE))


def rule_2(by: Sequence[Rates]) -> str:
    said = f"It {'holds' if holds_for_levels(by) else 'does not hold'} for levels: "
    return said + against(by, level_errors, tuple(LAWS))


def against(by: Sequence[Rates], errors: Errors, laws: Sequence[str]) -> str:
    each = []
    for which, x in zip(WHICH, by, strict=True):
        count = len(below(x, errors))
        figures = ", ".join(f"{law} {pooled(x, errors, law):.2f}" for law in laws)
        each.append(
            f"by the {which} it is nearer than ratios in {count} of {len(DOMAINS)} domains (rms octaves: {figures})"
        )
    return "; ".join(each) + "."


def shift_errors(x: Rates, domain: str, law: str) -> Iterator[float]:
    for config in RANKS:
        for arm in CHANGES:
            keys = [
                (domain, which, at) for which in (SOURCE, config) for at in (arm, BASE)
            ]
            if config == SOURCE or not x.keys() >= set(keys):
                continue
            source, source_base, there, there_base = (x[key] for key in keys)
            if law == FREE:
                predicted = free_slope(x, domain, config) * (source - source_base)
            else:
                predicted = LAWS[law](domain, config, source) - LAWS[law](
                    domain, config, source_base
                )
            yield predicted - (there - there_base)


def free_slope(x: Rates, domain: str, config: str) -> float:
    """Least-squares slope of a configuration's shifts on Init[A]'s, over the other domains."""
    pairs = [
        (
            x[other, SOURCE, arm] - x[other, SOURCE, BASE],
            x[other, config, arm] - x[other, config, BASE],
        )
        for other in DOMAINS
        for arm in CHANGES
        if other != domain
        and x.keys() >= {(other, c, at) for c in (SOURCE, config) for at in (arm, BASE)}
    ]
    total = sum(a * a for a, _ in pairs)
    return sum(a * b for a, b in pairs) / total if total else 1.0


def level_errors(x: Rates, domain: str, law: str) -> Iterator[float]:
    for config in RANKS:
        for arm in ARMS:
            if (
                law in LAWS
                and config != SOURCE
                and x.keys() >= {(domain, SOURCE, arm), (domain, config, arm)}
            ):
                yield (
                    LAWS[law](domain, config, x[domain, SOURCE, arm])
                    - x[domain, config, arm]
                )


# --- rule 3: moves to another batch or length -----------------------------------------------------------------------

SCALED = {
    "steps / 4": ("steps", -2),
    "batch / 4": ("batch", -2),
    "batch × 4": ("batch", 2),
    "steps × 4": ("steps", 2),
}
Found = Mapping[tuple[str, str, str], Estimate]
KEPT, PACKAGE, BY_C, BY_CONFIG = (
    "as it is",
    "the package's rules",
    "c by one exponent",
    "exponents a configuration",
)
WAYS = (KEPT, PACKAGE, BY_C, BY_CONFIG)
BAR = 0.05


class Move(NamedTuple):
    """A rate moved to another batch or length, and the share of the gain that it loses there."""

    domain: str
    config: str
    arm: str
    lost: float
    floor: (
        float  # of the cell where it lands; if that has one seed, of the unchanged task
    )


def moves(found: Found, way: str) -> Iterator[Move]:
    """Every configuration's own rate, moved in one of the ways, where both cells are complete."""
    for (domain, config, arm), there in found.items():
        home = found.get((domain, config, BASE))
        if arm not in SCALED or home is None or home.middle is None:
            continue
        done = stored(domain)
        best, start = min(there.means.values()), start_of(domain, done)
        lost = share_lost(
            there.means,
            best,
            start,
            moved(found, way, (domain, config, arm), home.middle),
        )
        floors = (noise_floor(done, cell_of(domain, config, at)) for at in (arm, BASE))
        yield Move(
            domain, config, arm, lost, next((f for f in floors if f is not None), 0.0)
        )


@cache
def stored(domain: str) -> Losses:
    return read(STORE / f"{domain}.jsonl")


def moved(found: Found, way: str, key: tuple[str, str, str], x: float) -> float:
    """log2 of the rate after the move: the package moves Adam's rate by √batch and keeps it over the steps."""
    domain, config, arm = key
    what, octaves = SCALED[arm]
    if way == PACKAGE:
        return x + 0.5 * octaves * (what == "batch")
    if way == BY_CONFIG:
        return x + octaves * exponent(found, what, domain, lambda d, c, x: x, config)
    if way == BY_C:
        grown = octaves * exponent(found, what, domain, log_constant)
        return rate_at(domain, config, constant_of(domain, config, x) * 2.0**grown)
    return x


def beyond(found: Found, way: str) -> float:
    """Worst loss beyond the noise floor, over all moves in one of the ways."""
    return max(
        (max(0.0, move.lost - move.floor) for move in moves(found, way)),
        default=math.nan,
    )


def rule_3(found: Found, by: Sequence[Rates]) -> str:
    worst = {way: beyond(found, way) for way in WAYS}
    said = ", ".join(f"{way} {share:.0%}" for way, share in worst.items())
    if holds_for_shifts(by) and holds_for_levels(by) and worst[BY_C] <= BAR:
        verdict = "c becomes a law of the package"
    elif worst[BY_CONFIG] <= BAR:
        verdict = "every configuration gets exponents of its own"
    else:
        verdict = "neither c nor exponents become a rule of the package"
    return f"Moved to another batch or length a rate loses at worst, beyond the noise floor: {said}. So {verdict}."


def log_constant(domain: str, config: str, x: float) -> float:
    return math.log2(constant_of(domain, config, x))


def exponent(
    found: Found,
    what: str,
    but: str,
    of: Callable[[str, str, float], float],
    only: str | None = None,
) -> float:
    """Octaves of `of` per octave of batch or steps: mean over domains except `but`, all configurations or `only`."""
    slopes = [
        (of(domain, config, there.middle) - of(domain, config, home.middle))
        / SCALED[arm][1]
        for (domain, config, arm), there in found.items()
        if domain != but
        and SCALED.get(arm, ("",))[0] == what
        and only in (None, config)
        and there.middle is not None
        if (home := found.get((domain, config, BASE))) is not None
        and home.middle is not None
    ]
    return statistics.fmean(slopes) if slopes else 0.0


# --- the page's rows ------------------------------------------------------------------------------------------------

MOVE_HEADS = (
    "way",
    "changed",
    "rates",
    "median",
    "worst",
    "worst beyond the floor",
    "where it is",
)
ERROR_HEADS = ("of", "estimator", "law", *DOMAINS, "all")
EXPONENT_HEADS = ("domain", "configuration", *SCALED)
RATE_HEADS = ("domain", "configuration", "estimator", *ARMS)


def move_rows(found: Found) -> Iterator[list[str]]:
    for arm in SCALED:
        for way in WAYS:
            own = [move for move in moves(found, way) if move.arm == arm]
            if own:
                worst = max(own, key=lambda move: move.lost)
                shares = (
                    statistics.median(m.lost for m in own),
                    worst.lost,
                    max(max(0.0, m.lost - m.floor) for m in own),
                )
                yield [
                    way,
                    arm,
                    str(len(own)),
                    *map(percent, shares),
                    f"{worst.domain}, {worst.config}",
                ]


def error_rows(by: Sequence[Rates]) -> Iterator[list[str]]:
    for name, errors, laws in (
        ("shifts", shift_errors, (*LAWS, FREE)),
        ("levels", level_errors, tuple(LAWS)),
    ):
        for which, x in zip(WHICH, by, strict=True):
            for law in laws:
                each = [rms(errors(x, domain, law)) for domain in DOMAINS]
                yield [
                    name,
                    which,
                    law,
                    *map(number, each),
                    number(pooled(x, errors, law)),
                ]


def exponent_rows(found: Found) -> Iterator[list[str]]:
    for domain in DOMAINS:
        for config in RANKS:
            home = found.get((domain, config, BASE))
            each = [found.get((domain, config, arm)) for arm in SCALED]
            own = [
                None
                if None in (home, there) or home.middle is None or there.middle is None
                else (there.middle - home.middle) / octaves
                for there, (_, octaves) in zip(each, SCALED.values(), strict=True)
            ]
            yield [domain, config, *(number(x, sign=True) for x in own)]


def rate_rows(found: Found) -> Iterator[list[str]]:
    for domain in DOMAINS:
        for config in RANKS:
            for which in WHICH:
                own = (
                    getattr(found.get((domain, config, arm)), which, None)
                    for arm in ARMS
                )
                yield [domain, config, which, *map(number, own)]


if __name__ == "__main__":
    main()
