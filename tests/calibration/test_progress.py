"""Tests of what a search displays: its cost, a line for each trial, and the best learning rate."""

from __future__ import annotations

import re
import sys
from types import ModuleType, SimpleNamespace

import optuna
import pytest

import rankaware_optim as ra
from rankaware_optim.calibration import Options, Progress, search
from rankaware_optim.laws import PRIOR_LAW, get_law

from ..helpers.calibrations import BEST, STEPS, AdamW, calibrate, made_up, valued

LINE = re.compile(
    r"trial (?P<done>\d+)/(?P<total>\d+)   "
    r"(rank (?P<rank>\d+) *   )?"
    r"lr (?P<lr>\d\.\de[-+]\d\d)   "
    r"((?P<name>loss|score|reward) (?P<value>\S+) *   )?"
    r"(?P<remark>.*?) *   (?P<left>\d+:\d\d(:\d\d)?) left"
)


def shown(written: str) -> list[dict[str, str]]:
    """Return the parts of each line about a trial in the text `written`."""
    lines = [line for line in written.splitlines() if line.startswith("trial ")]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), lines
    return [match.groupdict() for match in matches]


def test_each_trial_has_a_line(capfd):
    """Standard error has the cost, then a line for each trial with its learning rate and loss. Standard output is empty."""
    recipe = calibrate(made_up(), trials=4)
    out, err = capfd.readouterr()
    assert out == ""
    cost, *_ = err.splitlines()
    assert cost == "calibrate: 4 trials of 20 steps, at most 80 steps in all"
    trials = shown(err)
    assert [(each["done"], each["total"]) for each in trials] == [
        (str(number), "4") for number in range(1, 5)
    ]
    assert [each["lr"] for each in trials] == [
        f"{lr:.1e}" for lr in recipe.tensors["lr"]
    ]
    assert [each["rank"] for each in trials] == [
        str(rank) for rank in recipe.tensors["rank"]
    ]
    assert [each["value"] for each in trials if each["value"]] == [
        f"{value:.4g}"
        for value in recipe.tensors["value"]
        if value == value and value < 1e9
    ]
    assert "\r" not in err


def test_the_search_ends_with_the_best_learning_rate(capfd):
    """The last lines have the recipe's learning rate, its 90 % interval, and advice for full finetuning."""
    recipe = calibrate(made_up(), trials=6, ranks=(16,))
    best, full = capfd.readouterr().err.splitlines()[-2:]
    rate = recipe.at(rank=16, alpha=32)
    assert best == (
        f"Best learning rate {recipe.lr:.1e} (90 % interval {rate.low:.1e} to {rate.high:.1e})"
        " at rank 16, alpha 32."
    )
    assert full.startswith("Full finetuning: ")
    assert "full_trials=3" in full


def test_a_learning_rate_of_ones_own_is_judged(capfd):
    """If lr= is passed, the line after the best learning rate says how far the user's learning rate is from it."""
    calibrate(made_up(), trials=6, ranks=(16,), lr=2.0 ** (BEST - 5))
    best, verdict, _ = capfd.readouterr().err.splitlines()[-3:]
    assert best.startswith("Best learning rate")
    assert verdict.startswith("Your lr=0.000244")
    assert "times too low" in verdict


def remarks(loop, capfd, **options) -> list[str]:
    """Calibrate at one rank, and return the remarks of the trials' lines."""
    calibrate(loop, ranks=(16,), seeds=(0,), **{"trials": 4, **options})
    return [each["remark"] for each in shown(capfd.readouterr().err)]


def test_the_best_trial_so_far_is_marked(capfd):
    """The line of a trial that is better than all trials before it says "best so far", except for the first trial."""
    lower = valued(lambda u, step, trial: 2.0 - (trial.number + 1) * step / 100)
    assert remarks(lower, capfd) == ["", *["best so far"] * 3]
    higher = valued(lambda u, step, trial: 2.0 - (9 - trial.number) * step / 100)
    assert remarks(higher, capfd) == [""] * 4


def early(trial):
    """Diverge in the first trial, run out of memory in the second, and raise TrialPruned in the third."""
    for step, value in enumerate(made_up()(trial)):
        if step == 3:
            if trial.number == 0:
                value = float("nan")
            if trial.number == 1:
                raise MemoryError
            if trial.number == 2:
                raise optuna.TrialPruned
        yield value


def test_a_trial_that_ended_early_says_why(capfd):
    """The line of a trial that ended early has the step at which it ended and the reason."""
    assert remarks(early, capfd, trials=8)[:3] == [
        f"diverged at step 4 of {STEPS}",
        f"stopped at step 3 of {STEPS}: out of memory",
        f"stopped at step 3 of {STEPS}: train raised TrialPruned",
    ]


