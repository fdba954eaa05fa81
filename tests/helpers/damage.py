"""A hypothesis strategy for files that were damaged."""

from __future__ import annotations

import re

from hypothesis import strategies as st

NUMBER = re.compile(rb"-?\d+(\.\d+)?(e[-+]?\d+)?")
ODD = (b"nan", b"-1", b"0", b"1e999", b"1e-320", b'"x"', b"true", b"[]", b"{}", b"")
KINDS = ("cut short", "left out", "overwritten", "doubled", "odd number")


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Return these bytes cut short, with a stretch left out, overwritten or doubled, or with an odd
    value in place of a number.
    """
    kind = draw(st.sampled_from(KINDS))
    start = draw(st.integers(0, len(data) - 1))
    end = start + draw(st.integers(1, 40))
    new = b""
    if kind == "cut short":
        end = len(data)
    elif kind == "overwritten":
        new = draw(st.binary(min_size=1, max_size=8))
        end = start + len(new)
    elif kind == "doubled":
        new = 2 * data[start:end]
    elif kind == "odd number" and (numbers := list(NUMBER.finditer(data))):
        start, end = draw(st.sampled_from(numbers)).span()
        new = draw(st.sampled_from(ODD))
    return data[:start] + new + data[end:]
