"""Calibrations that meet in a PostgreSQL database, as several machines do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psycopg
import pytest
from optuna.trial import TrialState

import rankaware_optim as ra
from rankaware_optim import CalibrationError
from rankaware_optim.calibration._trials import Trials

from ...cli.test_calibrate import LOOP, assert_shared, call, ended, started, trials_of
from ...helpers.calibrations import calibrate, made_up

COMMON = ["--steps", 10, "--ranks", "2,32"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current directory, with a loop whose runs take 0.4 s."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow_loops.py").write_text(LOOP.replace("PAUSE", "0.04"))
    return tmp_path


def slow(server, name, trials, *more):
    return [
        "slow_loops:train",
        *COMMON,
        "--storage",
        server.url,
        "--name",
        name,
        "--trials",
        trials,
        *more,
    ]


def test_the_recipe_is_that_of_any_storage(server):
    """A study in PostgreSQL gives the recipe that one in memory gives, to the bit."""
    first = calibrate(made_up(), trials=8, storage=server.url, name="plain")
    second = calibrate(made_up(), trials=8, name="plain")
    assert first.fitted_lr == second.fitted_lr
    assert first.tensors["lr"].tolist() == second.tensors["lr"].tolist()


def test_commands_that_share_a_database_share_the_trials(server, folder):
    """Two commands, as on two machines, run the number asked for between them, and no point twice."""
    pair = [
        started(*slow(server, "shared", 24, "-o", f"{i}.toml"), env={"PROCESSES": "2"})
        for i in range(2)
    ]
    for process in pair:
        ended(process)
    assert_shared(trials_of(server.url, "shared"), 24)
    assert [len(ra.Recipe.load(f"{i}.toml").tensors["lr"]) for i in range(2)] == [
        24,
        24,
    ]


def test_killed_it_goes_on(server, folder):
    """After SIGKILL the same command keeps what was finished and runs the half-done trial again."""
    command = slow(server, "killed", 8, "-o", "r.toml")
    process = started(*command)
    before = wait_for_trials(server, "killed", 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    ended(started(*command))
    after = trials_of(server.url, "killed")
    assert [t.datetime_complete for t in after[: len(before)]] == [
        t.datetime_complete for t in before
    ]
    records = Trials.read(after)
    assert len(records.counted()) == 8
    killed = [trial for trial in records if trial.killed]
    assert len(killed) <= 1
    assert [t.setting for t in records if t.retry_of is not None] == [
        t.setting for t in killed
    ]


def test_a_database_without_an_encoding_is_said(server):
    """SQL_ASCII returns bytes for text. The error names it, and what to create instead."""
    with psycopg.connect(
        server.url.replace("+psycopg", ""), autocommit=True
    ) as connection:
        connection.execute(
            "create database bare encoding 'SQL_ASCII' template template0 lc_collate 'C' lc_ctype 'C'"
        )
    with pytest.raises(
        CalibrationError, match=r"does not return text.*the encoding UTF8"
    ):
        calibrate(made_up(), trials=2, storage=server.url.replace("/postgres", "/bare"))


def wait_for_trials(server, name, count):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            done = [
                t
                for t in trials_of(server.url, name)
                if t.state in (TrialState.COMPLETE, TrialState.PRUNED)
            ]
        except KeyError:  # no study of this name yet
            done = []
        if len(done) >= count:
            return done
        time.sleep(0.1)
    raise TimeoutError("The command ran no trials.")


def test_a_server_that_goes_away_is_said_and_nothing_is_lost(server, folder):
    """The command ends with a sentence that holds no password; with the server back, the same command goes on."""
    command = slow(server, "away", 8, "-o", "r.toml")
    process = started(*command)
    wait_for_trials(server, "away", 2)
    server.stop()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "\nError: The study's storage postgresql+psycopg://tester@127.0.0.1" in err
    assert "a-secret" not in err
    assert not Path("r.toml").exists()
    refused = call(*command)
    assert refused.exit_code == 1
    assert (
        "Connection refused" in refused.stderr or "connection failed" in refused.stderr
    )
    assert "a-secret" not in refused.output
    server.start()
    ended(started(*command))
    assert len(Trials.read(trials_of(server.url, "away")).counted()) == 8
