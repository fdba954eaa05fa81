"""Tests that a killed or interrupted calibration continues correctly, and does not disturb other workers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import optuna
import pytest

import rankaware_optim as ra
from rankaware_optim.calibration import _storage
from rankaware_optim.calibration._storage import (
    Heartbeat,
    begin_trial,
    close_storage,
    open_storage,
)

from ..helpers.calibrations import (
    AdamW,
    Net,
    calibrate,
    counted,
    falling,
    made_up,
    states,
)
from ..helpers.interrupted import CtrlC
from ..helpers.optimizers import called

pytestmark = pytest.mark.skipif(
    os.name != "posix", reason="processes are forked and killed"
)


def test_a_pruned_trial_counts_once_whatever_it_wrote_before_it_was_killed(
    quick, tmp_path
):
    """If a worker is killed after any write of a trial that was stopped early, resuming gives the same recipe."""

    whole = tmp_path / "whole.journal"
    options = {"ranks": (4, 64), "steps": 10, "trials": 7}
    recipe = calibrate(falling(), storage=whole, **options)
    pruned = next(
        t.number for t in stored(whole) if t.user_attrs.get("end") == "pruned"
    )
    lines = whole.read_bytes().splitlines(keepends=True)
    of_it = [
        number
        for number, line in enumerate(lines)
        if json.loads(line).get("trial_id") == pruned
    ]
    assert b'"end":"pruned"' in b"".join(lines[of_it[0] : of_it[-1]])
    for end in (of_it[0], *(number + 1 for number in of_it)):
        cut = tmp_path / f"{end}.journal"
        cut.write_bytes(b"".join(lines[:end]))
        again = calibrate(falling(), storage=cut, **options)
        assert again.fitted_lr == recipe.fitted_lr
        assert np.array_equal(again.covariance, recipe.covariance)
        assert again.tensors["lr"].tolist() == recipe.tensors["lr"].tolist()


def test_a_finished_calibration_is_read_by_the_settings_of_its_loop(tmp_path):
    """A call that runs no new trial binds the law to the optimizer settings of the stored trials."""
    loop = made_up(scale_parameter=False)
    options = {"trials": 4, "storage": tmp_path / "study.journal"}
    options["optimizer"] = called("Adafactor")
    first, again = (calibrate(loop, **options) for _ in range(2))
    assert first.at(rank=8).lr == again.at(rank=8).lr
    assert first.law == again.law
    assert isinstance(first.law.law, ra.MuA)


# --- heartbeats -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Shorten the interval between heartbeats, so that a dead worker is noticed soon."""
    monkeypatch.setattr(_storage, "BEAT_S", 0.1)


@pytest.fixture
def study():
    return optuna.create_study()


@pytest.fixture
def worker():
    """Return a function that starts a worker's heartbeat. The fixture stops all heartbeats at the end."""
    made = []

    def start(study) -> Heartbeat:
        made.append(Heartbeat(study))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.stop()


def test_a_stopped_worker_has_ended(study, monkeypatch):
    """`stop` waits until a worker's last poll has ended, so that nothing uses the storage afterwards."""
    monkeypatch.setattr(Heartbeat, "poll", lambda self: time.sleep(0.5))
    beating = Heartbeat(study)
    beating.start()
    beating.stop()
    assert not beating.is_alive()


def state_of(study, number: int = 0) -> str:
    return study.get_trials()[number].state.name


def failed_in_time(study) -> bool:
    until = time.monotonic() + 30
    while state_of(study) == "RUNNING" and time.monotonic() < until:
        time.sleep(0.02)
    return state_of(study) == "FAIL"


@pytest.mark.parametrize("attributes", [{}, {"heartbeat": 3}], ids=str)
def test_a_silent_trial_is_failed(attributes, quick, study, worker):
    """A trial without a new heartbeat is marked as failed, whether or not it had a heartbeat before."""
    begin_trial(study, attributes)
    worker(study)
    assert failed_in_time(study)


