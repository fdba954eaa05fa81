"""Fixtures that serve the built site on this machine and open its pages in a browser."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .chromium import launched

SITE = Path(__file__).parents[3] / "docs" / "_build" / "html"


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a folder without logging the requests."""

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="session")
def address():
    """Serve the built site, and yield its address."""
    assert (SITE / "index.html").exists(), "Build the site first: tox run -e docs."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    """Yield one browser for all tests."""
    with launched() as opened:
        yield opened


@pytest.fixture
def page(browser, address):
    """Yield a new page. At the end, check that no script failed and that no request left this machine."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(60_000)
    opened, wrong = context.new_page(), []
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request",
        lambda request: (
            request.url.startswith((address, "data:")) or wrong.append(request.url)
        ),
    )
    yield opened
    context.close()
    assert wrong == []
