"""Tests of reading sweeps: exports of common tools, notes about runs that were left out, and errors that name a line."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from rankaware_optim import CalibrationError
from rankaware_optim.sweeps import fit_sweep
from rankaware_optim.sweeps._read import SweepRun, read_sweep

ROWS = [
    {"rank": 4, "lr": 1e-4, "loss": 0.75, "alpha": 8},
    {"rank": "full", "lr": 2e-5, "loss": math.inf, "alpha": None},
    {"rank": 4, "lr": 3e-4, "loss": 0.5, "alpha": 8},
]
RUNS = (
    SweepRun(1e-4, 0.75, 4, 8.0),
    SweepRun(2e-5, math.inf, None),
    SweepRun(3e-4, 0.5, 4, 8.0),
)
FILES = {
    "s.csv": "rank,lr,loss,alpha\n4,1e-4,0.75,8\nfull,2e-5,diverged,\n4,3e-4,0.5,8\n",
    "bom.csv": "\ufeffrank,lr,loss,alpha\n4.0, 1e-4,0.75,8\nfull,2e-5,Inf,\n4.0,3e-4,0.5,8\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_sweep_reads_alike_from_rows_and_files(name, tmp_path):
    """A list of dicts, a CSV file and a CSV file with a byte order mark give the same runs for the same sweep."""
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    sources = [path, str(path), ROWS]
    assert [read_sweep(source).runs for source in sources] == [RUNS] * 3


def test_the_scalars_of_numpy_are_read():
    """NumPy's numbers and bools are read like Python's, and NaN is read like an empty cell."""
    numbers = {"rank": np.int64(4), "lr": np.float32(0.25), "loss": np.float64("inf")}
    others = {"alpha": np.int64(8), "rslora": np.bool_(True), "steps": math.nan}
    runs = read_sweep([numbers | others]).runs
    assert runs == (SweepRun(0.25, math.inf, 4, 8.0, rslora=True),)


# --- runs without a result ------------------------------------------------------------------------------------------

CRASHED = "rank,alpha,lr,loss\n4,8,1e-4,0.75\n4,8,2e-4,\n4,8,9e-4,{}\n4,8,3e-4,0.5\n"


@pytest.mark.parametrize("empty", ["", "NaN", "nan", "None"])
def test_a_run_without_a_loss_is_left_out_and_counted(empty, tmp_path):
    """A run with an empty or NaN loss is left out, counted in a note, and does not count as diverged."""
    path = tmp_path / "s.csv"
    path.write_text(CRASHED.format(empty))
    sweep = read_sweep(path)
    assert [run.loss for run in sweep.runs] == [0.75, 0.5]
    assert "2 runs were left out of 4" in sweep.notes[0]


def test_a_crashed_run_sets_no_ceiling_and_a_diverged_one_does():
    """A run without a result only adds a note to the recipe, whereas a diverged run sets the ceiling."""
    ended = [
        {"rank": 4, "alpha": 8, "lr": 2.0**x, "loss": 1 + (x + 9) ** 2 / 20}
        for x in range(-12, -6)
    ]
    lost = {"rank": 4, "alpha": 8, "lr": 2.0**-5}
    clean = fit_sweep(ended)
    crashed = fit_sweep([*ended, {**lost, "loss": math.nan}])
    assert (crashed.fitted_lr, crashed.ceiling) == (clean.fitted_lr, None)
    assert any("1 run was left out of 7" in note for note in crashed.notes)
    for loss in ("diverged", "inf", 1e40):
        assert fit_sweep([*ended, {**lost, "loss": loss}]).ceiling is not None


# --- the export of a tool -------------------------------------------------------------------------------------------

WANDB = """\
Name,State,config.learning_rate,lora_r,lora_alpha,eval/loss,train/loss
a,finished,1e-4,4,8,0.75,0.7
b,crashed,2e-4,4,8,1.5,1.4
c,finished,3e-4,4,8,0.5,0.4
d,crashed,3e-4,4,8,,
"""
FINISHED = (RUNS[0], RUNS[2])


@pytest.fixture
def export(tmp_path):
    """Return the CSV export of a tracker with two crashed runs, of which one has a loss."""
    path = tmp_path / "wandb.csv"
    path.write_text(WANDB)
    return path


def test_usual_names_of_columns_are_recognised(export):
    """Columns are found by their usual names, and the recipe lists the columns that were read."""
    sweep = read_sweep(export, where={"State": "FINISHED"})
    assert sweep.runs == FINISHED
    assert sweep.notes == ()
    source = fit_sweep(export, where={"State": "finished"}).source
    assert source["sweep"] == "wandb.csv"
    for pair in ("lr from config.learning_rate", "loss from eval/loss"):
        assert pair in source["columns"]


def test_a_column_that_is_asked_for_comes_first(export):
    """A column that is named in columns= is used even if another column has one of the usual names."""
    sweep = read_sweep(
        export, columns={"loss": "train/loss"}, where={"State": "finished"}
    )
    assert [run.loss for run in sweep.runs] == [0.7, 0.4]


def test_runs_that_did_not_finish_are_counted_and_said(export):
    """Without where=, a crashed run with a loss counts, and a note says how to leave it out."""
    sweep = read_sweep(export)
    assert len(sweep.runs) == 3
    assert any(
        "1 of 3 runs did not finish (State: crashed)" in note
        and "--where State=finished" in note
        for note in sweep.notes
    )


TWO = "rank,alpha,lr,eval_loss,eval/loss\n4,8,1e-4,1,2\n"
WRONG = [
    # the text of the file, the arguments, and a pattern of the error
    (WANDB, {"columns": {"loss": "eval/los"}}, "loss=eval/los.*mean 'eval/loss'"),
    (WANDB, {"columns": {"losses": "eval/loss"}}, "'losses'.*fields lr, loss"),
    (
        WANDB,
        {"columns": "loss=eval/loss"},
        "columns= must be a dict, but it is 'loss=eval/loss'",
    ),
    (WANDB, {"where": {"Stat": "finished"}}, "'Stat'.*mean 'State'"),
    (
        WANDB,
        {"where": {"State": "done"}},
        r"None of the 4 rows.*State=done.*finished \(2\), cras",
    ),
    (TWO, {}, r"several.*loss: eval_loss, eval/loss.*columns={'loss': 'eval_loss'}"),
    ("rank,lr\n4,1e-4\n", {}, "no column for the loss.*rank, lr.*--columns loss=NAME"),
    (
        "rank,alpha,lr,loss\n4,8,1e-4,\n",
        {},
        "None of .* 1 runs of the sweep has a loss",
    ),
    ("", {}, "empty"),
    ("rank,lr,loss\n", {}, "empty"),
]


@pytest.mark.parametrize(("text", "options", "message"), WRONG)
def test_an_export_that_does_not_fit_is_said(text, options, message, tmp_path):
    """A missing column, a where= that no row meets and a sweep without losses raise errors that say what to change."""
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_sweep(path, **options)


@pytest.mark.parametrize(("columns", "rest"), [(20, ""), (21, " and 1 more")])
def test_a_long_header_is_cut_in_an_error(columns, rest, tmp_path):
    """An error lists at most 20 columns, and counts the others."""
    path = tmp_path / "s.csv"
    names = [f"c{i}" for i in range(columns)]
    path.write_text(",".join(names) + "\n" + ",".join("1" * columns) + "\n")
    with pytest.raises(CalibrationError) as raised:
        read_sweep(path, where={"Stat": "finished"})
    assert ", ".join(names[:20]) + rest + "." in str(raised.value)


NO_SWEEP = [None, 3, {"rank": [4], "lr": [1e-4], "loss": [1.0]}, [1, 2], []]


@pytest.mark.parametrize("source", NO_SWEEP, ids=str)
def test_what_is_no_sweep_is_said(source):
    """None, a dict of columns, a list of numbers and an empty list raise errors that show what a sweep looks like."""
    with pytest.raises(CalibrationError, match=r"(S|s)weep.*rank"):
        fit_sweep(source)


# --- cells and lines ------------------------------------------------------------------------------------------------

BAD_CELLS = {
    "rank": ["sixteen", "0", "1.5", "1e10", ""],
    "lr": ["fast", "0", "-1e-4", "1e-320", "inf", "1,5e-4", ""],
    "loss": ["low", "-inf"],
    "alpha": ["x", "1e300", "0", ""],
    "rslora": ["maybe"],
    "init": ["C"],
    "fan_in": ["wide", "1e300"],
    "seed": ["1.5", "1e300"],
    "batch": ["-1"],
    "steps": ["0.5"],
    "start": ["inf"],
}
GOOD = {"rank": "4", "lr": "1e-4", "loss": "0.5", "alpha": "8"}


@pytest.mark.parametrize("name", BAD_CELLS)
def test_every_bad_cell_is_our_error_and_names_line_and_column(name, tmp_path):
    """An impossible cell, or an empty cell where a value is needed, raises an error that names the line and the column."""
    path = tmp_path / "s.csv"
    for text in BAD_CELLS[name]:
        rows = [{name: "", **GOOD}, {**GOOD, name: text}]
        cells = [",".join(f'"{row[key]}"' for key in rows[0]) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *cells]))
        for source, line in ((rows, "Row 2"), (path, "Line 3 of s.csv")):
            with pytest.raises(CalibrationError) as caught:
                read_sweep(source)
            assert caught.value.cause.startswith(f"{line}")
            assert name in caught.value.cause
            assert text in caught.value.cause


BAD_FILES = [
    (b"\xff\xfe\x00", "s.csv cannot be read.*UTF-8"),
    (b"rank,lr,loss\n4,1e-4,1,7\n", "Line 2 of s.csv has 4 cells.*3 columns"),
    (b"rank,lr,loss\n\n4,1e-4\n", "Line 3 of s.csv has 2 cells.*3 columns"),
    (b'rank,lr,loss\n4,"1e-4"x,1\n', "Line 2 of s.csv is not valid CSV"),
]


@pytest.mark.parametrize(("data", "message"), BAD_FILES)
def test_a_broken_line_is_named(data, message, tmp_path):
    """A binary file, or a line with too many, too few or broken cells, raises an error that names the file or the line."""
    (tmp_path / "s.csv").write_bytes(data)
    with pytest.raises(CalibrationError, match=message):
        read_sweep(tmp_path / "s.csv")


def test_what_is_no_file_is_said_at_once(tmp_path):
    """Reading a sweep from a pipe, a missing file or an impossible file name raises an error at once."""
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("pipe.csv", "nowhere.csv", "s\0.csv"):
        with pytest.raises(CalibrationError, match=r"\.csv cannot be read: "):
            read_sweep(tmp_path / name)
