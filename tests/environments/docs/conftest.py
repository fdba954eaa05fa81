"""The built site, served on this machine, and a browser that notes what goes wrong."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from .chromium import launched

SITE = Path(__file__).parents[3] / "docs" / "_build" / "html"


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line a request."""

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="session")
def address():
    """Where the site is served."""
    assert (SITE / "index.html").exists(), "Build the site first: tox run -e docs."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests."""
    with launched() as opened:
        yield opened


@pytest.fixture
def page(browser, address):
    """A page; errors of scripts, and requests that leave this machine, are an error at the end."""
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
