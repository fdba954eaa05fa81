"""The plug-in for ms-swift, which loads this file by its path.

    RANKAWARE_TUNED_AT="r=16,alpha=32" swift sft --external_plugins .../rankaware_swift.py
    --optimizer rankaware ...

`--learning_rate` is the rate tuned there; `--optim`, weight decay, betas and the schedule are
ms-swift's own. Settings are environment variables: RANKAWARE_ and the name of an argument of
`RankAwareOptimizer`, in capitals. `rankaware convert --as swift` prints the lines, with this file's
path.
"""

from __future__ import annotations

import os
from typing import Any

from swift import OptimizerCallback, optimizers_map

from rankaware_optim.integrations import attach
from rankaware_optim.integrations._settings import settings_from_words

_BENCHMARKS = "RANKAWARE_CACHE"


class RankAware(OptimizerCallback):
    """Attaches a `RankAwareOptimizer` for the arguments' optimizer, when ms-swift builds it."""

    def create_optimizer(self, model: Any = None) -> Any:
        if self.trainer.optimizer_cls_and_kwargs is None:
            words = {
                name: text for name, text in os.environ.items() if name != _BENCHMARKS
            }
            lr = self.args.learning_rate
            attach(self.trainer, **settings_from_words(words, "RANKAWARE_", lr=lr))
        return super().create_optimizer(model)


optimizers_map["rankaware"] = RankAware
