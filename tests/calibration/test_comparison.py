"""Tests that trials of one study are comparable: other settings are an error, another loop or version a warning."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from rankaware_optim import CalibrationError, RankAwareWarning
from rankaware_optim.calibration._storage import open_storage

from ..helpers.calibrations import Net, calibrate, made_up, runs, sloping, states


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "study.journal"


def study_in(journal: Path) -> optuna.Study:
    return optuna.load_study(study_name="calibration", storage=open_storage(journal))


def grouped(*decays):
    """Return a loop with one parameter group for each layer, each with its own weight decay."""

    def train(trial):
        model = Net(trial.rank)
        groups = [
            {
                "params": [p for p in layer.parameters() if p.requires_grad],
                "weight_decay": decay,
            }
            for layer, decay in zip(model.layers, decays, strict=True)
        ]
        yield from sloping(trial, groups, model=model)

    return train


OTHER = [
    (made_up(), made_up(weight_decay=0.25), "weight_decay=0.01, not 0.25"),
    (made_up(betas=(0.9, 0.95)), made_up(), "betas=[0.9, 0.95], not [0.9, 0.999]"),
    (
        made_up(weight_decay=torch.tensor(0.1)),
        made_up(weight_decay=torch.tensor(0.10001)),
        "weight_decay=0.1",
    ),
    (made_up(rates={"*.1.*": 1e-3}), made_up(), "rates={'*.1.*': 0.001}, not None"),
    (made_up(), made_up(scaling=lambda rank: 4.0), "alpha=8.0, not 16.0"),
    (made_up(), made_up(init="B"), "init='A', not 'B'"),
    (grouped(0.0, 0.1), grouped(0.0, 0.2), "weight_decay=[0.0, 0.1], not [0.0, 0.2]"),
]


@pytest.mark.parametrize(
    ("first", "then", "message"), OTHER, ids=[row[2] for row in OTHER]
)
def test_other_settings_or_models_are_refused(first, then, message, journal):
    """Continuing a study with another model or other settings raises an error that shows both values."""
    recipe = calibrate(first, trials=2, storage=journal)
    with pytest.raises(CalibrationError) as caught:
        calibrate(then, trials=3, storage=journal)
    assert message in str(caught.value)
    again = calibrate(first, trials=2, storage=journal)
    assert (again.fitted_lr, again.settings) == (recipe.fitted_lr, recipe.settings)
    assert states(study_in(journal).trials).count("COMPLETE") == 2


ALIKE = [
    (made_up(), made_up(weight_decay=0.01)),
    (made_up(betas=(0.9, 0.999)), made_up(betas=[0.9, 0.999])),
    (made_up(weight_decay=0.1 + 0.2), made_up(weight_decay=0.3)),
    (made_up(weight_decay=0.1), made_up(weight_decay=torch.tensor(0.1))),
    (made_up(weight_decay=np.float32(0.1)), made_up(weight_decay=0.1)),
    (made_up(weight_decay=1), made_up(weight_decay=1.0)),
    (made_up(foreach=True), made_up(foreach=False)),
    (grouped(0.1, 0.1), grouped(0.1, 0.1)),
]


@pytest.mark.parametrize(("first", "then"), ALIKE)
def test_the_same_settings_go_on(first, then, journal):
    """A study continues if settings are only written differently, such as a list for a tuple or an explicit default."""
    calibrate(first, trials=2, storage=journal)
    assert runs(calibrate(then, trials=3, storage=journal)) == 3


# --- another loop or another version --------------------------------------------------------------------------------


def stepping(trial):
    yield from sloping(trial)


named = stepping


def stepping(trial):
    trial.optimizer(Net(trial.rank))
    yield from (2.0 - 0.06 * step for step in range(trial.steps))


@pytest.mark.parametrize(
    ("then", "said"), [(stepping, "hash="), (grouped(0.01, 0.01), "train='stepping'")]
)
def test_another_loop_is_a_warning(then, said, journal):
    """A loop with another name or other source code continues the study with a warning."""
    calibrate(named, trials=2, storage=journal)
    with pytest.warns(RankAwareWarning, match=said):
        calibrate(then, trials=3, storage=journal)
    assert runs(calibrate(then, trials=4, storage=journal)) == 4


WRAPPED = [functools.partial(named), functools.wraps(named)(lambda trial: named(trial))]


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_wrapped_loop_is_known_by_what_it_wraps(wrapped, journal):
    """A loop that is wrapped by functools.partial or by a decorator counts as the same loop."""
    calibrate(named, trials=2, storage=journal)
    assert runs(calibrate(wrapped, trials=3, storage=journal)) == 3


def test_a_loop_that_was_mended_before_any_run_is_no_other_loop(journal):
    """If no trial of a study has finished, continuing it with another loop gives no warning."""

    def broken(trial):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        calibrate(broken, trials=2, storage=journal)
    assert runs(calibrate(named, trials=2, storage=journal)) == 2


def made_with(journal: Path, **changed) -> None:
    """Change the record of versions and schema in a stored study."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if "made_with" in line.get("user_attrs", {}):
            line["user_attrs"]["made_with"] |= changed
    journal.write_text(
        "".join(f"{json.dumps(line, separators=(',', ':'))}\n" for line in lines)
    )


def test_another_version_is_a_warning(journal):
    """A study that was made with another version of the package continues with a warning that names that version."""
    calibrate(named, trials=2, storage=journal)
    made_with(journal, **{"rankaware-optim": "0.0.1"})
    with pytest.warns(RankAwareWarning, match=r"rankaware-optim='0\.0\.1', not"):
        calibrate(named, trials=3, storage=journal)


def test_another_schema_is_refused(journal):
    """Continuing a study that was stored with another schema raises an error and leaves the study unchanged."""
    calibrate(named, trials=2, storage=journal)
    made_with(journal, schema=99)
    with pytest.raises(CalibrationError, match="schema=99, not 4"):
        calibrate(named, trials=3, storage=journal)
    trials = study_in(journal).trials
    assert [t.user_attrs["made_with"]["schema"] for t in trials] == [99, 99]
