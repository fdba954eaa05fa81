"""Schedulers: ratios kept to the last bit, or the one that erases them named, with what to pass."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim import lr_scheduler, swa_utils

from rankaware_optim import OptimizerError, RankAwareOptimizer, RankAwareWarning, Reference
from rankaware_optim.optimizer import check_scheduler

from ..helpers.models import mlp, train

LR = 0.5
AT = Reference(rank=16, alpha=16)


def wrapped(lr=LR, **options):
    model = mlp((4, 8, 16))
    return model, RankAwareOptimizer(model, torch.optim.SGD, lr=lr, tuned_at=AT, momentum=0.9, **options)


def by_hand(model, opt):
    """The native class with the groups of `opt`."""
    groups = [{"params": g["params"], "lr": g["lr"]} for g in opt.param_groups]
    return torch.optim.SGD(groups, lr=LR, momentum=0.9)


KEEPING = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda s: 0.95**s),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda s: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, power=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 6)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]
    ),
    "OneCycleLR, scaled": lambda o: lr_scheduler.OneCycleLR(o, limits(o, 2.0), total_steps=12),
    "CyclicLR, scaled": lambda o: lr_scheduler.CyclicLR(o, limits(o, 0.1), limits(o, 2.0), 4),
    "SWALR, scaled": lambda o: swa_utils.SWALR(o, limits(o, 0.05), anneal_epochs=4),
    "ReduceLROnPlateau": lambda o: Plateau(o, patience=0),
    "ReduceLROnPlateau, scaled": lambda o: Plateau(o, patience=0, min_lr=limits(o, 0.3)),
}


class Plateau(lr_scheduler.ReduceLROnPlateau):
    """A ReduceLROnPlateau told the same metric for ever."""

    def step(self):  # type: ignore[override]
        super().step(1.0)


def limits(opt, value):
    """`value` per group: by `scaled` on ours, by the groups' own ratios on the native class."""
    scale = getattr(opt, "scaled", None)
    return scale(value) if scale else [value * MULTIPLIERS[i] for i in range(len(opt.param_groups))]


MULTIPLIERS = [g["lr_multiplier"] for g in wrapped()[1].param_groups]


@pytest.mark.parametrize("make", KEEPING.values(), ids=list(KEEPING))
def test_multiplicative_schedulers_keep_the_ratios(make):
    """Rates follow those of the native class with the same groups to the last bit, and the ratios stay."""
    model, opt = wrapped()
    native = by_hand(model, opt)
    ours, theirs = make(opt), make(native)
    assert check_scheduler(opt, ours) == ()
    for _ in range(10):
        for optimizer, scheduler in ((opt, ours), (native, theirs)):
            optimizer.step()
            scheduler.step()
        rates = [g["lr"] for g in opt.param_groups]
        assert rates == [g["lr"] for g in native.param_groups]
        assert [r / m for r, m in zip(rates, MULTIPLIERS, strict=True)] == pytest.approx([rates[0]] * len(rates))


ERASING = {
    "OneCycleLR": (lambda o: lr_scheduler.OneCycleLR(o, 2.0, total_steps=12), r"max_lr=opt.scaled\(2\)"),
    "CyclicLR": (lambda o: lr_scheduler.CyclicLR(o, 0.1, 2.0, 4), r"=opt.scaled\("),
    "SWALR": (lambda o: swa_utils.SWALR(o, 0.05), r"swa_lr=opt.scaled\(0.05\)"),
    "ReduceLROnPlateau": (lambda o: Plateau(o, min_lr=0.3), r"min_lr=opt.scaled\(0.3\)"),
    "CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, 9, eta_min=0.01), "eta_min=0"),
    "WarmRestarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, eta_min=0.01), "eta_min=0"),
    "inside SequentialLR": (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.01)], [3]
        ),
        "eta_min=0",
    ),
    "inside ChainedScheduler": (
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.01)]),
        "eta_min=0",
    ),
}


@pytest.mark.parametrize(("make", "cure"), ERASING.values(), ids=list(ERASING))
def test_schedulers_with_one_limit_for_all_are_named_with_the_cure(make, cure):
    """check_scheduler says which argument flattens which group and what to pass; the first step warns by itself."""
    model, opt = wrapped()
    scheduler = make(opt)
    sentences = check_scheduler(opt, scheduler)
    assert sentences
    assert "loses its ratio" in sentences[0]
    with pytest.warns(RankAwareWarning, match=cure) as caught:
        train(model, opt, steps=1)
    assert len(caught) == len(sentences)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, steps=1)


