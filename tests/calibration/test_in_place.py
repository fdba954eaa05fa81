"""Calibration in place: the model as it was, to the bit, however it ends; and what each trial starts from."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from torch import nn
from torch.nn import functional

import rankaware_optim as ra
from rankaware_optim import (
    CalibrationError,
    CalibrationInterrupted,
    InspectionError,
    RankAwareError,
)

from ..helpers.fingerprint import changed, fingerprint
from ..helpers.models import STYLES, PlainLoRA, mlp

STEPS = 6
AdamW = torch.optim.AdamW


def step(model: nn.Module, i: int) -> torch.Tensor:
    """A made-up task: the batch follows from the step alone."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(i))
    out = model(x)
    return (out - x[:, : out.shape[1]].sin()).square().mean()


def calibrate(
    model, step=step, *, ranks=(2, 8), steps=STEPS, trials=4, optimizer=AdamW, **options
):
    return ra.calibrate_in_place(
        model, step, optimizer, ranks=ranks, steps=steps, trials=trials, **options
    )


class Everything(nn.Module):
    """What a trial can change: trained adapters, a tied head, buffers, modes, caches, hooks, gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 16)
        self.first, self.second = (PlainLoRA(nn.Linear(16, 16), 4) for _ in range(2))
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.recurrent = nn.GRU(16, 16)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.embed.weight  # tied, and trained
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("missing", None)
        self.wide = torch.zeros(1).expand(5)  # cannot be written, and need not be
        self.cache, self.history, self.last = {"steps": 0}, [], torch.zeros(16)
        self.frozen = nn.Parameter(
            torch.tensor([float("nan"), -0.0]), requires_grad=False
        )
        nn.init.normal_(self.first.lora_B)
        self.drop.eval()
        self.first.register_forward_hook(lambda *_: None)
        self.head.weight.register_hook(lambda grad: grad)
        self.forward_ids(torch.arange(16)).sum().backward()

    def forward_ids(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.second(self.first(self.embed(ids))))
        self.last.copy_(x[0].detach())
        self.history.append(len(ids))
        self.seen += 1
        self.cache = {"steps": self.cache["steps"] + 1}
        return self.head(self.drop(self.recurrent(x)[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_ids(x.abs().sum(1).long() % 16)


def messy(model: nn.Module, i: int) -> torch.Tensor:
    """A step that changes modes, hooks, buffers, attributes, submodules and every global generator."""
    model.train(i % 2 == 0)
    model.norm.register_forward_hook(lambda *_: None)
    model.head.weight.register_hook(lambda grad: 2 * grad)
    model.seen = model.seen + 1
    model.added, model.extra = torch.ones(3), nn.Linear(2, 2)
    model.recurrent.weight_hh_l0.requires_grad_(False)
    model.cache["steps"] = 7
    model.frozen.requires_grad_(i == 1)
    random.random(), np.random.random()
    model.last = torch.rand(16)
    return functional.mse_loss(model(torch.randn(8, 16)), torch.randn(8, 16))


class Boom(Exception):
    """The user's own error."""


def failing(error, at=3):
    def broken(model, i):
        if i == at:
            raise error
        return messy(model, i)

    return broken


ENDS = [
    ("success", messy, None),
    ("error", failing(Boom()), Boom),
    ("interrupt", failing(KeyboardInterrupt()), CalibrationInterrupted),
    ("interrupt at once", failing(KeyboardInterrupt(), 0), CalibrationInterrupted),
    ("no memory", failing(MemoryError()), CalibrationError),
    (
        "not finite",
        lambda model, i: messy(model, i) * (math.nan if i else 1),
        CalibrationError,
    ),
    (
        "not finite at once",
        lambda model, i: messy(model, i) * math.nan,
        CalibrationError,
    ),
    ("pruned", failing(optuna.TrialPruned()), CalibrationError),
    ("text", lambda model, i: "loss", CalibrationError),
]