def lagging(trial):
    """Yield losses that fall a tenth as fast in all trials after the first."""
    trial.optimizer(made_up.__globals__["Net"](trial.rank))
    speed = 1.0 if trial.number == 0 else 0.1
    for step in range(trial.steps):
        yield 2.0 - speed * step / trial.steps + 0.001 * (step % 2)


def test_a_trial_that_lags_says_so(capfd):
    """The line of a trial that is stopped because of a better one says that it is far behind the best trial."""
    said = remarks(lagging, capfd, steps=50)
    assert any(
        re.fullmatch(r"stopped at step \d+ of 50: far behind the best trial", each)
        for each in said
    )


def test_a_returned_score_is_called_so(capfd):
    """A value that train() returns is displayed with the name "score"."""
    scored = valued(
        lambda u, step, trial: 2.0 - step / 100, lambda u, trial: 0.5 + u * u
    )
    calibrate(scored, trials=2)
    assert {each["name"] for each in shown(capfd.readouterr().err)} == {"score"}


def test_a_continued_calibration_shows_the_rest(tmp_path, capfd):
    """A continued calibration displays only the new trials, but counts the earlier trials as done."""
    where = {"storage": tmp_path / "study.journal"}
    calibrate(made_up(), trials=2, **where)
    capfd.readouterr()
    calibrate(made_up(), trials=4, **where)
    written = capfd.readouterr().err
    assert "in all" not in written
    assert [each["done"] for each in shown(written)] == ["3", "4"]


def test_nothing_is_shown_against_a_wish(capfd):
    """With progress=False, a search prints nothing."""
    calibrate(made_up(), trials=2, progress=False)
    assert capfd.readouterr() == ("", "")


def options(**own) -> Options:
    usual = {"ranks": (16,), "seeds": (0,), "steps": STEPS, "trials": 3}
    return Options(AdamW, get_law(PRIOR_LAW), **{**usual, **own})


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"target_steps": 80}, r"\(the run has 80\)"),
        ({"suggested": ra.Rate(2.0**BEST, 1e-3, 1e-1)}, "from the suggested 7.8e-03$"),
        ({"lr_range": (1e-2, 1e-3)}, "from the middle of 1.0e-03 to 1.0e-02$"),
    ],
)
def test_the_first_line_says_where_the_search_starts(own, said, capfd):
    """The first line names the steps of the full run if trials are shorter, and where the search starts."""
    Progress().begin(options(**own), ra.calibration._trials.Trials(), "")
    assert re.search(said, capfd.readouterr().err.strip())


def test_a_reward_is_shown_with_its_own_sign(capfd):
    """The line of a trial shows a reward with its own sign, although the search minimises minus the reward."""
    loop = valued(lambda u, step, trial: -0.01 * step * (1 + trial.number))
    search(loop, options(), progress=Progress(value="reward"))
    first = shown(capfd.readouterr().err)[0]
    assert first["name"] == "reward"
    assert float(first["value"]) > 0


# --- notebooks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of HTML texts that a notebook displays, which a fake IPython collects."""
    seen = []
    handle = SimpleNamespace(update=lambda shown: seen.append(shown._repr_html_()))

    def display(shown, display_id):
        seen.append(shown._repr_html_())
        return handle

    ipython, module = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=object())
    ipython.display, module.display = module, display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return seen


def test_a_notebook_shows_one_table_that_grows(drawn, capfd):
    """A notebook shows one table with a row for each trial and the result below it, and nothing is printed."""
    recipe = calibrate(made_up(), trials=3, ranks=(16,))
    assert capfd.readouterr() == ("", "")
    last = drawn[-1]
    assert [last.count(f">{n}/3</td>") for n in (1, 2, 3)] == [1, 1, 1]
    assert "at most 60 steps in all" in last
    assert f"Best learning rate {recipe.lr:.1e}" in last
    assert ">rank</th>" not in last
    assert len(drawn) > 4


def test_a_notebook_of_several_ranks_has_a_column_of_ranks(drawn):
    """If a search has several ranks, the notebook's table has a column with the rank of each trial."""
    calibrate(made_up(), trials=3)
    assert ">rank</th>" in drawn[-1]
    assert ">16</td>" in drawn[-1]


def test_a_notebook_is_silent_against_a_wish(drawn):
    """With progress=False, a search displays nothing in a notebook."""
    calibrate(made_up(), trials=2, progress=False)
    assert not drawn
