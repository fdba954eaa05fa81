"""A pair of processes for every test module, with the environment and the third-party warnings it names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .pair import Pair


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two processes. The module may set IGNORED, warnings let pass, and the function `environment`."""
    environment = getattr(request.module, "environment", dict)
    made = Pair(getattr(request.module, "IGNORED", ()), **environment())
    yield made
    made.stop()
