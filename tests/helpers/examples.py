"""The README's Python blocks, and the scripts of examples/, run in a separate folder as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES, README = ROOT / "examples", ROOT / "README.md"


def readme_blocks() -> tuple[str, str, str, str]:
    """For an own loop, for a trainer, for no rate and no run, for no rate and a trainer."""
    own_loop, trainer, no_run, no_rate = re.findall(
        r"^```python\n(.*?)^```", README.read_text("utf-8"), re.M | re.S
    )
    return own_loop, trainer, no_run, no_rate


def run(folder: Path, *command: str, **environment: str) -> str:
    """What a command prints, offline, with this Python's scripts first in the path."""
    scripts = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
    # they import tiny
    ours = {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONSAFEPATH": "",
        "PATH": scripts,
    }
    given = {**os.environ, **ours, **environment}
    done = subprocess.run(
        command,
        cwd=folder,
        env=given,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
