"""Tests of `calibrate` on tiny networks and made-up losses: its results, its requirements on `train`, and resuming."""

from __future__ import annotations

import math
import random
import warnings
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
import torch

import rankaware_optim as ra
from rankaware_optim import CalibrationError, CalibrationInterrupted, Power
from rankaware_optim._checks import MOST_RANKS
from rankaware_optim.calibration import CallbackRun, _runner
from rankaware_optim.laws import PRIOR_LAW, get_law

from ..helpers.calibrations import (
    BEST,
    DIM,
    STEPS,
    AdamW,
    Net,
    bowl,
    calibrate,
    losses,
    made_up,
    train,
    valued,
)
from ..helpers.models import PlainLoRA


def trials_of(recipe) -> list[tuple]:
    """Return the rank, seed, learning rate and value of every trial, with the value -1 for a trial that was stopped early."""
    held = [recipe.tensors[name] for name in ("rank", "seed", "lr", "value")]
    return list(zip(*(np.nan_to_num(each, nan=-1.0) for each in held), strict=True))


def untrained(broken: str = "zeroed first", build=Net):
    """Return a training loop that is broken in some way, such as "no step", or that barely trains: "tiny" or "late"."""

    def train(trial):
        model = build(trial.rank)
        opt = trial.optimizer(model)
        source = torch.Generator().manual_seed(trial.seed)
        for step in count():
            x = torch.randn(DIM, DIM, generator=source)
            loss = (model(x) - x).square().mean()
            if broken == "late":
                yield loss.detach()
            loss.backward()
            if broken == "zeroed first":
                opt.zero_grad(set_to_none=False)
            rates = {
                "no rate": 0.0,
                "tiny": 1e-28 * trial.lr,
                "late": min(step, 1) * trial.lr,
            }
            for group in opt.param_groups:
                group["lr"] = rates.get(broken, trial.lr)
            if broken != "no step":
                opt.step()
            opt.zero_grad()
            if broken != "late":
                yield loss.detach()

    return train


@pytest.mark.parametrize("broken", ["zeroed first", "no step", "no rate"])
@pytest.mark.parametrize("init", ["A", "B"])
def test_a_loop_that_trains_nothing_is_refused_after_its_first_trial(broken, init):
    """A loop that zeroes its gradients, takes no step or has a learning rate of 0 raises an error after one trial."""
    storage = optuna.storages.InMemoryStorage()
    loop = untrained(broken, partial(Net, init=init))
    with pytest.raises(CalibrationError, match=r"Nothing was trained: after 20 steps"):
        calibrate(loop, storage=storage)
    (trial,) = storage.get_all_trials(0)
    assert trial.state == optuna.trial.TrialState.FAIL


LEAST = [
    ({"broken": "tiny"}, STEPS),
    ({"broken": "late"}, 3),
    ({"broken": "no step"}, 2),
]


