"""How do best rates move with the width, and which width decides full finetuning where layers are unequal?

    python benchmarks/laws/width.py run      # resumable: runs are kept as they end, some 40 minutes of one core
    python benchmarks/laws/width.py table    # results/width.json and .md

**Networks.** The study's Llama at widths 96, 192 and 384 and its DiT at widths 64, 128 and 256, with all parts in
proportion and heads of 32 each. The Llama of width 192 has an MLP of width 512, and is also run with MLPs of 192 and
1,024. All are pretrained alike, on the same batches in the same order: 400 steps of 16 × 64 tokens and 600 steps of 32
images. AdamW's rate is the study's, times the study's width over this width (2e-3·192/n and 1e-3·128/n), for every MLP.
Then they are trained on the study's tasks for 32 and 40 steps, fewer than in the study to save time.

**Runs.** Configurations: Init[A] and Init[B] with r = 16 and s = 1, and full. With the two other MLPs, only Init[A] and
full. As in one_constant.py, seed 0 runs at whole octaves around the study's best rate, on a grid that grows at an edge.
Then two seeds run at five half octaves around the lowest. The two estimators are also those of one_constant.py: the
middle of the basin and the cliff. Noise is half the difference of the two seeds' own estimates, rms over cells.

**Hypotheses.** n is the mean fan-in of the adapted layers, weighted by size (`Survey.width`): 132, 263 and 526 for the
Llama, and 107, 213 and 427 for the DiT. Exponents below are from the narrowest to the widest, of the Llama and then of
the DiT. By µA at 8 tokens the best rate goes as n^-0.42 and n^-0.41 at Init[A], as n^-0.97 and n^-0.96 at Init[B], and
as n^-0.98 and n^-0.97 in full. Over the two octaves of width these are -0.8, -1.9 and -2.0 octaves. With the fall that
is the package's default at Init[B], the rate there goes as n^-0.64 and n^-0.63: -1.3 octaves. With one constant per
task (T = 2, one_constant.py), c is the same at every width: .16 and .30, as at the study's best rates at Init[A]. Then
the rate at Init[A] goes as n^-0.32 and n^-0.35, and the others as by µA. The alternatives are one rate at every width,
n^-1/2 and 1/n.

Where layers are unequal, full's best rate goes as 1/κ(W), with W one of three widths. From an MLP of 512 to MLPs of 192
and of 1,024, the rate then moves by 0 and 0 octaves if W is the hidden width, by +0.44 and -0.64 if it is the mean
fan-in, and by +1.39 and -0.99 if it is the largest fan-in. The package takes the largest when the rate comes from
Init[A] (`Survey.full_width`).

**Rules**, committed before any run. Errors are in octaves, rms over both estimators.

1. Exponents. A configuration's rate is moved from every width to every other of its kind. The package's law (µA, with
   the fall at Init[B]) stands if its error over both kinds is at most .35 and at most .1 above the lowest candidate's.
   If not, the lowest candidate replaces it if it is the lowest in both kinds. Otherwise nothing is settled.
2. One constant. For a configuration, c is the same at every width if log2 c differs by less than .5 between the
   narrowest and the widest, in both kinds and by both estimators. One constant is the better law for levels if, by each
   estimator, it predicts full from Init[A] on the same network with a lower error than µA's ratios. Both configurations
   are then taken at the mean fan-in.
3. Unequal layers. The error of W is that of full's two shifts by 1/κ(W). W decides under two conditions. Its error is
   at most .5, and lower than the others' by at least .2. And the rates that µA predicts at W from Init[A] (taken at the
   mean fan-in, as in the package) also have the lowest spread about their mean error, over the three MLPs. Otherwise
   nothing is settled, and the package keeps the largest.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import torch
from laws.one_constant import (
    AT_B,
    SOURCE,
    Around,
    Estimate,
    constant_at,
    estimate,
    rate_for,
)
from recording import RESULTS, block, machine, number
from study.best_rates import slope
from study.configurations import START, run_in, start_of, starts
from study.domains import Domain, _dit, _llama, image_generation, language
from study.domains._adapters import adapt
from study.grids import FULL, Cell, Job, Losses, Together
from study.runs_on_file import complete, made_by, read
from study.suite import provenance, study_rates
from study.training import WARMUP

from rankaware_optim import Law, MuA, Reference, Survey, inspect_model
from rankaware_optim.laws import Falling
from rankaware_optim.laws._mua import Site

RESTS_ON = ("laws.adam", "scores")
STORE = RESULTS / "width"
RANK, SEEDS = 16, 2
RANKS = {SOURCE: RANK, "full": FULL, AT_B: RANK}
WHICH = ("middle", "cliff")


class Kind(NamedTuple):
    """A domain's module, the steps of a run, the steps of pretraining, and the adapted layers."""

    module: ModuleType
    steps: int
    pretraining: int
    layers: str


