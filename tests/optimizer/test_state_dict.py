"""Checkpoints: resumed, adopted from and given back to plain optimizers, and carried to another rank or law."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from rankaware_optim import CheckpointError, RankAwareOptimizer, RankAwareWarning, Reference, to_plain_state_dict
from rankaware_optim.optimizer import convert_scheduler_state

from ..helpers.models import mlp, same, snapshot, train

LR = 1e-2
AT = Reference(rank=16, alpha=16)
KINDS = [
    (torch.optim.AdamW, {}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.RMSprop, {"momentum": 0.5}),
    (torch.optim.Adafactor, {}),
]
SCHEDULES = [
    lambda opt: lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step)),
    lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=20),
    lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=scaled(opt, 0.1), total_steps=30, cycle_momentum=False),
    lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.1, total_iters=3), lr_scheduler.ExponentialLR(opt, 0.9)], milestones=[3]
    ),
]
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=["lambda", "cosine", "onecycle", "sequential"])


def scaled(opt, value):
    return opt.scaled(value) if isinstance(opt, RankAwareOptimizer) else value


def ours(model, kind=torch.optim.AdamW, **options):
    return RankAwareOptimizer(model, kind, **{"lr": LR, "tuned_at": AT, "init": "A"} | options)


def saved(state):
    """A state through a file, read without unpickling code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def step(model, opt, scheduler, count):
    for _ in range(count):
        train(model, opt, steps=1)
        scheduler.step()


def alike(a, b) -> bool:
    """Whether two nested states hold the same bits, in whatever order of keys."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@each_schedule
@each_kind
def test_a_resume_in_the_middle_of_a_schedule_is_bit_identical(kind, options, schedule):
    """Training interrupted, saved and resumed ends at the same bits as training that went on."""
    model = mlp((4, 8))
    opt = ours(model, kind, **options)
    scheduler = schedule(opt)
    step(model, opt, scheduler, 4)
    again = mlp((4, 8), seed=1)
    other = ours(again, kind, **options)
    resumed = schedule(other)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(saved(opt.state_dict()))
    resumed.load_state_dict(scheduler.state_dict())
    step(model, opt, scheduler, 4)
    step(again, other, resumed, 4)
    assert same(snapshot(model), snapshot(again))
    assert alike(opt.state_dict(), other.state_dict())


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


GIVEN = {
    "trainable": trainable,
    "all": lambda model: list(model.parameters()),
    "named": lambda model: list(model.named_parameters()),
    "two groups": lambda model: [{"params": trainable(model)[:3]}, {"params": trainable(model)[3:], "lr": 0.5}],
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=list(GIVEN))
@each_kind
def test_a_plain_checkpoint_is_adopted_and_multiplied(kind, options, given):
    """A native optimizer's checkpoint brings its moments, and its rates are multiplied group by group."""
    model = mlp((4, 8))
    native = kind(given(model), lr=0.25, **options)
    train(model, native, steps=3)
    groups = given(model) if isinstance(given(model)[0], dict) else model
    opt = RankAwareOptimizer(groups, kind, model=model, lr=LR, tuned_at=AT, init="A", **options)
    opt.load_state_dict(saved(native.state_dict()))
    base = {p: group["lr"] for group in native.param_groups for p in group["params"]}
    for group in opt.param_groups:
        for param in group["params"]:
            assert group["lr"] == base[param] * group["lr_multiplier"]
            assert alike(dict(opt.state[param]), dict(native.state[param]))
    train(model, opt, steps=1)


@each_kind
def test_the_way_back_to_a_plain_optimizer(kind, options):
    """to_plain_state_dict loads into the native class, which then holds the base rate and the same moments."""
    model = mlp((4, 8))
    opt = ours(model, kind, **options)
    train(model, opt, steps=3)
    native = kind(trainable(model), lr=1.0, **options)
    native.load_state_dict(saved(to_plain_state_dict(opt)))
    assert [group["lr"] for group in native.param_groups] == [pytest.approx(LR, rel=1e-12)]
    assert all(alike(native.state[p], opt.state[p]) for p in trainable(model))
    assert not {"lr_multiplier", "lora_rank", "user_group"} & native.param_groups[0].keys()


def test_the_way_back_in_the_order_of_all_parameters():
    """names= lays the plain state out for an optimizer that was given frozen parameters too."""
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=2)
    native = torch.optim.AdamW(model.parameters(), lr=1.0)
    native.load_state_dict(to_plain_state_dict(opt, names=[name for name, _ in model.named_parameters()]))
    assert all(alike(native.state[p], opt.state[p]) for p in trainable(model))


