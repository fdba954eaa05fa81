"""Checkpoints: resumed, adopted from and given back to plain optimizers, and carried to another rank or law."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from rankaware_optim import (
    CheckpointError,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
    to_plain_state_dict,
)
from rankaware_optim.optimizer import effective_lr, rank_aware_param_groups
from rankaware_optim.optimizer._state_dict import _laid_out

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
    lambda opt: lr_scheduler.OneCycleLR(
        opt, max_lr=0.1, total_steps=30, cycle_momentum=False
    ),
    lambda opt: lr_scheduler.SequentialLR(
        opt,
        [
            lr_scheduler.LinearLR(opt, 0.1, total_iters=3),
            lr_scheduler.ExponentialLR(opt, 0.9),
        ],
        milestones=[3],
    ),
]
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS)
each_schedule = pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=["lambda", "cosine", "onecycle", "sequential"]
)


def ours(model, kind=torch.optim.AdamW, **options):
    return RankAwareOptimizer(
        model, kind, **{"lr": LR, "tuned_at": AT, "init": "A"} | options
    )


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
    "two groups": lambda model: [
        {"params": trainable(model)[:3]},
        {"params": trainable(model)[3:], "lr": 0.5},
    ],
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=list(GIVEN))
@each_kind
def test_a_plain_checkpoint_is_adopted(kind, options, given):
    """A native optimizer's checkpoint brings its moments, and its rates are base rates."""
    model = mlp((4, 8))
    native = kind(given(model), lr=0.25, **options)
    train(model, native, steps=3)
    groups = given(model) if isinstance(given(model)[0], dict) else model
    opt = RankAwareOptimizer(
        groups, kind, model=model, lr=LR, tuned_at=AT, init="A", **options
    )
    opt.load_state_dict(saved(native.state_dict()))
    base = {p: group["lr"] for group in native.param_groups for p in group["params"]}
    for group in opt.param_groups:
        for param in group["params"]:
            assert group["lr"] == base[param]
            assert alike(dict(opt.state[param]), dict(native.state[param]))
    train(model, opt, steps=1)


@each_kind
def test_the_way_back_to_a_native_optimizer(kind, options):
    """Loaded into native groups, the plain state goes on as the rank-aware optimizer does, step by step."""
    model = mlp((4, 8))
    opt = ours(model, kind, **options)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    step(model, opt, scheduler, 3)
    again = copy.deepcopy(model)
    native = kind(
        rank_aware_param_groups(again, lr=1.0, tuned_at=AT, init="A"), lr=1.0, **options
    )
    native.load_state_dict(saved(to_plain_state_dict(opt)))
    assert all(group["rank_multiplied"] for group in native.param_groups)
    train(model, opt, steps=1)
    train(again, native, steps=1)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def native_kind(model, **options):
    return ours(model, native_type=True, **options)


@pytest.mark.parametrize("build", [ours, native_kind])
def test_a_kept_decay_goes_to_native_optimizers_and_back(build):
    """With scale_weight_decay=False the shrinkage of a step is the same after a load on either side."""
    options = {"scale_weight_decay": False, "weight_decay": 0.5}
    model = mlp((4, 64))
    opt = build(model, **options)
    train(model, opt, steps=2)
    state = opt.state_dict() if build is native_kind else to_plain_state_dict(opt)
    there, back = copy.deepcopy(model), copy.deepcopy(model)
    native, other = native_kind(there, **options), ours(back, **options)
    native.load_state_dict(saved(state))
    other.load_state_dict(saved(opt.state_dict()))
    assert [group["weight_decay"] for group in other.param_groups] == pytest.approx(
        [0.5] * 5, rel=1e-12
    )
    for one, its in ((model, opt), (there, native), (back, other)):
        train(one, its, steps=2)
    for one, two, three in zip(
        model.parameters(), there.parameters(), back.parameters(), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-7)


