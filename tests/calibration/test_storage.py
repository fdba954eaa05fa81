"""Tests of storage=: a study continues in a valid storage, and any other file raises an error and is left unchanged."""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import optuna
import pytest
from filelock import FileLock

import rankaware_optim as ra
from rankaware_optim import CalibrationError
from rankaware_optim.calibration import _storage
from rankaware_optim.calibration._storage import close_storage, open_storage

from ..helpers.calibrations import STEPS, calibrate, counted, made_up

TRIALS = 3
JOURNAL, SQLITE = "{}/study.journal", "sqlite:///{}/study.db"


@pytest.fixture
def journal(tmp_path):
    path = tmp_path / "study.journal"
    calibrate(made_up(), trials=TRIALS, storage=path)
    return path


# --- files of something else ----------------------------------------------------------------------------------------


def holding(data: bytes):
    return lambda path: path.write_bytes(data)


OTHERS = {
    "data without a newline": holding(b"\1" * 1_000_000),
    "JSON lines": holding(b'{"loss": 1}\n{"loss": 2}'),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_a_file_of_something_else_is_refused(make, tmp_path):
    """A file that is not a journal raises an error and is left unchanged, and no file is written beside it."""
    path = tmp_path / "given"
    make(path)
    before = path.read_bytes(), sorted(tmp_path.iterdir())
    with pytest.raises(CalibrationError, match=r"^storage=.* left unchanged"):
        calibrate(made_up(), trials=2, storage=path)
    assert (path.read_bytes(), sorted(tmp_path.iterdir())) == before


def test_a_lock_file_of_another_program_is_left_alone(tmp_path):
    """A study whose journal is named like a project does not overwrite this project's lock file."""
    (tmp_path / "poetry.lock").write_text("content")
    calibrate(made_up(), trials=2, storage=tmp_path / "poetry")
    assert (tmp_path / "poetry.lock").read_text() == "content"


@pytest.mark.parametrize("make", [os.link, os.symlink, shutil.copy])
def test_a_lock_is_no_way_to_empty_a_file(make, tmp_path):
    """If the path of a journal's lock file is a file with content, or a link to one, an error leaves it unchanged."""
    (tmp_path / "thesis.tex").write_text("content")
    make(tmp_path / "thesis.tex", tmp_path / "study.rankaware.lock")
    with pytest.raises(
        CalibrationError, match=r"lock file .*study\.rankaware\.lock. exists"
    ):
        calibrate(made_up(), trials=2, storage=tmp_path / "study")
    assert (tmp_path / "thesis.tex").read_text() == "content"
    assert (tmp_path / "study.rankaware.lock").read_text() == "content"


@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/dev/zero", path)]
)
def test_what_is_no_file_is_refused(make, tmp_path):
    """A folder, a pipe or a device as storage= raises an error at once instead of being read."""
    make(tmp_path / "given")
    with pytest.raises(CalibrationError, match="not the journal of a study"):
        calibrate(made_up(), trials=2, storage=tmp_path / "given")


@pytest.mark.parametrize(
    "storage", [3, b"study.journal", "\0", ["study.journal"], "", "://"]
)
def test_what_names_nothing_is_refused(storage):
    """A storage= of the wrong type, or one that is not a possible path or URL, raises a CalibrationError."""
    with pytest.raises(CalibrationError):
        calibrate(made_up(), trials=2, storage=storage)


# --- journals -------------------------------------------------------------------------------------------------------