@pytest.mark.parametrize(("how", "steps"), LEAST)
def test_whatever_moves_a_factor_is_training(how, steps):
    """A loop with a tiny learning rate, a warm-up from zero or trials of two steps counts as training."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Recipe .* same value, whatever their learning rate"
        )
        assert len(trials_of(calibrate(untrained(**how), trials=2, steps=steps))) == 2


# --- what a calibration finds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [-0.15, 0.0, 0.15])
@pytest.mark.parametrize("factor", [-0.4, 0.4])
def test_a_known_optimum_is_found(drift, factor):
    """The search finds the base learning rate, its drift with rank, and the ratio of full finetuning to LoRA."""
    best = {4: BEST - 2 * drift, 64: BEST + 2 * drift, None: BEST + factor}
    recipe = calibrate(made_up(best.get), ranks=(64, None, 4))
    law = Power(
        exponent=drift, full_factor=2.0**factor, pivot=16.0, law=get_law(PRIOR_LAW)
    )
    # the reference is the rank of the first trial
    truth = recipe_like(recipe, law, 2.0 ** best[64])
    for target in ({"rank": 4}, {"rank": 16}, {"rank": 64}, {"method": "full"}):
        assert abs(math.log2(recipe.at(**target).lr / truth.at(**target).lr)) < 0.35, (
            target
        )
    assert recipe.full_seen
    assert recipe.ranks == (4, 64)


def recipe_like(recipe, law, fitted_lr):
    """Return the recipe with another law and learning rate, and without a margin."""
    return replace(recipe, law=law, fitted_lr=fitted_lr, margin=0.0, steepness=0.0)


def test_everything_told_is_recorded(tmp_path):
    """The recipe, and the same recipe after saving and loading, has the name, ranks, steps, batch, settings and versions."""
    recipe = calibrate(
        made_up(weight_decay=0.01, betas=(0.9, 0.95), other_lr=1e-3),
        trials=4, batch=16, law="loraplus",
    )  # fmt: skip
    loaded = ra.Recipe.load(recipe.save(tmp_path / "digits.toml"))
    for made in (recipe, loaded):
        assert (made.name, made.ranks, made.steps) == ("calibration", (4, 16), STEPS)
        assert (made.batch, made.reference.batch) == (16, 16)
        assert made.warmup == 0.0
        assert made.settings["betas"] == (0.9, 0.95)
        assert "other_lr" not in made.settings
        assert made.law.law == ra.LoRAPlus()
        assert made.optimizer.endswith("AdamW")
        assert {"python", "torch", "optuna", "rankaware-optim"} <= made.versions.keys()
        assert made.tensors["steps"].tolist() == [STEPS] * 4
        assert made.tensors["curve"].shape == (4, STEPS)


def pairs_of(rank):
    """Return two networks of different sizes, like a U-Net and a text encoder, and the parameters that train."""
    unet, encoder = Net(rank), Net(rank)
    encoder.layers = encoder.layers[:1]
    params = [*unet.parameters(), *encoder.parameters()]
    return [unet, encoder], [param for param in params if param.requires_grad]


SEVERAL = {
    "models": lambda trial, models, params: trial.optimizer(models),
    "a tuple": lambda trial, models, params: trial.optimizer(tuple(models)),
    "parameters": lambda trial, models, params: trial.optimizer(params, model=models),
}


@pytest.mark.parametrize("build", SEVERAL.values(), ids=SEVERAL)
def test_several_networks_are_calibrated_together(build):
    """A trial can train a list of models, or the parameters of several models that are passed with model=."""
    seen = []

    def train(trial):
        models, params = pairs_of(trial.rank)
        opt = build(trial, models, params)
        trained = {id(p) for group in opt.param_groups for p in group["params"]}
        seen.append(trained == set(map(id, params)))
        del opt  # the losses are made up
        yield from to_bowl(trial)

    recipe = calibrate(train, trials=6)
    assert all(seen)
    assert abs(math.log2(recipe.fitted_lr) - BEST) < 1
    models, _ = pairs_of(8)
    opt = ra.RankAwareOptimizer(models, AdamW, recipe=recipe)
    assert {group.rank for group in opt.rates.groups if group.rank} == {8}


def to_bowl(trial):
    end = bowl(math.log2(trial.lr) - BEST)
    return (2.3 + (end - 2.3) * step / trial.steps for step in range(trial.steps))


def test_an_init_that_cannot_be_read_is_the_one_given():
    """If the weights show no known init, the recipe has the init that was passed to trial.optimizer(model, init=...)."""

    def train(trial):
        trial.optimizer(Net(trial.rank, init="other"), init="B")
        yield from to_bowl(trial)

    assert calibrate(train, trials=4).reference.init == "B"


def test_numpy_may_be_told_to_raise(tmp_path):
    """A calibration also works in a process in which NumPy raises errors on underflow."""
    with np.errstate(all="raise"):
        recipe = calibrate(made_up(), trials=8)
        recipe.save(tmp_path / "r.toml")
        assert ra.Recipe.load(tmp_path / "r.toml").at(rank=8).lr > 0


# --- random states and seeds ----------------------------------------------------------------------------------------


def noisy(trial):
    np.random.random(3)
    random.random()
    torch.rand(3)
    yield from made_up()(trial)


def interrupted(trial):
    yield from noisy(trial) if trial.number < 2 else interrupt()


def interrupt():
    raise KeyboardInterrupt
    yield


def test_the_global_generators_are_left_alone():
    """A calibration that was interrupted leaves the global random states of torch, random and NumPy unchanged."""
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    with pytest.raises(CalibrationInterrupted):
        calibrate(interrupted, trials=3)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(map(np.array_equal, before[2], after[2]))


def test_every_trial_is_seeded():
    """Trials with the same seed draw the same random numbers from torch, random and NumPy."""
    draws = {}

    def train(trial):
        drawn = (torch.rand(1).item(), random.random(), np.random.random())
        draws.setdefault(trial.seed, set()).add(drawn)
        yield from made_up()(trial)

    calibrate(train, seeds=(3, 5), trials=12)
    assert sorted(draws) == [3, 5]
    assert all(len(seen) == 1 for seen in draws.values())
    assert draws[3] != draws[5]


# --- the loop's contract --------------------------------------------------------------------------------------------


def logged(log, *, length=None, returned=None):
    """Return a loop that logs the number of values it yielded when it is closed, and is endless unless `length` is passed."""

    def train(trial):
        trial.optimizer(Net(trial.rank))
        taken = 0
        try:
            for taken in count(1) if length is None else range(1, length + 1):
                yield torch.tensor([bowl(math.log2(trial.lr) - BEST) + 1 / taken])
            return returned
        finally:
            log.append(taken)

    return train


# a loop that goes on is resumed once more, because it may return a score after its last step
LENGTHS = [(None, STEPS + 1), (STEPS + 5, STEPS + 1), (STEPS, STEPS)]


@pytest.mark.parametrize(("length", "taken"), LENGTHS)
def test_the_steps_are_taken_and_the_generator_is_closed(length, taken, monkeypatch):
    """A loop that could go on is stopped after `steps` values, and its `finally` block runs."""
    log = []
    monkeypatch.setattr(_runner, "is_behind", lambda *_: False)
    recipe = calibrate(logged(log, length=length), trials=4)
    assert log == [taken] * 4
    assert not np.isnan(recipe.tensors["curve"]).any()


@pytest.mark.parametrize("returned", [-3.0, 4, torch.tensor(0.25), torch.tensor([2.0])])
def test_a_returned_score_is_taken(returned):
    """A number or tensor that the loop returns is the trial's score, whether it is positive or negative."""
    recipe = calibrate(logged([], length=STEPS, returned=returned), trials=2)
    assert recipe.tensors["value"].tolist() == [float(returned)] * 2


