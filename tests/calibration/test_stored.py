"""Studies that people have stored stay readable: the record of a trial, and a calibration of version 0.1 that goes on.

stored/calibration.journal was written by version 0.1, from `loop`: its trials completed, diverged, were pruned, ran out
of memory, raised, were killed and run again, and the last one was full finetuning.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path

import optuna
import pytest

from rankaware_optim.calibration._storage import open_storage
from rankaware_optim.calibration._trials import TrialRecord, Trials, stored

from ..helpers.calibrations import BEST, Net, calibrate

OPTIONS = {"ranks": (4, 64), "steps": 10, "full_trials": 1, "batch": 8, "seeds": (0,)}
BEST_LR = 0.01689914048621483
VARIANCES = (0.13936810550137838, 0.017235858398630486, 0.6060967305312432)
RANKS = [4, 64, 64, 4, 64, 4, 64, 64, 4, 64, 4, 64, 0]


@pytest.fixture
def journal(tmp_path):
    return Path(
        shutil.copy(Path(__file__).parent / "stored" / "calibration.journal", tmp_path)
    )


def stored_trials(journal: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(
        study_name="calibration", storage=open_storage(journal)
    ).trials


def loop(trial):
    """Falls as fast as the rate lets it, rises an octave above the best, and is lost two octaves above it."""
    trial.optimizer(Net(trial.rank))
    u = math.log2(trial.lr) - BEST
    for step in range(trial.steps):
        gain = (
            2.0 * (1 - math.exp(-3 * 2**u * (step + 1) / trial.steps))
            if u < 1
            else -0.01 * step
        )
        yield math.nan if u > 2 and step > 1 else 2.3 - gain


NAMES = {
    "rank", "seed", "retry_of", "killed", "estimate", "scaling", "own_lr", "curve", "stopped", "observation",
}  # fmt: skip


def test_attributes_have_the_names_that_are_stored(journal):
    """A record has every attribute of a stored trial but its owner, and new trials are stored under the same names."""
    calibrate(loop, trials=14, storage=journal, **OPTIONS)
    trials = stored_trials(journal)
    old, new = (
        {key for trial in part for key in trial.user_attrs}
        for part in (trials[:15], trials[15:])
    )
    assert old == NAMES | {"owner"}
    assert new == NAMES - {"retry_of", "killed", "stopped"} | {
        "worker",
        "heartbeat",
        "built",
    }
    for trial in trials:
        record = TrialRecord.read(trial)
        assert record.x == trial.params.get("log2_lr")
        for name in NAMES & trial.user_attrs.keys() - {"observation"}:
            assert getattr(record, name) == trial.user_attrs[name]
        if record.observation is not None:
            assert stored(record.observation) == trial.user_attrs["observation"]


def test_records_say_what_became_of_the_trials(journal):
    """Fates, the trial that repeats a killed one, and the trial of full finetuning are distinguished."""
    records = Trials.read(stored_trials(journal))
    assert Counter(record.state.name for record in records) == {
        "COMPLETE": 5,
        "PRUNED": 8,
        "FAIL": 2,
    }
    assert Counter(record.stopped for record in records) == {
        "": 9,
        "pruned": 5,
        "memory": 1,
    }
    assert [(r.number, r.x) for r in records if r.killed] == [(2, records[3].x)]
    assert [r.number for r in records if r.retry_of == 2] == [3]
    assert records[-1].rank is None


def test_a_stored_study_gives_its_recipe(journal):
    """With nothing left to run, the recipe is the fit of the stored trials, to nine digits."""
    recipe = calibrate(None, trials=12, storage=journal, **OPTIONS)
    assert recipe.fitted_lr == pytest.approx(BEST_LR, rel=1e-9)
    assert recipe.covariance.diagonal().tolist() == pytest.approx(VARIANCES, rel=1e-9)
    assert recipe.tensors["rank"].tolist() == RANKS


def test_a_stored_study_goes_on(journal):
    """More trials are added to those that are stored."""
    recipe = calibrate(loop, trials=14, storage=journal, **OPTIONS)
    assert recipe.tensors["rank"].tolist()[: len(RANKS)] == RANKS
    assert len(recipe.tensors["rank"]) == len(RANKS) + 2
