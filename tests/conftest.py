"""Settings of Hypothesis, the handler of SIGINT, and fixtures that several folders of tests share."""

import gc
import signal
import sys

import pytest
from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

# shells ignore SIGINT in processes that they start in the background
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Freeze all imported objects, because otherwise each gc.collect() of the package would examine all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Return the current directory, which has one module with a law and with other objects, and one broken module."""
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
    """Add the option `--write-golden`, with which some tests write their golden files again."""
    parser.addoption("--write-golden", action="store_true")
