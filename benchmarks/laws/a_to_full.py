"""Moving a rate tuned at Init[A] to full finetuning: which form generalises, and with which width and tokens?

    python benchmarks/laws/a_to_full.py    # no training: results/a_to_full.json and .md from the study's runs

**Forms**, with τ = T·η, κ(m) = √(m + (2/π)·m²/b), s the effective multiplier, r the rank and n the fan-in:

    µA              Init[A]: s·κ(r)·τ·(1 + κ(n)·τ) = 1; full: κ(n)·τ = 1. Only ratios of rates count, so T cancels.
    one constant    The same conditions with c in place of 1. The rate that is moved sets c.

For LoRA, n is the mean fan-in of the adapted layers. For full finetuning it is the mean or the largest fan-in. A level
o multiplies full finetuning's rate by 2^o. T is chosen for one constant, unless the form's name gives it. The tokens b
and the level o are chosen where the name says so. Otherwise b = 8 and o = 0.

**Fits and rule** are those of `study/leave_one_out.py`, for both uses together: moves between ranks and to full
finetuning, from s = 1 and from s = 1/r. They were set after a look at the same runs that suggested one constant, with
T about 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import click
from recording import percent
from study.leave_one_out import (
    CRITERIA,
    USES,
    Constants,
    Fit,
    Form,
    by_level,
    eighths,
    fits,
    judged,
    scores,
    stored,
    winner,
    write,
)

from rankaware_optim.laws._mua import Site, sign_terms

RESTS_ON = ("laws.adam", "scores")
SCHEMES = ("Init[A], s = 1", "Init[A], s = 1/r")


def root(p: float, q: float) -> float:
    """Positive solution x of p·x + q·x² = 1."""
    return 2.0 / (p + math.sqrt(p * p + 4.0 * q))


def mua(site: Site, of: Constants) -> float:
    return math.log2(root(*sign_terms(of["b"], site)))


def one_constant(a: Site, b: Site, x: float, of: Constants) -> float:
    """Move the log2 rate `x` from site `a` to site `b`, which have the same constant c."""
    p, q = sign_terms(of["b"], a)
    tau = of["T"] * 2.0**x
    c = p * tau + q * tau**2
    p, q = sign_terms(of["b"], b)
    return math.log2(root(p / c, q / c) / of["T"])


EIGHT, TOKENS = (8.0,), (1.0, 2.0, 4.0, 8.0, 16.0)
TIMES, LEVELS = [2.0**x for x in eighths(-1, 5)], eighths(-2.5, 2.5)
RATIO = partial(by_level, mua)
FORMS = (
    Form("µA", RATIO, {"b": EIGHT}),
    Form("µA, largest", RATIO, {"b": EIGHT}, full_width="largest"),
    Form("µA, level", RATIO, {"b": EIGHT, "o": LEVELS}),
    Form("µA, largest, level", RATIO, {"b": EIGHT, "o": LEVELS}, full_width="largest"),
    Form("µA, largest, tokens", RATIO, {"b": TOKENS}, full_width="largest"),
    Form(
        "µA, largest, tokens, level",
        RATIO,
        {"b": TOKENS, "o": LEVELS},
        full_width="largest",
    ),
    Form("one constant", one_constant, {"T": TIMES, "b": EIGHT}),
    Form(
        "one constant, largest",
        one_constant,
        {"T": TIMES, "b": EIGHT},
        full_width="largest",
    ),
    Form("one constant, tokens", one_constant, {"T": TIMES, "b": TOKENS}),
    Form(
        "one constant, largest, tokens",
        one_constant,
        {"T": TIMES, "b": TOKENS},
        full_width="largest",
    ),
    Form("one constant, T = 2", one_constant, {"T": (2.0,), "b": EIGHT}, judged=False),
)
SHIPPED = FORMS[1]


@click.command()
def main() -> None:
    """Fit every form and write the page."""
    places = stored(SCHEMES)
    fitted = [fit for form in FORMS for fit in fits(form, places)]
    title = "From Init[A] to full finetuning: which form generalises"
    write("a_to_full", title, __doc__ or "", verdict(fitted), places, fitted)


def verdict(fitted: Sequence[Fit]) -> str:
    """State which form the rule names, with its figures."""
    named = {
        criterion: winner(judged(scores(fitted, criterion))) for criterion in CRITERIA
    }
    first, tied = named[CRITERIA[0]]
    others = ", ".join(
        f"by {criterion} it names {form.name}"
        for criterion, (form, _) in list(named.items())[1:]
    )
    figures = [
        f"{use.capitalize()}, rms octaves by vertex / cliff, median and worst regret: "
        + "; ".join(
            f"{form.name} {scores(fitted, CRITERIA[0], use)[form]}"
            for form in dict.fromkeys((first, SHIPPED))
        )
        for use in USES
    ]
    beyond = scores(fitted, CRITERIA[0])[first].beyond
    return (
        f"The rule names **{first.name}**: it loses at worst {percent(beyond)} beyond the noise floor; "
        f"{len(tied) - 1} forms tie with it. With constants chosen {others}. {'. '.join(figures)}."
    )


if __name__ == "__main__":
    main()
