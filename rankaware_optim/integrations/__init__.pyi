from ._attach import attach as attach
from ._calibrate_trainer import calibrate_trainer as calibrate_trainer
from ._logs import group_rates as group_rates
from ._logs import lightning_rates as lightning_rates
from ._logs import log_rates as log_rates
from ._trainer_factory import create_rankaware_optimizer as create_rankaware_optimizer
from ._trainer_factory import trainer_factory as trainer_factory