@pytest.mark.parametrize("ranks", [(2, 8), (2, None), (None,)], ids=str)
@pytest.mark.parametrize(
    ("how", "taken", "raised"), ENDS, ids=[how for how, _, _ in ENDS]
)
def test_the_model_is_as_it_was(how, taken, raised, ranks):
    """However it ends, every object, value, gradient, mode, hook, buffer and attribute is as found, to the bit."""
    model = Everything()
    before = fingerprint(model)
    with pytest.raises(raised) if raised else nullcontext():
        calibrate(model, taken, ranks=ranks, init="A")
    assert changed(before, fingerprint(model)) == []
    for one, two in zip(
        model.recurrent._flat_weights, model.recurrent.parameters(), strict=True
    ):
        assert one is two


def test_the_check_can_fail():
    """The same fingerprint sees what a single step leaves behind."""
    model = Everything()
    before = fingerprint(model)
    messy(model, 0).backward()
    found = changed(before, fingerprint(model))
    assert {".seen", ".training", "random", ".history"} & set(found)
    assert any(name.endswith("_parameters") for name in found)


class Fragile(torch.Tensor):
    """A buffer that breaks off so many of the writes that put it back."""

    breaks: int | float = 0
    error: BaseException = RuntimeError("no memory")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if (
            func is torch.Tensor.copy_
            and isinstance(args[0], Fragile)
            and args[0].breaks > 0
        ):
            args[0].breaks -= 1
            raise args[0].error
        return super().__torch_function__(func, types, args, kwargs or {})


class Reluctant(dict):
    """An attribute that cannot be cleared once it was written to."""

    def clear(self):
        raise RuntimeError("kept")


def breaking(error, breaks=1):
    """A step that at its end leaves the model's buffer `fragile` changed and about to fail."""

    def taken(model, i):
        if i == STEPS - 1:
            model.fragile.add_(1)
            model.fragile.breaks, model.fragile.error = breaks, error
        return messy(model, i)

    return taken


@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyboardInterrupt(), SystemExit(1)], ids=repr
)
def test_a_put_back_that_is_broken_off_is_done_again(error):
    """An exception in the middle of the last put-back leaves nothing between two states; an exit still exits."""
    model = Everything()
    model.register_buffer("fragile", torch.zeros(3).as_subclass(Fragile))
    before = fingerprint(model)
    with nullcontext() if isinstance(error, Exception) else pytest.raises(type(error)):
        calibrate(model, breaking(error), trials=1, init="A")
    model.fragile.__dict__.clear()
    assert changed(before, fingerprint(model)) == []


def test_what_cannot_be_put_back_is_named():
    """Where a second try fails too, the error names the tensor and the attribute, and all else is as it was."""
    model = Everything()
    model.register_buffer("fragile", torch.zeros(3).as_subclass(Fragile))
    model.first.notes = Reluctant(a=1)

    def taken(model, i):
        model.first.notes["b"] = 2
        return breaking(RuntimeError("no memory"), math.inf)(model, i)

    before = fingerprint(model)
    with pytest.raises(
        CalibrationError,
        match=r"could not be restored, all others were: first\.notes, fragile\. Load",
    ):
        calibrate(model, taken, trials=1, init="A")
    assert set(changed(before, fingerprint(model))) == {"._buffers", "first.notes"}


def test_a_buffer_that_was_given_other_memory_is_as_it_was():
    """A step that gives a buffer other numbers in another shape does not change what the buffer is afterwards."""
    model = Everything()
    before = fingerprint(model)

    def taken(model, i):
        model.seen.data = torch.ones(3)
        return step(model, i)

    calibrate(model, taken, trials=1, init="A")
    assert changed(before, fingerprint(model)) == []