class Network(NamedTuple):
    """A network of a kind, with its hidden width and the width of its MLP."""

    kind: str
    width: int
    mlp: int


KINDS = {
    "Llama": Kind(language, 32, 400, _llama.LAYERS),
    "DiT": Kind(image_generation, 40, 600, _dit.LAYERS),
}
NETWORKS = {  # the most decisive first
    "Llama 192": Network("Llama", 192, 512),
    "Llama 192, MLP 192": Network("Llama", 192, 192),
    "Llama 192, MLP 1024": Network("Llama", 192, 1024),
    "Llama 96": Network("Llama", 96, 256),
    "Llama 384": Network("Llama", 384, 1024),
    "DiT 64": Network("DiT", 64, 256),
    "DiT 256": Network("DiT", 256, 1024),
    "DiT 128": Network("DiT", 128, 512),
}
ALIKE = {
    "Llama": ("Llama 96", "Llama 192", "Llama 384"),
    "DiT": ("DiT 64", "DiT 128", "DiT 256"),
}
USUAL, *OTHER_MLPS = (
    name for name, net in NETWORKS.items() if (net.kind, net.width) == ("Llama", 192)
)


# --- running --------------------------------------------------------------------------------------------------------


def domain_of(name: str) -> Domain:
    """The task of a network's kind, on that network."""
    kind, width, mlp = NETWORKS[name]
    module, steps, pretraining, _ = KINDS[kind]
    sizes = {"width": width, "mlp": mlp} if kind == "Llama" else {"width": width}
    build = partial(module.build, pretraining=pretraining, **sizes)
    return replace(module.DOMAIN, name=name, steps=steps, build=build)


def configs_of(name: str) -> tuple[str, ...]:
    return (SOURCE, "full") if name in OTHER_MLPS else tuple(RANKS)


def store_of(name: str) -> Path:
    return STORE / f"{NETWORKS[name].kind.lower()}.jsonl"


def cell_of(name: str, config: str) -> Cell:
    return name, config, RANKS[config]


def task_of(name: str) -> Together:
    """Jobs of a network: loss before training, and every configuration around the study's best rate."""
    cells = [
        Around(cell_of(name, config), guess(name, config), SEEDS)
        for config in configs_of(name)
    ]
    return Together([starts(name, range(1)), *cells])


def guess(name: str, config: str) -> int:
    """First guess of log2 rate: the study's best rate on this kind of network, rounded."""
    domain = KINDS[NETWORKS[name].kind].module.DOMAIN.name
    return round(study_rates(domain, config)[RANKS[config]])


def run_one(job: Job) -> float | None:
    return run_in(domain_of(job.domain), job, WARMUP)


def warm(name: str) -> None:
    domain_of(name).warm()


@click.group()
def main() -> None:
    """Measure how best rates move with the width."""


@main.command()
@click.option(
    "--network",
    "chosen",
    multiple=True,
    type=click.Choice(list(NETWORKS)),
    help="Some; by default all.",
)
@click.option("--workers", default=2, show_default=True)
def run(chosen: tuple[str, ...], workers: int) -> None:
    """Pretrain the networks, and make missing runs."""
    names = chosen or tuple(NETWORKS)
    with get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        pool.map(warm, names, chunksize=1)
    for name in names:
        complete(
            task_of(name),
            run_one,
            store_of(name),
            workers,
            click.echo,
            provenance(domain_of(name)),
        )


