"""Runs every script of examples/ that needs no environment of its own, without changes."""

from __future__ import annotations

import re
import runpy
import sys
import warnings

import pytest

from ...helpers.examples import EXAMPLES

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
RANKS = {"diffusers_loop.py": "16"}  # of the others "64"
CALIBRATIONS = (
    "calibrate_peft.py",
    "calibrate_trainer.py",
    "calibrate_grpo.py",
    "calibrate_ranks.py",
)
APART = {  # a helper of the others, and what the environments `demo` and `ray` run
    "tiny.py",
    "demo.py",
    "calibrate_ray.py",
}


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Return a function that runs a script as `python SCRIPT ...` would, in a folder of its own,
    and returns its output.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capfd.readouterr().out

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs_and_reports_moved_rates(run, script):
    """The script's report has A and B at the example's rank, and their learning rates differ from the base."""
    out = run(script, *SCRIPTS[script])
    table = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    heads = next(cells for cells in table if "multiplier" in cells)
    rows = [
        dict(zip(heads, cells, strict=True))
        for cells in table
        if len(cells) == len(heads)
    ]
    factors = [row for row in rows if row["role"] in ("A", "B")]
    assert {(row["role"], row["rank"]) for row in factors} == {
        (role, RANKS.get(script, "64")) for role in "AB"
    }
    assert all(float(row["multiplier"]) != 1.0 for row in factors)


@pytest.mark.parametrize("script", CALIBRATIONS)
def test_a_calibration_ends_in_a_rate(run, script):
    """The recipe gives a learning rate within its 90 % interval for a rank that was not tried."""
    out = run(script)
    lr, low, high = map(
        float,
        re.search(
            r"^lr +(\S+)\nat .*rank 8.*\n90 % interval (\S+) to (\S+)$", out, re.M
        ).groups(),
    )
    assert low <= lr <= high


def test_every_script_is_run():
    """Every script of examples/ is tested here, or listed as one that needs its own environment."""
    assert {path.name for path in EXAMPLES.glob("*.py")} - APART == {
        *SCRIPTS,
        *CALIBRATIONS,
    }
