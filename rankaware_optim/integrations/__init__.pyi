from ._attach import attach as attach
from ._calibrate import calibrate as calibrate
from ._logs import group_rates as group_rates
from ._logs import lightning_rates as lightning_rates
from ._logs import log_rates as log_rates
