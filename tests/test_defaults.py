"""Tests that numbers in README and on the site are the same as in the code or in the benchmarks' results.

This command writes the current numbers into the sentences:

    tox run -e core -- tests/test_defaults.py --write-golden
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest

from rankaware_optim.calibration import TRIALS_PER_RANK
from rankaware_optim.laws._to_full import FULL_TRUST_FACTOR
from rankaware_optim.recipe._rates import MOST_MARGIN
from rankaware_optim.transfer._suggest import MARGIN

NUMBER = r"\d*\.?\d+"
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


# --- the sources of the numbers ---------------------------------------------------------


@cache
def result(page: str) -> str:
    return (RESULTS / f"{page}.md").read_text(encoding="utf-8")


def said(page: str, sentence: str, at: int = 0) -> str:
    """Return the number at the place of <> in a sentence on a page of results."""
    found = re.findall(re.escape(sentence).replace("<>", f"({NUMBER})"), result(page))
    return found[at]


def cell(page: str, section: str, row: str, column: str, at: int = 0) -> str:
    """Return a number in the cell of a table. If the cell has a mean and a percentile, the mean is the first number."""
    return re.findall(NUMBER, text_of_cell(page, section, row, column))[at]


def text_of_cell(page: str, section: str, row: str, column: str) -> str:
    """Return the text of a cell in the first table below a heading that has both the column and the row."""
    below = result(page).partition(f"# {section}")[2]
    heads: list[str] = []
    for line in below.splitlines():
        cells = [each.strip() for each in line.strip("|").split("|")]
        if column in cells:
            heads = cells
        if heads and f"| {row} |" in line:
            return cells[heads.index(column)]
    raise AssertionError(f"{page}, {section}: no cell at {row}, {column}.")


NINE, FIVE = "Nine tasks at their own steps", "Five tasks at 400 steps"
REAL = "The cells of the real runs at own steps"
RANKS, FULL = "another rank, alpha = rank", "full finetuning, alpha = rank"
KEPT, AT_B = "another rank, alpha kept", "another rank, A = 0"
MODELS = "35 language models"
frontier = partial(cell, "frontier")


def falls_on_small_tasks() -> list[float]:
    """Return the factors by which the best learning rates fall from rank 4 to 256, for tasks that have both ranks."""
    row = rf"falls as r\^-1/2 \| \w+ \| .*rank 4's is ({NUMBER}) times rank 256's"
    return sorted(map(float, re.findall(row, result("study"))))


def lost_on_7b() -> list[float]:
    row = re.findall(r"^\| \*\*`suggest_lr`\*\*.*$", result("large_models"), re.M)[0]
    return sorted(map(float, re.findall(rf"\| ({NUMBER})", row)))


def suggestion_lost() -> list[float]:
    columns = (RANKS, KEPT, AT_B, FULL)
    return sorted(float(frontier(NINE, "**`suggest_lr`**", each)) for each in columns)


Figure = Callable[[], str | float]
FIGURES: dict[str, Figure] = {
    "runs": lambda: f"{2 * TRIALS_PER_RANK}",
    "runs_per_rank": lambda: f"{TRIALS_PER_RANK}",
    "recipe_margin": lambda: 2**-MOST_MARGIN,
    "suggestion_margin": lambda: 2**-MARGIN,
    "fall_7b": partial(
        said,
        "large_models",
        "From rank 16 to 256 the best learning rate falls by a factor of <>",
    ),
    "fall_1b": partial(
        cell, "large_models", "What multiplies", "rank 4 → 256, alpha = rank", "theirs"
    ),
    "fall_1b_law": partial(
        cell, "large_models", "What multiplies", "rank 4 → 256, alpha = rank", "ours"
    ),
    "fall_small_least": lambda: falls_on_small_tasks()[0],
    "fall_small_most": lambda: falls_on_small_tasks()[-1],
    "models_kept": partial(
        said, "large_models", "lose <> % with an unchanged learning rate"
    ),
    "models_law": partial(said, "large_models", "and <> % by the default law"),
    "full_trust": lambda: FULL_TRUST_FACTOR,
    "suggest_7b_least": lambda: lost_on_7b()[0],
    "suggest_7b_most": lambda: lost_on_7b()[-1],
    "law_full": partial(frontier, NINE, "**the default law**", FULL),
    "tenth_full": partial(frontier, NINE, "a tenth in full finetuning", FULL),
    "suggest_least": lambda: suggestion_lost()[0],
    "suggest_most": lambda: suggestion_lost()[-1],
    "suggest_real": partial(frontier, REAL, "**`suggest_lr`**", RANKS),
    "suggest_real_full": partial(frontier, REAL, "**`suggest_lr`**", FULL),
    **{
        f"{name}{suffix}": partial(frontier, section, way, column)
        for name, way in (
            ("free", "schedule-free AdamW"),
            ("safe", "Prodigy with safeguard"),
            ("adaptation", "D-Adaptation"),
        )
        for suffix, section, column in (
            ("", REAL, RANKS),
            ("_400", FIVE, RANKS),
            ("_full", REAL, FULL),
            ("_full_400", FIVE, FULL),
        )
    },
    "prodigy": partial(
        frontier, "Prodigy by the", "Prodigy, d_coef 1", "another rank: own steps"
    ),
    "prodigy_400": partial(
        frontier, "Prodigy by the", "Prodigy, d_coef 1", "another rank: 400"
    ),
    "prodigy_half": partial(frontier, REAL, "Prodigy", RANKS),
    "prodigy_half_400": partial(frontier, FIVE, "Prodigy", RANKS),
    "prodigy_full": partial(frontier, REAL, "Prodigy", FULL),
    "prodigy_full_400": partial(frontier, FIVE, "Prodigy", FULL),
    **{
        f"{name}{suffix}": partial(cell, "finder", "Lost, %", way, column)
        for name, way in (
            ("quarter", "1/4 of 400, around the suggestion"),
            ("eighth", "1/8 of 400, around the suggestion"),
            ("untuned", "400 steps, `suggest_lr`, no search"),
            ("lightning", "400 steps, Lightning's range test"),
        )
        for suffix, column in (("", "rank 16"), ("_full", "full, tuned there"))
    },
    "eighth_800": partial(
        cell, "finder", "Lost, %", "1/8 of 800, around the suggestion", "rank 16"
    ),
    "range_test": partial(frontier, FIVE, "LR range test at the rank trained", RANKS),
    "range_test_full": partial(
        frontier, FIVE, "LR range test at the rank trained", FULL
    ),
    **{
        f"{name}_rest": partial(
            frontier,
            "From rank 16's rate to full",
            f"{way}, alpha = rank",
            "without reinforcement",
        )
        for name, way in (
            ("law", "the default law"),
            ("tenth", "a tenth in full finetuning"),
        )
    },
    "study_full": partial(
        cell, "study", "What a converted", "the default law", "to full finetuning"
    ),
    "study_full_b": partial(
        cell,
        "study",
        "What a converted",
        "the default law",
        "to full finetuning, Init[B]",
    ),
    "study_full_recipe": partial(
        cell, "study", "What a converted", "a calibrated recipe", "to full finetuning"
    ),
}


# --- the sentences ----------------------------------------------------------------------

README = (
    "<runs> short runs at two ranks give a learning rate for every rank",
    "from rank 16 to 256 by a factor of <fall_7b> on this 7B model, from 4 to 256 by a "
    "factor of <fall_1b> on a 1B model, and by <fall_small_least> to <fall_small_most> on "
    "[three small tasks]",
    "is <models_kept> % above the lowest loss with an unchanged learning rate, and "
    "<models_law> % above it with the scaling law.",
)
PAGES = {
    "README.md": README,
    "SKILL.md": ("all ranks: <runs> short runs",),
    "docs/index.md": (
        "the best learning rate fell by a factor of <fall_1b> [on Gemma-3-1B](without-regret.md)",
    ),
    "docs/calibrate.md": (
        "[<runs> short runs at two ranks](#all-ranks)",
        "With <runs> short runs at two ranks you obtain a learning rate",
        "| four trials of a quarter of the run | <quarter> % | <quarter_full> % |",
        "| four trials of an eighth of the run | <eighth> % | <eighth_full> % |",
        "| the suggested learning rate alone | <untuned> % | <untuned_full> % |",
        "| Lightning's range test, its own `suggestion()` | <lightning> % | <lightning_full> % |",
        "from trials of 100 steps lost <eighth_800> % of the possible improvement on average",
        "<runs_per_rank> runs per rank, so <runs> at two ranks",
        "For <runs> runs on one GPU, the table shows the highest possible number of hours",
    ),
    "docs/which-rate.md": (
        "| <runs> short runs by default |",
        "ended <suggest_7b_least> to <suggest_7b_most> % above the lowest loss at ranks 8 to 256",
        "learning rate [lost](../benchmarks/results/frontier.md) <suggest_least> to "
        "<suggest_most> % of LoRA's possible improvement",
    ),
    "docs/bands.md": (
        "With the largest safety margin that a recipe uses, `lr` is <recipe_margin> times the middle",
        "In a suggestion from `suggest_lr`, `lr` is <suggestion_margin> times the middle",
    ),
    "docs/faq.md": (
        "full finetuning at a tenth of LoRA's learning rate "
        "[lost](../benchmarks/results/frontier.md) <tenth_full> % of the possible improvement. "
        "Full finetuning at the learning rate from the scaling law lost <law_full> %",
        "a tenth of LoRA's learning rate lost <tenth_rest> % of the possible improvement, and "
        "the learning rate from the scaling law lost <law_rest> %.",
        "`suggest_lr`'s learning rate loses <suggest_real> and <suggest_real_full> % there",
        "| **Prodigy** with `d_coef=0.5` | <prodigy_half> %; <prodigy_half_400> |",
        "| **Prodigy**, cosine, no warm-up | <prodigy> %; <prodigy_400> at 400 steps | "
        "<prodigy_full> %; <prodigy_full_400> |",
        "its safeguard | <safe> %; <safe_400> | <safe_full> %; <safe_full_400> |",
        "most runs diverged | <adaptation_full> %; <adaptation_full_400> |",
        "at its suggested learning rate | <free> %; <free_400> | <free_full> %; "
        "<free_full_400> |",
        "[lost](../benchmarks/results/frontier.md) <range_test> % of the possible "
        "improvement with LoRA and <range_test_full> % in full finetuning",
    ),
    "docs/full-finetuning.md": (
        "lies **within a factor of <full_trust>** of the one that is converted from LoRA.",
        "learning rates that the scaling law converted from LoRA lost <study_full> % of the "
        "possible improvement with init A, and <study_full_b> % with init B. A recipe that was "
        "calibrated with init A lost <study_full_recipe> % of the possible improvement on average.",
    ),
    "docs/without-regret.md": (
        "[fell by a factor of <fall_1b>](../benchmarks/results/large_models.md) from rank 4 "
        "to 256, and the scaling law predicts a factor of <fall_1b_law>:",
    ),
}
SENTENCES = [(page, each) for page, sentences in PAGES.items() for each in sentences]


def pattern_of(sentence: str) -> str:
    """Return a regular expression that matches the sentence with any numbers and any line breaks."""
    parts = re.split(r"<\w+>", sentence)
    texts = [re.escape(part).replace(r"\ ", r"\s+") for part in parts]
    return NUMBER.join(texts)


def with_figures(shown: str, sentence: str) -> str:
    """Return the sentence with the page's line breaks and the numbers that it should have."""
    names = re.findall(r"<(\w+)>", sentence)
    fixed = [re.findall(NUMBER, part) for part in re.split(r"<\w+>", sentence)]
    wanted: list[str | float | None] = [None] * len(fixed[0])
    for name, after in zip(names, fixed[1:], strict=True):
        wanted += [FIGURES[name](), *[None] * len(after)]
    numbers: Iterator[str | float | None] = iter(wanted)
    return re.sub(NUMBER, lambda found: written(found[0], next(numbers)), shown)