def test_the_optimizer_is_the_users_at_the_trials_rate():
    """trial.optimizer returns a RankAwareOptimizer of the requested class, whose learning rate follows from trial.lr."""
    seen = []

    def train(trial):
        model = Net(trial.rank)
        assert trial.lr is None
        opt = trial.optimizer(model.parameters(), model=model, weight_decay=0.5)
        seen.append((trial, opt))
        for _ in losses(model, opt, trial.seed):
            yield bowl(math.log2(trial.lr) - BEST)

    recipe = calibrate(train, trials=4)
    for trial, opt in seen:
        assert isinstance(opt, AdamW)
        assert isinstance(opt, ra.RankAwareOptimizer)
        assert opt.defaults["weight_decay"] == 0.5
        (used,) = {part.lr for part in opt.rates.groups if part.role == "A"}
        by_law = recipe_like(recipe, Power(pivot=8.0, law=get_law(PRIOR_LAW)), trial.lr)
        assert used == pytest.approx(by_law.at(rank=trial.rank).lr, rel=1e-9)


def of_rank(rank, **settings):
    def train(trial):
        trial.optimizer(Net(rank), **settings)
        yield 1.0

    return train


def never(trial):
    yield 1.0


def without_model(trial):
    trial.optimizer(list(Net(trial.rank).parameters()))
    yield 1.0


def yields(*values, later=None, returned=None):
    """Return a loop that yields `values` in its first trial and the values of `later`, if passed, in the others."""

    def train(trial):
        trial.optimizer(Net(trial.rank))
        yield from values if later is None or not trial.number else later
        return returned(trial.number) if returned else None

    return train


ONES = [1.0] * STEPS
BAD_LOOPS = [
    (lambda trial: ONES, "returned a list"),
    (never, "before it called trial.optimizer"),
    (without_model, "A model was expected"),
    (of_rank(5), "model of rank 5, but trial.rank is 16"),
    (of_rank(None), "No trainable LoRA"),
    (of_rank(16, recipe="r.toml"), "recipe='r.toml'.*Remove recipe="),
    (of_rank(16, lr=1e-3), "lr=0.001.*Remove lr="),
    (lambda trial: trial.optimizer(None), "must be the model, but None was passed"),
    (of_rank(16, method="full"), "method='full'"),
    (
        yields({"loss": 1.0}),
        "step 1 must be a single number, .* a dict with the keys 'loss'",
    ),
    (yields(1.0, None), "step 2 must be a single number, but it is None"),
    (yields("1.0"), "must be a single number, but it is '1.0'"),
    (
        yields(torch.ones(8)),
        r"yielded .* is a Tensor of shape \(8,\).*losses\.mean\(\)",
    ),
    (yields(np.ones((2, 2))), r"yielded .* is a ndarray of shape \(2, 2\)"),
    (yields([1.0, 2.0]), r"must be a single number, but it is \[1\.0, 2\.0\]"),
    (
        yields(*ONES, returned=lambda number: {"acc": 1}),
        r"score that train\(\) returned .* a dict with the keys 'acc'",
    ),
    (lambda trial: None, r"must be a generator function, but it returned None.*yield"),
    (yields(), f"ended after 0 of {STEPS} steps"),
    (yields(*ONES[1:]), f"ended after {STEPS - 1} of {STEPS} steps"),
    (yields(*ONES, later=ONES[1:]), f"ended after {STEPS - 1} of {STEPS} steps"),
    (yields(math.nan), r"first value that train\(\) yielded is nan"),
    (yields(torch.tensor(-math.inf)), r"first value that train\(\) yielded is -inf"),
    (
        yields(*ONES, returned=lambda number: None if number else 0.5),
        "returned a score",
    ),
]


@pytest.mark.parametrize(("loop", "message"), BAD_LOOPS)
def test_a_loop_that_breaks_the_contract_is_refused(loop, message):
    """A loop that breaks its contract raises an error that says what train() did, and its trial is stored as failed."""
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(ra.RankAwareError, match=message):
        calibrate(loop, trials=4, storage=storage)
    *_, last = storage.get_all_trials(0)
    assert last.state == optuna.trial.TrialState.FAIL


BAD_ARGUMENTS = [
    {"ranks": ()}, {"ranks": (0,)}, {"ranks": (1.5,)}, {"ranks": "46"}, {"ranks": None},
    {"ranks": range(1, MOST_RANKS + 2)},
    {"seeds": ()}, {"seeds": "ab"}, {"seeds": 3}, {"seeds": (True, False)},
    {"steps": 0}, {"steps": 1.5}, {"steps": "20"}, {"steps": True},
    {"trials": 0}, {"trials": 2.5},
    {"lr_range": (0.0, 1.0)}, {"lr_range": (math.nan, 1.0)},
    {"lr_range": (1e-3, math.inf)}, {"lr_range": (1e-3,)}, {"lr_range": 1e-3},
    {"batch": 0}, {"batch": math.nan}, {"batch": "16"},
    {"steps": 0}, {"trials": 0}, {"settings": [1]},
    {"full_trials": -1}, {"full_trials": True}, {"full_trials": 1.5}, {"full_trials": 2, "ranks": (4, None)},
    {"target_steps": 10}, {"target_steps": (80, 160)},
    {"law": "unheard-of"}, {"optimizer": "unheard-of"}, {"optimizer": dict},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_ARGUMENTS, ids=str)