def test_native_groups_of_a_kept_decay_are_wrapped_at_the_users():
    """A native instance whose decays were divided is wrapped with those that the user gave."""
    model = mlp((4, 64))
    native = native_kind(model, scale_weight_decay=False, weight_decay=0.5)
    assert len({group["weight_decay"] for group in native.param_groups}) == 3
    opt = RankAwareOptimizer(
        native, model=model, tuned_at=AT, init="A", scale_weight_decay=False
    )
    assert [group["weight_decay"] for group in opt.param_groups] == pytest.approx(
        [0.5] * 5, rel=1e-12
    )
    assert not any("rank_divided_decay" in group for group in opt.param_groups)


@each_kind
def test_the_way_back_to_groups_of_ones_own(kind, options):
    """own_groups=True gives the user's own groups at the base rate, with the same moments."""
    model = mlp((4, 8))
    opt = ours(model, kind, **options)
    train(model, opt, steps=3)
    native = kind(trainable(model), lr=1.0, **options)
    native.load_state_dict(saved(to_plain_state_dict(opt, own_groups=True)))
    assert [group["lr"] for group in native.param_groups] == [LR]
    assert all(alike(native.state[p], opt.state[p]) for p in trainable(model))


def test_the_way_back_in_the_order_of_all_parameters():
    """names= lays the plain state out for an optimizer that was given frozen parameters too."""
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=2)
    native = torch.optim.AdamW(model.parameters(), lr=1.0)
    native.load_state_dict(
        to_plain_state_dict(opt, names=[name for name, _ in model.named_parameters()])
    )
    assert all(alike(native.state[p], opt.state[p]) for p in trainable(model))


@pytest.mark.parametrize("order", [{"own_groups": True}, {"names": ["layer0.lora_A"]}])
def test_the_way_back_needs_the_groups(order):
    """An optimizer whose groups were cleared has no settings to give, and that is said."""
    opt = ours(mlp())
    opt.param_groups.clear()
    with pytest.raises(
        CheckpointError, match=r"param_groups are empty.*before they are cleared"
    ):
        to_plain_state_dict(opt, **order)


def test_there_and_back_changes_no_bit():
    """Ours to the user's own groups to ours keeps moments and rates to the bit."""
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=3)
    again = ours(model)
    again.load_state_dict(to_plain_state_dict(opt, own_groups=True))
    assert alike(again.state_dict(), opt.state_dict())


@each_schedule
def test_a_plain_runs_scheduler_goes_on(schedule):
    """A plain run's state loads as it is, and its scheduler's by `expand`, as a warning says. Rates are plain × law's."""
    model = mlp((4, 8))
    native = torch.optim.AdamW(trainable(model), lr=LR)
    plain = schedule(native)
    step(model, native, plain, 4)
    opt = ours(model)
    mine = schedule(opt)
    with pytest.warns(
        RankAwareWarning, match=r"= opt\.expand\(state\[\"base_lrs\"\]\)"
    ):
        opt.load_state_dict(saved(native.state_dict()))
    state = plain.state_dict()
    for part in (state, *state.get("_schedulers", ())):
        for key in {"base_lrs", "_last_lr", "lr_lambdas"} & part.keys():
            part[key] = opt.expand(part[key])
    mine.load_state_dict(state)
    for scheduler in (plain, mine):
        scheduler.optimizer.step()
        scheduler.step()
    assert {g["lr"] for g in opt.param_groups} == {native.param_groups[0]["lr"]}


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
    with pytest.raises(
        CheckpointError,
        match=rf"rank {before}, the model's has rank {after}.*on_rank_change",
    ):
        other.load_state_dict(saved(opt.state_dict()))
    assert alike(untouched, other.state_dict())


