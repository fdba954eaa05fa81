"""Calibrating short to train long: runs of several lengths or batches, a recipe for a target that none of them had."""

from __future__ import annotations

import math
import random
from collections import Counter

import optuna
import pytest

import rankaware_optim as ra
from rankaware_optim.calibration import Pushed
from rankaware_optim.calibration._schedule import Schedule, Task
from rankaware_optim.calibration._trials import Trials

from ..helpers.calibrations import BEST, Net, bowl, calibrate, made_up

LENGTHS, TARGET = (20, 80), 320


def whole(best=lambda trial: BEST, seen=None):
    """A loop of whole runs: its loss reaches a bowl about log2 of the best rate, as `best` of the trial says."""

    def train(trial):
        trial.optimizer(Net(trial.rank))
        if seen is not None:
            seen.append((trial.rank, trial.seed, trial.steps, trial.batch, math.log2(trial.lr)))
        end = bowl(math.log2(trial.lr) - best(trial))
        for step in range(trial.steps):
            yield 2.3 + (end - 2.3) * min(2 * (step + 1) / trial.steps, 1.0) + 0.01 * random.random()

    return train


def lengthy(slope):
    """The best rate rises by `slope` octaves an octave of steps, and is BEST at the target."""
    return lambda trial: BEST + slope * math.log2(trial.steps / TARGET)


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, 0.15])
def test_the_rate_of_a_target_never_tried_lies_in_its_band(slope):
    """Runs of two short lengths give a recipe for the target, whose band holds its best rate and is the widest."""
    recipe = calibrate(whole(lengthy(slope)), steps=LENGTHS, target_steps=TARGET, budget=1200)
    assert (recipe.steps, recipe.horizon.tried[0][0], recipe.horizon.tried[1][0]) == (TARGET, *LENGTHS)
    target, tried = recipe.at(rank=16), recipe.at(rank=16, steps=LENGTHS[1])
    assert recipe.at(rank=16, steps=TARGET).lr == target.lr
    assert target.low < 2.0**BEST < target.high
    assert tried.low < 2.0 ** (BEST - 2 * slope) < tried.high
    assert target.high / target.low > 1.2 * tried.high / tried.low
    assert any(f"{TARGET} steps were not tried" in note for note in target.notes)


def test_lengths_between_and_beyond_are_extrapolations():
    """Between two lengths the rate lies between theirs; beyond the target the band grows."""
    recipe = calibrate(whole(lengthy(0.15)), steps=LENGTHS, target_steps=TARGET, budget=800)
    with pytest.warns(ra.RankAwareWarning, match="40 steps were not tried"):
        between = recipe.at(rank=4, steps=40)
    first, second, target, beyond = (recipe.at(rank=4, steps=steps) for steps in (*LENGTHS, TARGET, 4 * TARGET))
    assert between.extrapolated
    assert beyond.extrapolated
    assert [rate.extrapolated for rate in (first, second, target)] == [False] * 3
    assert sorted((first, between, second), key=lambda rate: rate.low * rate.high)[1] is between
    assert beyond.high / beyond.low > target.high / target.low


def test_full_finetuning_at_the_target_carries_the_uncertainty_of_its_length():
    """Full runs at the longest length tried leave the rate at the target less sure than that of the length tried."""
    near, far = (
        calibrate(whole(), steps=LENGTHS, target_steps=target, budget=1600, full_trials=3).at(method="full")
        for target in (None, 16 * LENGTHS[1])
    )
    assert far.high / far.low > 1.5 * near.high / near.low


def test_one_length_may_be_shorter_than_the_target():
    """A whole number of steps stays valid beside target_steps: the band is the prior's, carried there."""
    short, there = (calibrate(whole(), steps=20, trials=12, target_steps=target) for target in (None, 1280))
    assert (short.steps, there.steps) == (20, 1280)
    assert there.at(rank=4).high / there.at(rank=4).low > 2 * short.at(rank=4).high / short.at(rank=4).low


def test_several_lengths_without_a_target_are_for_the_longest():
    """The short runs then help the recipe of the longest length, which was tried."""
    recipe = calibrate(whole(), steps=LENGTHS, budget=1600)
    assert recipe.steps == LENGTHS[1]
    assert not any("not tried" in note for note in recipe.notes)


