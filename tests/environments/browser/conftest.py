"""A browser for all tests, and a page that must neither complain nor ask the network for anything."""

from __future__ import annotations

import pytest

from .chromium import launched


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests."""
    with launched() as opened:
        yield opened


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page's text as a file; what it says on the console and asks of the network is an error at the end."""
    contexts, said, asked = [], [], []

    def open_page(text: str, **options):
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(text, encoding="utf-8")
        context = browser.new_context(**options)
        context.set_default_timeout(5000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss())
        )
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        asked.remove(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert (said, [url for url in asked if not url.startswith("data:")]) == ([], [])