def test_there_and_back_changes_no_bit_of_state():
    """Ours to plain to ours keeps moments to the bit and rates to rounding."""
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=3)
    again = ours(model)
    again.load_state_dict(to_plain_state_dict(opt))
    assert alike(again.state_dict()["state"], opt.state_dict()["state"])
    rates = [[group["lr"] for group in o.param_groups] for o in (opt, again)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


@each_schedule
def test_a_schedulers_state_moves_both_ways(schedule):
    """A plain scheduler's state, converted, continues on ours as if it had been there, and comes back."""
    model = mlp((4, 8))
    native = torch.optim.AdamW(trainable(model), lr=LR)
    plain = schedule(native)
    opt = ours(model)
    mine = schedule(opt)
    for _ in range(4):
        for scheduler in (plain, mine):
            scheduler.optimizer.step()
            scheduler.step()
    fresh = ours(model)
    moved = schedule(fresh)
    fresh.load_state_dict(native.state_dict())
    moved.load_state_dict(convert_scheduler_state(plain.state_dict(), fresh))
    for scheduler in (moved, mine):
        scheduler.optimizer.step()
        scheduler.step()
    assert [g["lr"] for g in fresh.param_groups] == pytest.approx([g["lr"] for g in opt.param_groups], rel=1e-12)
    back = convert_scheduler_state(convert_scheduler_state(plain.state_dict(), opt), opt, to="plain")
    assert back["last_epoch"] == plain.state_dict()["last_epoch"]
    assert back.get("base_lrs", [LR]) == pytest.approx(plain.state_dict().get("base_lrs", [LR]), rel=1e-12)


# --- another rank ---------------------------------------------------------------------------------------------------

RANKS = [(4, 8), (8, 4), (1, 8), (8, 1), (4, 5)]
each_rank = pytest.mark.parametrize(("before", "after"), RANKS)


@each_rank
@each_kind
def test_another_rank_is_refused_with_both_numbers(kind, options, before, after):
    """By default a checkpoint of another rank is an error that names the way out, and nothing is changed."""
    model = mlp((before, 8))
    opt = ours(model, kind, **options)
    train(model, opt, steps=2)
    other = ours(mlp((after, 8)), kind, **options)
    untouched = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=rf"rank {before}, the model's has rank {after}.*on_rank_change"):
        other.load_state_dict(saved(opt.state_dict()))
    assert alike(untouched, other.state_dict())


@pytest.mark.parametrize("tags", [True, False], ids=["ours", "plain"])
@each_rank
def test_resize_carries_the_shared_directions(before, after, tags):
    """Moments are truncated or padded with zeros along the rank, and unchanged parameters keep theirs."""
    model, wider = mlp((before, 8)), mlp((after, 8))
    opt = ours(model)
    train(model, opt, steps=3)
    other = ours(wider, on_rank_change="resize")
    other.load_state_dict(opt.state_dict() if tags else to_plain_state_dict(opt))
    both = min(before, after)
    for key in ("exp_avg", "exp_avg_sq"):
        a, b = opt.state[model.layer0.lora_A][key], other.state[wider.layer0.lora_A][key]
        assert torch.equal(a[:both], b[:both])
        assert not b[both:].any()
        a, b = opt.state[model.layer0.lora_B][key], other.state[wider.layer0.lora_B][key]
        assert torch.equal(a[:, :both], b[:, :both])
        assert torch.equal(opt.state[model.layer1.lora_A][key], other.state[wider.layer1.lora_A][key])
    carried = {c.name: (c.saved_rank, c.rank, c.kept) for c in other.report().carried}
    assert carried == {f"layer0.lora_{role}": (before, after, both) for role in "AB"}
    assert f"checkpoint of rank {before}, now {after}" in str(other.report())
    train(wider, other, steps=2)


@pytest.mark.parametrize("policy", ["reset", "resize"])
@each_kind
def test_rates_are_derived_anew_at_another_rank(kind, options, policy):
    """After a change of rank every rate is the schedule's factor times what a fresh optimizer has."""
    model = mlp((4, 8))
    opt = ours(model, kind, **options)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    step(model, opt, scheduler, 2)
    other = ours(mlp((16, 8)), kind, on_rank_change=policy, **options)
    expected = [group["lr"] / 4 for group in other.param_groups]
    other.load_state_dict(saved(opt.state_dict()))
    assert [group["lr"] for group in other.param_groups] == pytest.approx(expected, rel=1e-12)


def test_reset_starts_changed_factors_anew():
    """on_rank_change="reset" drops the moments of changed factors alone."""
    model, wider = mlp((4, 8)), mlp((16, 8))
    opt = ours(model)
    train(model, opt, steps=2)
    other = ours(wider, on_rank_change="reset")
    other.load_state_dict(saved(opt.state_dict()))
    assert wider.layer0.lora_A not in other.state
    assert torch.equal(other.state[wider.layer1.lora_A]["exp_avg"], opt.state[model.layer1.lora_A]["exp_avg"])
    assert "their moments start anew" in str(other.report())
    train(wider, other, steps=1)