def test_training_goes_on_as_if_nothing_had_been():
    """An optimizer of the user's own, in the middle of its run, gives the same bits after a calibration as without."""
    ends = []
    for between in (False, True):
        model = mlp()
        opt = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for i in range(6):
            if between and i == 3:
                calibrate(model, ranks=(2, 8, None), trials=3, init="A")
            step(model, i).backward()
            opt.step()
            opt.zero_grad()
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# --- what each trial starts from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fixed", "alpha", "rslora"])
@pytest.mark.parametrize("style", STYLES)
def test_it_gives_the_recipe_of_models_built_anew(style, rule):
    """In place or built in every trial, in any library's style, the trials see the same losses to the last bit."""
    found = mlp((4, 4), style=style, scalings=2.0)
    kept = {
        name: value
        for name, value in found.state_dict().items()
        if "base_layer" in name or "head" in name
    }

    def train(trial):
        scaling = (
            2.0 * (4 / trial.rank) ** {"fixed": 0.0, "alpha": 1.0, "rslora": 0.5}[rule]
        )
        model = mlp((trial.rank, trial.rank), style=style, scalings=scaling)
        model.load_state_dict(kept, strict=False)
        ra.initialize(model, "A", variance="peft", seed=trial.seed)
        opt = trial.optimizer(model, weight_decay=0.1)
        for i in range(trial.steps):
            loss = step(model, i)
            loss.backward()
            opt.step()
            opt.zero_grad()
            yield loss

    other = ra.calibrate(train, AdamW, ranks=(2, 8), steps=STEPS, trials=6)
    recipe = calibrate(
        found, settings={"weight_decay": 0.1}, scaling_rule=rule, trials=6
    )
    for key, value in other.tensors.items():
        assert np.array_equal(
            value, recipe.tensors[key], equal_nan=value.dtype.kind == "f"
        ), key
    assert (recipe.fitted_lr, recipe.settings, recipe.reference) == (
        other.fitted_lr,
        other.settings,
        other.reference,
    )
    assert recipe.scaling_rule == other.scaling_rule == rule


def test_every_trial_starts_alike():
    """Trials of one rank, seed and rate give one curve, whatever ran between them, with dropout and a moved buffer."""
    model = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.3), *mlp())
    curves = {}

    def kept(model, i):
        return step(model, i)

    recipe = calibrate(
        model,
        kept,
        ranks=(4, 8, None),
        trials=12,
        seeds=(3,),
        sampler=Fixed(),
        optimizer="sgd",
        full_trains=["*base_layer*"],
    )
    for rank, seed, curve in zip(
        *(recipe.tensors[key].tolist() for key in ("rank", "seed", "curve")),
        strict=True,
    ):
        curves.setdefault((rank, seed), []).append(curve)
    assert sorted(curves) == [(0, 3), (4, 3), (8, 3)]
    for same in curves.values():
        assert len(same) == 4
        assert same == [same[0]] * 4


class Fixed(optuna.samplers.BaseSampler):
    """One rate for all trials."""

    def infer_relative_search_space(self, study, trial):
        return {}

    def sample_relative(self, study, trial, search_space):
        return {}

    def sample_independent(self, study, trial, param_name, param_distribution):
        return -10.0


def watched(seen, step=step):
    """The step, which notes what the model is at i = 0 of every trial."""

    def taken(model, i):
        if i == 0:
            seen.append(
                {
                    name: (p.detach().clone(), p.requires_grad)
                    for name, p in model.named_parameters()
                }
            )
        return step(model, i)

    return taken


def test_adapters_are_fresh_and_heads_as_found():
    """Every trial has adapters at its rank, drawn by its seed, though trained ones were found; and the found head."""
    model, seen = mlp((4, 4)), []
    nn.init.normal_(model.layer0.lora_B)
    found = model.head.weight.detach().clone()
    recipe = calibrate(model, watched(seen), trials=12, init="A", scaling_rule="alpha")
    shapes = [len(state["layer0.lora_A"][0]) for state in seen]
    assert sorted(set(shapes)) == [2, 8]
    assert recipe.scaling_rule == "alpha"
    assert all(torch.equal(state["head.weight"][0], found) for state in seen)
    assert all(not state["layer0.lora_B"][0].any() for state in seen)
    draws = {tuple(state["layer0.lora_A"][0][0].tolist()) for state in seen}
    assert len(draws) == 2  # two seeds


