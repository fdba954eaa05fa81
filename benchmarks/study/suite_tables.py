"""Tables of `suite.py`: exponents, the paper's claims, regret. The rules of verdict were written before any run."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from recording import block, number, percent, table_of
from study.configurations import CONFIGS, RSLORA, start_of
from study.domains import HELD_OUT, get_domain
from study.grids import FULL, Losses
from study.loss_curves import DIVERGED
from study.optima import (
    ESTIMATORS,
    best_rates,
    cliff,
    domains_in,
    exponent_of,
    law_slope,
    optimum,
    ranks_in,
)
from study.regret import (
    DEFAULT,
    FLOOR,
    LAWS,
    ONE_SEED,
    RECIPE,
    Moved,
    best_and_start,
    moves,
    pooled,
    score,
)

HELD, DRIFT, OCTAVE = 0.1, 0.35, 0.5
RULES = (
    f"A claim held if the measured exponent is within {HELD} of the claimed one. It held with a drift if it is within "
    f"{DRIFT}, and otherwise it did not hold. The last claim says that the best rate with A = 0 (Init[B]) equals that of "
    f"full finetuning. It held if the two are within {OCTAVE} octaves, averaged over the ranks, and held with a drift if "
    f"they are within {2 * OCTAVE:g}. Look at the single ranks too. These rules were written before any run."
)
ESTIMATED = (
    "The vertex is the lowest point of a parabola through the best three rates. The cliff is the rate above it at which a "
    "tenth of the possible improvement is lost. The laws' exponents are computed over the ranks shown. Where a grid does "
    "not reach its cliff, the ranks that do have one stand in brackets."
)
REGRET = (
    "Each cell has the median loss, then mean / 95th percentile / share of conversions that lose more than 5 %, all in % of "
    "the possible improvement. The next column names the worst conversion. The possible improvement is the loss before "
    "training minus the lowest loss of the sweep. The seeds that chose the best rates also score them. Between two rates "
    "that were tried, the loss is read off a monotone spline; beyond them it stays at that of the last one. A run that "
    "diverged counts as 500 %. The noise floor is what a rate loses on one seed if all other seeds chose it, averaged over "
    "seeds; a sweep with one seed has none. A loss below the noise floor says nothing. 'µA, falling at B' is the default "
    "scaling law."
)
BY_SETTING = (
    "Each cell has the mean / the 95th percentile / the share of conversions that lose more than 5 %. All are in % of the "
    "possible improvement, over the conversions of all domains, which count the same. A rate is the best of a sweep in whole "
    "octaves over three seeds; in the row below the default law it is the best of a single seed. What a rate loses is read "
    "off a curve through all rates that were run. Where two estimates of a converted rate's loss differed by more than two "
    "points, 33 further rates between the octaves were run (at commit b742a816), and they count in every row. Losses are "
    "measured from the lowest of all runs, so no single cell is below zero. The further rates are close to those of the "
    "default law and the recipes, above all in full finetuning of reinforcement learning (13 rates). The lowest of many "
    "noisy losses is too low, so all rows lose more there."
)
SUMMED = (
    "Each cell has the mean / the 95th percentile / the share of conversions that lose more than 5 %, in % of the possible "
    "improvement, over a domain's configurations in table (c). Two rows use the tuned rate of full finetuning itself in "
    'the lower half: "ten times full finetuning\'s", and LoRA+ tuned at every rank. LoRA+ was swept in one configuration, '
    "alpha = rank with B = 0 (Init[A]); table (c) compares it with the other ways there. Ten times full finetuning's rate "
    "is common practice with a fixed alpha: see Init[A], s = 1/r in table (c). A calibrated recipe converts no rate. It is "
    "a search at the lowest and the highest rank with three full-finetuning runs, and costs a fifth of a sweep. Every seed "
    "of a search that is on file counts: the recipe that is shipped, and those in `recipes/` beside this page."
)
LATER = "These tasks were run after every law and default had been chosen. The tables below contain them too."


def tables(done: Losses) -> list[str]:
    every, moved = domains_in(done), moves(done)
    exponent_rows = [row for domain in every for row in exponents(done, domain)]
    claim_rows = [row for domain in every for row in claims(done, domain)]
    regret_rows = [
        [
            *(each.domain, each.config, each.way),
            *in_words(each.lora, each.worst),
            *in_words(each.full, each.worst_full),
        ]
        for each in moved
    ]
    heads = [
        "domain",
        "configuration",
        "ranks",
        "seeds",
        *(f"by the {name}" for name in ESTIMATORS),
        *LAWS,
    ]
    ways = [
        "way",
        *(
            f"LoRA to {to}: {what}"
            for to in ("LoRA", "full")
            for what in ("moves", "% lost", "worst")
        ),
    ]
    held_out = [each for each in moved if each.domain in HELD_OUT]
    others = [each for each in moved if each.domain not in HELD_OUT]
    return [
        in_short(every, others),
        f"## What a converted rate loses, by setting\n\n{by_setting(others)}",
        BY_SETTING,
        f"## What a converted rate loses, by domain\n\n{summary(others)}",
        SUMMED,
        *later(held_out),
        block(
            "(a) Exponent of the best rate in rank, with its 90 % interval over seeds",
            heads,
            exponent_rows,
        ),
        ESTIMATED,
        block(
            "(b) The paper's claims",
            ["domain", "claim", "verdict", "numbers"],
            claim_rows,
        ),
        RULES,
        block(
            "How large the possible improvement is",
            GAIN_HEADS,
            [row for domain in every for row in gains(done, domain)],
        ),
        GAINS,
        block(
            "(c) What a rate loses that is converted from every rank to every other",
            ["domain", "configuration", *ways],
            regret_rows,
        ),
        REGRET,
    ]


def in_short(every: Sequence[str], moved: Sequence[Moved]) -> str:
    """The first screen of the page: what was run, what a user should conclude, and where the tables are."""
    rows = []
    for setting, (configs, which) in SETTINGS.items():
        ways = ("one rate everywhere", "the paper's law", DEFAULT)
        found = [regrets_in(moved, way, configs, which) for way in ways]
        means = [100 * statistics.fmean(regrets) for regrets in found if regrets]
        rows.append([setting, *(f"{number(mean, 1)} %" for mean in means)])
    heads = ["from one rank", "rate unchanged", "the paper's law", "the default law"]
    return (
        "How should a learning rate change with the LoRA rank, and with the move to full finetuning? To answer this, "
        f"{len(every)} small tasks were trained at every power of two of the learning rate, at several ranks, in four "
        "configurations, and in full finetuning. The best rate of one rank was then converted to every other. A converted "
        "rate loses little between ranks, and more on the way to full finetuning. With a fixed alpha, an unchanged rate is "
        "nearly as good as a converted one. The table shows what a converted rate loses on average, in % of the possible "
        f"improvement, over the {len({each.domain for each in moved})} tasks that the laws were chosen on:\n\n"
        f"{table_of(heads, rows)}\n\n"
        "On the tasks that were run after all choices had been made, the default law loses less: see below. Table (a) has "
        "the exponents, (b) says which claims of the paper held, (c) has every conversion, and the pictures at the end show "
        "the best rates themselves. Init[A] means that B starts at zero, as in most libraries; Init[B] means that A does. "
        "The scaling s is alpha / rank: 1 if alpha equals the rank, and proportional to 1/r if alpha is fixed."
    )


# --- exponents and claims -------------------------------------------------------------------------------------------


def exponents(done: Losses, domain: str) -> Iterator[list[str]]:
    for scheme in (*CONFIGS, *RSLORA):
        found = exponent_of(done, domain, scheme)
        if found is not None:
            by_laws = [
                number(law_slope(domain, scheme, found.ranks, law), 2, sign=True)
                for law in LAWS.values()
            ]
            ranks, by_cliff = (
                listed(found.ranks),
                exponent_of(done, domain, scheme, cliff),
            )
            other = "–" if by_cliff is None else str(by_cliff)
            if by_cliff is not None and by_cliff.ranks != found.ranks:
                other += f" (r = {listed(by_cliff.ranks)})"
            yield [domain, scheme, ranks, str(found.seeds), str(found), other, *by_laws]


def listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


CLAIMS = (
    ("Init[A], s = 1", -0.5, "Init[A], s = 1: the best rate falls as r^-1/2"),
    ("Init[A], s = 1/r", 0.0, "Init[A], s = 1/r: one rate for every rank"),
    ("Init[B], s = 1", 0.0, "Init[B], s = 1: one rate for every rank"),
)


LOWEST = 4  # the lowest rank that every domain has


def across_ranks(best: Mapping[int, float]) -> Iterator[str]:
    """The best rate at rank 4 by that at the highest rank, given log2 of the best rates by rank."""
    highest = max(best, default=LOWEST)
    if LOWEST in best and highest > LOWEST:
        yield f"rank {LOWEST}'s is {2 ** (best[LOWEST] - best[highest]):.2g} times rank {highest}'s"


def claims(done: Losses, domain: str) -> Iterator[list[str]]:
    for scheme, claimed, words in CLAIMS:
        found = exponent_of(done, domain, scheme)
        if found is not None:
            numbers = [f"r^({found})", *across_ranks(best_rates(done, domain, scheme))]
            yield [
                domain,
                words,
                verdict(found.slope - claimed, HELD, DRIFT),
                "; ".join(numbers),
            ]
    yield from to_full(done, domain)


def verdict(apart: float, held: float, drift: float) -> str:
    if abs(apart) <= held:
        return "held"
    return (
        f"held with a drift of {apart:+.2f}"
        if abs(apart) <= drift
        else "did not hold here"
    )


def to_full(done: Losses, domain: str) -> Iterator[list[str]]:
    scheme, full = "Init[B], s = 1", optimum(done, (domain, "full", FULL)).x
    apart = (
        {}
        if full is None
        else {rank: x - full for rank, x in best_rates(done, domain, scheme).items()}
    )
    if apart:
        said = verdict(statistics.fmean(apart.values()), OCTAVE, 2 * OCTAVE)
        numbers = ", ".join(f"{x:+.1f} at r = {rank}" for rank, x in apart.items())
        yield [
            domain,
            "Init[B]'s rate is full finetuning's, in the mean",
            said,
            f"octaves above full's: {numbers}",
        ]


# --- gains ----------------------------------------------------------------------------------------------------------

GAIN_HEADS = (
    "domain",
    "loss",
    "before training",
    "LoRA's best, over its ranks",
    "full's best",
    "1 % of the gain",
)
GAINS = (
    "Losses are on held-out data at the best rate that was run, averaged over seeds. For LoRA, the lowest and the highest "
    "loss over ranks and configurations are shown. The possible improvement is the loss before training minus the best "
    "loss. The last column says how large 1 % of it is in units of the loss, where it is least and where it is most."
)


def gains(done: Losses, domain: str) -> Iterator[list[str]]:
    """A domain's losses before and after training, and what a regret of 1 % is in units of the loss."""
    start, best = start_of(domain, done), {}
    for scheme in (*CONFIGS, "full"):
        for rank in ranks_in(done, domain, scheme):
            cell = (domain, scheme, rank)
            best[scheme, rank], _ = best_and_start(done, cell, cell)
    lora = sorted(loss for (scheme, _), loss in best.items() if scheme != "full")
    full = best.get(("full", FULL))
    shares = sorted((start - loss) / 100 for loss in best.values())
    if lora:
        own = get_domain(domain)
        cells = [
            f"{number(lora[0], 3)} to {number(lora[-1], 3)}",
            "–" if full is None else number(full, 3),
        ]
        yield [
            domain,
            own.score,
            number(start, 3),
            *cells,
            f"{shares[0]:.4f} to {shares[-1]:.4f}",
        ]