def test_bad_arguments_are_refused_before_anything_runs(options):
    """An impossible argument raises an error that begins with the argument's name, before train() is called."""
    called = []
    with pytest.raises(ra.RankAwareError) as caught:
        calibrate(called.append, **options)
    assert not called
    of_a_name = {"law", "optimizer"} & options.keys()
    assert of_a_name or str(caught.value).startswith(tuple(options))


# --- the learning rate at which a trial trains ----------------------------------------------------------------------


def scheduled(make, where=lambda net: net):
    """Return a loop that trains the parameters `where(net)` with the schedule that `make(optimizer, trial)` builds."""

    def train(trial):
        net = Net(trial.rank)
        opt = trial.optimizer(where(net), model=net)
        schedule = make(opt, trial)
        for value in losses(net, opt, trial.seed):
            schedule.step()
            yield value

    return train


def one_cycle(peak):
    """Return a function that builds a warm-up to `peak(trial)` over a quarter of the steps, followed by a decay."""

    def make(opt, trial):
        return torch.optim.lr_scheduler.OneCycleLR(
            opt, max_lr=peak(trial), total_steps=STEPS + 1, pct_start=0.25
        )

    return make


def constant(opt, trial):
    return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)


def test_a_schedule_that_sets_its_own_peak_is_refused():
    """If a schedule trains two trials at the same learning rate, an error says so and recommends max_lr=trial.lr."""
    loop = scheduled(one_cycle(lambda trial: 1e-3))
    with pytest.raises(
        CalibrationError, match=r"Trial 0 was .* Trial 1 was.*max_lr=trial\.lr"
    ):
        calibrate(loop, trials=6)


def of_own_rate(lr):
    """Return a function that puts the LoRA matrices into one group with the learning rate `lr`."""
    return lambda net: [{"params": [*net.parameters()], "lr": lr}]


SHARED = [{"params": [], "lr": 1e-3}]


def shared(net):
    """Return the same list of groups in every trial, so that its learning rate does not follow the trial."""
    SHARED[0]["params"] = [p for p in net.parameters() if p.requires_grad]
    return SHARED


@pytest.mark.parametrize("where", [of_own_rate(1e-3), shared])
def test_lora_matrices_in_a_group_with_its_own_rate_are_refused(where):
    """A learning rate in the group of the LoRA matrices raises an error that names the group and this learning rate."""
    with pytest.raises(
        CalibrationError, match=r"group 0 was passed with lr=0\.001.*Remove 'lr'"
    ):
        calibrate(scheduled(constant, where), trials=2)


def test_lora_matrices_that_are_all_pinned_are_refused():
    """If rates= sets the learning rate of every LoRA matrix, the calibration raises an error."""
    with pytest.raises(CalibrationError, match="rates= sets a fixed learning rate"):
        calibrate(made_up(rates={"*": 1e-3}), trials=2)


BY_THE_TRIAL = [
    (one_cycle(lambda trial: trial.lr), lambda net: net),
    (
        constant,
        lambda net: [{"params": p} for p in net.parameters() if p.requires_grad],
    ),
]


@pytest.mark.parametrize(("make", "where"), BY_THE_TRIAL)
def test_schedules_that_follow_the_trial_are_taken(make, where):
    """A schedule whose peak is trial.lr is accepted, and so are parameter groups without their own learning rate."""
    assert len(trials_of(calibrate(scheduled(make, where), trials=6))) == 6


@pytest.mark.parametrize("seed", [0, 3, 2**40])
def test_every_random_generator_begins_at_the_trials_seed(seed):
    """At the start of each trial, the generators of torch, random and NumPy are seeded with trial.seed."""
    drawn = []

    def train(trial):
        drawn.append((np.random.random(), random.random(), torch.rand(()).item()))
        yield from made_up()(trial)

    calibrate(train, trials=2, seeds=(seed,))
    np_state = np.random.RandomState(seed % 2**32)
    generator = torch.Generator().manual_seed(seed)
    expected = (
        np_state.random_sample(),
        random.Random(seed).random(),
        torch.rand((), generator=generator).item(),
    )
    assert drawn == [expected, expected]


# --- divergence -----------------------------------------------------------------------------------------------------


def with_cliff(how, taken):
    """Return a loop that yields `how(step)` if the learning rate is more than an octave above the best one."""

    def value(u, step, trial):
        taken[trial.number] = step + 1
        if u > 1 and step:
            return how(step)
        return 2.3 + (bowl(min(u, 1)) - 2.3) * min(step / 10, 1.0)

    return valued(value)


CLIFFS = [
    (lambda step: math.nan, 2),
    (lambda step: math.inf, 2),
    (lambda step: -math.inf, 2),
    (lambda step: torch.tensor(math.nan), 2),
    (lambda step: 2.3 + step, 10),
]