@each_kind
def test_multipliers_are_of_the_new_rank(kind, options):
    """After a change of rank the base rate is the schedule's, and every multiplier what a fresh optimizer has."""
    model = mlp((4, 8))
    opt = ours(model, kind, **options)
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    step(model, opt, scheduler, 2)
    other = ours(mlp((16, 8)), kind, on_rank_change="reset", **options)
    expected = [(LR / 4, group["rank_multiplier"]) for group in other.param_groups]
    other.load_state_dict(saved(opt.state_dict()))
    assert [
        (group["lr"], group["rank_multiplier"]) for group in other.param_groups
    ] == expected


@pytest.mark.parametrize("tags", [True, False], ids=["ours", "plain"])
@each_rank
def test_reset_starts_changed_factors_anew(before, after, tags):
    """on_rank_change="reset" drops the moments of changed factors alone, and the report says so."""
    model, wider = mlp((before, 8)), mlp((after, 8))
    opt = ours(model)
    train(model, opt, steps=2)
    other = ours(wider, on_rank_change="reset")
    other.load_state_dict(
        saved(opt.state_dict() if tags else to_plain_state_dict(opt, own_groups=True))
    )
    assert wider.layer0.lora_A not in other.state
    assert torch.equal(
        other.state[wider.layer1.lora_A]["exp_avg"],
        opt.state[model.layer1.lora_A]["exp_avg"],
    )
    assert set(other.report().reset) == {
        (f"layer0.lora_{role}", before, after) for role in "AB"
    }
    assert f"checkpoint of rank {before}, now {after}: their moments were reset" in str(
        other.report()
    )
    train(wider, other, steps=1)


# --- another law ----------------------------------------------------------------------------------------------------


def test_another_law_multiplies_the_saved_base_rate_and_says_so():
    """At equal rank the base rate is the checkpoint's, the multipliers are this optimizer's, and a warning says so."""
    model = mlp((4, 8))
    opt = ours(model)
    for group in opt.param_groups:
        group["lr"] *= 0.5
    train(model, opt, steps=2)
    other = ours(mlp((4, 8)), law="loraplus")
    expected = [group["rank_multiplier"] for group in other.param_groups]
    with pytest.warns(RankAwareWarning, match="another law") as caught:
        other.load_state_dict(saved(opt.state_dict()))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert {group["lr"] for group in other.param_groups} == {LR / 2}
    assert [group["rank_multiplier"] for group in other.param_groups] == expected


def test_a_rate_that_was_named_is_kept_at_a_load():
    """A rate of `rates` is not replaced by the checkpoint's multiplier, though the init no longer shows."""
    model = mlp((4, 8))
    opt = RankAwareOptimizer(model, "adamw", lr=LR, tuned_at=AT)
    train(model, opt, steps=2)
    again = copy.deepcopy(model)
    with pytest.warns(RankAwareWarning, match="neither factor zero"):
        other = RankAwareOptimizer(
            again, "adamw", lr=LR, tuned_at=AT, rates={"layer0.*": 1e-4}
        )
    other.load_state_dict(saved(opt.state_dict()))
    rates = {
        name: effective_lr(group)
        for group in other.param_groups
        for name in group["param_names"]
    }
    before = {
        name: effective_lr(group)
        for group in opt.param_groups
        for name in group["param_names"]
    }
    for name, rate in rates.items():
        assert rate == pytest.approx(
            1e-4 if name.startswith("layer0") else before[name]
        )


def test_the_default_rate_is_that_of_groups_without_their_own():
    """A load leaves defaults["lr"], which schedules read, at the base rate, though the first group has another."""
    model = mlp((4, 8))
    head = [p for name, p in model.named_parameters() if "head" in name]
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    groups = [{"params": head, "lr": 0.5}, {"params": lora}]
    opt = RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=LR)
    opt.load_state_dict(opt.state_dict())
    assert opt.defaults["lr"] == LR
    for group in opt.param_groups:
        group["lr"] *= 2
    other = RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=LR)
    other.load_state_dict(opt.state_dict())
    assert other.defaults["lr"] == 2 * LR


