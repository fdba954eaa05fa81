"""How far a calibration is: its price, then a line for each trial, nothing where none is wanted."""

from __future__ import annotations

import re

from ..helpers.calibrations import calibrate, made_up


def counts(written: str) -> list[int]:
    """How many trials have ended, by each line of one."""
    line = r"calibrate: trial (\d+)/4, rank \d+, [\d:]+ left"
    return [int(n) for n in re.findall(line, written)]


def test_each_trial_has_a_line(capfd):
    """The price comes first, then a line for each trial. Nothing is written over."""
    calibrate(made_up(), trials=4)
    out, err = capfd.readouterr()
    assert out == ""
    price, *trials = err.split("\n")
    assert price == "calibrate: 4 trials × 20 steps = at most 80 steps"
    assert [counts(line) for line in trials] == [[1], [2], [3], [4], []]
    assert "\r" not in err


def test_a_continued_calibration_shows_the_rest(tmp_path, capfd):
    """Trials of an earlier call count as done, and have no price and no line again."""
    where = {"storage": tmp_path / "study.journal"}
    calibrate(made_up(), trials=2, **where)
    capfd.readouterr()
    calibrate(made_up(), trials=4, **where)
    written = capfd.readouterr().err
    assert "steps" not in written
    assert counts(written) == [3, 4]


def test_nothing_is_shown_against_a_wish(capfd):
    """With progress=False there is no line."""
    calibrate(made_up(), trials=2, progress=False)
    assert capfd.readouterr() == ("", "")