@pytest.mark.parametrize(("how", "most"), CLIFFS)
def test_diverging_runs_are_cut_short_and_are_the_ceiling(how, most):
    """A run that diverges is stopped early, and the lowest learning rate at which a run diverged is the recipe's ceiling."""
    taken = {}
    recipe = calibrate(with_cliff(how, taken), ranks=(16,), trials=10)
    rates, lost = recipe.tensors["lr"], recipe.tensors["diverged"]
    assert lost.any()
    assert all(taken[i] <= most for i in lost.nonzero()[0].tolist())
    assert recipe.ceiling == pytest.approx(rates[lost].min().item())
    assert recipe.lr < recipe.ceiling
    assert np.isinf(recipe.tensors["value"][lost]).all()
    assert abs(math.log2(recipe.lr) - BEST) < 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_return_value_that_is_not_finite_is_divergence(value):
    """A run that returns NaN or infinity counts as diverged."""
    loop = valued(
        lambda u, step, trial: 1.0 + (step == 0),
        lambda u, trial: value if u > 0 else bowl(u),
    )
    recipe = calibrate(loop, ranks=(16,))
    assert recipe.ceiling > 2**BEST > recipe.lr


def test_a_first_value_low_by_chance_stops_no_run():
    """A slow run does not count as diverged only because the first batch of its seed had a low loss."""

    def value(u, step, trial):
        easy = 0.15 if step == 0 and trial.seed == 0 else 0.0
        return 0.75 - easy - 0.3 * math.exp(-(u**2) / 8) * step / STEPS

    recipe = calibrate(valued(value), trials=10)
    assert not recipe.tensors["diverged"].any()
    assert abs(math.log2(recipe.fitted_lr) - BEST) < 1.0


def test_hard_batches_are_no_divergence():
    """A run that learns slowly does not count as diverged if later batches have a higher loss for every model."""

    def loop(trial):
        for step, value in enumerate(made_up()(trial)):
            yield value + 2.0 * (5 <= step < 15)

    recipe = calibrate(loop, trials=16)
    rates, diverged = recipe.tensors["lr"], recipe.tensors["diverged"]
    assert not diverged[rates < 2.0**BEST].any()
    assert math.log2(recipe.fitted_lr) == pytest.approx(BEST, abs=0.5)


def drawn(step, *seeds):
    """Return a random number that depends only on the step and the seeds."""
    return np.random.default_rng(seeds).standard_normal(step + 1)[-1]


# with gain=0.0, the loss of a run does not depend on its learning rate
@pytest.mark.filterwarnings("ignore:.* same value, whatever their learning rate")
@pytest.mark.parametrize("returned", [True, False])
@pytest.mark.parametrize("gain", [0.0, 0.1, 0.5])
def test_noisy_batches_are_no_divergence(gain, returned):
    """A run on batches as noisy as in reinforcement learning does not count as diverged if its curve rises by chance."""

    def value(u, step, trial):
        learned = gain * max(0.0, 1.0 - 0.02 * u * u) * step / trial.steps
        return 0.3 * drawn(step, trial.seed) - learned + max(0.0, u - 4.0) * step

    score = lambda u, trial: 0.3 + 0.02 * u * u if returned else None  # noqa: E731
    recipe = calibrate(valued(value, score), trials=16, steps=100)
    octaves, lost = np.log2(recipe.tensors["lr"]) - BEST, recipe.tensors["diverged"]
    assert octaves.min() > -8.0
    assert not lost[octaves < 4.0].any()
    assert lost[octaves > 5.0].all()


@pytest.mark.parametrize("octaves", [1.0, 5.0])
def test_a_collapse_is_left_below_though_the_curve_hides_it(octaves):
    """If high learning rates ruin the model without a visible rise of the loss, the search goes down until a run learns."""

    def value(u, step, trial):
        value = 0.05 * drawn(step, trial.seed) - 0.2 - 0.02 * step / trial.steps
        return 0.01 * value if u > -octaves and step > 1 else value

    def score(u, trial):
        u += octaves
        return -0.001 * u if u > 0 else 0.005 * (u + 1) ** 2 - 0.4

    recipe = calibrate(valued(value, score), trials=12, steps=100)
    assert abs(math.log2(recipe.fitted_lr) - (BEST - octaves - 1)) < 1.5
    assert recipe.lr < 2.0 ** (BEST - octaves)


# --- out of memory, TrialPruned, and values reported by callback ----------------------------------------------------


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: 12 bytes."
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: 12 bytes."
    ),
    MemoryError(),
]


def giving_up(error, loop, *, ranks=(16,), before=False):
    """Return a loop that raises `error` at some ranks, at its second step or before it builds its optimizer."""

    def train(trial):
        if before and trial.rank in ranks:
            raise error
        values = loop(trial)
        yield next(values)
        if trial.rank in ranks:
            raise error
        yield from values

    return train


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    "error",
    [*OUT_OF_MEMORY, optuna.TrialPruned()],
    ids=lambda error: type(error).__name__,
)
def test_a_run_may_give_up(error, before):
    """A run that runs out of memory or raises TrialPruned counts as stopped early, and the other runs give the recipe."""
    storage = optuna.storages.InMemoryStorage()
    recipe = calibrate(
        giving_up(error, made_up(), before=before), trials=16, storage=storage
    )
    states = [t.state for t in storage.get_all_trials(0)]
    assert states.count(optuna.trial.TrialState.PRUNED) >= 8
    assert len(states) == 16
    assert abs(math.log2(recipe.fitted_lr) - BEST) < 1


def test_out_of_memory_says_nothing_of_a_rate():
    """A rank that never fits into memory does not change the learning rate that is found at another rank."""
    alone = calibrate(made_up(), ranks=(4,), trials=6)
    beside = calibrate(giving_up(MemoryError(), made_up(), before=True), trials=12)
    assert abs(math.log2(beside.fitted_lr / alone.fitted_lr)) < 0.1


