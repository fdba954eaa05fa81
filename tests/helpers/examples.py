"""The Python blocks of the README, and the folder of the example scripts."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES, README = ROOT / "examples", ROOT / "README.md"


def readme_blocks() -> tuple[str, str, str, str]:
    """Return the README's four Python blocks: for your own training loop, for a trainer, and for an
    unknown learning rate without a run and with a trainer.
    """
    own_loop, trainer, no_run, no_rate = re.findall(
        r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S
    )
    return own_loop, trainer, no_run, no_rate