def test_a_trial_with_heartbeats_is_left_alone(quick, study, worker):
    """Two workers that write heartbeats for their trials do not mark each other's trial as failed."""
    for each in [worker(study), worker(study)]:
        each.trial = begin_trial(study, {"heartbeat": 0})
    time.sleep(2 * _storage.BEAT_S * _storage.MISSED)
    assert states(study.trials) == ["RUNNING", "RUNNING"]


def test_a_machine_that_stood_still_proves_nothing(study, worker, monkeypatch):
    """A worker polls four times before it marks a trial as failed, no matter how much time has passed."""
    monkeypatch.setattr(_storage, "BEAT_S", 3600.0)
    begin_trial(study, {})
    watcher = worker(study)
    for _ in range(_storage.MISSED - 1):
        watcher.poll()
    assert state_of(study) == "RUNNING"
    watcher.poll()
    watcher.poll()
    assert state_of(study) == "FAIL"


def test_a_dead_trial_is_run_again(quick):
    """A trial whose worker died is marked as failed, and another trial is run in its place."""
    storage = optuna.storages.InMemoryStorage()
    calibrate(made_up(), trials=2, storage=storage)
    study = optuna.load_study(study_name="calibration", storage=storage)
    dead = begin_trial(study, {"rank": 4, "seed": 1, "heartbeat": 5})
    dead.suggest_float("log2_lr", -7.0, -6.9)
    recipe = calibrate(made_up(), trials=8, storage=storage)
    assert state_of(study, dead.number) == "FAIL"
    assert len(recipe.tensors["lr"]) == 8


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------

MOMENTS = [
    ("return", "create_new_study", 1),
    ("return", "_open", 1),
    ("call", "_apply_create_trial", 2),
    ("return", "create_new_trial", 1),
    ("return", "_begin", 2),
    ("return", "acquire", 9),
    ("call", "release", 9),
    ("return", "_choose_rate", 2),
    ("call", "end_trial", 2),
    ("return", "set_trial_state_values", 2),
    ("call", "close_storage", 1),
]
SQL = (
    "create_new_study",
    "create_new_trial",
    "_begin",
    "set_trial_state_values",
    "close_storage",
)


@pytest.fixture(
    params=[
        (kind, m)
        for m in MOMENTS
        for kind in ("journal", "sqlite")[: 1 + (m[1] in SQL)]
    ],
    ids=str,
)
def interrupted(request, tmp_path):
    """Return the storage of a study, and the moment at which its calibration is interrupted."""
    kind, moment = request.param
    return (
        tmp_path / "s.journal" if kind == "journal" else f"sqlite:///{tmp_path}/s.db"
    ), moment


def small(storage, trials=3):
    return calibrate(
        made_up(), ranks=(2, 4), steps=3, trials=trials, storage=storage, progress=False
    )


def opened_in(folder: Path) -> set[str]:
    """Return the names of the files in a folder that this process has open, according to /proc."""
    links = [link for link in Path("/proc/self/fd").glob("*") if link.exists()]
    return {
        link.readlink().name for link in links if link.readlink().is_relative_to(folder)
    }


def in_time(call, seconds=30):
    """Return the result of `call`, or fail the test if `call` takes longer than `seconds`."""
    guard = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    guard.start()
    try:
        return call()
    except KeyboardInterrupt:
        pytest.fail(f"It did not end within {seconds} s.")
    finally:
        guard.cancel()


@pytest.mark.parametrize("times", [1, 2])
def test_interrupted_at_any_moment_the_same_call_goes_on(
    times, interrupted, quick, tmp_path
):
    """After Ctrl-C at any moment, the same call gives the same recipe as an uninterrupted one, and no file stays open."""
    storage, moment = interrupted
    expected, level = small(None), logging.getLogger("optuna").level
    with pytest.raises(KeyboardInterrupt) as kept, CtrlC(*moment, times=times):
        small(storage)
    assert kept.value
    assert logging.getLogger("optuna").level == level
    assert times > 1 or not opened_in(tmp_path)
    recipe = in_time(lambda: small(storage))
    assert recipe.fitted_lr == expected.fitted_lr
    assert recipe.tensors["lr"].tolist() == expected.tensors["lr"].tolist()