EVERYWHERE = (4, 16)
USELESS = [
    (yields(1.0, math.nan), "diverged"),
    (
        giving_up(optuna.TrialPruned(), made_up(), ranks=EVERYWHERE),
        "were stopped early",
    ),
    (
        giving_up(MemoryError(), made_up(), ranks=EVERYWHERE, before=True),
        "ran out of memory",
    ),
]


@pytest.mark.parametrize(("loop", "end"), USELESS)
def test_where_no_run_tells_of_the_rate_the_error_says_why(loop, end):
    """If no run has a result, an error says how the runs ended. After each divergence, the search lowers the learning rate."""
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(CalibrationError, match=f"all 5 trials {end}"):
        calibrate(loop, trials=5, storage=storage)
    if end == "diverged":
        rates = [t.params["log2_lr"] for t in storage.get_all_trials(0)]
        assert rates == sorted(rates, reverse=True)
        assert rates[0] - rates[-1] > 6


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory")]
)
def test_other_errors_are_not_taken_for_memory(error):
    """An error that does not mean a lack of memory is raised to the caller unchanged."""
    with pytest.raises(type(error)) as caught:
        calibrate(giving_up(error, made_up(), ranks=(4, 16)), trials=3)
    assert caught.value is error


def pushed(loop, *, ends=None, score=False):
    """Return a loop whose CallbackRun reports the values of `loop`, and one more value after it was asked to stop."""

    def train(trial):
        def run(runner):
            for step, value in enumerate(loop(trial)):
                if step == ends:
                    return None
                if runner.report(value) and runner.report(value):
                    break
            return float(value) if score else None

        return CallbackRun(run)

    return train


def test_values_may_be_pushed():
    """A run that reports its values by callback gives the same recipe as a generator that yields the same values."""
    loops = made_up(), pushed(made_up())
    pulled, pushed_result = (calibrate(loop, trials=8) for loop in loops)
    assert trials_of(pulled) == trials_of(pushed_result)
    assert pulled.fitted_lr == pushed_result.fitted_lr


def trained_by_another(lr=lambda trial: trial.lr):
    """Return a loop that trains with an optimizer of its own, which warms up to `lr(trial)` over five steps."""

    def train(trial):
        def run(runner):
            net = Net(trial.rank)
            stand_in = trial.optimizer(net)
            own = torch.optim.SGD(
                [p for p in net.parameters() if p.requires_grad], lr=lr(trial)
            )
            runner.follow(own)
            for step, value in enumerate(made_up()(trial_like(trial, net, stand_in))):
                own.param_groups[0]["lr"] = lr(trial) * min(1.0, (step + 1) / 5)
                if runner.report(value):
                    return

        return CallbackRun(run)

    return train


def trial_like(trial, net, opt):
    """Return a trial for `made_up` that already has its optimizer, after a small change to the trainable matrices."""
    with torch.no_grad():
        for param in net.parameters():
            param.add_(1e-6 if param.requires_grad else 0.0)
    return SimpleNamespace(rank=trial.rank, lr=trial.lr, optimizer=lambda *_: opt)


def test_a_trainers_own_optimizer_is_followed():
    """Warm-up and learning rate are read from the optimizer that the trainer uses, not from the trial's idle optimizer."""
    assert calibrate(trained_by_another(), trials=2).warmup == pytest.approx(5 / STEPS)
    with pytest.raises(
        CalibrationError, match=r"Trial 0 was given .* Trial \d was given"
    ):
        calibrate(trained_by_another(lr=lambda trial: 1e-3), trials=8)


# --- stopping and resuming ------------------------------------------------------------------------------------------


def stopping_at(number: int, loop=train):
    """Return a loop that trains like `loop`, but raises KeyboardInterrupt in the middle of trial `number`."""

    def stopped(trial):
        for step, value in enumerate(loop(trial)):
            if (trial.number, step) == (number, 3):
                raise KeyboardInterrupt
            yield value

    return stopped


@pytest.fixture
def storage():
    return optuna.storages.InMemoryStorage()


@pytest.mark.filterwarnings("ignore:The stored study .* was made with train=")
def test_an_interrupted_study_goes_on_where_it_stopped(storage):
    """After Ctrl-C, the same call runs only the remaining trials and gives the same recipe as an uninterrupted call."""
    with pytest.raises(CalibrationInterrupted, match="after 3 of 8 trials") as caught:
        calibrate(stopping_at(3), trials=8, storage=storage)
    assert len(caught.value.recipe.tensors["lr"]) == 3
    numbers = []

    def counted(trial):
        numbers.append(trial.number)
        yield from train(trial)

    resumed = calibrate(counted, trials=8, storage=storage)
    assert numbers == [4, 5, 6, 7, 8]
    straight = calibrate(train, trials=8)
    assert trials_of(resumed) == trials_of(straight)
    assert resumed.fitted_lr == straight.fitted_lr


@pytest.mark.parametrize("number", [0, 2])
def test_ctrl_c_is_still_ctrl_c(number):
    """Ctrl-C raises a KeyboardInterrupt that has the recipe so far, or None if no trial has finished."""
    with pytest.raises(KeyboardInterrupt) as caught:
        calibrate(stopping_at(number, made_up()))
    assert isinstance(caught.value, CalibrationInterrupted)
    assert not isinstance(caught.value, Exception)
    assert (caught.value.recipe is None) == (number == 0)