def written(shown: str, figure: str | float | None) -> str:
    """Return the figure with as many decimals as the page shows, and with a leading zero only if the page has one."""
    if figure is None:
        return shown
    if isinstance(figure, str) and len(figure) == len(shown.lstrip("0")):
        return figure
    decimals = len(shown.partition(".")[2])
    text = f"{float(figure):.{decimals}f}"
    return text.lstrip("0") if shown.startswith(".") else text


@pytest.mark.parametrize(("page", "sentence"), SENTENCES)
def test_prose_has_the_numbers_of_the_code_and_of_its_page(
    page: str, sentence: str, request: pytest.FixtureRequest
) -> None:
    """Each sentence with a default or a result is on its page and has the number from the code or the results."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    [shown] = re.findall(pattern_of(sentence), text)
    wanted = with_figures(shown, sentence)
    if request.config.getoption("--write-golden"):
        path.write_text(text.replace(shown, wanted), encoding="utf-8")
        return
    assert shown == wanted, "tox run -e core -- tests/test_defaults.py --write-golden"


def test_every_figure_of_readme_is_held() -> None:
    """Every percentage and decimal number in README's prose is checked by this file or is in a generated table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"<!-- tables -->.*<!-- end of tables -->", "", text, flags=re.S)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = re.sub(r"^    .*$|`[^`]*`", "", text, flags=re.M)
    for sentence in README:
        text = re.sub(pattern_of(re.sub(r"`[^`]*`", "", sentence)), "", text)
    loose = re.findall(r"(?<!\w)\d*\.\d+|\d+ %", text)
    # the version of Python, the number of the paper, and the version of the licence
    assert loose == ["3.10", "2602.06204", "2.0"]