# --- regret ---------------------------------------------------------------------------------------------------------


def in_words(regrets: Sequence[float], worst: str) -> list[str]:
    """How many, their median and score, and the worst with its name."""
    if not regrets:
        return ["0", "–", "–"]
    most = "diverged" if max(regrets) >= DIVERGED else percent(max(regrets))
    named = f"{most} ({worst})" if worst else most
    return [
        str(len(regrets)),
        f"{number(100 * statistics.median(regrets), 1)}; {score(regrets).words()}",
        named,
    ]


COMPARED = {  # what the summaries compare, in their words
    "one rate everywhere": "one rate everywhere",
    "1/r": "1/r",
    "LoRA+ 16": "LoRA+ 16, its rate unchanged",
    "LoRA+ 16, moved": "LoRA+ 16, by the default law",
    "LoRA+ 16, own best": "LoRA+ 16, tuned at every rank",
    "ten times full": "ten times full finetuning's",
    "the paper's law": "the paper's law",
    "µA": 'this package, law="mua"',
    DEFAULT: "this package's default law",
    RECIPE: "this package, calibrated",
}
TARGETS = ("another rank", "full finetuning")


def summary(moved: Sequence[Moved]) -> str:
    """The score of a rate that is moved, a domain a column."""
    every, rows = list(dict.fromkeys(each.domain for each in moved)), []
    for which, target in enumerate(TARGETS):
        for way, words in COMPARED.items():
            if found := pooled(moved, way):
                shares = [
                    found[domain][which] if domain in found else [] for domain in every
                ]
                rows.append(
                    [
                        target,
                        words,
                        *(score(each).words() if each else "–" for each in shares),
                    ]
                )
    return table_of(
        [
            "to",
            "the rate is converted by",
            *(domain.replace("_", " ") for domain in every),
        ],
        rows,
    )


