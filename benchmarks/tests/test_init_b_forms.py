"""Forms of Init[B]'s fall: how each moves a rate, how constants are chosen, and what the rule names."""

from __future__ import annotations

import math
from typing import Any

import pytest
from laws import init_b_forms as forms
from study import leave_one_out

WIDTH = 512.0


def named(name: str) -> Any:
    return next(form for form in forms.FORMS if form.name == name)


def site(rank: int) -> Any:
    """A rank at Init[B]; 0 for full finetuning."""
    return (
        forms.Site("B", rank, 1.0, WIDTH) if rank else forms.Site("full", 1, 1.0, WIDTH)
    )


def place(rank: int, best: float, floor: float | None = 0.0, start: float = 2.0) -> Any:
    """A bowl about a best rate, which both estimators find."""
    tried = {float(x): 1.0 + (x - best) ** 2 / 10 for x in range(-20, 1)}
    scheme = "Init[B], s = 1" if rank else "full"
    return leave_one_out.Place(
        scheme,
        site(rank),
        {"vertex": best, "cliff": best},
        tried,
        1.0,
        start,
        floor,
    )


def following(exponent: float, top: float) -> list[Any]:
    """A domain whose best rates lie (n / r)^exponent above full finetuning's."""
    full = [place(0, top)]
    return [
        place(rank, top + exponent * math.log2(WIDTH / rank)) for rank in (4, 16, 64)
    ] + full


@pytest.mark.parametrize(
    ("name", "constants", "octaves"),
    [
        ("power", {"p": 0.5}, -2.5),
        ("power 1/3", {"p": 1 / 3}, -5 / 3),
        ("power 1/3, level", {"p": 1 / 3, "o": -0.5}, -5 / 3 - 0.5),
        ("Falling", {"k": 4.0}, -math.log2(516 / 20) / 2),
        ("knee and power", {"k": 4.0, "p": 1 / 3}, -math.log2(516 / 20) / 3),
        ("power on µA", {"p": 0.5}, -2.5),
    ],
)
def test_a_form_moves_a_rate_to_full_finetuning(
    name: str, constants: dict[str, float], octaves: float
):
    """From rank 16 by its equation; µA itself moves it by no more than its second term, a fifth of an octave."""
    moved = named(name).move(site(16), site(0), -6.0, constants) + 6.0
    assert moved == pytest.approx(
        octaves, abs=0.2 if "µA" in name or "k" in constants else 1e-9
    )


def test_falling_is_the_packages():
    """At any knee the form's octaves are those of the law with 8 tokens, as when the forms were compared."""
    from rankaware_optim import Factor, Falling, MuA, Reference

    at = Reference(rank=16, alpha=16, init="B", fan_in=WIDTH)
    for knee, rank in ((4.0, 64), (16.0, 1), (2.0, 512)):
        factor = Factor("w", "A", rank, int(WIDTH), int(WIDTH), scaling=1.0, init="B")
        moved = named("Falling").move(site(16), site(rank), -6.0, {"k": knee}) + 6.0
        assert moved == pytest.approx(
            math.log2(Falling(knee, 0.5, MuA(tokens=8.0)).multiplier(factor, at))
        )


@pytest.mark.parametrize(
    "form", ["weakened µA", "Falling, level", "power, level", "no fall"]
)
@pytest.mark.parametrize(("a", "b"), [(1, 64), (16, 0)])
def test_a_move_and_its_way_back_are_inverse(form: str, a: int, b: int):
    """Moved there and back a rate is itself, whichever way a form reads it."""
    chosen, here, there = named(form), site(a), site(b)
    for constants in chosen.choices()[:: max(1, len(chosen.choices()) // 5)]:
        assert chosen.move(
            there, here, chosen.move(here, there, -8.0, constants), constants
        ) == pytest.approx(-8.0)


def test_constants_are_chosen_on_the_other_domains():
    """Two domains that follow r^(-1/2) choose it for a third that follows r^(-1/4), by every criterion."""
    places = {
        "a": following(0.5, -9.0),
        "b": following(0.5, -11.0),
        "c": following(0.25, -10.0),
    }
    found = {
        (fit.criterion, fit.domain): fit for fit in forms.fits(named("power"), places)
    }
    for criterion in leave_one_out.CRITERIA:
        fit = found[criterion, "c"]
        assert fit.constants == {"p": pytest.approx(0.5)}
        assert leave_one_out.score(
            [m for m in fit.moves if m.use == leave_one_out.USES[1]]
        ).vertex == pytest.approx(math.sqrt((7**2 + 5**2 + 3**2) / 3) / 4)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        # one constant against two, within .1 octaves
        (
            {"power": (0.5, 0.12)},
            "power",
        ),
        ({"power": (0.65, 0.12)}, "knee and power"),  # further off
        # as few constants, the less at worst
        (
            {"power": (0.5, 0.12), "Falling": (0.5, 0.11)},
            "Falling",
        ),
        ({"power 1/3": (0.55, 0.3), "Falling": (0.5, 0.11)}, "power 1/3"),
    ],
)
def test_the_rule_names_the_least_and_of_a_tie_the_simplest(
    others: dict[str, Any], expected: str
):
    """The least worst regret wins; within .1 octaves of it the fewest constants do."""
    figures = {"knee and power": (0.5, 0.1), **others}
    scored = {
        named(name): leave_one_out.Score(rms, rms, 0.0, worst, worst)
        for name, (rms, worst) in figures.items()
    }
    assert forms.winner(scored)[0].name == expected
