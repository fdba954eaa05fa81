"""Every script of examples/ that needs no environment of its own, run as it stands."""

from __future__ import annotations

import sys

import pytest

from ...helpers.examples import EXAMPLES, run

SCRIPTS = {
    "peft_loop.py": [],
    "transformers_trainer.py": [],
    "trl_sft.py": [],
    "trl_grpo.py": [],
    "lightning_module.py": [],
    "lightning_cli.py": ["fit", "--config", str(EXAMPLES / "lightning_cli.yaml")],
    "hydra_app.py": [],
    "diffusers_loop.py": [],
}
ELSEWHERE = {"tiny.py", "kohya_flags.py"}  # made use of by the others; in tests/environments/kohya


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs_and_reports_moved_rates(tmp_path, script):
    """It ends well, and its report shows the factors of rank 64 away from the base rate."""
    out = run(tmp_path, sys.executable, str(EXAMPLES / script), *SCRIPTS[script])
    rows = [line.split() for line in out.splitlines() if line.split()[:3] in (["peft", "A", "64"], ["peft", "B", "64"])]
    assert len(rows) >= 2
    assert all(float(row[9]) != 1.0 for row in rows)


def test_every_script_is_run():
    """No example is left out."""
    assert {path.name for path in EXAMPLES.glob("*.py")} - ELSEWHERE == set(SCRIPTS)