ENDS = {
    "cut in its last line": b'{"op_code":4,"trial',
    "cut at once": b"{",
    "grown before its data came": b'{"op_code":4,' + bytes(5000),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_journal_goes_on_where_it_is_whole(when, end, journal):
    """An incomplete last line of a journal is dropped, and the study continues from the complete lines."""
    whole = journal.read_bytes()

    def tear() -> None:
        with journal.open("ab") as file:
            file.write(end)

    loop = made_up()
    if when == "before":
        tear()
    else:
        loop = functools.wraps(loop)(meanwhile(tear, at=1))
    recipe = calibrate(loop, trials=TRIALS + 2, storage=journal)
    assert len(recipe.tensors["lr"]) == TRIALS + 2
    kept = journal.read_bytes()
    assert kept.startswith(whole)
    assert all(json.loads(line) for line in kept.splitlines())


@pytest.mark.parametrize("begun", [b"", b'{"op_code":0,"worker_id":"5f'])
def test_a_journal_of_which_nothing_is_whole_begins_again(begun, tmp_path):
    """In a journal that is empty or has only an incomplete line, a new study begins."""
    path = tmp_path / "study.journal"
    path.write_bytes(begun)
    recipe = calibrate(made_up(), trials=TRIALS, storage=path)
    assert len(recipe.tensors["lr"]) == TRIALS


def line(**changed):
    """Return a function that changes values in the line of a journal's first trial. The value None removes an entry."""

    def change(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        at = next(i for i, text in enumerate(lines) if json.loads(text)["op_code"] == 4)
        made = {
            key: value
            for key, value in {**json.loads(lines[at]), **changed}.items()
            if value is not None
        }
        return b"".join(
            [*lines[:at], json.dumps(made).encode() + b"\n", *lines[at + 1 :]]
        )

    return change


DAMAGED = {
    "not UTF-8": lambda data: data.replace(b'"rank"', b'"r\xffnk"', 1),
    "no object": lambda data: data.replace(b"\n", b"\n[]\n", 1),
    "a rank beyond every model": line(user_attrs={"rank": 2**40, "seed": 0}),
    "a rate below zero": lambda data: data.replace(b'"own_lr":', b'"own_lr":-', 1),
    "a reference without a width": lambda data: data.replace(
        b'"full_fan_in"', b'"fan"', 1
    ),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_journal_is_refused(damage, journal):
    """A damaged journal raises an error that says what to do, and none of its lines is changed."""
    journal.write_bytes(damage(journal.read_bytes()))
    before = journal.read_bytes()
    with pytest.raises(CalibrationError, match=r"study\.journal failed: .* restore it"):
        calibrate(made_up(), trials=TRIALS + 1, storage=journal)
    assert journal.read_bytes().startswith(before)


def test_a_journal_has_one_lock_by_whatever_name(journal, tmp_path):
    """A journal that is opened through a link is locked at its real path, so that no lock file appears next to the link."""
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(journal)
    recipe = calibrate(made_up(), trials=TRIALS + 1, storage=link)
    assert len(recipe.tensors["lr"]) == TRIALS + 1
    assert list(link.parent.iterdir()) == [link]


# --- changed during the run -----------------------------------------------------------------------------------------


def meanwhile(change, at: int = 3):
    """Return a loop that calls `change()` in the middle of its `at`-th trial."""
    ran = []

    def loop(trial):
        for step, value in enumerate(made_up()(trial)):
            ran.extend([trial.number] * (not step))
            if len(ran) == at and step == 5:
                change()
            yield value

    return loop


@pytest.mark.parametrize("place", [JOURNAL, SQLITE])
def test_a_study_that_is_deleted_during_the_run_is_said(place, tmp_path):
    """If a study is deleted while it runs, an error says that its storage failed."""
    url = place.format(tmp_path)

    def delete() -> None:
        opened = open_storage(url)
        optuna.delete_study(study_name="calibration", storage=opened)
        close_storage(opened)

    loop = meanwhile(delete, at=1)
    with pytest.raises(CalibrationError, match=r"study\.\w+ failed: "):
        calibrate(loop, trials=6, storage=url)


def test_a_lock_that_is_held_for_ever_is_said(journal, monkeypatch):
    """If another process keeps the journal's lock, an error after a while says that the journal is locked."""
    monkeypatch.setattr(_storage, "LOCK_S", 0.3)
    with (
        FileLock(f"{journal}.rankaware.lock"),
        pytest.raises(
            CalibrationError, match=r"study\.journal is locked by another process"
        ),
    ):
        calibrate(made_up(), trials=TRIALS + 1, storage=journal)


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    """If files cannot be locked, as on some network drives, an error is raised and no journal is created."""
    fcntl = pytest.importorskip("fcntl")

    def missing(file, operation) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(CalibrationError, match="Function not implemented"):
        calibrate(made_up(), trials=2, storage=tmp_path / "study.journal")
    assert not (tmp_path / "study.journal").exists()


# --- started together -----------------------------------------------------------------------------------------------


def a_journal(folder: Path):
    return open_storage(folder / "study.journal")


# only reads before the worker's own first trial, because the other worker would wait for a running trial
READS = [1, 2]


@pytest.mark.parametrize("nth", READS)
def test_a_worker_may_start_between_two_reads_of_another(nth, tmp_path, monkeypatch):
    """If another worker runs all trials between two reads of a worker, both workers get the same recipe."""
    storage, reads, made = a_journal(tmp_path), [], []
    original = type(storage).get_all_trials

    def between(self, *arguments, **options):
        value = original(self, *arguments, **options)
        reads.append(value)
        if len(reads) == nth:
            monkeypatch.undo()
            made.append(calibrate(made_up(), trials=6, storage=storage))
        return value

    monkeypatch.setattr(type(storage), "get_all_trials", between)
    recipe = calibrate(made_up(), trials=6, storage=storage)
    monkeypatch.undo()
    assert [other.fitted_lr for other in made] == [recipe.fitted_lr] * len(made)
    close_storage(storage)


# options of another worker, which has run some of the trials or all of them
OTHER = [{"law": "loraplus"}, {"ranks": (4, 64)}, {"steps": STEPS + 5}]


@pytest.mark.parametrize("count", [2, 6])
@pytest.mark.parametrize("other", OTHER, ids=str)
def test_a_worker_of_other_options_may_start_after_the_first_read(
    other, count, tmp_path, monkeypatch
):
    """If another worker began the study with other options, an error names the option, and only the other's runs count."""
    storage = a_journal(tmp_path)
    original = type(storage).get_all_trials

    def then_another(self, *arguments, **options):
        value = original(self, *arguments, **options)
        monkeypatch.undo()
        calibrate(made_up(), trials=count, storage=storage, **other)
        return value

    monkeypatch.setattr(type(storage), "get_all_trials", then_another)
    with pytest.raises(CalibrationError, match=f"was made with {next(iter(other))}="):
        calibrate(made_up(), trials=6, storage=storage)
    assert len(counted(storage.get_all_trials(0))) == count
    close_storage(storage)


def calibrate_together(train, barrier, ends, options) -> None:
    barrier.wait()
    try:
        recipe = calibrate(train, trials=6, progress=False, **options)
        ends.put((None, recipe.steps, recipe.ranks, recipe.law.law.name))
    except BaseException as error:
        ends.put((type(error).__name__, str(error)))


TOGETHER = [
    (JOURNAL, {}, {"law": "loraplus"}, "law="),
    (SQLITE, {}, {"law": "loraplus"}, "law="),
    (JOURNAL, {}, {"ranks": (4, 64)}, "ranks="),
    (JOURNAL, {"steps": STEPS}, {"steps": STEPS + 5}, "steps="),
    # settings may depend on the rank, so they are compared separately for each rank
    (JOURNAL, {"ranks": (4,)}, {"ranks": (4,), "weight_decay": 0.5}, "weight_decay="),
]


@pytest.mark.processes
@pytest.mark.skipif(os.name != "posix", reason="processes are forked")
@pytest.mark.parametrize(("make", "one", "other", "difference"), TOGETHER, ids=str)
def test_workers_with_other_options_that_start_together_do_not_mix(
    make, one, other, difference, tmp_path
):
    """If two processes with different options start together, one raises an error, and only the other one's runs count."""
    url = make.format(tmp_path)
    # import everything before the fork, so that both processes start equally fast
    close_storage(open_storage(url))
    fork = multiprocessing.get_context("fork")
    barrier, ends = fork.Barrier(2), fork.SimpleQueue()
    workers = []
    for each in (one, other):
        options = {"storage": url, **each}
        decay = options.pop("weight_decay", 0.0)
        train = in_time(made_up(weight_decay=decay))
        arguments = (train, barrier, ends, options)
        workers.append(fork.Process(target=calibrate_together, args=arguments))
    for worker in workers:
        worker.start()
    results = [ends.get() for _ in workers]
    for worker in workers:
        worker.join(60)
    (refused,) = (result for result in results if result[0] is not None)
    (recipe,) = (result for result in results if result[0] is None)
    assert refused[0] == "CalibrationError"
    assert difference in refused[1]
    assert "was made with" in refused[1]
    storage = open_storage(url)
    study = optuna.load_study(study_name="calibration", storage=storage)
    runs = counted(study.trials)
    close_storage(storage)
    assert len(runs) == 6
    whole = [run for run in runs if run.state.name == "COMPLETE"]
    assert {len(run.user_attrs["curve"]) for run in whole} == {recipe[1]}
    assert {run.user_attrs["rank"] for run in runs} == set(recipe[2])
    assert (
        len({run.user_attrs["build"]["settings"]["weight_decay"] for run in runs}) == 1
    )


def in_time(loop):
    """Return the loop, slowed down so that the trials of two processes overlap."""

    @functools.wraps(loop)
    def train(trial):
        for value in loop(trial):
            time.sleep(0.005)
            yield value

    return train


# --- databases ------------------------------------------------------------------------------------------------------

URLS = [
    "no-such-db://me:a-secret@here/there",
    "postgresql+psycopg://me:a-secret@127.0.0.1:1/there",
    "postgresql+psycopg://me:a-secret@127.0.0.1:port/there",
    "postgresql+psycopg://me:a-sec@ret:a-secret@127.0.0.1:1/there",
    "postgresql+psycopg://127.0.0.1:1/there?user=me&password=a-secret",
    "postgresql+psycopg://me:a-sec@ret-secret@127.0.0.1/there",
]


@pytest.mark.parametrize("url", URLS)
def test_a_password_stays_out_of_messages(url):
    """An error about a database URL shows neither the password nor the query of the URL."""
    with pytest.raises(CalibrationError) as raised:
        calibrate(made_up(), trials=2, storage=url)
    assert "secret" not in str(raised.value)
    assert url.partition("://")[0] in str(raised.value)


def open_together(url: str, barrier, ends) -> None:
    barrier.wait()
    try:
        open_storage(url)
        ends.put("opened")
    except ra.RankAwareError as error:
        ends.put(str(error))


@pytest.mark.processes
def test_workers_that_start_together_create_one_database(tmp_path):
    """Twelve processes that open the same new database at once all succeed."""
    fork, count = multiprocessing.get_context("fork"), 12
    # import everything before the fork, so that all processes start equally fast
    open_storage("sqlite://")
    barrier, ends = fork.Barrier(count), fork.SimpleQueue()
    workers = [
        fork.Process(
            target=open_together, args=(f"sqlite:///{tmp_path}/s.db", barrier, ends)
        )
        for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [ends.get() for _ in workers] == ["opened"] * count
