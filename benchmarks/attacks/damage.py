"""Damage to bytes and to nested values, drawn from a seeded generator."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

# Replacements for a value in a file: wrong types, and numbers at the ends of every range.
VALUES: tuple[Any, ...] = (
    True, False, 0, 1, -1, 2, 3, 4, 64, 10**9, 2**31, 2**63 - 1, 10**30, 0.0, -0.0, 0.5, 1.0, -1.5, 1e-30, 1e30, 1e300,
    -1e24, 5e-324, 1e-320, math.nan, math.inf, -math.inf, "", "0", "A", "B", "full", "mua", "nan", "x" * 3000,
    "[/bold]", "\x1b[2J", "=1+1", "../../etc/passwd", "\x00", "é\n", [], [4], [-1], [[]], [1e300], {}, {"name": "mua"},
    {"law": {"law": {}}},
)  # fmt: skip
PIECES = (
    b"", b"\xff", b"{", b"}", b"[" * 3000, b'"', b",", b"null", b"1e999", b"NaN", b"-", b"\x00" * 8, b"\n", b"\r",
    b"=", b"[law]\n", b"9" * 5000, b"1e-320", b"\x1b[31m", b"'''", b"\xef\xbb\xbf", b"inf", b"#",
)  # fmt: skip


def damaged_bytes(data: bytes, chance: random.Random, times: int = 2) -> bytes:
    """Cut off, overwrite, insert, remove or double bytes, up to `times` times."""
    for _ in range(chance.randint(1, times)):
        i, j = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        match chance.randrange(6):
            case 0:
                data = data[:i]
            case 1:
                data = data[:i] + bytes([chance.randrange(256)]) + data[i + 1 :]
            case 2:
                data = data[:i] + chance.choice(PIECES) + data[i:]
            case 3:
                data = data[:i] + data[min(j, i + 40) :]
            case 4:
                data = data[:j] + data[i:]
            case _:
                data = data[:i] + chance.choice(PIECES) + data[min(j, i + 12) :]
    return data


def damaged_values(document: Any, chance: random.Random, times: int = 2) -> Any:
    """Copy a nested document, and change up to `times` values: replace, remove, or overwrite by one from elsewhere."""
    document = copy.deepcopy(document)
    for _ in range(chance.randint(1, times)):
        found = list(places(document))
        if not found:
            break
        inner, key = chance.choice(found)
        match chance.randrange(5):
            case 0:
                del inner[key]
            case 1:
                other, there = chance.choice(found)
                inner[key] = copy.deepcopy(other[there])
            case 2 if isinstance(inner[key], (int, float)) and not isinstance(
                inner[key], bool
            ):
                inner[key] *= chance.choice((-1, 0, 1e-6, 1e6, 1e-300, 1e300, 2, 0.5))
            case _:
                inner[key] = copy.deepcopy(chance.choice(VALUES))
    return document


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a nested document."""
    keys = (
        document
        if isinstance(document, dict)
        else range(len(document))
        if isinstance(document, list)
        else ()
    )
    for key in keys:
        yield document, key
        yield from places(document[key])
