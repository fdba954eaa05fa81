"""Tests of calibrating an existing model: however the search ends, the model and the random states are restored."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim import CalibrationError, CalibrationInterrupted
from rankaware_optim.calibration import Snapshot, seeded
from rankaware_optim.trainers import Touched

from ..helpers.calibrations import DIM, STEPS, Net

AdamW = torch.optim.AdamW


class Whole(nn.Module):
    """A model with adapters or full weights, dropout, batch norm, and other kinds of state that a trial may change."""

    def __init__(self, rank: int | None = 4, scaling: float = 2.0) -> None:
        super().__init__()
        self.net = Net(rank, scaling)
        self.norm = nn.BatchNorm1d(DIM)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.frozen = nn.Parameter(torch.ones(DIM), requires_grad=False)
        self.source = torch.Generator().manual_seed(5)
        self.history: list[float] = []

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.history.append(torch.rand((), generator=self.source).item())
        return self.drop(self.norm(self.net(x))) * self.frozen


def built(rank: int | None = 4) -> Whole:
    torch.manual_seed(0)
    model = Whole(rank)
    model.norm.eval()
    model.norm.bias.requires_grad_(False)
    for param in model.net.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    return model


def steps(trial, model):
    """Train the model in place, and change its modes, hooks and attributes as a user's loop may do."""
    model.train()
    model.norm.bias.requires_grad_(True)
    opt = trial.optimizer(model, other_lr=1e-3, weight_decay=0.1)
    model.net.register_forward_hook(lambda *_: None)
    model.forward = model.forward
    model.extra = nn.Linear(2, 2)
    for _ in range(trial.steps):
        x = torch.randn(8, DIM)
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        opt.zero_grad(set_to_none=False)
        loss.backward()
        opt.step()
        random.random(), np.random.random()
        yield loss.detach()
    model.eval()
    return float(loss.detach())


def state(model) -> list[object]:
    """Return all values of the model and of the process that a trial may change."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [t.detach().clone().numpy().tobytes() for t in tensors]
    gradients = [
        None if p.grad is None else p.grad.tolist() for p in model.parameters()
    ]
    flags = [p.requires_grad for p in model.parameters()]
    modules = [
        (name, m.training, len(m._forward_hooks)) for name, m in model.named_modules()
    ]
    numpys = np.random.get_state()[1].tolist()
    generators = [torch.get_rng_state().tolist(), random.getstate(), numpys]
    own = [
        model.source.get_state().tolist(),
        [*model.history],
        "forward" in vars(model),
    ]
    return [values, gradients, flags, modules, generators, own, torch.is_grad_enabled()]


def calibrate(train, model, **options):
    usual = {"steps": STEPS, "target_steps": 4 * STEPS, "progress": False}
    return ra.calibrate(train, "adamw", model=model, **{**usual, **options})


@pytest.mark.parametrize("rank", [4, None])
def test_a_model_that_was_calibrated_in_place_is_as_it_was(rank):
    """A search restores the model's weights, gradients, buffers, flags, hooks and attributes, and the random states."""
    model = built(rank)
    before, kept = state(model), [*model.parameters()]
    starts = []

    def train(trial):
        starts.append([p.detach().clone() for p in model.parameters()])
        yield from steps(trial, model)

    recipe = calibrate(train, model)
    assert state(model) == before
    assert all(one is two for one, two in zip(kept, model.parameters(), strict=True))
    assert len(starts) == len(recipe.tensors["lr"]) == 4
    for start in starts[1:]:
        assert all(map(torch.equal, start, starts[0]))
    assert recipe.reference.rank == rank
    assert recipe.steps == 4 * STEPS


def test_trials_search_around_the_suggested_rate():
    """The first trial of an existing model has the suggested learning rate, or the middle of lr_range= if it is passed."""
    model = built()
    train = lambda trial: steps(trial, model)  # noqa: E731
    suggested = ra.suggest_lr(model, "adamw").lr
    assert calibrate(train, model).tensors["lr"][0] == pytest.approx(suggested)
    given = calibrate(train, model, lr_range=(2e-4, 2e-2), trials=2)
    assert given.tensors["lr"][0] == pytest.approx(2e-3)