@pytest.mark.parametrize(
    ("init", "variance", "std"),
    [("A", "mua", 1 / 4), ("A", None, 1 / 48**0.5), ("B", None, 1 / 128**0.5)],
)
def test_init_and_variance_are_as_asked(init, variance, std):
    """init= and variance= decide the draw, and the recipe knows the init."""
    model, seen = mlp((4, 4)), []
    recipe = calibrate(
        model, watched(seen), ranks=(128,), init=init, variance=variance, trials=2
    )
    assert recipe.reference.init == init
    assert seen[0][f"layer0.lora_{init}"][0].std() == pytest.approx(std, rel=0.1)


def test_full_finetuning_trains_the_weights_that_are_adapted():
    """Where None is among the ranks, base weights train, adapters add nothing and stay, and heads train as before."""
    model, seen = mlp(), []
    nn.init.normal_(model.layer0.lora_B)

    def taken(model, i):
        loss = watched(seen)(model, i)
        if any(
            "base_layer" in n and p.requires_grad for n, p in model.named_parameters()
        ):
            bare = copy.deepcopy(model)
            for layer in (bare.layer0, bare.layer1):
                nn.init.zeros_(layer.lora_B)
            assert torch.equal(step(bare, i), loss)
        return loss

    recipe = calibrate(model, taken, ranks=(4, None), trials=6, init="A")
    trained = [
        {name for name, (_, trains) in state.items() if trains} for state in seen
    ]
    head = {"head.weight", "head.bias"}
    assert {frozenset(names) for names in trained} == {
        frozenset(
            {"layer0.lora_A", "layer0.lora_B", "layer1.lora_A", "layer1.lora_B"} | head
        ),
        frozenset({"layer0.base_layer.weight", "layer1.base_layer.weight"} | head),
    }
    assert recipe.full_seen


def test_full_trials_may_end_it():
    """full_trials= of `calibrate` trains the base weights though no full finetuning is among the ranks."""
    model, seen = mlp(), []
    before = fingerprint(model)
    recipe = calibrate(model, watched(seen), trials=6, full_trials=2)
    assert recipe.full_seen
    assert sum(state["layer0.base_layer.weight"][1] for state in seen) == 2
    assert changed(before, fingerprint(model)) == []


@pytest.mark.parametrize(
    "chosen", [["*.base_layer.*"], lambda name, param: "base_layer" in name]
)
def test_full_trains_says_what_full_finetuning_trains(chosen):
    """Patterns or a predicate choose the parameters, here the biases too."""
    model, seen = mlp(), []
    calibrate(model, watched(seen), ranks=(None,), full_trains=chosen, trials=2)
    assert {n for n, (_, trains) in seen[0].items() if trains and "layer" in n} == {
        f"layer{i}.base_layer.{part}" for i in (0, 1) for part in ("weight", "bias")
    }


def test_a_model_without_adapters():
    """ranks=(None,) needs no adapters: what requires a gradient trains."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    before = fingerprint(model)
    assert calibrate(model, ranks=(None,)).reference.method == "full"
    assert changed(before, fingerprint(model)) == []


# --- the step's contract --------------------------------------------------------------------------------------------


def test_a_step_may_take_its_gradients_itself():
    """A number, or a loss without a graph, says that the gradients are there already."""

    def own(model, i):
        loss = step(model, i)
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()
        return loss.item() if i % 2 else loss.detach()

    ours, theirs = calibrate(mlp(), own), calibrate(mlp(), step)
    assert np.allclose(
        ours.tensors["curve"], theirs.tensors["curve"], rtol=1e-4, equal_nan=True
    )


def test_schedule_score_and_settings_are_used():
    """The scheduler steps after every step, the score is what is minimised, the settings are the optimizer's."""
    rates, scored = [], []

    def schedule(opt):
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 / (1 + i))

    def score(model):
        scored.append(torch.is_grad_enabled())
        return step(model, 0)

    def taken(model, i):
        return step(model, i)

    class Watching(AdamW):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            assert self.defaults["weight_decay"] == 0.5
            return super().step(closure)

    recipe = calibrate(
        mlp(),
        taken,
        optimizer=Watching,
        schedule=schedule,
        score=score,
        settings={"weight_decay": 0.5},
        trials=2,
    )
    assert rates[:3] == pytest.approx([rates[0], rates[0] / 2, rates[0] / 3])
    assert scored == [False, False]
    assert recipe.settings["weight_decay"] == 0.5