# --- what was found -------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A cell's estimates, from both seeds together and from each alone, and the loss before training."""

    both: Estimate
    by_seed: tuple[Estimate | None, ...]
    start: float


Key = tuple[str, str]  # network, configuration
Rates = Mapping[Key, float]


def on_file() -> dict[Key, Found]:
    """Estimates of every complete cell on file."""
    found = {}
    for name in NETWORKS:
        done = read(store_of(name))
        if Job(name, START, FULL, 0.0, 0) in done:
            start = start_of(name, done)
            for config in configs_of(name):
                both = estimate(done, cell_of(name, config), start, SEEDS)
                if both is not None:
                    found[name, config] = Found(
                        both, alone(done, cell_of(name, config), start), start
                    )
    return found


def alone(done: Losses, cell: Cell, start: float) -> tuple[Estimate | None, ...]:
    """Estimates from each seed's runs alone."""
    by_seed = [
        {job._replace(seed=0): loss for job, loss in done.items() if job.seed == seed}
        for seed in range(SEEDS)
    ]
    return tuple(estimate(own, cell, start, 1) for own in by_seed)


def rates_of(found: Mapping[Key, Found], which: str) -> dict[Key, float]:
    """log2 best rates by one estimator, for the cells where it has an estimate."""
    return {
        key: x
        for key, each in found.items()
        if (x := getattr(each.both, which)) is not None
    }


def noise(found: Mapping[Key, Found], which: str) -> float:
    """Standard error of an estimate over two seeds: half their difference, rms over cells."""
    pairs = [
        [getattr(one, which, None) for one in each.by_seed] for each in found.values()
    ]
    return rms((a - b) / 2 for a, b in pairs if a is not None and b is not None)


def rms(errors: Iterable[float]) -> float:
    squares = [e * e for e in errors]
    return math.sqrt(statistics.fmean(squares)) if squares else math.nan


# --- widths and laws ------------------------------------------------------------------------------------------------


class Widths(NamedTuple):
    """The hidden width, the mean fan-in weighted by size, and the largest fan-in."""

    hidden: float
    mean: float
    largest: float


WORDS = {"hidden": "hidden width", "mean": "mean fan-in", "largest": "largest fan-in"}


@cache
def widths(name: str) -> Widths:
    survey = surveyed(name)
    return Widths(NETWORKS[name].width, survey.width, survey.full_width("A"))


def surveyed(name: str) -> Survey:
    """The package's survey of a network, which does not depend on the weights."""
    kind, width, mlp = NETWORKS[name]
    bare = _llama.new_llama(width, mlp) if kind == "Llama" else _dit.DiT(width)
    return inspect_model(
        adapt(bare.requires_grad_(False), RANK, RANK, "A", 0, KINDS[kind].layers)
    )


class Place(NamedTuple):
    """A configuration at a width."""

    config: str
    width: float

    @property
    def reference(self) -> Reference:
        if self.config == "full":
            return Reference(method="full", fan_in=self.width)
        return Reference(
            RANK, RANK, init="B" if self.config == AT_B else "A", fan_in=self.width
        )

    @property
    def site(self) -> Site:
        init = "full" if self.config == "full" else self.reference.init
        return Site(init, RANKS[self.config] or 1, 1.0, self.width)


# (here, there, log2 of the rate here) to log2 of the rate there
Move = Callable[[Place, Place, float], float]


def by_law(law: Law) -> Move:
    return lambda here, there, x: (
        x + math.log2(law.multiplier(there.reference.as_factor(), here.reference))
    )


def one_constant(here: Place, there: Place, x: float) -> float:
    return rate_for(there.site, constant_at(here.site, x))


def power(exponent: float) -> Move:
    return lambda here, there, x: x + exponent * math.log2(there.width / here.width)


MOVES: dict[str, Move] = {
    "µA": by_law(MuA(tokens=8.0)),  # the default when the rules were written
    "µA, falling at B": by_law(Falling(law=MuA(tokens=8.0))),
    "one constant": one_constant,
    "one rate": power(0.0),
    "n^-1/2": power(-0.5),
    "1/n": power(-1.0),
}
PACKAGE = {SOURCE: "µA", "full": "µA", AT_B: "µA, falling at B"}


