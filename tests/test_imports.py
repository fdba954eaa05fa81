"""Tests of which packages are imported with this package, and of the public names of its subpackages."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rankaware_optim as ra

HEAVY = (
    "torch",
    "optuna",
    "sqlalchemy",
    "filelock",
    "scipy",
    "pandas",
    "matplotlib",
    "peft",
    "transformers",
    "lightning",
    "torch_optimizer",
)

FACES = ["rankaware_optim"] + [
    package
    for _, package, is_package in pkgutil.walk_packages(ra.__path__, "rankaware_optim.")
    if is_package
]


def imported_by(code: str) -> set[str]:
    """Return the heavy packages that a fresh interpreter has imported after running `code`."""
    probe = f"import sys\n{code}\nprint('HELD', *(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    return set(done.stdout.rsplit("HELD", 1)[1].split())


TRAINING = """
import torch, rankaware_optim as ra
model = torch.nn.Module()
model.weight = torch.nn.Parameter(torch.randn(8, 8), requires_grad=False)
model.lora_A = torch.nn.Parameter(torch.ones(4, 8))
model.lora_B = torch.nn.Parameter(torch.ones(8, 4))
model.r, model.scaling = 4, 1.0
opt = ra.RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3, tuned_at="r=16,alpha=32")
(model.lora_B @ model.lora_A).sum().backward()
opt.step()
print(opt.report())
"""
TRAINERS = """
from rankaware_optim import OptimizerError, attach, trainers
trainers.log_rates, trainers.lightning_rates
try:
    attach(object(), "adamw", lr=1e-3)
except OptimizerError:
    pass
"""
CONVERSION = (
    "import rankaware_optim as ra\n"
    "ra.convert_lr(2e-4, from_='r=16,alpha=32', to='r=64')"
)


@pytest.mark.parametrize(
    ("code", "held"),
    [(CONVERSION, set()), (TRAINING + TRAINERS, {"torch"})],
    ids=["convert", "train"],
)
def test_what_trains_needs_no_study(code, held):
    """Converting a learning rate imports no heavy package, and training imports only torch."""
    assert imported_by(code) == held


def test_the_check_can_fail():
    """The check notices a heavy package that is imported."""
    assert "optuna" in imported_by("import rankaware_optim, optuna")


@pytest.mark.parametrize("name", FACES)
def test_every_package_offers_what_it_says(name):
    """Each subpackage has a sorted `__all__` without duplicates, and every name in it exists."""
    package = importlib.import_module(name)
    assert package.__all__
    assert sorted(package.__all__) == sorted(set(package.__all__))
    assert all(hasattr(package, offered) for offered in package.__all__)


def test_stages_meet_at_their_faces():
    """No subpackage imports from a private module of another subpackage."""
    root = Path(ra.__file__).parent
    taken = {
        f"{path.relative_to(root)}: {found}"
        for path in root.rglob("*.py")
        for found in re.findall(
            r"from (\.{2,}\w[\w.]*\._\w+) import", path.read_text(encoding="utf-8")
        )
    }
    assert not taken
