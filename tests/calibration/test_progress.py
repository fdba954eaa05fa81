"""How far a calibration is: a bar on a terminal, lines elsewhere, nothing where none is wanted."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress

import pytest

from ..helpers.calibrations import calibrate, made_up

WIDTH = 80
CODE = """\
import rankaware_optim as ra, torch
def train(trial):
    model = torch.nn.Linear(4, 1)
    opt = trial.optimizer(model)
    for _ in range(12):
        loss = (model(torch.eye(4)) - 1).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        yield loss
ra.calibrate(train, 'adamw', ranks=(None,), steps=12, trials=12)
"""


def on_a_terminal(code: str) -> str:
    """What a process writes to its standard error, a terminal of `WIDTH` columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    with suppress(OSError):  # by which Linux says that the other end is closed
        while block := os.read(ours, 4096):
            written += block
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def test_a_bar_fits_a_terminal_of_80_columns():
    """The price comes first. Every frame fits in a line, with a bar and the time left; the last has the best rate."""
    price, *written = [
        frame for frame in re.split(r"[\r\n]+", on_a_terminal(CODE)) if frame.strip()
    ]
    assert price == "calibrate: 12 trials × 12 steps = at most 144 steps"
    frames = [frame for frame in written if not frame.startswith("calibrate: at most")]
    assert len(frames) == len(written) - 1
    assert max(map(len, frames)) <= WIDTH
    assert all(re.search(r" +\d+%\|.{10,}\| \S+ left *$", frame) for frame in frames)
    assert re.match(
        r"trial 12/12, full finetuning, best rate [\d.e-]+: 100%\|█+\| 00:00 left",
        frames[-1],
    )


def percentages(written: str) -> list[int]:
    """The percentages of lines, each of which has a bar and the time left, below those that have the price."""
    pattern = (
        r"trial \d+/\d+, rank \d+(?:, best rate [\d.e-]+)?: +(\d+)%\|[#\d ]+\| \S+ left"
    )
    trials = [line for line in written.splitlines() if "calibrate: " not in line]
    return [int(re.fullmatch(pattern, line)[1]) for line in trials]


def test_where_there_is_no_terminal_each_trial_has_a_line(capfd):
    """In a batch job's log every trial is a line, the last with the best rate."""
    calibrate(made_up(), trials=5)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "calibrate: 5 trials × 20 steps = at most 100 steps"
    assert percentages(err) == [20, 40, 60, 80, 100]
    assert "best rate" in err.splitlines()[-1]


def test_after_ten_steps_the_log_has_the_hours(capfd):
    """The second line is the time of all steps at the pace of the first ten, without that of building a model."""

    def slow(trial):
        time.sleep(0.3)
        for value in made_up()(trial):
            time.sleep(0.01 if trial.number == 0 else 0.0)
            yield value

    calibrate(slow, trials=5)
    line = capfd.readouterr().err.splitlines()[1]
    words = r"calibrate: at most ([\d.e-]+) hours in all, at ([\d.]+) s a step"
    hours, pace = map(float, re.fullmatch(words, line).groups())
    assert 0.01 <= pace < 0.03
    assert hours == pytest.approx(100 * pace / 3600, rel=0.1)


def test_a_continued_calibration_shows_the_rest(tmp_path, capfd):
    """Trials of an earlier call count as done and have no line again."""
    where = {"storage": tmp_path / "study.journal"}
    calibrate(made_up(), trials=2, **where)
    capfd.readouterr()
    calibrate(made_up(), trials=4, **where)
    written = capfd.readouterr().err
    assert "calibrate: " not in written
    assert percentages(written) == [75, 100]


def test_nothing_is_shown_against_a_wish(capfd):
    """With progress=False there is no line."""
    calibrate(made_up(), trials=2, progress=False)
    assert capfd.readouterr() == ("", "")


def test_an_error_leaves_the_last_line_as_it_is(capfd):
    """A calibration that fails is not shown as complete."""

    def fails(trial):
        if trial.number == 2:
            raise RuntimeError("mine")
        yield from made_up()(trial)

    with pytest.raises(RuntimeError, match="mine"):
        calibrate(fails, trials=4)
    assert 0 < percentages(capfd.readouterr().err)[-1] < 75