def test_a_recipe_of_several_lengths_is_kept_by_its_files(tmp_path):
    """Lengths, margins and every trial's planned steps are read as they were written."""
    made = calibrate(whole(), steps=LENGTHS, target_steps=TARGET, budget=800)
    read = ra.Recipe.load(made.save(tmp_path / "r.toml"))
    for name in ("horizon", "steepness", "scatter", "lr"):
        assert getattr(read, name) == getattr(made, name)
    assert set(read.tensors["planned_steps"].tolist()) == set(LENGTHS)
    assert read.tag == made.tag
    assert read.at(rank=8, steps=LENGTHS[1]).lr == made.at(rank=8, steps=LENGTHS[1]).lr


# --- the runs -------------------------------------------------------------------------------------------------------


def test_trials_are_whole_runs_of_the_lengths_within_the_budget():
    """The highest rank begins, at the short length; a few short runs of each rank are followed by long ones of all."""
    seen = []
    recipe = calibrate(whole(seen=seen), ranks=(1, 16), steps=LENGTHS, target_steps=TARGET, budget=1600)
    runs = Counter((rank, steps) for rank, _, steps, *_ in seen)
    assert runs[16, 20] >= 3
    assert runs[1, 20] >= 2
    assert abs(runs[16, 80] - runs[1, 80]) <= 1
    assert [rank for rank, *_ in seen[:3]] == [16] * 3
    assert int(recipe.tensors["steps"].sum()) <= 1600
    assert runs[16, 80] > runs[16, 20] / 2


def test_batches_are_tried_for_the_batch_that_is_meant():
    """trial.batch says which; the best rate at a batch never tried lies in the band of the recipe, which is for it."""
    seen = []
    recipe = calibrate(
        whole(lambda trial: BEST + 0.5 * math.log2(trial.batch / 256), seen), batches=(16, 64), batch=256, budget=800
    )
    assert {batch for *_, batch, _ in seen} == {16, 64}
    assert (recipe.batch, recipe.reference.batch) == (256, 256)
    assert recipe.at().low < 2.0**BEST < recipe.at().high
    assert any("batch 256 was not tried" in note for note in recipe.notes)


@pytest.mark.parametrize("batches", [(16, 64), (16, 32, 64)])
@pytest.mark.parametrize("batch", [16, 64, 256])
def test_batches_share_the_runs(batches, batch):
    """Every batch has as many runs as another, wherever the target's lies, and the slope is measured."""
    seen = []
    best = whole(lambda trial: BEST + math.log2(trial.batch / 64), seen)
    recipe = calibrate(best, batches=batches, batch=batch, trials=16 * len(batches))
    counts = Counter(batch for *_, batch, _ in seen)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert recipe.at().low < 2.0 ** (BEST + math.log2(batch / 64)) < recipe.at().high


def test_batches_of_several_lengths_are_all_measured():
    """Beside batches, the shortest length of the target's batch is no mere search for the rates: it is compared."""
    seen = []
    best = whole(lambda trial: BEST + math.log2(trial.batch / 64), seen)
    calibrate(best, steps=LENGTHS, batches=(16, 64), batch=64, trials=48)
    counts = Counter((steps, batch) for *_, steps, batch, _ in seen)
    assert counts[LENGTHS[0], 64] >= counts[LENGTHS[0], 16] - 1 > 5


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        ({"steps": (250,)}, [Task()]),
        ({"steps": (250,), "target_steps": 250}, [Task()]),
        ({"steps": (250,), "target_steps": 800}, [Task(250)]),
        ({"steps": (250, 1000)}, [Task(250), Task(1000)]),
        ({"steps": (250, 1000), "batches": (8, 32), "batch": 8}, [Task(250, 8), Task(1000, 8), Task(250, 32)]),
        ({"steps": (250,), "batches": (8, 32), "batch": 64}, [Task(None, 32), Task(None, 8)]),
    ],
)
def test_what_is_searched_at(options, tasks):
    """First the shortest length at the batch nearest to the target's, then every other length, every other batch."""
    assert Schedule((4, 64), (0, 1), **options).tasks == tasks


