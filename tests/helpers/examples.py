"""The README's Python blocks, and where the scripts of examples/ are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES, README = ROOT / "examples", ROOT / "README.md"


def readme_blocks() -> tuple[str, str, str, str]:
    """For an own loop, for a trainer, for no rate and no run, for no rate and a trainer."""
    own_loop, trainer, no_run, no_rate = re.findall(
        r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S
    )
    return own_loop, trainer, no_run, no_rate
