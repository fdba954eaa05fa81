"""The bugs that benchmarks/planted.py plants still have a place in the package."""

from planted import BUGS


def test_every_bug_has_one_place() -> None:
    """The text that a planted bug replaces occurs exactly once in its file."""
    assert BUGS
    assert all(bug.text for bug in BUGS)