def test_adapters_that_are_trained_keep_their_values():
    """Adapters that were already trained can be calibrated with init=, and have their trained values again afterwards."""
    model = built()
    with torch.no_grad():
        for param in model.net.parameters():
            param.add_(0.01)
    before = state(model)

    def train(trial):
        opt = trial.optimizer(model, other_lr=1e-3, init="A")
        for _ in range(trial.steps):
            loss = model(torch.randn(8, DIM)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            yield loss.detach()

    assert calibrate(train, model).reference.rank == 4
    assert state(model) == before


# --- errors and interrupts ------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def ending(model, end):
    def train(trial):
        for step, loss in enumerate(steps(trial, model)):
            if (trial.number, step) == (1, 3):
                end()
            yield loss

    return train


def fail():
    raise Boom


@pytest.mark.parametrize(
    ("end", "error"), [(fail, Boom), (press_ctrl_c, CalibrationInterrupted)]
)
def test_an_error_and_ctrl_c_put_the_model_back(end, error):
    """If the user's loop raises an error or Ctrl-C is pressed, the search restores the model and raises the error."""
    model = built()
    before = state(model)
    with pytest.raises(error):
        calibrate(ending(model, end), model)
    assert state(model) == before


@pytest.mark.parametrize("presses", [1, 2, 3])
def test_further_ctrl_cs_wait_until_the_model_is_back(monkeypatch, presses):
    """Pressing Ctrl-C again while the model is being restored does not prevent its complete restoration."""
    model = built()
    before = state(model)
    copy_, copies = torch.Tensor.copy_, []

    def interrupted(tensor, *args, **kwargs):
        copies.append(tensor)
        if copies and state_is_last(copies):
            for _ in range(presses):
                press_ctrl_c()
        return copy_(tensor, *args, **kwargs)

    last = next(p for p in model.parameters() if p.requires_grad)

    def state_is_last(seen):
        return interrupts["on"] and seen[-1] is last

    interrupts = {"on": False}

    def end():
        interrupts["on"] = True
        press_ctrl_c()

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        calibrate(ending(model, end), model)
    monkeypatch.undo()
    assert state(model) == before
    assert signal.getsignal(signal.SIGINT) is handler


# --- what else a trial may change -----------------------------------------------------------------------------------


class Beside(nn.Module):
    """A model with tensors that no optimizer trains, such as integer buffers, a plain tensor and averages of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(4)
        self.base = nn.Parameter(torch.ones(DIM), requires_grad=False)
        for name in ("counts", "more", "most"):  # together more than a mebibyte
            self.register_buffer(name, torch.zeros(65_536, dtype=torch.int64))
        self.plain = torch.zeros(3)
        self.state = np.random.RandomState(3)
        self.averages = {name: p.clone() for name, p in self.net.named_parameters()}
        self.ema = Averages(self.net.parameters())
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x):
        return self.net(x) * self.base


def beside() -> Beside:
    torch.manual_seed(0)
    return Beside()


def counts(model):
    for buffer in model.buffers():
        buffer += 1


def plain(model):
    model.plain.add_(1.0)


def draws(model):
    model.state.random()


def dict_of_averages(model):
    for value in model.averages.values():
        value.lerp_(torch.ones_like(value), 0.5)


class Averages:
    """An object with averages of the weights and a counter, like EMAModel of diffusers."""

    def __init__(self, params):
        self.shadow_params, self.updates = [p.detach().clone() for p in params], 0


def object_of_averages(model):
    model.ema.updates += 1
    for value in model.ema.shadow_params:
        value.lerp_(torch.ones_like(value), 0.5)


def module_of_averages(model):
    with torch.no_grad():
        for param in model.teacher.parameters():
            param.add_(1.0)


def merges(model):
    model.base.data += 1e-3


def all_of(model) -> list[object]:
    tensors = [*model.parameters(), *model.buffers(), model.plain]
    values = [
        t.numpy(force=True).tobytes() for t in (*tensors, *model.averages.values())
    ]
    averages = [p.tolist() for p in model.ema.shadow_params]
    own = [averages, model.ema.updates, model.state.get_state()[1].tolist()]
    return [values, own]


@pytest.mark.parametrize(
    "change",
    [
        counts,
        plain,
        draws,
        object_of_averages,
        dict_of_averages,
        module_of_averages,
        merges,
    ],
)
def test_what_a_loop_changes_beside_the_weights_is_put_back(change):
    """Every trial starts with the original buffers, plain tensors, generators, averages and small frozen weights.

    After the search, they have their original values again.
    """
    model = beside()
    before, starts = all_of(model), []

    def train(trial):
        starts.append(all_of(model))
        opt = trial.optimizer(model)
        for _ in range(trial.steps):
            loss = model(torch.randn(8, DIM)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            change(model)
            yield loss.detach()

    calibrate(train, model, trials=2)
    assert starts == [before, before]
    assert all_of(model) == before


class Large(Beside):
    """A model with frozen weights, or a buffer, that are too large to copy."""

    def __init__(self, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        large = torch.zeros(1 << 20).to(kind)
        if kind == torch.float32:
            self.large = nn.Parameter(large, requires_grad=False)
        else:
            self.register_buffer("large", large)


def by_data(large):
    large.data += 1


def one_entry(large):
    with torch.no_grad():
        large[5] = 3


@pytest.mark.parametrize("write", [by_data, one_entry])
@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
def test_large_weights_that_do_not_train_are_watched(kind, write):
    """A trial that writes into large frozen weights, of which no copy is made, raises an error that names them."""
    model = Large(kind)

    def train(trial):
        for loss in sloping_steps(trial, model):
            write(model.large)
            yield loss

    with pytest.raises(
        CalibrationError,
        match=r"changed tensors that do not train \(1 in all\), such as large.*function that builds",
    ):
        calibrate(train, model)


def sloping_steps(trial, model):
    opt = trial.optimizer(model)
    for _ in range(trial.steps):
        loss = model(torch.randn(8, DIM)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss.detach()


def test_memory_of_the_copies_is_bounded():
    """Beside the weights that train and the integer buffers, a search copies at most one mebibyte of tensors."""
    model = Large()
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    size = Snapshot(Touched([model])).size
    counts = sum(buffer.numel() * 8 for buffer in model.buffers())
    assert trained < size - counts < trained + 2**20


class Rows(torch.utils.data.IterableDataset):
    """A data set that shuffles its rows in place at every pass, with Python's random numbers."""

    def __init__(self):
        self.rows = [*range(50)]

    def __iter__(self):
        random.shuffle(self.rows)
        return iter(self.rows)


class Transforms(torch.utils.data.Dataset):
    """A data set whose generators are inside a list of transforms."""

    def __init__(self):
        self.steps = [Flip(random.Random(1)), Flip(np.random.default_rng(2))]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return [step.source.random() for step in self.steps]


class Flip:
    def __init__(self, source):
        self.source = source


def test_data_are_put_back():
    """`Snapshot.begin` restores the order of a data set's rows and the generators in its list of transforms."""
    rows, transforms = Rows(), Transforms()
    state = random.getstate()
    with seeded(0):
        snapshot = Snapshot(Touched([], (), [rows, transforms]))
    assert (rows.rows, random.getstate()) == ([*range(50)], state)
    first = transforms[0]
    snapshot.begin()
    assert len([*rows]) == 50
    assert transforms[0] == first
    snapshot.begin()
    assert rows.rows == [*range(50)]


class Collator:
    """A collator whose method draws from a generator of its own."""

    def __init__(self):
        self.source = torch.Generator().manual_seed(4)

    def collate(self, rows, scale=1):
        return scale * torch.rand((), generator=self.source).item()


@pytest.mark.parametrize(
    "wrap", [lambda collate: collate, partial, lambda c: (c,), lambda c: deque([c])]
)
def test_generators_behind_functions_are_put_back(wrap):
    """`Snapshot.begin` restores a generator that is reached through a bound method, a partial, a tuple or a deque."""
    collator = Collator()
    snapshot = Snapshot(Touched([], (), [wrap(collator.collate)]))
    first = collator.collate([])
    assert collator.collate([]) != first
    snapshot.begin()
    assert collator.collate([]) == first


class Once:
    """Data that can be read only once, and whose attributes cannot be listed because of `__slots__`."""

    __slots__ = ("rows",)

    def __init__(self):
        self.rows = iter([1, 2, 3])

    def __iter__(self):
        return self.rows


def test_data_that_can_be_read_once_are_an_error():
    """Passing data that can be read only once raises an error, and none of the rows is read."""
    data = Once()
    with pytest.raises(CalibrationError, match=r"Once, .* only once"):
        Snapshot(Touched([], (), [data]))
    assert [*data] == [1, 2, 3]


def test_sets_and_deques_are_put_back():
    """`Snapshot.begin` restores sets, deques, nested dicts and the attributes of objects."""
    holder = Flip({1, 2})
    holder.last, holder.nested = deque([1, 2], maxlen=2), {"a": [1, {"b": 2}]}
    snapshot = Snapshot(Touched([], [holder]))
    holder.source.add(3)
    holder.last.append(9)
    holder.nested["a"][1]["b"] = 3
    holder.new = 1
    snapshot.begin()
    assert (holder.source, [*holder.last]) == ({1, 2}, [1, 2])
    assert (holder.nested, holder.last.maxlen) == ({"a": [1, {"b": 2}]}, 2)
    assert not hasattr(holder, "new")


def test_an_open_file_is_read_from_the_same_line(tmp_path):
    """After `Snapshot.begin`, a data set that reads an open file continues from the same line as before."""
    path = tmp_path / "rows.txt"
    path.write_text("a\nb\nc\n")
    with path.open() as file:
        file.readline()
        holder = Flip(file)
        snapshot = Snapshot(Touched([], (), [holder]))
        assert file.readline() == "b\n"
        snapshot.begin()
        assert file.readline() == "b\n"


class Strict(dict):
    """A container that can be emptied, but not filled again."""

    def update(self, *_, **__):
        raise TypeError("frozen")


def test_a_container_that_cannot_be_filled_again_is_never_emptied():
    """A container that cannot be refilled is not emptied. If a trial changed it, a warning names it."""
    model = beside()
    model.strict = Strict(a=1)
    snapshot = Snapshot(Touched([model]))
    snapshot.begin()
    assert model.strict == {"a": 1}
    model.strict["b"] = 2
    with pytest.warns(ra.RankAwareWarning, match="Strict.*frozen"):
        snapshot.begin()
    assert model.strict == {"a": 1, "b": 2}


# --- errors before the first trial ----------------------------------------------------------------------------------


def sharded():
    model = built()
    model.net.layers[0].__class__ = type("FSDPModule", (type(model.net.layers[0]),), {})
    return model


def pruned():
    model = built()
    model.net.layers[0].__class__ = type(
        "AdaLoraLayer", (type(model.net.layers[0]),), {}
    )
    return model


def of_deepspeed():
    model = built()
    model.frozen.ds_id = 0
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (sharded, {}, "FSDP or DeepSpeed shards it.*function that builds"),
        (pruned, {}, "AdaLoRA prunes its ranks"),
        (of_deepspeed, {}, "FSDP or DeepSpeed shards it"),
        (built, {"ranks": (4, 8)}, "ranks= and full_trials= cannot .* existing model"),
        (
            built,
            {"full_trials": 1},
            "full_trials= cannot be used with an existing model",
        ),
        (built, {"steps": None, "target_steps": None}, "steps= was not passed"),
        (built, {"steps": None}, "only 20 of the 80 steps"),
        (
            built,
            {"settings": {"weight_decay": 1.0}},
            r"settings= and score= .* train\(\) did not return a trainer",
        ),
    ],
)
def test_what_cannot_be_put_back_is_refused(model, options, message):
    """Models that are sharded or prune their ranks, and arguments that do not fit an existing model, raise errors."""
    made = model()

    def train(trial):
        return steps(trial, made)

    with pytest.raises(CalibrationError, match=message):
        calibrate(train, made, **options)


def test_a_model_that_is_not_given_needs_ranks():
    """Calling `calibrate` with a training function but without model= and ranks= raises an error."""
    with pytest.raises(CalibrationError, match="ranks= was not passed"):
        ra.calibrate(copy.copy, "adamw", steps=100)


def test_a_large_module_beside_the_model_is_not_copied():
    """The large weights of a trainer's reward model are not copied, but changing them raises an error."""
    reward = nn.Linear(1 << 10, 1 << 10)
    trainer = Flip(reward)
    snapshot = Snapshot(Touched([beside()], [trainer]))
    alone = Snapshot(Touched([beside()]))
    assert snapshot.size - alone.size == reward.bias.numel() * 4
    with torch.no_grad():
        reward.weight[0, 0] += 1
    with pytest.raises(CalibrationError, match="such as weight"):
        snapshot.begin()