def candidates(config: str) -> list[str]:
    return [law for law in MOVES if law != "µA, falling at B" or config == AT_B]


# --- rule 1: exponents ----------------------------------------------------------------------------------------------


def moved(rates: Rates, kind: str, config: str, law: str) -> Iterator[float]:
    """Errors of a configuration's rates, moved from every width of a kind to every other."""
    for here, there in permutations(ALIKE[kind], 2):
        if {(here, config), (there, config)} <= rates.keys():
            start, end = (Place(config, widths(name).mean) for name in (here, there))
            yield MOVES[law](start, end, rates[here, config]) - rates[there, config]


def exponent(rates: Rates, kind: str, config: str) -> float:
    """Least-squares slope of log2 best rate on log2 n."""
    known = {
        widths(name).mean: rates[name, config]
        for name in ALIKE[kind]
        if (name, config) in rates
    }
    return slope(known) if len(known) > 1 else math.nan


def rule_1(by: Sequence[Rates], config: str) -> str:
    """Which law moves a configuration's rate to another width, by rule 1."""

    def errors(kinds: Iterable[str]) -> dict[str, float]:
        return {
            law: rms(
                e for kind in kinds for x in by for e in moved(x, kind, config, law)
            )
            for law in candidates(config)
        }

    every, own = errors(ALIKE), PACKAGE[config]
    if any(math.isnan(exponent(x, kind, config)) for kind in ALIKE for x in by):
        return (
            f"{config}: the exponent in width is not settled (an estimate is missing)."
        )
    best = min(every, key=every.__getitem__)
    said = f"{own} is {every[own]:.2f} octaves off, the best candidate, {best}, {every[best]:.2f}"
    if every[own] <= min(0.35, every[best] + 0.1):
        return f"{config}: the package's law holds in width ({said})."
    each = [errors([kind]) for kind in ALIKE]
    if all(min(one, key=one.__getitem__) == best for one in each):
        return f"{config}: {best} in place of the package's law ({said})."
    return f"{config}: the exponent in width is not settled ({said})."


# --- rule 2: one constant -------------------------------------------------------------------------------------------


def log_constant(rates: Rates, name: str, config: str) -> float | None:
    """log2 of c at a network's best rate."""
    if (name, config) not in rates:
        return None
    return math.log2(
        constant_at(Place(config, widths(name).mean).site, rates[name, config])
    )


def growth(rates: Rates, kind: str, config: str) -> float:
    """Octaves by which c grows from the narrowest network to the widest."""
    narrow, *_, wide = (log_constant(rates, name, config) for name in ALIKE[kind])
    return math.nan if narrow is None or wide is None else wide - narrow


def level_errors(
    rates: Rates, names: Iterable[str], law: str, which: str = "mean"
) -> list[float]:
    """Errors in octaves of full's rate at the width `which`, predicted by `law` from Init[A] at the mean fan-in."""
    return [
        MOVES[law](
            Place(SOURCE, widths(name).mean),
            Place("full", getattr(widths(name), which)),
            rates[name, SOURCE],
        )
        - rates[name, "full"]
        for name in names
        if {(name, SOURCE), (name, "full")} <= rates.keys()
    ]


def rule_2(by: Sequence[Rates]) -> Iterator[str]:
    for config in RANKS:
        grown = [growth(x, kind, config) for kind in ALIKE for x in by]
        same = (
            "the same"
            if all(abs(octaves) < 0.5 for octaves in grown)
            else "not the same"
        )
        said = (
            f"{', '.join(number(octaves, 1, sign=True) for octaves in grown)} octaves"
        )
        if any(map(math.isnan, grown)):
            same, said = "not known to be the same", "an estimate is missing"
        yield f"{config}: c is {same} at every width ({said})."
    errors = {
        law: [rms(level_errors(x, sum(ALIKE.values(), ()), law)) for x in by]
        for law in ("one constant", "µA")
    }
    better = (
        ""
        if all(one < ratio for one, ratio in zip(*errors.values(), strict=True))
        else "not "
    )
    said = "; ".join(
        f"{law} {' and '.join(map(number, found))}" for law, found in errors.items()
    )
    yield f"From Init[A] to full at the mean fan-in, one constant is {better}the better law ({said} octaves)."