def test_a_second_signal_leaves_no_trial_running(tmp_path, monkeypatch):
    """A worker that receives a second signal while its heartbeat stops still marks its trial as failed."""
    storage, stop = tmp_path / "s.journal", Heartbeat.stop

    def stop_and_interrupt(heartbeat: Heartbeat) -> None:
        stop(heartbeat)
        signal.raise_signal(signal.SIGINT)

    def train(trial):
        trial.optimizer(Net(trial.rank))
        yield 1.0
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Heartbeat, "stop", stop_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        ra.calibrate(train, AdamW, ranks=(2, 4), steps=3, storage=storage)
    (name,) = optuna.get_all_study_names(open_storage(storage))
    study = optuna.load_study(study_name=name, storage=open_storage(storage))
    assert [trial.state.name for trial in study.trials] == ["FAIL"]


@pytest.mark.processes
def test_a_second_ctrl_c_ends_a_wait_for_the_lock(tmp_path):
    """If another process keeps the journal's lock, a second Ctrl-C ends the wait for the lock."""
    path = tmp_path / "s.journal"
    small(path, trials=1)
    program = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command, pipe = (
        [sys.executable, "-c", program, f"{path}.rankaware.lock"],
        subprocess.PIPE,
    )
    holder = subprocess.Popen(command, stdin=pipe, stdout=pipe)
    holder.stdout.readline()
    guards = [
        threading.Timer(wait, os.kill, (os.getpid(), signal.SIGINT))
        for wait in (0.3, 0.6)
    ]
    for guard in guards:
        guard.start()
    with pytest.raises(KeyboardInterrupt):
        small(path)
    holder.communicate(b"\n")
    assert len(small(path).tensors["lr"]) == 3


# --- other workers --------------------------------------------------------------------------------------------------


def stored(journal: Path) -> list[optuna.trial.FrozenTrial]:
    opened = open_storage(journal)
    try:
        return optuna.load_study(study_name="calibration", storage=opened).trials
    finally:
        close_storage(opened)


def test_a_run_that_was_taken_over_does_not_count():
    """A worker whose trial was declared dead warns, drops the result, and runs another trial in its place."""
    storage = optuna.storages.InMemoryStorage()

    def train(trial):
        for step, value in enumerate(made_up()(trial)):
            if (trial.number, step) == (1, 5):
                study = optuna.load_study(study_name="calibration", storage=storage)
                study.tell(1, state=optuna.trial.TrialState.FAIL)
            yield value

    with pytest.warns(ra.RankAwareWarning, match="Trial 1 sent no heartbeat"):
        calibrate(train, trials=4, storage=storage)
    trials = storage.get_all_trials(0)
    assert states(trials)[1] == "FAIL"
    assert len(counted(trials)) == 4


def test_a_trial_waits_for_the_optimizers_of_those_begun_before(quick):
    """A trial that begins later also gets its learning rate later, even if its model is ready first."""
    storage, built = optuna.storages.InMemoryStorage(), []

    def train(trial):
        if trial.number == 0:
            other.start()
            while len(storage.get_all_trials(0)) < 2:
                time.sleep(0.01)
            time.sleep(0.5)  # by now the other trial has built its model
        for step, value in enumerate(made_up()(trial)):
            if step == 0:
                built.append(trial.number)
            yield value

    options = {"trials": 4, "storage": storage}
    other = threading.Thread(target=calibrate, args=(train,), kwargs=options)
    calibrate(train, **options)
    other.join()
    assert built[:2] == [0, 1]
    assert len(counted(storage.get_all_trials(0))) == 4