def test_out_of_memory_at_a_rank_leaves_the_others():
    """A rank that does not fit is pruned, and the next trial starts from the model as found."""

    def hungry(model, i):
        if i == 2 and len(model.layer0.lora_A) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(model, i)

    model = mlp()
    before = fingerprint(model)
    storage = optuna.storages.InMemoryStorage()
    recipe = calibrate(model, hungry, trials=6, storage=storage)
    assert set(recipe.tensors["rank"][~recipe.tensors["pruned"]].tolist()) == {2}
    assert len(storage.get_all_trials(0)) == 6
    assert changed(before, fingerprint(model)) == []


def test_frozen_weights_are_not_copied():
    """Memory beside the model: what trains and buffers, and not the frozen weights, unless they are tried whole."""
    from rankaware_optim.calibration._snapshot import (
        ModelState,
        _restore_value,
    )
    from rankaware_optim.inspection import walk

    def copied(model, **options):
        undo = ModelState(walk(model), **options)._undo
        return {name for name, restore in undo if restore.func is _restore_value}

    model = mlp(width=64)
    factors = [p for n, p in model.named_parameters() if "lora" in n]
    assert copied(model, unchanged=factors) == {"head.weight", "head.bias"}
    base = model.layer0.base_layer.weight
    assert "layer0.base_layer.weight" in copied(model, changing=[base])


def writes_frozen(model, i):
    with torch.no_grad():
        model.layer0.base_layer.weight.mul_(1.0)
    return step(model, i)


class Sharded(nn.Sequential):
    """By its name a wrapper of torch's."""


Sharded.__name__ = "FullyShardedDataParallel"


def quantised():
    model = mlp()
    model.layer0.base_layer.weight = nn.Parameter(
        torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False
    )
    return model


BAD = [
    (lambda: "model", {}, CalibrationError, "got a str and a function"),
    (mlp, {"step": 3}, CalibrationError, "and a int"),
    (mlp, {"ranks": "48"}, CalibrationError, "ranks is '48'"),
    (mlp, {"ranks": (0,)}, CalibrationError, r"ranks is \(0,\)"),
    (mlp, {"ranks": (4, 4)}, CalibrationError, r"ranks is \(4, 4\)"),
    (mlp, {"init": "C"}, CalibrationError, "init is 'C'"),
    (mlp, {"variance": "big"}, CalibrationError, "variance is 'big'"),
    (mlp, {"scaling_rule": "sqrt"}, CalibrationError, "scaling_rule is 'sqrt'"),
    (
        mlp,
        {"ranks": (None,), "full_trains": ["nothing*"]},
        CalibrationError,
        "chooses no parameter",
    ),
    (
        quantised,
        {"ranks": (4, None)},
        CalibrationError,
        "weight of layer0 cannot be trained whole",
    ),
    (lambda: Sharded(*mlp()), {}, InspectionError, "sharded or wrapped"),
    (lambda: nn.Linear(16, 16), {}, InspectionError, "No trainable LoRA pair"),
    (
        mlp,
        {"step": writes_frozen},
        CalibrationError,
        "wrote the frozen parameter layer0.base_layer.weight",
    ),
    (mlp, {"step": lambda model, i: 1.0}, CalibrationError, "a float without a graph"),
    (
        mlp,
        {"step": lambda model, i: step(model, i).detach()},
        CalibrationError,
        "a tensor without a graph",
    ),
    (
        mlp,
        {"step": lambda model, i: None},
        CalibrationError,
        "a NoneType without a graph",
    ),
    (
        mlp,
        {"step": lambda model, i: model(torch.ones(2, 16))},
        CalibrationError,
        "is a Tensor",
    ),
    (mlp, {"score": lambda model: None}, CalibrationError, "score returned None"),
    (mlp, {"settings": {"lr": 1.0}}, CalibrationError, "got lr="),
    (mlp, {"trials": 0}, CalibrationError, "trials is 0"),
]