def test_a_checkpoint_of_the_format_before_is_read():
    """Rates of format 1 were multiplied: they are divided back, scheduler keys too, and training goes on the same."""
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=2)
    old = saved(opt.state_dict())
    for group in old["param_groups"]:
        multiplier = group.pop("rank_multiplier")
        group |= {
            "lr_multiplier": multiplier,
            "lr": LR * multiplier,
            "rankaware_format": 1,
        }
        group["initial_lr"] = 2 * LR * multiplier
    other = ours(copy.deepcopy(model))
    other.load_state_dict(old)
    for group, own in zip(other.param_groups, opt.param_groups, strict=True):
        assert group["lr"] == pytest.approx(LR, rel=1e-12)
        assert group["initial_lr"] == pytest.approx(2 * LR, rel=1e-12)
        assert group["rank_multiplier"] == own["rank_multiplier"]
        assert "lr_multiplier" not in group


def test_saved_groups_that_differ_are_not_merged():
    """Parameters that had two rates are not put into one group with one of them."""
    wide = nn.Sequential(
        mlp((4,), head=False),
        nn.Linear(16, 32),
        mlp((4,), width=32, head=False),
        nn.Linear(32, 3),
    )
    opt = ours(wide, per_layer_width=True)
    train(wide, opt, steps=2)
    other = ours(copy.deepcopy(wide))
    with pytest.warns(RankAwareWarning, match="another law"):
        other.load_state_dict(saved(opt.state_dict()))
    opt.param_groups[0]["lr"] /= 2
    with pytest.raises(CheckpointError, match="come from saved groups of different lr"):
        ours(copy.deepcopy(wide)).load_state_dict(saved(opt.state_dict()))


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
    (lambda: {}, "not an optimizer checkpoint"),
    (lambda: {"param_groups": [], "state": {}}, "not an optimizer checkpoint"),
    (lambda: newer(ours(mlp((4, 8))).state_dict()), "format 99"),
    (lambda: ours(mlp((4, 8, 8))).state_dict(), None),
    (
        lambda: ours(mlp((4,))).state_dict(),
        r"lacks 2 of this optimizer's parameters, such as layer1",
    ),
    (
        lambda: torch.optim.AdamW(mlp((4, 8, 8)).parameters()).state_dict(),
        "without matching names",
    ),
]


@pytest.mark.parametrize(("make", "message"), [row for row in BAD if row[1]])
def test_bad_checkpoints_are_refused(make, message):
    """What does not fit is an error with cause and cure, and nothing is loaded."""
    opt = ours(mlp((4, 8)))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(CheckpointError, match=message):
        opt.load_state_dict(make())
    assert alike(before, opt.state_dict())


@pytest.mark.parametrize("option", ["on_rank_change"])
def test_unknown_policies_are_refused(option):
    """A policy that does not exist is refused at construction, with those that do."""
    with pytest.raises(CheckpointError, match=f"{option} is 'guess'.*Choose one of"):
        ours(mlp(), **{option: "guess"})


def in_state(value, key="exp_avg_sq"):
    """The state of a stepped optimizer, with `value`, or what it makes of the tensor there, as one of its moments."""
    model = mlp((4, 8))
    opt = ours(model)
    train(model, opt, steps=2)
    state = copy.deepcopy(opt.state_dict())
    entry = state["state"][0]
    entry[key] = value(entry[key]) if callable(value) else value
    return state


def in_groups(**keys):
    state = in_state(lambda moment: moment)
    state["param_groups"][0] |= keys
    return state


def stepped_by(state, fused):
    """The state with torch's fused step or without: a checkpoint's settings are the optimizer's after a load."""
    for group in filter(lambda group: isinstance(group, dict), state["param_groups"]):
        group["fused"] = fused
    return state