def test_a_study_of_lengths_goes_on_where_it_stopped(tmp_path):
    """Stopped in the middle of its trials, the same call ends with the recipe of an uninterrupted one."""
    options, stop = {"steps": LENGTHS, "target_steps": TARGET}, [9]

    def train(trial):
        if trial.number in stop:
            stop.clear()
            raise KeyboardInterrupt
        yield from whole(lengthy(0.1))(trial)

    uninterrupted = calibrate(train, trials=9, **options)
    with pytest.raises(ra.CalibrationInterrupted) as stopped:
        calibrate(train, trials=14, storage=tmp_path / "study.journal", **options)
    assert stopped.value.recipe.lr == pytest.approx(uninterrupted.lr)
    resumed = calibrate(train, trials=14, storage=tmp_path / "study.journal", **options)
    assert resumed.lr == pytest.approx(calibrate(train, trials=14, **options).lr)


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = [
    ({"steps": (80, 20)}, r"steps is \(80, 20\)"),
    ({"steps": (20, 20)}, r"steps is \(20, 20\)"),
    ({"steps": ()}, r"steps is \(\)"),
    ({"steps": (20, 80.5)}, "steps is"),
    ({"steps": (20, 80), "target_steps": 40}, "target_steps=40 is less than the 80 steps of a trial"),
    ({"steps": 20, "target_steps": 0}, "target_steps is 0"),
    ({"steps": 20, "batches": (64, 16)}, r"batches is \(64, 16\)"),
    ({"steps": 20, "batches": (0, 16)}, r"batches is \(0, 16\)"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_arguments_that_cannot_be_are_refused_before_any_run(options, message):
    """Lengths that do not rise, a target shorter than a trial, a budget too small: a sentence, and no run."""
    seen = []
    with pytest.raises(ra.CalibrationError, match=message):
        calibrate(whole(seen=seen), **options)
    assert not seen


def test_a_loop_that_ignores_its_steps_is_found_by_its_first_run():
    """Endless and without a look at trial.steps, it cannot span a schedule over them; its first run is not counted."""
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ra.CalibrationError, match=r"never read trial\.steps"):
        calibrate(made_up(), steps=LENGTHS, target_steps=TARGET, storage=storage)
    (first,) = Trials.read(storage.get_all_trials(0))
    assert (first.state.name, first.steps) == ("FAIL", LENGTHS[0])
    assert calibrate(whole(), steps=LENGTHS, target_steps=TARGET, storage=storage, budget=800).steps == TARGET


def test_a_loop_that_ignores_its_batch_is_found_by_its_first_run():
    """Where the batch varies, a loop that never reads trial.batch is refused."""

    def train(trial):
        trial.optimizer(Net(trial.rank))
        yield from [1.0] * trial.steps

    with pytest.raises(ra.CalibrationError, match=r"never read trial\.batch"):
        calibrate(train, batches=(8, 16))


def test_a_pushed_loop_reads_its_steps_too():
    """A trainer that spans its schedule over trial.steps is no loop that ignores them."""

    def train(trial):
        def run(report):
            trial.optimizer(Net(trial.rank))
            for _ in range(trial.steps):
                report(bowl(math.log2(trial.lr) - BEST))

        return Pushed(run)

    assert calibrate(train, steps=LENGTHS, target_steps=TARGET, budget=400).steps == TARGET


@pytest.mark.parametrize("other", [{"steps": (20, 40)}, {"steps": 20}, {"batches": (8, 16)}])
def test_a_stored_study_of_other_lengths_is_refused(other, tmp_path):
    """Other lengths or batches are refused as other settings are; another target goes on with the same trials."""
    journal, options = tmp_path / "study.journal", {"steps": LENGTHS, "target_steps": TARGET, "trials": 4}
    calibrate(whole(), storage=journal, **options)
    with pytest.raises(ra.CalibrationError, match=r"was made with (steps|batches)="):
        calibrate(whole(), storage=journal, **{**options, **other})
    assert calibrate(whole(), storage=journal, **{**options, "target_steps": 640}).steps == 640


@pytest.mark.parametrize(("first", "then"), [({}, {"target_steps": TARGET}), ({"target_steps": TARGET}, {})])
def test_runs_of_the_targets_length_are_no_short_ones(first, then, tmp_path):
    """A study without target_steps= does not go on with one, nor one with it without: its runs would be misread."""
    journal, options = tmp_path / "study.journal", {"steps": LENGTHS[0], "trials": 4}
    calibrate(whole(), storage=journal, **options, **first)
    with pytest.raises(ra.CalibrationError, match=r"was made with(out)? target_steps=.*another name="):
        calibrate(whole(), storage=journal, **options, **then)
