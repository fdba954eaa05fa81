"""One PostgreSQL server for all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    made = Server()
    made.start()
    yield made
    made.remove()
