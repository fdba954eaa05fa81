from ._fit import fit_sweep as fit_sweep
from ._runs import DEMO_SWEEP as DEMO_SWEEP
