"""Hypothesis without deadlines and with fixed examples, SIGINT as Python has it, and fixtures that rooms share."""

import gc
import signal
import sys

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

# as shells start what runs in the background
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave what was imported to itself: each gc.collect of the package would walk all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of one's own in the folder one stands in, with a law and things that are none."""
    source = [
        "from dataclasses import dataclass",
        "from rankaware_optim import Constant, Power",
        "HALF, WORD = Power(exponent=-0.5), 'word'",
        "class Bare(Constant.__mro__[1]):",
        "    name = 'bare'",
        "    def multiplier(self, factor, reference):",
        "        return 1.0",
        "class Needs(Bare):",
        "    def __init__(self, what): ...",
        "class Negative(Bare):",
        "    def multiplier(self, factor, reference):",
        "        return -1.0",
    ]
    (tmp_path / "test_law_module.py").write_text("\n".join(source))
    (tmp_path / "test_broken_module.py").write_text(
        "raise SystemExit('no weights here')"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("test_law_module", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--write-golden` writes the golden files, of tests/test_golden.py."""
    parser.addoption("--write-golden", action="store_true")