@pytest.mark.parametrize(("make", "options", "kind", "message"), BAD)
def test_bad_input_is_a_sentence_and_changes_nothing(make, options, kind, message):
    """What cannot be calibrated in place is an error of ours, and the model is as it was."""
    model = make()
    before = fingerprint(model) if isinstance(model, nn.Module) else {}
    with pytest.raises(kind, match=message) as caught:
        calibrate(model, **options)
    assert isinstance(caught.value, RankAwareError)
    assert changed(before, fingerprint(model) if before else {}) == []


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_as_before_afterwards():
    """The handler of SIGINT is the one that was there, and a thread without signals can calibrate too."""
    import threading

    before = signal.getsignal(signal.SIGINT)
    calibrate(mlp(), trials=1)
    assert signal.getsignal(signal.SIGINT) is before
    ended = []
    thread = threading.Thread(target=lambda: ended.append(calibrate(mlp(), trials=1)))
    thread.start()
    thread.join()
    assert ended[0].lr > 0


def test_a_step_that_swallows_ctrl_c_can_be_interrupted_again():
    """The second Ctrl-C ends a calibration whose step caught the first."""
    taken = []

    def stubborn(model, i):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            taken.append(i)
            if len(taken) == 3:
                raise
        return step(model, i)

    with pytest.raises(CalibrationInterrupted):
        calibrate(mlp(), stubborn)
    assert taken == [0, 1, 2]


def off_and_interrupted(i):
    """Gradients are off and Ctrl-C comes, as where it interrupts `no_grad()` as it is entered or left."""
    if i == 3:
        torch.set_grad_enabled(False)
        signal.raise_signal(signal.SIGINT)


def in_place():
    def interrupted(model, i):
        off_and_interrupted(i)
        return step(model, i)

    calibrate(mlp(), interrupted)


def in_a_loop():
    def train(trial):
        model = mlp((trial.rank,))
        opt = trial.optimizer(model)
        for i in range(trial.steps):
            off_and_interrupted(i)
            loss = step(model, i)
            loss.backward()
            opt.step()
            yield loss.detach()

    ra.calibrate(train, AdamW, ranks=(2, 8), steps=STEPS, trials=4)


@pytest.mark.parametrize("calibrated", [in_place, in_a_loop])
def test_gradients_are_on_after_ctrl_c_in_no_grad(calibrated):
    """Ctrl-C inside `torch.no_grad()` ends a calibration, and the process computes gradients as before."""
    try:
        with pytest.raises(CalibrationInterrupted):
            calibrated()
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


ROUNDS = 24


@pytest.mark.parametrize("double", [False, True], ids=["once", "twice"])
def test_ctrl_c_at_any_moment_of_a_real_process(double):
    """Interrupted at random moments, once or twice in quick succession, the model of a real process is as it was."""
    source = random.Random(int(double))
    command = [sys.executable, "-m", "tests.helpers.interrupted", str(3 + ROUNDS)]
    root = Path(__file__).parents[2]
    ends = []
    with subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        whole = (
            math.inf
        )  # seconds of the fastest of three rounds that nothing interrupts
        for _ in range(3):
            assert child.stdout.readline() == "go\n"
            start = time.perf_counter()
            assert child.stdout.readline().split()[1:] == []
            whole = min(whole, time.perf_counter() - start)
            child.stdin.write("next\n")
            child.stdin.flush()
        for _ in range(ROUNDS):
            assert child.stdout.readline() == "go\n"
            for pause in (
                source.uniform(0, 0.8 * whole),
                *([source.uniform(0, 0.003)] if double else []),
            ):
                time.sleep(pause)
                child.send_signal(signal.SIGINT)
            ended, *differs = child.stdout.readline().split()
            assert differs == []
            ends.append(ended)
            if ended == "done":  # the machine has less to do than before
                whole *= 0.8
            child.stdin.write("next\n")
            child.stdin.flush()
        child.stdin.close()
    assert child.returncode == 0
    assert ends.count("CalibrationInterrupted") > ROUNDS / 2