DAMAGED = [
    (
        lambda: in_state(torch.zeros(1, 1)),
        r"exp_avg_sq of layer0.lora_A has shape \(1, 1\), where \(4, 16\) is needed",
    ),
    (lambda: in_state(torch.zeros(())), r"has shape \(\), where"),
    (lambda: in_state(torch.zeros(64)), r"has shape \(64,\), where"),
    (
        lambda: in_state(torch.zeros(4, 16).to_sparse()),
        r"exp_avg_sq of layer0.lora_A is torch.sparse_coo",
    ),
    (
        lambda: in_state(torch.zeros(4, 16), "step"),
        r"step of layer0.lora_A has shape \(4, 16\), where \(\) is needed",
    ),
    (
        lambda: in_state("text", "step"),
        r"No step can be taken with the checkpoint's state",
    ),
    (lambda: in_state(torch.tensor(math.nan), "step"), r"state: .*not finite"),
    (
        lambda: in_groups(betas=None),
        r"No step can be taken with the checkpoint's settings: TypeError",
    ),
    (lambda: in_groups(params=[0, 0]), r"has 2 parameters and 1 names"),
    (lambda: in_groups(params=[1]), r"list a parameter twice"),
    (lambda: in_groups(param_names=["a", "b"]), r"has 1 parameters and 2 names"),
    (lambda: in_groups(param_names=["layer0.lora_B"]), r"list a parameter twice"),
    (lambda: in_groups(rank_multiplier=0.0), r"has rank_multiplier=0.0"),
    (lambda: in_groups(lr=math.nan), r"has lr=nan"),
    (lambda: in_groups(initial_lr="x"), r"has initial_lr='x'"),
    (lambda: in_groups(lr=1.5e308), r"times the multiplier 2.11 of a group is inf"),
    (lambda: without(in_groups(), "params"), r"cannot be loaded: KeyError\('params'\)"),
    (lambda: {"param_groups": [3], "state": {}}, r"cannot be loaded: AttributeError"),
]


@pytest.mark.parametrize(("make", "message"), DAMAGED)
@pytest.mark.parametrize("fused", [False, True])
def test_damaged_checkpoints_are_refused(make, message, fused):
    """A moment of another shape, a setting or a group that makes no sense is refused before torch has seen it."""
    opt = ours(mlp((4, 8)))
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(CheckpointError, match=message):
        opt.load_state_dict(stepped_by(make(), fused))
    assert alike(before, opt.state_dict())


LAYOUTS = [
    lambda moment: moment.T.contiguous().T,
    lambda moment: moment.repeat_interleave(2, 1)[:, ::2],
    lambda moment: moment.mean().expand(moment.shape),
]


