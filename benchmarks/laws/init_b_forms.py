"""Which form of Init[B]'s fall generalises: between ranks, and to full finetuning?

    python benchmarks/laws/init_b_forms.py    # no training: results/init_b_forms.md from the study's runs

**Forms** of the best rate η at Init[B], s = 1, rank r and mean fan-in n, relative to full finetuning's η_full at n:

    no fall          µA alone: hypot(κ(n)·τ, κ(n)·κ(r)·τ²) = 1; full: κ(n)·τ = 1; κ(m) = √(m + (2/π)·m²/8)
    Falling          µA · √((k + n) / (k + min(r, n))), with the knee k chosen
    knee and power   µA · ((k + n) / (k + min(r, n)))^p, with k and p chosen
    power            η = η_full · (n / min(r, n))^p, with p chosen, and with p = 1/3
    power on µA      µA · (n / min(r, n))^p, with p chosen, and with p = 1/3
    weakened µA      hypot(w·κ(n)·τ, κ(n)·κ(r)·τ²) = c; full: κ(n)·τ = c; τ = T·η; with w, T and κ's tokens b chosen.
                     The task's rate sets c, so the rate itself matters, not only ratios of rates.

Most forms are also tried with a level o, which is chosen: full finetuning's rate is then 2^o times the form's.

**Fits and rule** are those of `study/leave_one_out.py`. They were set before this script was run, but after a look at
the same runs that suggested p = 1/3. Constants are those chosen by regret. The page says whether the constants chosen
by octaves name the same form. Two kinds of forms are shown but not judged: the knee of 4 that the package had before,
which was chosen on four tasks, three of them of the same kinds as these domains; and levels asked for after that look.

Amended after the first run (commit 6e7d8e73), which also named a power of 1/3. The first run also scored each vertex
displaced by the error of its cliff in octaves. Where a vertex lies at the cliff, and the cliff is known to an octave,
this charges 238 % for .4 octaves, although nobody moves a rate in this way. The form "knee and power" was added at the
same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import click
from recording import percent
from study.leave_one_out import (
    CRITERIA,
    USES,
    Constants,
    Fit,
    Form,
    Site,
    by_level,
    eighths,
    fits,
    halves,
    judged,
    scores,
    stored,
    winner,
    write,
)

RESTS_ON = ("laws.adam", "scores")
SCHEME, TOKENS = "Init[B], s = 1", 8.0


def kappa(m: float, tokens: float) -> float:
    """The size of a sum of m sign terms that serves so many tokens at once."""
    return math.sqrt(m + (2.0 / math.pi) * m * m / tokens)


def sign_terms(tokens: float, at: Site) -> tuple[float, float]:
    """(p, q) of the change p·η + q·η² of µA's condition, as rankaware_optim/laws/_mua.py has them."""
    k_n = kappa(at.fan_in, tokens)
    if at.init == "full":
        return k_n, 0.0
    k_r = kappa(at.rank, tokens)
    return at.scaling * (k_r if at.init == "A" else k_n), at.scaling * k_r * k_n


def in_quadrature(p: float, q: float) -> float:
    """The root x of hypot(p·x, q·x²) = 1."""
    return math.sqrt(2.0 / (p * p + math.sqrt(p**4 + 4.0 * q * q)))


def mua(site: Site, of: Constants) -> float:
    return math.log2(in_quadrature(*sign_terms(TOKENS, site)))


def full(site: Site, of: Constants) -> float:
    """log2 of τ for full finetuning at the site's fan-in, where κ(n)·τ = 1."""
    return -math.log2(kappa(site.fan_in, TOKENS))


def falling(site: Site, of: Constants) -> float:
    return mua(site, of) + of.get("p", 0.5) * math.log2(
        (of["k"] + site.fan_in) / (of["k"] + rank_of(site))
    )


def power(on: Callable[[Site, Constants], float], site: Site, of: Constants) -> float:
    return on(site, of) + of["p"] * math.log2(site.fan_in / rank_of(site))


def rank_of(site: Site) -> float:
    """min(r, n) of a site, where full finetuning has r = n."""
    return site.fan_in if site.init == "full" else min(site.rank, site.fan_in)


