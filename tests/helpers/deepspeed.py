"""DeepSpeed on a CPU: the variables that it needs, and where it keeps what it compiles."""

import sys
from pathlib import Path

# once an environment, since it takes a minute
COMPILED = Path(sys.prefix) / "torch_extensions"


def on_cpu() -> dict[str, str]:
    """Its environment variables. A lock left by a build that was killed goes: it is waited for without end."""
    for lock in COMPILED.glob("**/lock"):
        lock.unlink(missing_ok=True)
    compiled = {"TORCH_EXTENSIONS_DIR": str(COMPILED)}
    return {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", **compiled}
