"""Forms of Init[B]'s fall: how each moves a rate, how constants are chosen, and what the rule names."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    not BENCHMARKS.exists(), reason="the benchmarks are not at hand"
)
WIDTH = 512.0


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("laws.init_b_forms")
    sys.modules.pop("laws.init_b_forms", None)


def leave() -> Any:
    return sys.modules["study.leave_one_out"]


def named(forms: Any, name: str) -> Any:
    return next(form for form in forms.FORMS if form.name == name)


def site(forms: Any, rank: int) -> Any:
    """A rank at Init[B]; 0 for full finetuning."""
    return (
        forms.Site("B", rank, 1.0, WIDTH) if rank else forms.Site("full", 1, 1.0, WIDTH)
    )


def place(
    forms: Any, rank: int, best: float, floor: float | None = 0.0, start: float = 2.0
) -> Any:
    """A bowl about a best rate, which both estimators find."""
    tried = {float(x): 1.0 + (x - best) ** 2 / 10 for x in range(-20, 1)}
    scheme = "Init[B], s = 1" if rank else "full"
    return leave().Place(
        scheme,
        site(forms, rank),
        WIDTH,
        {"vertex": best, "cliff": best},
        tried,
        1.0,
        start,
        floor,
    )


def following(forms: Any, exponent: float, top: float) -> list[Any]:
    """A domain whose best rates lie (n / r)^exponent above full finetuning's."""
    full = [place(forms, 0, top)]
    return [
        place(forms, rank, top + exponent * math.log2(WIDTH / rank))
        for rank in (4, 16, 64)
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
    forms: Any, name: str, constants: dict[str, float], octaves: float
):
    """From rank 16 by its equation; µA itself moves it by no more than its second term, a fifth of an octave."""
    moved = (
        named(forms, name).move(site(forms, 16), site(forms, 0), -6.0, constants) + 6.0
    )
    assert moved == pytest.approx(
        octaves, abs=0.2 if "µA" in name or "k" in constants else 1e-9
    )


def test_falling_is_the_packages(forms: Any):
    """At any knee the form's octaves are those of the law with 8 tokens, as when the forms were compared."""
    from rankaware_optim import Factor, Falling, MuA, Reference

    at = Reference(rank=16, alpha=16, init="B", fan_in=WIDTH)
    for knee, rank in ((4.0, 64), (16.0, 1), (2.0, 512)):
        factor = Factor("w", "A", rank, int(WIDTH), int(WIDTH), scaling=1.0, init="B")
        moved = (
            named(forms, "Falling").move(
                site(forms, 16), site(forms, rank), -6.0, {"k": knee}
            )
            + 6.0
        )
        assert moved == pytest.approx(
            math.log2(Falling(knee, 0.5, MuA(tokens=8.0)).multiplier(factor, at))
        )


@pytest.mark.parametrize(
    "form", ["weakened µA", "Falling, level", "power, level", "no fall"]
)
@pytest.mark.parametrize(("a", "b"), [(1, 64), (16, 0)])
def test_a_move_and_its_way_back_are_inverse(forms: Any, form: str, a: int, b: int):
    """Moved there and back a rate is itself, whichever way a form reads it."""
    chosen, here, there = named(forms, form), site(forms, a), site(forms, b)
    for constants in chosen.choices()[:: max(1, len(chosen.choices()) // 5)]:
        assert chosen.move(
            there, here, chosen.move(here, there, -8.0, constants), constants
        ) == pytest.approx(-8.0)


def test_the_weakened_condition_reads_the_rate(forms: Any):
    """Low rates are moved by its first term, w below full finetuning's; at high ones an octave of rank 16 is two."""
    form, of = named(forms, "weakened µA"), {"w": 0.125, "T": 1.0, "b": 8.0}
    moved = [
        form.move(site(forms, 16), site(forms, 0), x, of) for x in (-30.0, 5.0, 6.0)
    ]
    assert moved[0] == pytest.approx(-33.0, abs=1e-3)
    assert moved[2] - moved[1] == pytest.approx(2.0, abs=1e-3)


def test_constants_are_chosen_on_the_other_domains(forms: Any):
    """Two domains that follow r^(-1/2) choose it for a third that follows r^(-1/4), by every criterion."""
    places = {
        "a": following(forms, 0.5, -9.0),
        "b": following(forms, 0.5, -11.0),
        "c": following(forms, 0.25, -10.0),
    }
    found = {
        (fit.criterion, fit.domain): fit
        for fit in forms.fits(named(forms, "power"), places)
    }
    for criterion in leave().CRITERIA:
        fit = found[criterion, "c"]
        assert fit.constants == {"p": pytest.approx(0.5)}
        assert leave().score(
            [m for m in fit.moves if m.use == leave().USES[1]]
        ).vertex == pytest.approx(math.sqrt((7**2 + 5**2 + 3**2) / 3) / 4)


def test_a_regret_within_the_noise_floor_counts_as_none(forms: Any):
    """Moves are all ordered pairs of ranks and every rank to full finetuning; beyond is what lies above the floor."""
    places = [
        place(forms, 4, -6.0),
        place(forms, 16, -7.0, floor=0.5),
        place(forms, 0, -9.0, floor=None),
    ]
    found = list(leave().moves(named(forms, "power"), {"p": 0.0}, places))
    assert [
        (
            move.use,
            round(move.off["vertex"], 9),
            round(move.regret, 9),
            round(move.beyond, 9),
        )
        for move in found
    ] == [
        ("between ranks", 1.0, 0.1, 0.0),
        ("to full finetuning", 3.0, 0.9, 0.9),
        ("between ranks", -1.0, 0.1, 0.1),
        ("to full finetuning", 2.0, 0.4, 0.4),
    ]


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
    forms: Any, others: dict[str, Any], expected: str
):
    """The least worst regret wins; within .1 octaves of it the fewest constants do."""
    figures = {"knee and power": (0.5, 0.1), **others}
    scored = {
        named(forms, name): leave().Score(rms, rms, 0.0, worst, worst)
        for name, (rms, worst) in figures.items()
    }
    assert forms.winner(scored)[0].name == expected
