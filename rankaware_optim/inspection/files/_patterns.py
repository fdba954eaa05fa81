"""PEFT's patterns: which key of `rank_pattern` or `alpha_pattern` counts for a layer.

The first key for which the regex (.*\\.)?(key)$ matches the layer's name. Keys come from strangers, and the match of a
regex can take for ever: those with groups, classes or repeats are matched in a process of its own, which is ended after
five seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["first_matches"]

_SECONDS = 5.0
_PATTERNS = 1000  # that are matched here at most,
_PAIRS = 200_000  # with so many patterns × names
_CHILD = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = [re.compile(pattern) for pattern in patterns]
first = [next((i for i, pattern in enumerate(compiled) if pattern.match(name)), None) for name in names]
json.dump(first, sys.stdout)
"""


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> Sequence[int | None]:
    """For each name the index of the first pattern that PEFT would find in it.

    Raises:
        ValueError: a pattern is no regex, or they take more than five seconds.
    """
    if not patterns or not names:
        return [None] * len(names)
    wrapped = [rf"(.*\.)?({pattern})$" for pattern in patterns]
    few = len(patterns) <= _PATTERNS and len(patterns) * len(names) <= _PAIRS
    if not few or not all(map(_is_plain, patterns)):
        return _matched_apart(wrapped, names)
    try:
        compiled = [re.compile(pattern) for pattern in wrapped]
    except re.error as error:
        raise ValueError(_line(str(error))) from error
    return [next((i for i, pattern in enumerate(compiled) if pattern.match(name)), None) for name in names]


def _is_plain(pattern: str) -> bool:
    """Whether it holds no group, class or repeat, so that its match takes a time linear in the name's length."""
    return not any(character in pattern for character in "*+?{([")


def _matched_apart(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _CHILD]
    text = json.dumps([patterns, names])
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the patterns take more than {_SECONDS:g} seconds to match") from error
    except OSError as error:
        raise ValueError(f"no process could be started to match them: {error}") from error
    if done.returncode:
        raise ValueError(_line(done.stderr) or f"matching them ended with code {done.returncode}")
    found: list[int | None] = json.loads(done.stdout)
    return found


def _line(text: str) -> str:
    """The last line of an error's text, printable and short."""
    return ascii(text.strip().rpartition("\n")[2][:200])[1:-1]
