from ._compare import LawComparison as LawComparison
from ._compare import compare_laws as compare_laws
from ._fit import DEMO_SWEEP as DEMO_SWEEP
from ._fit import fit_sweep as fit_sweep
