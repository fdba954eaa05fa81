"""How far a calibration is: its price, then a bar on a terminal, lines elsewhere, nothing where none is wanted."""

from __future__ import annotations

import re

import pytest

from ..helpers.calibrations import calibrate, made_up


def percentages(written: str) -> list[int]:
    """The percentages of the frames that show a trial, each with a bar and the time left."""
    trial = r"trial \d+/\d+, rank \d+(?:, best rate [\d.e-]+)?"
    return [int(n) for n in re.findall(trial + r": +(\d+)%\|.+?\| \S+ left", written)]


def test_where_there_is_no_terminal_whole_trials_are_said(capfd):
    """The price comes first. Frames are of whole trials, the last with the best rate."""
    calibrate(made_up(), trials=5)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "calibrate: 5 trials × 20 steps = at most 100 steps"
    shown = percentages(err)
    assert shown == sorted(shown)
    assert shown[-1] == 100
    assert "best rate" in err.splitlines()[-1]


def test_a_continued_calibration_shows_the_rest(tmp_path, capfd):
    """Trials of an earlier call count as done, and have no price and no frame again."""
    where = {"storage": tmp_path / "study.journal"}
    calibrate(made_up(), trials=2, **where)
    capfd.readouterr()
    calibrate(made_up(), trials=4, **where)
    written = capfd.readouterr().err
    assert "steps" not in written
    assert min(percentages(written)) > 50


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