@pytest.mark.parametrize(
    "laid_out", LAYOUTS, ids=["transposed", "every second", "expanded"]
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_moment_is_read_by_its_numbers_however_it_lies_in_memory(laid_out, fused):
    """Strides of a saved tensor, which a fused kernel does not look at, do not change what is trained."""
    ends = []
    for made in (laid_out, lambda moment: laid_out(moment).contiguous().clone()):
        model = mlp((4, 8))
        opt = ours(model)
        opt.load_state_dict(saved(stepped_by(in_state(made), fused)))
        train(model, opt, steps=3)
        ends.append(snapshot(model))
    assert same(*ends)


class Undecided(torch.optim.SGD):
    """An optimizer whose own load fails after it has begun."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.param_groups[0]["lr"] = 0.5
        # no stand-in
        if any(
            p.requires_grad and p.numel() > 12 for p in self.param_groups[0]["params"]
        ):
            raise OSError("the disk is gone")


def test_a_load_that_fails_midway_changes_nothing():
    """Where the optimizer's own load raises, state, groups and attributes are those of before."""
    model = mlp((4, 8))
    opt = ours(model, Undecided)
    state, held = copy.deepcopy(opt.state_dict()), (opt.state, opt.param_groups)
    with pytest.raises(CheckpointError, match="OSError"):
        opt.load_state_dict(
            ours(mlp((4, 8)), torch.optim.SGD, momentum=0.9).state_dict()
        )
    assert (opt.state, opt.param_groups) == held
    assert alike(state, opt.state_dict())


def test_architectures_of_other_shapes_are_refused():
    """The same names at another width are an error with both shapes."""
    small, wide = mlp((4, 8)), mlp((4, 8), width=32)
    opt = ours(small)
    train(small, opt, steps=1)
    with pytest.raises(
        CheckpointError, match=r"has shape \(\d, 16\), the parameter \(\d, 32\)"
    ):
        ours(wide, on_rank_change="reset").load_state_dict(opt.state_dict())


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
    """A copy reports, scales, and still refuses or resets as its original would."""
    model = mlp((4, 8))
    opt = ours(model, on_rank_change="reset")
    train(model, opt, steps=1)
    twin = copied(opt)
    assert isinstance(twin, torch.optim.AdamW)
    assert str(twin.report()) == str(opt.report())
    assert twin.expand([1.0]) == opt.expand([1.0])
    source = mlp((16, 8))
    wider = ours(source)
    train(source, wider, steps=1)
    twin.load_state_dict(wider.state_dict())
    assert {change[1:] for change in twin.report().reset} == {(16, 4)}


def test_a_rate_of_several_numbers_is_refused():
    """One number in a tensor is a rate, the 0 of a warm-up too; two are none."""
    opt = ours(mlp((4, 8)))
    for value in (0.0, 0.5):
        opt.load_state_dict(in_groups(lr=torch.tensor(value)))
        assert float(opt.param_groups[0]["lr"]) == value
    with pytest.raises(CheckpointError, match=r"has lr=tensor\(\[1., 2.\]\)"):
        opt.load_state_dict(in_groups(lr=torch.tensor([1.0, 2.0])))


def test_a_former_group_without_a_multiplier_is_at_its_base_rate():
    """In the first format a group that nothing moved had none."""
    state = without(in_groups(), "rank_multiplier", "lr_multiplier")
    for group in state["param_groups"]:
        group["rankaware_format"] = 1
    opt = ours(mlp((4, 8)))
    with pytest.warns(RankAwareWarning, match="another law"):
        opt.load_state_dict(state)
    assert {group["lr"] for group in opt.param_groups} == {LR}


def test_a_moment_takes_the_parameters_layout_and_keeps_its_precision():
    """Fused kernels read a moment as the parameter lies in memory, whatever its dtype."""
    param, moment = torch.zeros(4, 6), torch.arange(24.0, dtype=torch.float64)
    moment = moment.reshape(6, 4).T
    laid = _laid_out(moment, param)
    assert (laid.dtype, laid.stride()) == (torch.float64, param.stride())
    assert torch.equal(laid, moment)


def test_a_moment_of_another_shape_stays_as_it_lies():
    """Such as a factored one: only a moment of the parameter's shape has its layout."""
    moment = torch.arange(8.0).reshape(2, 4).T
    laid = _laid_out(moment, torch.zeros(4, 6))
    assert laid.stride() == moment.stride()
    assert torch.equal(laid, moment)


def test_an_optimizer_that_cannot_step_here_loads_its_checkpoint():
    """What cannot be rehearsed without a checkpoint is not held against one."""
    opt = ours(mlp((4, 8)), torch.optim.Adam, differentiable=True)
    state = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    assert alike(state, opt.state_dict())


def test_parts_of_a_group_with_several_rates_are_said():
    """A state by names, as torch.distributed.checkpoint loads it, may have put a rate into one part alone."""
    opt = ours(mlp((4, 8)))
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        group["params"] = list(group["param_names"])
    opt.load_state_dict(copy.deepcopy(state))
    state["param_groups"][0]["lr"] = LR / 2
    with pytest.warns(RankAwareWarning, match="several base rates"):
        opt.load_state_dict(state)
