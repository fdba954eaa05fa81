"""A pair of processes for every test module, with the environment and the third-party warnings it names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .pair import Pair


@pytest.fixture(scope="module")
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Two processes. The module may set IGNORED, warnings let pass, and ENVIRONMENT."""
    # Compiled again: in the user's cache, a lock left by a build that was killed is waited for without end.
    compiled = tmp_path_factory.getbasetemp() / "torch_extensions"
    environment = {
        "TORCH_EXTENSIONS_DIR": str(compiled),
        **getattr(request.module, "ENVIRONMENT", {}),
    }
    made = Pair(getattr(request.module, "IGNORED", ()), **environment)
    yield made
    made.stop()
