"""transformers, TRL and Lightning."""

from ._calibrate_trainer import calibrate_trainer
from ._transformers import group_rates, log_rates, trainer_factory

__all__ = ["calibrate_trainer", "group_rates", "log_rates", "trainer_factory"]