# --- rule 3: unequal layers -----------------------------------------------------------------------------------------


def shift(rates: Rates, name: str, config: str) -> float:
    """Octaves by which the best rate moves from the Llama with the usual MLP to network `name`."""
    return rates[name, config] - rates[USUAL, config]


def shift_by(which: str, name: str) -> float:
    """Octaves by which full's rate moves to network `name` by 1/κ(W), where W is the width `which`."""
    here, there = (
        Place("full", getattr(widths(each), which)) for each in (USUAL, name)
    )
    return MOVES["µA"](here, there, 0.0)


def shift_error(by: Sequence[Rates], which: str) -> float:
    known = [
        (x, name)
        for x in by
        for name in OTHER_MLPS
        if {(name, "full"), (USUAL, "full")} <= x.keys()
    ]
    return rms(shift_by(which, name) - shift(x, name, "full") for x, name in known)


def level_spread(by: Sequence[Rates], which: str) -> float:
    """Standard deviation of the level's error over the three MLPs, rms over estimators."""
    found = [level_errors(x, (USUAL, *OTHER_MLPS), "µA", which) for x in by]
    return rms(statistics.stdev(errors) for errors in found if len(errors) > 1)


def rule_3(by: Sequence[Rates]) -> str:
    shifts, levels = (
        {which: of(by, which) for which in Widths._fields}
        for of in (shift_error, level_spread)
    )
    first, second = sorted(shifts, key=shifts.__getitem__)[:2]
    said = "; ".join(
        f"{which} {shifts[which]:.2f}, {levels[which]:.2f}" for which in Widths._fields
    )
    settled = (
        shifts[first] <= min(0.5, shifts[second] - 0.2)
        and min(levels, key=levels.__getitem__) == first
    )
    what = (
        "nothing is settled"
        if not settled
        else f"the {WORDS[first]} decides full finetuning"
    )
    return f"Where layers are unequal, {what} (errors of full's shifts, spread of its level from Init[A]: {said})."


# --- the page -------------------------------------------------------------------------------------------------------