@pytest.mark.filterwarnings("ignore:The stored study .* was made with train=")
def test_a_finished_study_is_read_and_not_run_again(storage):
    """The same call on a finished study runs no trial and returns the same recipe again."""
    first = calibrate(made_up(weight_decay=0.25), trials=4, storage=storage)
    called = []
    again = calibrate(called.append, trials=4, storage=storage)
    assert not called
    assert again.fitted_lr == first.fitted_lr
    assert again.settings == first.settings
    assert first.settings["weight_decay"] == 0.25
    assert (again.scaling_rule, again.reference, again.full_fan_in) == (
        first.scaling_rule, first.reference, first.full_fan_in,
    )  # fmt: skip


CHANGED = [
    {"steps": STEPS - 5},
    {"steps": STEPS + 5},
    {"optimizer": "sgd"},
    {"law": "loraplus"},
    {"ranks": (4, 64)},
    {"seeds": (0, 2)},
]


@pytest.mark.parametrize("changed", CHANGED, ids=str)
def test_another_calibration_does_not_go_on_with_a_stored_one(changed, storage):
    """Continuing a study with other steps, ranks, seeds, another law or optimizer raises an error that names the argument."""
    calibrate(made_up(), trials=2, storage=storage)
    with pytest.raises(CalibrationError, match=next(iter(changed))):
        calibrate(made_up(), trials=4, storage=storage, **changed)
    another = calibrate(made_up(), trials=8, **changed)
    assert len(trials_of(another)) == 8


@pytest.mark.parametrize("levels", [(1.0, 3.0), (3.0, 1.0)])
def test_a_loss_that_ignores_the_rate_is_said(levels):
    """If the loss does not depend on the learning rate, a warning and a note say so."""
    train = valued(lambda u, step, trial: levels[trial.seed])
    with pytest.warns(
        ra.RankAwareWarning, match="same value, whatever their learning rate"
    ):
        recipe = calibrate(train, ranks=(4, 64))
    assert any(
        "same value, whatever their learning rate" in note for note in recipe.notes
    )


def turned(how):
    """Return a loop whose loss falls faster at higher learning rates and rises sharply far above the best one.

    `how` says whether the loop yields or returns the loss, the negated loss or an accuracy.
    """

    def loss(u, step, trial):
        share = (step + 1) / trial.steps
        if u > 2.5:
            return 2.3 + 4.0 * min(1.0, 5.0 * share)
        learned = 1.0 - math.exp(-3.0 * 2.0 ** min(u, 3.0) * share)
        return 2.3 - 2.0 * learned * math.exp(-0.3 * max(u, 0.0) ** 2)

    def made(loss):
        ways = {"-loss": -loss, "accuracy": max(0.0, 1.0 - loss / 2.3)}
        return ways.get(how.split()[1], loss)

    def value(u, step, trial):
        seen = loss(u, step, trial) + 0.01 * random.gauss(0.0, 1.0)
        return made(seen) if how.startswith("yield") else seen

    def score(u, trial):
        last = loss(u, trial.steps - 1, trial) + 0.01 * random.gauss(0.0, 1.0)
        return made(last) if how.startswith("return") else None

    return valued(value, score)


RISING = "at the lowest learning rates the value only increased"
NONE_FELL = "no run reduced the value"
AGAINST = "the runs with the best scores have the worst training losses"
WHERE = [BEST - 4, BEST, BEST + 4]
TURNED = [
    ("yield -loss", WHERE[2], RISING),
    ("yield accuracy", WHERE[2], RISING),
    ("return -loss", WHERE[1], AGAINST),
    *(("return accuracy", centre, AGAINST) for centre in WHERE),
]


def searched(how, centre):
    around = (2.0 ** (centre - 4), 2.0 ** (centre + 4))
    return calibrate(turned(how), ranks=(4, 64), steps=50, lr_range=around)


@pytest.mark.parametrize(("how", "centre", "said"), TURNED)
def test_a_value_that_should_be_maximised_is_warned_of(how, centre, said):
    """If a negated loss or an accuracy leads the search too high, a warning says to yield or return minus the value."""
    with pytest.warns(ra.RankAwareWarning, match=f"{said}.* minus the") as seen:
        recipe = searched(how, centre)
    assert len(seen) == 1
    assert any(said in note for note in recipe.notes)


@pytest.mark.parametrize("how", ["yield -loss", "yield accuracy"])
@pytest.mark.parametrize("centre", WHERE[:2])
def test_a_value_that_should_be_maximised_and_leads_down_is_noted(centre, how):
    """If a negated loss or an accuracy leads the search too low, a note says that no run reduced the value."""
    assert any(NONE_FELL in note for note in searched(how, centre).notes)


def scored(scores, gains):
    """Return a loop whose n-th trial returns the n-th score, while its loss falls by the n-th gain."""

    def train(trial):
        trial.optimizer(Net(trial.rank))
        for step in range(trial.steps):
            yield 2.0 - gains[trial.number] * step / trial.steps
        return scores[trial.number]

    return train


