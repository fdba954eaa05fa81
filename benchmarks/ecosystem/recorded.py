"""Run a script as `__main__`, and write down the rate of every tensor at every step.

    python benchmarks/ecosystem/recorded.py RATES.json SCRIPT ARGUMENTS...

The rates are read where Adam computes (`torch.optim.adam.adam`), so below any optimizer object, wrapper or trainer. A
row is a call of it: the number of steps that its tensors have behind them, the rate, the weight decay, and how many
tensors. Of several optimizers the one that stepped last is kept: loading a checkpoint tries steps on copies.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from torch.optim import Optimizer, adam
from torch.optim.optimizer import register_optimizer_step_pre_hook


def main() -> None:
    """Run the script of the command line with the rest of it."""
    file, script = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    sys.path[0] = str(Path(script).resolve().parent)
    stepping: list[Optimizer] = []
    rows: list[tuple[Optimizer, dict[str, Any]]] = []
    compute = adam.adam

    def noted(params: Any, *args: Any, **settings: Any) -> Any:
        if params:
            row = {
                "step": int(args[4][0]),
                "lr": float(settings["lr"]),
                "weight_decay": settings["weight_decay"],
                "tensors": len(params),
            }
            rows.append((stepping[-1], row))
        return compute(params, *args, **settings)

    adam.adam = noted
    register_optimizer_step_pre_hook(lambda opt, *_: stepping.append(opt))
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        last = rows[-1][0] if rows else None
        file.write_text(json.dumps([row for opt, row in rows if opt is last]))


if __name__ == "__main__":
    main()