# --- another law ----------------------------------------------------------------------------------------------------


def test_another_law_keeps_the_saved_rates_and_says_so():
    """At equal rank a resume is bit-identical under whatever law, with a warning."""
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=2)
    again = copy.deepcopy(model)
    other = ours(again, law="loraplus")
    with pytest.warns(RankAwareWarning, match="another law"):
        other.load_state_dict(saved(opt.state_dict()))
    train(model, opt, steps=2)
    train(again, other, steps=2)
    assert same(snapshot(model), snapshot(again))


def test_another_law_rederives_on_request():
    """on_law_change="rederive" gives the new law's rates, times the schedule's factor."""
    model = mlp((4, 8))
    opt = ours(model)
    for group in opt.param_groups:
        group["lr"] *= 0.5
    other = ours(mlp((4, 8)), law="loraplus", on_law_change="rederive")
    expected = {g["param_names"][0]: g["lr"] / 2 for g in other.param_groups}
    train(model, opt, steps=1)
    other.load_state_dict(saved(opt.state_dict()))
    assert {g["param_names"][0]: g["lr"] for g in other.param_groups} == pytest.approx(expected, rel=1e-12)


def test_a_finer_cut_is_kept():
    """Rates saved layer by layer survive in an optimizer that would merge the layers."""
    wide = nn.Sequential(mlp((4,), head=False), nn.Linear(16, 32), mlp((4,), width=32, head=False), nn.Linear(32, 3))
    opt = ours(wide, per_layer_width=True)
    train(wide, opt, steps=2)
    again = copy.deepcopy(wide)
    other = ours(again)
    count = len(other.param_groups)
    with pytest.warns(RankAwareWarning, match="another law"):
        other.load_state_dict(saved(opt.state_dict()))
    assert len(other.param_groups) > count
    train(wide, opt, steps=2)
    train(again, other, steps=2)
    assert same(snapshot(wide), snapshot(again))


# --- bad checkpoints ------------------------------------------------------------------------------------------------


def without(state, *keys):
    for group in state["param_groups"]:
        for key in keys:
            group.pop(key, None)
    return state


def newer(state):
    state["param_groups"][0]["rankaware_format"] = 99
    return state


BAD = [
    (lambda: {}, "no optimizer checkpoint"),
    (lambda: {"param_groups": [], "state": {}}, "no optimizer checkpoint"),
    (lambda: newer(ours(mlp((4, 8))).state_dict()), "format 99"),
    (lambda: ours(mlp((4, 8, 8))).state_dict(), None),
    (lambda: ours(mlp((4,))).state_dict(), r"lacks 2 of this optimizer's parameters, such as layer1"),
    (lambda: torch.optim.AdamW(mlp((4, 8, 8)).parameters()).state_dict(), "without names to match"),
]


@pytest.mark.parametrize(("make", "message"), [row for row in BAD if row[1]])
def test_bad_checkpoints_are_refused(make, message):
    """What does not fit is an error with cause and cure, and nothing is loaded."""
    opt = ours(mlp((4, 8)))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(CheckpointError, match=message):
        opt.load_state_dict(make())
    assert alike(before, opt.state_dict())


@pytest.mark.parametrize("option", ["on_rank_change", "on_law_change"])
def test_unknown_policies_are_refused(option):
    """A policy that does not exist is refused at construction, with those that do."""
    with pytest.raises(CheckpointError, match=f"{option} is 'guess'.*Choose one of"):
        ours(mlp(), **{option: "guess"})


def test_architectures_of_other_shapes_are_refused():
    """The same names at another width are an error with both shapes."""
    small, wide = mlp((4, 8)), mlp((4, 8), width=32)
    opt = ours(small)
    train(small, opt, steps=1)
    with pytest.raises(CheckpointError, match=r"has shape \(\d, 16\), the parameter \(\d, 32\)"):
        ours(wide, on_rank_change="resize").load_state_dict(opt.state_dict())


# --- copies ---------------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "spawn": lambda opt: _through_a_process(opt),
}


def _through_a_process(opt):
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply_async(copy.copy, (opt,)).get(timeout=100)


@pytest.mark.parametrize("copied", COPIES.values(), ids=list(COPIES))
def test_copies_keep_plan_policies_and_checks(copied):
    """A copy reports, scales, and still refuses or resizes as its original would."""
    model = mlp((4, 8))
    opt = ours(model, on_rank_change="resize")
    train(model, opt, steps=1)
    twin = copied(opt)
    assert isinstance(twin, torch.optim.AdamW)
    assert str(twin.report()) == str(opt.report())
    assert twin.scaled(1.0) == opt.scaled(1.0)
    source = mlp((16, 8))
    wider = ours(source)
    train(source, wider, steps=1)
    twin.load_state_dict(wider.state_dict())
    assert {c.kept for c in twin.report().carried} == {4}