def later(moved: Sequence[Moved]) -> list[str]:
    """The same of the tasks that no choice saw, if they are on file."""
    if not moved:
        return []
    return [f"## The same on tasks that no choice saw\n\n{summary(moved)}", LATER]


SCORED = {  # the rows of the table by setting, in its words
    FLOOR: "noise floor",
    "one rate everywhere": "the rate unchanged",
    "the paper's law": "the paper's law",
    DEFAULT: "the default law",
    ONE_SEED: "the same, its rate from one seed",
    RECIPE: "a calibrated recipe",
}
Setting = tuple[tuple[str, ...], int]
# configurations, and 0 for moves to another rank or 1 for those to full finetuning, by words
SETTINGS: dict[str, Setting] = {
    "to another rank, alpha = rank": (("Init[A], s = 1",), 0),
    "to another rank, alpha fixed": (("Init[A], s = 1/r",), 0),
    "to full finetuning": (("Init[A], s = 1", "Init[A], s = 1/r"), 1),
    "to another rank, alpha = rank, Init[B]": (("Init[B], s = 1",), 0),
    "to full finetuning, Init[B]": (("Init[B], s = 1",), 1),
}


def regrets_in(
    moved: Sequence[Moved], way: str, configs: Sequence[str], which: int
) -> list[float]:
    mine = [
        (each.lora, each.full)[which]
        for each in moved
        if each.way == way and each.config in configs
    ]
    return [regret for regrets in mine for regret in regrets]


def by_setting(moved: Sequence[Moved]) -> str:
    """The score of each way over the moves of all domains, a setting a column."""
    rows = []
    for way, words in SCORED.items():
        cells = [regrets_in(moved, way, *setting) for setting in SETTINGS.values()]
        scores = [score(regrets).words() if regrets else "–" for regrets in cells]
        rows.append([words, *scores])
    return table_of(["", *SETTINGS], rows)
