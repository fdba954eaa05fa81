"""The built site in a real browser: it opens, its search finds, its links lead somewhere, and it fits a phone."""

from __future__ import annotations

import re
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from .conftest import SITE

HREFS = "all => all.map(a => a.href)"
IDS = "() => [...document.querySelectorAll('[id]')].map(e => e.id)"
BROKEN = "() => [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
WIDTH = "document.documentElement.scrollWidth"
PAGES = ("index", "quickstart", "which-rate", "symptoms", "without-regret", "faq", "trainers/trl", "calibrate", "clusters",
         "law", "benchmarks/index", "benchmarks/study", "generated/recipes", "bands", "api", "commands", "examples/peft_loop")  # fmt: skip


def test_every_link_leads_somewhere(page, address):
    """Every page is reached from the first one, and every picture and every place linked to is there."""
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


@pytest.mark.parametrize(
    ("words", "page_found"), [("convention", "extend/convention"), ("rsLoRA", "faq")]
)
def test_the_search_finds(page, address, words, page_found):
    """A word typed into the search box leads to the page about it."""
    page.goto(address + "index.html")
    page.locator("input.sidebar-search").fill(words)
    page.keyboard.press("Enter")
    page.locator("ul.search li a").first.wait_for()
    found = page.locator("ul.search li a").evaluate_all(HREFS)
    assert any(
        urldefrag(href).url.removeprefix(address).startswith(f"{page_found}.html")
        for href in found
    )


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_needs_no_scrolling_sideways(page, address, name):
    """At 420 pixels a page is as wide as the window: tables and code scroll within themselves."""
    page.set_viewport_size({"width": 420, "height": 900})
    page.goto(f"{address}{name}.html")
    assert page.evaluate(WIDTH) <= 420


def test_llms_txt_lists_the_pages():
    """llms.txt has a line a page, each with a link that is there."""
    links = re.findall(
        r"^- \[.+\]\((\S+)\)", (SITE / "llms.txt").read_text(encoding="utf-8"), re.M
    )
    assert {"quickstart.html", "faq.html", "law.html"} <= set(links)
    assert [link for link in links if not (SITE / link).exists()] == []
