"""Tests of a recipe's HTML page: it is self-contained, escapes text, and shows the learning rates of `Recipe.at`."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest
from click.testing import CliRunner

from rankaware_optim import RankAwareOptimizer
from rankaware_optim.cli import main
from rankaware_optim.recipe import facts
from rankaware_optim.recipe._rates import margin, spread
from rankaware_optim.reports import report_html
from rankaware_optim.reports._figure import COLOURS

from ..helpers.models import mlp
from ..helpers.recipes import KINDS, RECIPE

HOSTILE = """</script><script>alert("x")</script><img src=x onerror=alert(1)>' & {{ 7 * 7 }} \u2028"""
DRAWS = find_spec("matplotlib") is not None
VOID = {"meta", "link", "input", "img"}


class Page(HTMLParser):
    """A parsed page: its tags with their attributes, in order, and the tags that were not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_has_a_page(kind):
    """The page of every kind of recipe is well-formed, loads no other file, runs no script and is the same each time."""
    text = report_html(KINDS[kind])
    page = Page(text)
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("h1") == 1
    values = [
        value for _, attributes in page.tags for value in attributes.values() if value
    ]
    assert not any(re.search(r"nan\b|None", value) for value in values)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert report_html(KINDS[kind]) == text
    places = ("src", "href", "xlink:href", "action", "data", "srcset")
    addresses = {
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in places and not value.startswith("#")
    }
    assert addresses == {"data:,"}
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"url\((?!#)|@import|<script", text)
    assert text.count("<table>") == text.count("<caption>")


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_says_what_printing_says(kind):
    """The page shows all facts that printing a recipe shows, and none of them is empty or None."""
    made = KINDS[kind]
    page = html.unescape(report_html(made))
    assert "None" not in str(made)
    for name, text in facts(made):
        assert text
        assert f"<dt>{name.capitalize()}</dt><dd>{text}</dd>" in page


def test_pictures_are_in_the_page_or_it_says_what_they_need():
    """The page contains the figure as SVG in the page's own colours, or says that plots need matplotlib."""
    page = report_html(RECIPE)
    assert page.count("<svg") == page.count('role="img"') == DRAWS
    assert ("This page has no figure. Plots need matplotlib" in page) == (not DRAWS)
    body = page.partition("</style>")[2]
    assert not any(colour.lower() in body for colour in COLOURS)
    used = {*re.findall(r"var\(--(blue|orange|green|ink|soft)\)", body)}
    assert used == ({"blue", "orange", "green", "ink", "soft"} if DRAWS else set())
    assert "#ffffff" not in body  # the page's own background is seen behind the figure


def test_whatever_a_recipe_says_is_escaped():
    """A recipe's name, optimizer, settings, versions and notes can neither add a tag to the page nor run as a template."""
    clean = report_html(
        replace(
            RECIPE,
            versions={"a": "b"},
            settings={"a": "b"},
            notes=("b",),
            optimizer="a.b",  # an unknown optimizer, as the hostile name below is
        )
    )
    made = replace(
        RECIPE,
        name=HOSTILE,
        versions={HOSTILE: HOSTILE},
        settings={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        optimizer=f"{HOSTILE}.{HOSTILE}",
    )
    text = report_html(made)
    tags = [tag for tag, _ in Page(text).tags]
    assert tags == [tag for tag, _ in Page(clean).tags]
    assert "<img" not in text
    assert "{{ 7 * 7 }}" in re.search(r"<h1>(.*?)</h1>", text, re.S)[1]


def test_the_command_writes_the_page(tmp_path):
    """`rankaware report` writes the page and prints its path, or prints one line if the path cannot be written."""
    path, page = RECIPE.save(tmp_path / "r.toml"), tmp_path / "pages" / "r.html"
    done = CliRunner().invoke(main, ["report", str(path), "-o", str(page)])
    assert (done.exit_code, done.output.strip()) == (0, str(page))
    assert page.read_text(encoding="utf-8") == report_html(RECIPE)
    (tmp_path / "file").write_text("mine")
    done = CliRunner().invoke(main, ["report", str(path), "-o", f"{tmp_path}/file/r"])
    assert (done.exit_code, len(done.output.splitlines())) == (1, 1)
    assert sorted(p.name for p in page.parent.iterdir()) == ["r.html"]


def table_of_rates(text: str) -> str:
    return text.split("90 % from")[1].partition("</table>")[0]


def cells(text: str, label: str) -> list[str]:
    """Return the cells of one row of the table of learning rates, which is found by its label."""
    (row,) = re.findall(
        rf'<tr[^>]*><th scope="row">{label}</th>(.*?)</tr>', table_of_rates(text)
    )
    return re.findall("<td>(.*?)</td>", row)


# a recipe of steepness 2, and the margin at its reference
STEEP = replace(RECIPE, steepness=2.0)
MARGIN = margin(STEEP, spread(STEEP, STEEP.reference)[0])


def shown(*arguments: str, line: str) -> str:
    """Return the number that a command prints after the label `line`."""
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    (number,) = re.findall(rf"^{line} +(\S+?)(?: at .*)?$", done.output, re.M)
    return number


@pytest.mark.filterwarnings("ignore:Recipe .* extrapolates")
@pytest.mark.parametrize("rank", [1, 4, 8, 256])
@pytest.mark.parametrize("recipe", [RECIPE, replace(STEEP, margin=MARGIN)])
def test_one_rate_everywhere(recipe, rank, tmp_path):
    """The page, `rankaware lr`, `rankaware show` and the optimizer's report show the same learning rate in the same digits."""
    path = str(recipe.save(tmp_path / "r.toml"))
    (on_page, *_) = cells(report_html(recipe), f"rank {rank}")
    assert shown("lr", path, "--rank", str(rank), line="lr") == on_page
    if rank == recipe.reference.rank:
        assert shown("show", path, line="base rate") == on_page
    model = mlp((rank,), scalings=recipe.reference.scaling, width=64, head=False)
    report = RankAwareOptimizer(model, "adamw", recipe=recipe).report()
    for row in str(report).splitlines()[4:6]:
        *_, lr, _why = row.split()
        assert lr == on_page
