"""The texts of a recipe and its rates: once, wherever it is printed."""

from __future__ import annotations

import html
from dataclasses import replace

import pytest

from rankaware_optim import Reference
from rankaware_optim.recipe import facts
from rankaware_optim.reports import report_html

from ..helpers.recipes import KINDS, RECIPE

FULL = replace(
    RECIPE,
    margin=0.25,
    settings={"weight_decay": 0.01, "betas": (0.9, 0.99)},
    reference=Reference(rank=4, alpha=8, fan_in=64, batch=16.0),
    steps=1,
    warmup=0.05,
    versions={"torch": "2.6"},
    notes=("first", "second"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_it_holds_a_recipe_prints_itself(kind):
    """Every recipe has a text of one fact a line, none of them empty or None."""
    made = KINDS[kind]
    assert str(made) == made.explain()
    assert "None" not in str(made)
    assert all(name and text for name, text in facts(made))


WORDS = [
    ({}, "law", "mua, times rank^0.1"),
    ({"ceiling": 0.03}, "ceiling", "0.03, the smallest rate that diverged, moved to the base rate's configuration as a best rate"),
    ({"ranks": (), "tensors": {}}, "seen", "ranks none; 0 trials"),
    ({"missing": "x"}, "seen", "ranks 4, 64; its trials are not here, x is missing"),
    ({"other_rates": {"a.*": "base", "b": 1e-3}}, "other rates", "a.* base, b 0.001; any other must be given, as full finetuning was not tried"),
    ({"steps": None, "reference": Reference(4, 8), "warmup": None}, "runs", "unknown steps, batch unknown, warm-up unknown"),
    ({"source": {"train": "a", "commit": "b"}}, "code", "a, commit b"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "name", "text"), WORDS)
def test_a_fact_says_what_is_known_of_it(changes, name, text):
    """What the recipe does not hold is said to be unknown, none or nothing."""
    assert dict(facts(replace(FULL, **changes)))[name] == text


def test_the_page_says_what_printing_says():
    """The page holds every fact that printing it shows."""
    made = FULL
    page = html.unescape(report_html(made))
    for name, text in facts(made):
        assert f"<dt>{name.capitalize()}</dt><dd>{text}</dd>" in page


BARE = {"steps": None, "reference": Reference(4, 4)}
AT = [
    ({}, {}, "rank 4, alpha 8, init A, fan-in 64, 100 steps, batch 16"),
    ({}, {"rank": 8, "alpha": 8, "rslora": True}, "rank 8, alpha 8, rslora, init A, fan-in 64, 100 steps, batch 16"),
    ({}, {"method": "full", "steps": 9, "batch": 4}, "full finetuning, fan-in 64, 9 steps, batch 4"),
    (BARE, {"rank": 8}, "rank 8, alpha 8, init A"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")
@pytest.mark.parametrize(("changes", "asked", "words"), AT)
def test_a_rate_says_what_it_is_for(changes, asked, words):
    """A recipe's rate says, on its second line, the configuration, steps and batch that were asked for or assumed."""
    rate = replace(FULL, **{"steps": 100, **changes}).at(**asked)
    assert str(rate).splitlines()[1] == f"at        {words}"