SCORES = [
    # the scores, how far the losses fell, and whether a warning says to return minus the score
    ([0.1, 0.6, 0.7, 0.65], [0.0, 0.9, 1.0, 0.95], True),
    ([0.1, 0.6, 0.7, 0.65], [-3.0, 0.9, 1.0, 0.95], True),
    ([0.6, 0.7, 0.5, 0.65], [0.9, 1.0, 0.8, 0.95], True),
    ([0.6, 0.5, 0.7, 0.65], [0.9, 1.0, 0.8, 0.95], False),
    ([0.6, 0.7, 0.5, 0.65], [0.9, 0.95, 0.8, 1.0], False),
    ([0.1, 0.6, 0.7, 0.65], [0.0, 0.0, 0.0, 0.0], False),
]


@pytest.mark.parametrize(("scores", "gains", "is_warned"), SCORES)
def test_a_score_to_maximise_is_noticed_from_four_trials(scores, gains, is_warned):
    """A warning appears if the run with the best score learned nothing, or if scores and losses have opposite orders."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        calibrate(scored(scores, gains), trials=4, ranks=(16,), seeds=(0,), steps=50)
    assert any(AGAINST in str(each.message) for each in seen) == is_warned


@pytest.mark.parametrize("centre", WHERE)
def test_a_value_that_is_minimised_is_not_said(centre):
    """A loop that yields its loss gets no note about maximising, wherever the search begins."""
    notes = searched("yield loss", centre).notes
    assert not any("minus the" in note for note in notes)
    assert not any(NONE_FELL in note for note in notes)


def accumulating(batches: int, *, first: bool = False):
    """Return a loop that takes an optimizer step every `batches` micro-batches, but yields a loss for each micro-batch."""

    def train(trial):
        model = Net(trial.rank)
        opt = trial.optimizer(model)
        source = torch.Generator().manual_seed(trial.seed)
        for number in count(1):
            x = torch.randn(DIM, DIM, generator=source)
            loss = (model(x) - x).square().mean()
            loss.backward()
            if first:
                yield loss.detach()
            if number % batches == 0:
                opt.step()
                opt.zero_grad()
            if not first:
                yield loss.detach()

    return train


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("batches", "steps"), [(2, 20), (16, 20), (2, 4)])
def test_a_yield_for_every_micro_batch_is_refused(batches, steps, first):
    """A loop that yields more often than its optimizer steps raises an error after at most three optimizer steps."""
    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(CalibrationError, match=r"number of optimizer steps was \d+\."):
        calibrate(accumulating(batches, first=first), steps=steps, storage=storage)
    (trial,) = storage.get_all_trials(0)
    assert trial.state == optuna.trial.TrialState.FAIL
    assert max(trial.intermediate_values, default=0) <= 3 * batches


def skipping(trial):
    """Train like a loop whose GradScaler skips the first twelve optimizer steps."""
    model = Net(trial.rank)
    opt = trial.optimizer(model)
    asked = count()
    skipped = SimpleNamespace(
        step=lambda: opt.step() if next(asked) >= 12 else None, zero_grad=opt.zero_grad
    )
    yield from losses(model, skipped, trial.seed)


@pytest.mark.parametrize(
    "loop", [accumulating(1), accumulating(1, first=True), skipping]
)
def test_a_yield_for_every_step_is_not_refused(loop):
    """A loop may yield before or after its optimizer step, and a GradScaler may skip the first steps."""
    assert len(trials_of(calibrate(loop, trials=2))) == 2


def test_numbers_of_numpy_are_numbers():
    """NumPy's numbers as losses, ranks, seeds and steps give the same recipe as Python's."""

    def train(trial):
        return (np.float32(loss) for loss in made_up(noise=0.0)(trial))

    numbers = {
        "ranks": np.array([4, 16]),
        "seeds": [np.int64(0), 1],
        "steps": np.array(20),
        "trials": np.int64(6),
        "lr_range": np.array([1e-4, 1e-1]),
        "batch": np.int32(16),
    }
    plain = {name: np.array(value).tolist() for name, value in numbers.items()}
    recipe, same = calibrate(train, **numbers), calibrate(train, **plain)
    at = recipe.at(np.int64(8), alpha=np.float32(8), batch=np.int64(16))
    assert at == same.at(8, alpha=8, batch=16)


def test_full_trials_of_a_wide_model_are_converted_as_the_fit_converts_them():
    """If a calibration has full trials, the learning rate for full finetuning is the one that these trials found."""

    def wide(rank):
        layer = torch.nn.Linear(2048, 8, bias=False)
        return layer if rank is None else PlainLoRA(layer, rank, 2.0, "A")

    def train(trial):
        opt = trial.optimizer(wide(trial.rank))
        x = math.log2(next(iter(opt.rates.values())).lr)
        end = 1.0 + 0.1 * (x + (12 if trial.rank else 15)) ** 2
        for step in range(trial.steps):
            for group in opt.param_groups:
                for param in group["params"]:
                    param.grad = torch.ones_like(param)
            opt.step()
            yield 2.3 + (end - 2.3) * min(2 * (step + 1) / trial.steps, 1.0)

    recipe = calibrate(train, ranks=(4, 16), trials=8, full_trials=3)
    rate = recipe.at(method="full")
    middle = math.log2(rate.low * rate.high) / 2
    assert middle == pytest.approx(-15, abs=0.4)
    opt = ra.RankAwareOptimizer(wide(None), "adamw", recipe=recipe, method="full")
    assert opt.rates["weight"].lr == pytest.approx(rate.lr)
