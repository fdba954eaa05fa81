from ._fit import DEMO_SWEEP as DEMO_SWEEP
from ._fit import fit_sweep as fit_sweep
