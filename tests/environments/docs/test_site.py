"""Tests of the built site in a real browser: its links, its search, its layout and its galleries."""

from __future__ import annotations

import re
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from .conftest import SITE

RECIPES = SITE.parents[2] / "recipes"

HREFS = "all => all.map(a => a.href)"
IDS = "() => [...document.querySelectorAll('[id]')].map(e => e.id)"
BROKEN = "() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
WIDTH = "document.documentElement.scrollWidth"
# Returns the elements that are wider than the text and not inside a box that scrolls.
CUT_OFF = """() => {
    const edge = document.querySelector("article").getBoundingClientRect().right + 1;
    const scrolls = e => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    return [...document.querySelectorAll("article :is(pre, table, img, svg, math)")]
        .filter(e => e.getBoundingClientRect().right > edge && !scrolls(e)).map(e => e.outerHTML.slice(0, 80));
}"""


def test_every_link_leads_somewhere(page, address):
    """Every page can be reached from the first page, and every picture and every target of a link exists."""
    ids, asked, waiting = {}, {}, [address + "index.html"]
    while waiting:
        url = waiting.pop()
        if url in ids:
            continue
        response = page.goto(url)
        assert response.status == 200, f"{url}, linked from {asked.get(url)}"
        ids[url] = set(page.evaluate(IDS))
        assert page.evaluate(BROKEN) == []
        links = {
            urljoin(url, href) for href in page.locator("a[href]").evaluate_all(HREFS)
        }
        for link in (link for link in links if link.startswith(address)):
            asked.setdefault(link, url)
            target = urldefrag(link).url
            if target.endswith((".html", "/")):
                waiting.append(target)
            else:
                assert (SITE / unquote(target.removeprefix(address))).exists(), (
                    f"{link}, linked from {url}"
                )
    places = {link: urldefrag(link) for link in asked}
    lost = [f"{link}, linked from {asked[link]}" for link, (target, place) in places.items()
            if place and unquote(place) not in ids.get(target, {unquote(place)})]  # fmt: skip
    assert lost == []
    built = {path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")}
    assert built - {url.removeprefix(address) for url in ids} <= {
        "search.html",
        "genindex.html",
        "py-modindex.html",
    }


SEARCHED = [
    ("convention", "extend/convention"),
    ("rsLoRA", "faq"),
    ("7B", "faq"),
    ("GPU hours", "calibrate"),
    ("LR finder", "faq"),
    ("multi-GPU", "clusters"),
    ("NaN", "symptoms"),
    ("Prodigy", "faq"),
    ("torchtune", "trainers/index"),
    ("wandb", "trainers/transformers"),
    ("LoKr", "inspect"),
    ("layer-wise decay", "loops"),
    ("vision tower", "loops"),
    ("epochs", "faq"),
    # words from questions in public threads
    ("trained adapter", "symptoms"),
    ("noise timesteps", "symptoms"),
    ("spiked", "symptoms"),
    ("clip", "symptoms"),
    ("how many examples", "faq"),
    ("text encoder", "faq"),
    ("projector", "faq"),
    ("share experts", "faq"),
    ("schedule-free eval", "faq"),
    ("resume checkpoint", "loops"),
    ("linear layers", "faq"),
    ("gradient checkpointing", "faq"),
    ("dropout", "faq"),
    ("out of memory", "faq"),
    ("merging", "faq"),
    ("warm-up", "faq"),
    ("which rank", "symptoms"),
    ("two pairs", "extend/convention"),
    ("log_rates", "trainers/transformers"),
    ("write by index", "loops"),
]


@pytest.mark.parametrize(("words", "page_found"), SEARCHED)
def test_the_search_finds(page, address, words, page_found):
    """A search for a word finds the page that explains it."""
    page.goto(address + "index.html")
    page.locator("input.sidebar-search").fill(words)
    page.keyboard.press("Enter")
    page.get_by_text("Search finished").wait_for()
    found = page.locator("ul.search li a").evaluate_all(HREFS)
    assert any(
        urldefrag(href).url.removeprefix(address).startswith(f"{page_found}.html")
        for href in found
    )


@pytest.mark.parametrize("width", [390, 1050, 1280])
def test_nothing_is_cut_off(page, address, width):
    """On a phone, a tablet and a laptop, no page is wider than the window.

    Wide tables and code scroll on their own.
    """
    page.set_viewport_size({"width": width, "height": 900})
    wide = {}
    for path in sorted(SITE.rglob("*.html")):
        name = path.relative_to(SITE).as_posix()
        page.goto(address + name)
        if page.evaluate(WIDTH) > width or page.evaluate(CUT_OFF):
            wide[name] = page.evaluate(WIDTH), page.evaluate(CUT_OFF)
    assert wide == {}


def test_the_api_page_shows_no_markup(page, address):
    """Every description in the table of the API page is a sentence without the markup `::`."""
    page.goto(f"{address}api.html")
    words = page.locator("table.autosummary td:last-child").all_inner_texts()
    assert len(words) > 30
    assert [line for line in words if "::" in line or not line.endswith(".")] == []


def test_every_example_has_a_picture_of_its_own():
    """No two examples of the gallery have the same picture, so none shows the placeholder."""
    pictures = sorted((SITE / "_images").glob("sphx_glr_*_thumb.png"))
    assert len(pictures) > 5
    assert len({path.read_bytes() for path in pictures}) == len(pictures)


def test_the_recipes_have_an_index_in_words(page, address):
    """The page of recipes starts with a table that links to every recipe, and no heading is a file name."""
    page.goto(f"{address}generated/recipes.html")
    titles = page.locator("h2").all_inner_texts()
    links = page.locator("article table").first.locator("a").evaluate_all(HREFS)
    recipes = sorted(RECIPES.glob("*.toml"))
    assert len(set(links)) == len(titles) == len(recipes) > 0
    assert not {path.stem for path in recipes} & set(titles)


def test_llms_txt_lists_the_pages():
    """llms.txt has one line for each page, and every link in it leads to a file."""
    links = re.findall(
        r"^- \[.+\]\((\S+)\)", (SITE / "llms.txt").read_text(encoding="utf-8"), re.M
    )
    assert {"quickstart.html", "faq.html", "law.html"} <= set(links)
    assert [link for link in links if not (SITE / link).exists()] == []
