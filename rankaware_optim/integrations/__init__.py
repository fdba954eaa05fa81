"""transformers, TRL and Lightning."""

from ._calibrate_trainer import calibrate_trainer
from ._lightning import lightning_rates
from ._rates import group_rates
from ._transformers import log_rates, trainer_factory

__all__ = ["calibrate_trainer", "group_rates", "lightning_rates", "log_rates", "trainer_factory"]
