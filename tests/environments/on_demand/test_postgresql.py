"""Tests of calibrations whose processes share a PostgreSQL database, as several machines would."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from optuna.trial import TrialState

import rankaware_optim as ra
from rankaware_optim import CalibrationError

from ...cli.test_calibrate import LOOP, assert_shared, call, ended, started, trials_of
from ...helpers.calibrations import calibrate, made_up
from .postgresql import Server

LOOP_OF = "slow_loops:train --steps 10 --ranks 2,32 --storage"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Yield one PostgreSQL server for all tests of this file."""
    made = Server()
    made.start()
    yield made
    made.remove()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the current directory, which contains a training loop whose runs take 0.4 s."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow_loops.py").write_text(LOOP.replace("PAUSE", "0.04"))
    return tmp_path


def slow(server, name, trials, recipe):
    words = f"{LOOP_OF} {server.url} --name {name} --trials {trials} -o {recipe}"
    return words.split()


def test_the_recipe_is_that_of_any_storage(server):
    """A study in PostgreSQL gives exactly the same recipe as a study in memory."""
    first = calibrate(made_up(), trials=8, storage=f"{server.url}#plain")
    second = calibrate(made_up(), trials=8)
    assert first.fitted_lr == second.fitted_lr
    assert first.tensors["lr"].tolist() == second.tensors["lr"].tolist()


def test_commands_that_share_a_database_share_the_trials(server, folder):
    """Two commands on one database run the requested number of trials together, and none of them twice."""
    recipes, env = ("0.toml", "1.toml"), {"PROCESSES": "2"}
    for process in [started(*slow(server, "shared", 24, r), env=env) for r in recipes]:
        ended(process)
    assert_shared(trials_of(server.url, "shared"), 24)
    first, second = (ra.Recipe.load(recipe) for recipe in recipes)
    assert first.tensors["lr"].tolist() == second.tensors["lr"].tolist()


def test_a_database_without_an_encoding_is_said(server):
    """If the database has the encoding SQL_ASCII, which returns bytes for strings, the error names
    the database.
    """
    made = "create database bare encoding 'SQL_ASCII' template template0 lc_collate 'C' lc_ctype 'C'"
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as bare:
        bare.execute(made)
    url = server.url.replace("/postgres", "/bare")
    with pytest.raises(CalibrationError, match=r"/bare failed: "):
        calibrate(made_up(), trials=2, storage=url)


def ended_trials(server, name):
    """Return the completed and pruned trials of a study, or an empty list if the study does not exist yet."""
    try:
        trials = trials_of(server.url, name)
    except KeyError:
        return []
    return [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]


def test_a_server_that_goes_away_is_said_and_nothing_is_lost(server, folder):
    """If the server stops, the command ends with an error that hides the password.

    Once the server is back, the same command continues.
    """
    command = slow(server, "away", 8, "r.toml")
    process = started(*command)
    until = time.monotonic() + 60
    while len(before := ended_trials(server, "away")) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    server.stop()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    error = err[err.index("Error:") :]
    assert f"127.0.0.1:{server.port}/postgres" in error
    assert "a-secret" not in err
    assert not Path("r.toml").exists()
    refused = call(*command)
    assert refused.exit_code == 1
    assert any(said in refused.stderr for said in ("refused", "connection failed"))
    assert "a-secret" not in refused.output
    server.start()
    ended(started(*command))
    after = ended_trials(server, "away")
    assert [trial for trial in after if trial in before] == before
    assert len(ra.Recipe.load("r.toml").tensors["lr"]) == 8
