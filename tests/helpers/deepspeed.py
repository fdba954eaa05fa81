"""DeepSpeed on a CPU: the environment variables that it needs, and the folder for the code that it
compiles.
"""

import sys
from pathlib import Path

# Code is compiled once for each environment, because it takes a minute.
COMPILED = Path(sys.prefix) / "torch_extensions"


def on_cpu() -> dict[str, str]:
    """Return DeepSpeed's environment variables, and remove locks of killed builds, for which
    DeepSpeed would wait without end.
    """
    for lock in COMPILED.glob("**/lock"):
        lock.unlink(missing_ok=True)
    compiled = {"TORCH_EXTENSIONS_DIR": str(COMPILED)}
    return {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", **compiled}
