from ._attach import attach as attach
from ._attach import group_rates as group_rates
from ._attach import lightning_rates as lightning_rates
from ._attach import log_rates as log_rates
from ._calibrate import calibrate as calibrate