@pytest.mark.parametrize(("make", "cure"), ERASING.values(), ids=list(ERASING))
def test_a_uniform_model_has_no_ratios_to_lose(make, cure):
    """Where every group has the base rate nothing is said."""
    model = mlp((4, 4))
    opt = RankAwareOptimizer(model, torch.optim.SGD, lr=LR, momentum=0.9)
    scheduler = make(opt)
    assert check_scheduler(opt, scheduler) == ()
    train(model, opt, steps=1)


def test_a_scheduler_of_another_optimizer_is_refused():
    """check_scheduler looks at the scheduler's own optimizer."""
    (_, opt), (_, other) = wrapped(), wrapped()
    with pytest.raises(OptimizerError, match="another optimizer"):
        check_scheduler(opt, lr_scheduler.StepLR(other, 3))


def test_scaled_takes_one_value_for_each_of_the_users_groups():
    """A sequence is spread over the groups that each of the user's own was split into."""
    model = mlp((4, 8))
    groups = [{"params": list(model.layer0.parameters())[-2:]}, {"params": list(model.layer1.parameters())[-2:]}]
    opt = RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=LR, tuned_at=AT)
    expected = [(1.0, 3.0)[g["user_group"]] * g["lr_multiplier"] for g in opt.param_groups]
    assert opt.scaled([1.0, 3.0]) == expected
    with pytest.raises(OptimizerError, match="3 values were given for 2 groups"):
        opt.scaled([1.0, 2.0, 3.0])


# --- the base rate --------------------------------------------------------------------------------------------------


def test_set_base_lr_moves_every_group_but_pinned_ones():
    """Multipliers stay, rates of their own stay, and schedulers see the new base."""
    model = mlp((4, 8))
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=LR, tuned_at=AT, rates={"head.bias": 0.125})
    before = [g["lr"] for g in opt.param_groups]
    opt.set_base_lr(LR / 2)
    pinned = ["head.bias" in g["param_names"] for g in opt.param_groups]
    expected = [lr if own else lr / 2 for lr, own in zip(before, pinned, strict=True)]
    assert [g["lr"] for g in opt.param_groups] == pytest.approx(expected)
    assert opt.defaults["lr"] == LR / 2


@pytest.mark.parametrize("scheduled", [False, True])
def test_set_base_lr_after_another_rates_checkpoint(scheduled):
    """Once a checkpoint was loaded its base rate is the base, decayed by a scheduler or not, and moves from there."""
    _, saved = wrapped()
    if scheduled:
        scheduler = lr_scheduler.LambdaLR(saved, lambda s: 0.5**s)
        saved.step()
        scheduler.step()
    _, opt = wrapped(lr=4 * LR)
    opt.load_state_dict(saved.state_dict())
    assert opt.defaults["lr"] == pytest.approx(LR)
    opt.set_base_lr(1.0)
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([m * 0.5**scheduled for m in MULTIPLIERS])


def test_set_base_lr_with_a_scheduler():
    """A scheduler would restore its own base rates: it is asked for, and moved along."""
    _, opt = wrapped()
    scheduler = lr_scheduler.LambdaLR(opt, lambda s: 0.5**s)
    with pytest.raises(OptimizerError, match="Pass it"):
        opt.set_base_lr(1.0)
    opt.set_base_lr(1.0, scheduler)
    opt.step()
    scheduler.step()
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([0.5 * m for m in MULTIPLIERS])


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), "fast"])
def test_a_base_rate_is_positive(lr):
    """Anything but a positive finite number is refused."""
    _, opt = wrapped()
    with pytest.raises(OptimizerError):
        opt.set_base_lr(lr)


def test_weight_decay_can_be_kept_apart_from_the_rate():
    """With scale_weight_decay=False lr × weight_decay is the base's in every group."""
    _, opt = wrapped(scale_weight_decay=False, weight_decay=0.1)
    assert [g["lr"] * g["weight_decay"] for g in opt.param_groups] == pytest.approx([LR * 0.1] * len(MULTIPLIERS))
