"""Tests that notebooks display objects as HTML tables with the same content as their printed text."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import rankaware_optim as ra

from .helpers.models import PlainLoRA
from .helpers.recipes import RECIPE

EVIL = "<script>alert(1)</script>&\"'\x1b[2J\u202e"


def optimizer() -> ra.RankAwareOptimizer:
    torch.manual_seed(0)
    model = nn.Sequential(
        PlainLoRA(nn.Linear(16, 16), 4), PlainLoRA(nn.Linear(16, 16), 8)
    )
    return ra.RankAwareOptimizer(
        model, torch.optim.AdamW, lr=2e-4, tuned_at="r=16,alpha=32"
    )


def converted(to: str) -> ra.Rate:
    return ra.convert_lr(2e-4, from_="r=16,alpha=32", to=to)


# the objects that a notebook displays
CASES = {
    "report": lambda: optimizer().report(),
    "survey": lambda: optimizer().report().survey,
    "recipe": lambda: replace(RECIPE, notes=("a < b",)),
    "rate": lambda: RECIPE.at(rank=1000),
    "converted": lambda: converted("r=64,alpha=64"),
}


class Cells(HTMLParser):
    """The parsed HTML of an object: the texts of all cells and paragraphs, and the names of all tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)


def plain(text: str) -> str:
    """Return the text without its line breaks, which depend on the width of the terminal."""
    return " ".join(text.split())


@pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")
@pytest.mark.parametrize("kind", CASES)
def test_a_notebook_shows_what_is_printed(kind):
    """The HTML table and the printed text of an object contain the same words."""
    shown = CASES[kind]()
    cells, text = Cells(shown._repr_html_()), plain(str(shown))
    assert "table" in cells.tags
    words = set(re.findall(r"\w+", " ".join(cells.texts)))
    assert set(re.findall(r"\w+", text)) == words
    if kind != "report of tensors":  # its text breaks long cells into several lines
        assert all(plain(cell) in text for cell in cells.texts)


SHOWN = {
    "recipe": lambda: replace(RECIPE, name=EVIL, notes=(EVIL,), versions={EVIL: EVIL}),
    "rate": lambda: ra.Rate(1e-3, notes=(EVIL,), configuration=EVIL),
    "survey": lambda: ra.Survey(other=(EVIL,), notes=(EVIL,)),
    "report": lambda: replace(
        optimizer().report(), title=EVIL, notes=(EVIL,), audit=(EVIL,)
    ),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_a_strangers_words_stay_text(kind):
    """Names and notes from files are escaped in a notebook, and their control characters are removed."""
    html = SHOWN[kind]()._repr_html_()
    cells = Cells(html)
    assert "script" not in cells.tags
    assert "<script>alert(1)</script>&\"'[2J" in "".join(cells.texts)
    assert not [sign for sign in html if not (sign.isprintable() or sign == "\n")]
