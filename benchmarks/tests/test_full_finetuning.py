"""Tests of the page on full finetuning: its fits, and the constants that the package takes from it."""

from __future__ import annotations

import math
import re

import pytest
from internals import FULL_LOG2_RATE, FULL_RL, FULL_RL_HIGH, FULL_RL_LOW, FULL_SPREAD
from laws import full_finetuning
from laws.full_finetuning import FORMS, Form
from laws.full_sources import Best, Pair, mean_of_log2, mean_of_steps
from recording import RESULTS

from rankaware_optim import Falling, Reference
from rankaware_optim.laws import FULL_RATIO, FULL_TRUST_FACTOR


def best(source: str, rate: float, steps: float, inner: int = 9728) -> Best:
    return Best(source, "a model", math.log2(rate), steps, inner, False)


# Two sources whose best learning rate falls by half an octave per octave of steps beyond 780.
FALLING = [
    best("one", 4e-5, 400),
    best("one", 4e-5 * 2**-1.0, 3120),
    best("other", 4e-5, 780),
    best("other", 4e-5 * 2**-0.5, 1560),
]


def test_a_form_finds_the_exponent_that_made_the_data() -> None:
    """The form with an exponent beyond 780 steps finds it, and predicts a source that was left out."""
    form = Form("", "beyond")
    intercept, exponent = form.fit(FALLING)
    assert 2.0**intercept == pytest.approx(4e-5)
    assert exponent == pytest.approx(-0.5)
    errors = full_finetuning.left_out(form, FALLING)
    assert max(abs(each) for group in errors.values() for each in group) < 1e-6


def test_sources_count_alike() -> None:
    """A source with many curves has the same weight as a source with one."""
    many = [best("many", 1e-5, 780)] * 9
    (middle,) = FORMS[0].fit([*many, best("one", 4e-5, 780)])
    assert 2.0**middle == pytest.approx(2e-5)


def test_a_ratio_is_fitted_without_the_source_that_it_judges() -> None:
    """If two models follow the scaling law and one ratio, each is predicted from the other without an error."""
    at = Reference(16, 32, fan_in=4096.0)
    lora = {
        at: -12.0,
        Reference(64, 64, fan_in=4096.0): -12.0
        + math.log2(
            Falling().multiplier(Reference(64, 64, fan_in=4096.0).as_factor(), at)
        ),
    }
    full = Reference(method="full", fan_in=14336.0)
    plain = Pair("plain", lora, full, -12.0 - math.log2(26), False)
    rounded = Pair("bfloat16", lora, full, -12.0 - math.log2(26 / 2.8), True)
    for pair in (plain, rounded):
        errors = full_finetuning.by_ratio(pair, [plain, rounded], True)
        assert max(map(abs, errors)) < 1e-6


def test_words_in_the_files_are_read_as_numbers() -> None:
    """Two learning rates in words are read as their geometric mean, and so is a range of steps."""
    assert mean_of_log2("1e-6 (thinking) or 4e-6 (not thinking)") == pytest.approx(
        math.log2(2e-6)
    )
    assert mean_of_steps("80-320") == pytest.approx(160)
    assert mean_of_steps("") is None


SAID = [
    (r"starts from (\S+) at 780 steps", 2.0**FULL_LOG2_RATE, 0.02),
    (r"a standard deviation of (\S+) octaves between sources", FULL_SPREAD, 1e-9),
    (r"finetuning's rate is 1 / (\d+) of LoRA's", FULL_RATIO, 1e-9),
    (
        r"nine in ten best rates should lie within a factor of (\d\.\d)",
        FULL_TRUST_FACTOR,
        1e-9,
    ),
    (r"the quoted rate is then the lowest best one, (\S+?):", FULL_RL, 0.02),
    (r"The interval is (\S+) to", FULL_RL_LOW, 0.02),
    (r"The interval is \S+ to (\S+?)\. ", FULL_RL_HIGH, 0.02),
]


@pytest.mark.parametrize(("sentence", "number", "within"), SAID)
def test_the_package_has_the_numbers_of_the_page(
    sentence: str, number: float, within: float
) -> None:
    """Every constant for full finetuning in the package equals the number on the page."""
    page = (RESULTS / "full_finetuning.md").read_text(encoding="utf-8")
    (shown,) = re.findall(sentence, page)
    assert float(shown) == pytest.approx(number, rel=within)
