from ._attach import attach as attach
from ._calibrate_trainer import calibrate_trainer as calibrate_trainer
from ._lightning import lightning_rates as lightning_rates
from ._peft import create_rankaware_optimizer as create_rankaware_optimizer
from ._rates import group_rates as group_rates
from ._transformers import log_rates as log_rates
from ._transformers import trainer_factory as trainer_factory
