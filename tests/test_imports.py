"""What importing the package brings in, and what it offers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import rankaware_optim

HEAVY = ("optuna", "scipy", "pandas", "matplotlib", "peft", "transformers", "lightning", "torch_optimizer")

PUBLIC = [
    "CalibrationError",
    "CalibrationInterrupted",
    "CheckpointError",
    "Constant",
    "Convention",
    "Conversion",
    "CoordinateCheck",
    "Factor",
    "Falling",
    "InspectionError",
    "InvalidReferenceError",
    "Law",
    "LawConformance",
    "LawError",
    "LoRAPlus",
    "Measured",
    "MuA",
    "OptimizerError",
    "Power",
    "RankAwareError",
    "RankAwareOptimizer",
    "RankAwareWarning",
    "Rate",
    "Recipe",
    "RecipeError",
    "Reference",
    "Report",
    "Suggestion",
    "Survey",
    "Trial",
    "bench_law",
    "calibrate",
    "calibrate_in_place",
    "calibrate_trainer",
    "capture",
    "check_convention",
    "check_law",
    "check_scheduler",
    "convert_lr",
    "convert_scheduler_state",
    "coordinate_check",
    "fit_sweep",
    "group_rates",
    "initialize",
    "inspect_model",
    "log_rates",
    "rank_aware_param_groups",
    "register_convention",
    "suggest_lr",
    "to_plain_state_dict",
    "trainer_factory",
]
MODULES = [m.name for m in pkgutil.iter_modules(rankaware_optim.__path__) if m.name != "__main__"]


def imported_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter holds after running `code`."""
    probe = f"import sys\n{code}\nprint('HELD', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("HELD", 1)[1].split())


def test_importing_the_package_is_light():
    """`import rankaware_optim` imports no optional package, no optuna, and no optimizer library."""
    assert imported_by("import rankaware_optim") == set()


@pytest.mark.parametrize("heavy", ["optuna", "torch_optimizer"])
def test_the_check_can_fail(heavy):
    """The same check sees a heavy package that is imported."""
    pytest.importorskip(heavy)
    assert heavy in imported_by(f"import rankaware_optim, {heavy}")


def test_the_public_names():
    """The package offers exactly these names, sorted, and all of them resolve."""
    assert rankaware_optim.__all__ == PUBLIC == sorted(PUBLIC)
    assert all(hasattr(rankaware_optim, name) for name in PUBLIC)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_offers_what_it_says(name):
    """Every name in a module's __all__ resolves, and every module has one."""
    module = importlib.import_module(f"rankaware_optim.{name}")
    assert module.__all__
    assert all(hasattr(module, public) for public in module.__all__)
