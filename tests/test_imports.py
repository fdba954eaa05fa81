"""What importing the package brings in, and what it offers."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import rankaware_optim

HEAVY = ("torch", "optuna", "scipy", "pandas", "matplotlib", "peft", "transformers", "lightning", "torch_optimizer")

PACKAGES = [
    "calibration",
    "inspection",
    "integrations",
    "laws",
    "optimizer",
    "recipe",
    "sweeps",
    "testing",
    "transfer",
]
PUBLIC = [
    "CalibrationError",
    "CalibrationInterrupted",
    "CheckpointError",
    "Constant",
    "Convention",
    "Factor",
    "Falling",
    "InspectionError",
    "InvalidReferenceError",
    "Law",
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
    "Survey",
    "Trial",
    "calibrate",
    "calibrate_in_place",
    "calibrate_trainer",
    "convert_lr",
    "coordinate_check",
    "initialize",
    "inspect_file",
    "inspect_model",
    "rank_aware_param_groups",
    "register_convention",
    "suggest_lr",
    "to_plain_state_dict",
]
MODULES = [
    m.name for m in pkgutil.walk_packages(rankaware_optim.__path__, "rankaware_optim.") if "__main__" not in m.name
]


def imported_by(code: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter holds after running `code`."""
    probe = f"import sys\n{code}\nprint('HELD', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.rsplit("HELD", 1)[1].split())


def test_importing_the_package_is_light():
    """`import rankaware_optim` imports no torch, no optional package, no optuna, and no optimizer library."""
    assert imported_by("import rankaware_optim") == set()


@pytest.mark.parametrize("heavy", ["optuna", "torch_optimizer"])
def test_the_check_can_fail(heavy):
    """The same check sees a heavy package that is imported."""
    pytest.importorskip(heavy)
    assert heavy in imported_by(f"import rankaware_optim, {heavy}")


def test_the_public_names():
    """The package offers exactly these names and packages, and all of them resolve."""
    assert rankaware_optim.__all__ == sorted(PUBLIC + PACKAGES)
    assert all(hasattr(rankaware_optim, name) for name in rankaware_optim.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_offers_what_it_says(name):
    """Every name in a module's __all__ resolves, and every module has one."""
    module = importlib.import_module(name)
    assert module.__all__
    assert all(hasattr(module, public) for public in module.__all__)
