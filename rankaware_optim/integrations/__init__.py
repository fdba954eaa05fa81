"""Integrations with transformers, TRL, PEFT and Lightning.

Axolotl, kohya's scripts and ms-swift load the modules `axolotl` and `kohya` and a file of `external_plugins`
themselves.
"""

from ._attach import attach
from ._calibrate_trainer import calibrate_trainer
from ._lightning import lightning_rates
from ._peft import create_rankaware_optimizer
from ._rates import group_rates
from ._transformers import log_rates, trainer_factory

__all__ = [
    "attach",
    "calibrate_trainer",
    "create_rankaware_optimizer",
    "group_rates",
    "lightning_rates",
    "log_rates",
    "trainer_factory",
]
