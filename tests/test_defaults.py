"""Sentences of README and the site that name a default: their numbers are the code's.

    tox run -e core -- tests/test_defaults.py --write-golden

writes the numbers into them again.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankaware_optim.calibration import TRIALS_PER_RANK
from rankaware_optim.recipe._constants import MOST_MARGIN
from rankaware_optim.transfer._suggest import MARGIN

NUMBER = r"\d+(?:\.\d+)?"
ROOT = Path(__file__).parents[1]
DEFAULTS = {
    "runs_per_rank": f"{TRIALS_PER_RANK}",
    "runs": f"{2 * TRIALS_PER_RANK}",
    "recipe_margin": f"{2**-MOST_MARGIN:.2f}",
    "suggestion_margin": f"{2**-MARGIN:.2f}",
}
SENTENCES = [
    ("README.md", "<runs> short runs at two ranks give a recipe"),
    ("docs/calibrate.md", "<runs> short runs at two ranks give a rate"),
    ("docs/calibrate.md", "<runs_per_rank> runs per rank, so <runs> at two ranks"),
    ("docs/which-rate.md", "| <runs> short runs by default |"),
    ("docs/bands.md", "It is × <recipe_margin> at most"),
    ("docs/bands.md", "In a *suggestion* it is × <suggestion_margin>"),
]


def pattern_of(sentence: str) -> str:
    """A regular expression of the sentence with any numbers, on one line or more."""
    parts = re.split(r"<\w+>", sentence)
    texts = [re.escape(part).replace(r"\ ", r"\s+") for part in parts]
    return NUMBER.join(texts)


def with_defaults(shown: str, sentence: str) -> str:
    """The sentence as the page breaks it, with the code's numbers."""
    names = iter(re.findall(r"<(\w+)>", sentence))
    return re.sub(NUMBER, lambda _: DEFAULTS[next(names)], shown)


@pytest.mark.parametrize(("page", "sentence"), SENTENCES)
def test_prose_has_the_defaults_of_the_code(
    page: str, sentence: str, request: pytest.FixtureRequest
) -> None:
    """A sentence that names a default is on its page, with the number of the code."""
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    [shown] = re.findall(pattern_of(sentence), text)
    wanted = with_defaults(shown, sentence)
    if request.config.getoption("--write-golden"):
        path.write_text(text.replace(shown, wanted), encoding="utf-8")
        return
    assert shown == wanted, "tox run -e core -- tests/test_defaults.py --write-golden"