def weakened(a: Site, b: Site, x: float, of: Constants) -> float:
    """Move the log2 rate `x` from site `a` to site `b`, which have the same constant c."""
    p, q = weakened_terms(a, of)
    tau = of["T"] * 2.0**x
    c = math.hypot(p * tau, q * tau**2)
    p, q = weakened_terms(b, of)
    return math.log2(in_quadrature(p / c, q / c) / of["T"])


def weakened_terms(site: Site, of: Constants) -> tuple[float, float]:
    p, q = sign_terms(of["b"], site)
    return p * (of["w"] if site.init == "B" else 1.0), q


KNEES, POWERS, LEVELS = (
    (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    [step / 24 for step in range(2, 17)],
    eighths(-2.5, 2.5),
)
FALL, ON_FULL, ON_MUA = (
    partial(by_level, level)
    for level in (falling, partial(power, full), partial(power, mua))
)
THIRD = (1 / 3,)
FORMS = (
    Form("no fall", partial(by_level, mua)),
    Form("no fall, level", partial(by_level, mua), {"o": LEVELS}),
    Form("Falling", FALL, {"k": KNEES}),
    Form("Falling, level", FALL, {"k": KNEES, "o": LEVELS}),
    Form("knee and power", FALL, {"k": KNEES, "p": POWERS}),
    Form("power", ON_FULL, {"p": POWERS}),
    Form("power, level", ON_FULL, {"p": POWERS, "o": LEVELS}),
    Form("power 1/3", ON_FULL, {"p": THIRD}),
    Form("power 1/3, level", ON_FULL, {"p": THIRD, "o": LEVELS}),
    Form("power on µA", ON_MUA, {"p": POWERS}),
    Form("power on µA, level", ON_MUA, {"p": POWERS, "o": LEVELS}),
    Form("power 1/3 on µA", ON_MUA, {"p": THIRD}),
    Form("power 1/3 on µA, level", ON_MUA, {"p": THIRD, "o": LEVELS}),
    Form(
        "weakened µA",
        weakened,
        {"w": halves(-5, 0), "T": halves(-2, 8), "b": [2.0**step for step in range(8)]},
    ),
    Form("Falling, k = 4", FALL, {"k": (4.0,)}, judged=False),
    Form("power 1/3, o = -1/8", ON_FULL, {"p": THIRD, "o": (-0.125,)}, judged=False),
    Form(
        "power 1/3 on µA, o = -1/8", ON_MUA, {"p": THIRD, "o": (-0.125,)}, judged=False
    ),
)
BEFORE, SHOWN = (
    next(form for form in FORMS if form.name == "Falling, k = 4"),
    ("no fall", "weakened µA"),
)


@click.command()
def main() -> None:
    """Fit every form and write the page."""
    places = stored([SCHEME])
    fitted = [fit for form in FORMS for fit in fits(form, places)]
    write(
        "init_b_forms",
        "Which form of Init[B]'s fall generalises",
        __doc__ or "",
        verdict(fitted),
        places,
        fitted,
    )


def verdict(fitted: Sequence[Fit]) -> str:
    """State which form the rule names, with its figures."""
    by_criterion = {criterion: scores(fitted, criterion) for criterion in CRITERIA}
    named = {
        criterion: winner(judged(each)) for criterion, each in by_criterion.items()
    }
    first, tied = named[CRITERIA[0]]
    others = ", ".join(
        f"by {criterion} it names {form.name}"
        for criterion, (form, _) in list(named.items())[1:]
    )
    scored = by_criterion[CRITERIA[0]]
    known, _ = winner(judged(scored) | {BEFORE: scored[BEFORE]})
    shown = (first, *(form for form in FORMS if form is BEFORE or form.name in SHOWN))
    figures = [
        f"{use.capitalize()}, rms octaves by vertex / cliff, median and worst regret: "
        + "; ".join(
            f"{form.name} {scores(fitted, CRITERIA[0], use)[form]}" for form in shown
        )
        for use in USES
    ]
    return (
        f"The rule names **{first.name}**: it loses at worst {percent(scored[first].beyond)} beyond the noise floor; "
        f"{len(tied) - 1} forms tie with it. With constants chosen {others}. Were the knee of 4 taken "
        f"as known beforehand, as 1/3 is, the rule would name {known.name}. {'. '.join(figures)}."
    )


if __name__ == "__main__":
    main()