@main.command()
def table() -> None:
    """Write the verdict and the tables from the runs on file."""
    found, on = on_file(), machine(1)
    if not found:
        raise click.ClickException(
            f"There is no complete cell in {STORE}. Make the runs first: python benchmarks/laws/width.py run."
        )
    by = [rates_of(found, which) for which in WHICH]
    verdict = [*(rule_1(by, config) for config in RANKS), *rule_2(by), rule_3(by)]
    floor = ", ".join(f"{noise(found, which):.2f} by the {which}" for which in WHICH)
    parts = [
        "# How best rates move with the width",
        " ".join(verdict) + f" Noise of a rate, octaves: {floor}.",
        block("Best rates, log2 (seed by seed)", RATE_HEADS, list(rate_rows(found))),
        block(
            "Exponents in the mean fan-in",
            ["kind", "configuration", *WHICH, *MOVES],
            list(exponent_rows(by)),
        ),
        block(
            "Error of a rate moved to another width",
            ["configuration", "kind", *MOVES],
            list(error_rows(by)),
        ),
        block(
            "log2 of c, narrowest to widest",
            ["configuration", "kind", *WHICH],
            list(constant_rows(by)),
        ),
        block(
            "Another MLP at hidden width 192: octaves from the usual",
            SHIFT_HEADS,
            list(shift_rows(by)),
        ),
        block(
            "Full finetuning predicted from Init[A]: mean error ± sd",
            LEVEL_HEADS,
            list(level_rows(by)),
        ),
        "**" + (__doc__ or "").partition("\n\n**")[2].strip(),
        made_by(on, *sorted(STORE.glob("*.jsonl"))),
    ]
    rows = [row_of(key, each) for key, each in found.items()]
    document = {"machine": on, "verdict": verdict, "rows": rows}
    (RESULTS / "width.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / "width.md").write_text("\n\n".join(parts) + "\n")
    click.echo("\n\n".join(parts[:-2]))


RATE_HEADS = (
    "network",
    *Widths._fields,
    "configuration",
    *WHICH,
    "loss before",
    "lowest",
)
SHIFT_HEADS = (
    "MLP",
    "estimator",
    "Init[A]",
    "full",
    *(f"full by the {which}" for which in Widths._fields),
)
LEVEL_HEADS = ("law", "networks", "estimator", *Widths._fields)


def row_of(key: Key, found: Found) -> dict[str, Any]:
    name, config = key
    own = {which: getattr(found.both, which) for which in WHICH}
    seeds = {
        f"{which} by seed": [getattr(one, which, None) for one in found.by_seed]
        for which in WHICH
    }
    lowest = min(found.both.means.values())
    return {
        "network": name,
        **widths(name)._asdict(),
        "configuration": config,
        **own,
        **seeds,
    } | {
        "before": found.start,
        "lowest": lowest,
    }


def rate_rows(found: Mapping[Key, Found]) -> Iterator[list[str]]:
    for key, each in found.items():
        row = row_of(key, each)
        rates = [
            f"{number(row[w])} ({', '.join(number(x, 1) for x in row[f'{w} by seed'])})"
            for w in WHICH
        ]
        sizes = [number(row[which], 0) for which in Widths._fields]
        yield [
            row["network"],
            *sizes,
            row["configuration"],
            *rates,
            number(row["before"], 3),
            number(row["lowest"], 3),
        ]


def exponent_rows(by: Sequence[Rates]) -> Iterator[list[str]]:
    for kind, config in ((kind, config) for kind in ALIKE for config in RANKS):
        narrow, wide = (
            Place(config, widths(name).mean)
            for name in (ALIKE[kind][0], ALIKE[kind][-1])
        )
        octaves = math.log2(wide.width / narrow.width)
        first = by[0].get((ALIKE[kind][0], config), math.nan)
        laws = [
            (MOVES[law](narrow, wide, first) - first) / octaves
            if law in candidates(config)
            else None
            for law in MOVES
        ]
        yield [
            kind,
            config,
            *(
                number(x, 2, sign=True)
                for x in (*(exponent(x, kind, config) for x in by), *laws)
            ),
        ]


def error_rows(by: Sequence[Rates]) -> Iterator[list[str]]:
    for config, kind in ((config, kind) for config in RANKS for kind in ALIKE):
        errors = [
            rms(e for x in by for e in moved(x, kind, config, law)) for law in MOVES
        ]
        known = candidates(config)
        yield [
            config,
            kind,
            *(
                number(e if law in known else None)
                for law, e in zip(MOVES, errors, strict=True)
            ),
        ]


def constant_rows(by: Sequence[Rates]) -> Iterator[list[str]]:
    for config, kind in ((config, kind) for config in RANKS for kind in ALIKE):
        yield [
            config,
            kind,
            *(
                ", ".join(number(log_constant(x, name, config)) for name in ALIKE[kind])
                for x in by
            ),
        ]


def shift_rows(by: Sequence[Rates]) -> Iterator[list[str]]:
    for name, (which, x) in (
        (name, each) for name in OTHER_MLPS for each in zip(WHICH, by, strict=True)
    ):
        known = [c for c in (SOURCE, "full") if {(name, c), (USUAL, c)} <= x.keys()]
        found = [shift(x, name, c) if c in known else None for c in (SOURCE, "full")]
        octaves = [*found, *(shift_by(each, name) for each in Widths._fields)]
        yield [
            str(NETWORKS[name].mlp),
            which,
            *(number(o, 2, sign=True) for o in octaves),
        ]


def level_rows(by: Sequence[Rates]) -> Iterator[list[str]]:
    groups = {
        "all parts in proportion": sum(ALIKE.values(), ()),
        "three MLPs": (USUAL, *OTHER_MLPS),
    }
    for law in ("µA", "one constant"):
        for what, names in groups.items():
            for which, x in zip(WHICH, by, strict=True):
                errors = [level_errors(x, names, law, each) for each in Widths._fields]
                yield [law, what, which, *(spread(found) for found in errors)]


def spread(errors: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    if not errors:
        return number(None)
    return f"{statistics.fmean(errors):+.2f} ± {number(statistics.stdev(errors) if len(errors) > 1 else None)}"


if __name__ == "__main__":
    main()
