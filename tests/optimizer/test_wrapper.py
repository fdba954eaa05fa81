"""RankAwareOptimizer: what it leaves unchanged, which learning rates it sets, and which arguments
raise an error.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim import (
    OptimizerError,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
)

from ..helpers.models import PlainLoRA, mlp, train, trained
from ..helpers.optimizers import multiplier, names_of, rates_of

LR = 1e-2
AT_16 = Reference(rank=16, alpha=16)
AdamW = torch.optim.AdamW


def by_class(model, kind, options, **own):
    return RankAwareOptimizer(model, kind, lr=LR, **own, **options)


def by_instance(model, kind, options, **own):
    return RankAwareOptimizer(
        kind(trained(model), lr=LR, **options), model=model, **own
    )


def by_groups(model, kind, options, **own):
    return RankAwareOptimizer(
        [{"params": trained(model)}], kind, model=model, lr=LR, **own, **options
    )


each_form = pytest.mark.parametrize("form", [by_class, by_instance, by_groups])


# --- what stays as in the user's class ------------------------------------------------------------------------------


@each_form
def test_it_is_an_instance_of_both(form):
    """The optimizer is an instance of RankAwareOptimizer and of the user's class, whose name and
    step it has.
    """
    kind, options = AdamW, {}
    opt = form(mlp(), kind, options)
    assert isinstance(opt, kind)
    assert isinstance(opt, RankAwareOptimizer)
    assert (type(opt).__name__, type(opt).__module__, type(opt).__bases__) == (
        kind.__name__,
        kind.__module__,
        (kind,),
    )
    assert inspect.unwrap(type(opt).step) is inspect.unwrap(kind.step)
    assert type(form(mlp(), kind, options)) is type(opt)  # the class is made only once
    plain = kind(trained(mlp()), lr=LR)
    assert not isinstance(plain, RankAwareOptimizer)


def test_the_optimizers_own_default_rate():
    """Without lr= the base learning rate is the optimizer's own default, and a warning says that nobody tuned it."""
    with pytest.warns(
        RankAwareWarning, match=r"trains at 0\.001, the default learning rate of AdamW"
    ):
        opt = RankAwareOptimizer(mlp(), AdamW)
    assert opt.defaults["lr"] == 1e-3


# --- learning rates of A and B --------------------------------------------------------------------------------------


def distance(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def products(kind, scaling, lr, init, law) -> list[torch.Tensor]:
    """Return s·B·A of both layers after each of 30 steps, in which the head trains at LR."""
    model = mlp(scalings=scaling, init=init, dtype=torch.float64)
    options = {"weight_decay": 0.0, "rates": {"head*": LR}}
    if kind is not torch.optim.SGD:
        options["eps"] = 1e-300
    opt = RankAwareOptimizer(model, kind, lr=lr, law=law, **options)
    deltas = []

    def note(*_):
        for layer in (model.layer0, model.layer1):
            deltas.append(scaling * (layer.lora_B @ layer.lora_A).detach())

    opt.register_step_post_hook(note)
    train(model, opt, 30)
    return deltas


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("ratio", [0.25, 16.0])
@pytest.mark.parametrize("kind", [torch.optim.Adam, AdamW])
def test_loraplus_is_another_alpha(kind, ratio, init):
    """With Adam, LoRA+ trains the product s·B·A exactly as a single learning rate with another
    alpha does, for either init.
    """
    scaling, lr = {"A": (2.0 * ratio, LR), "B": (2.0 / ratio, LR * ratio)}[init]
    plus = products(kind, 2.0, LR, init, ra.LoRAPlus(ratio))
    other = products(kind, scaling, lr, init, "constant")
    assert len(plus) == 60
    assert distance(plus, other) < 1e-11


# --- the user's groups ----------------------------------------------------------------------------------------------


@each_form
def test_rates_are_merged_named_and_ordered(form):
    """A group of the user is split into one part for each role, rank and scaling, in the model's
    order and with parameter names.
    """
    opt = form(mlp((4, 8, 4, 8)), AdamW, {})
    parts = opt.rates.groups
    lora = [(role, rank, 1.0) for rank in (4, 8) for role in "AB"]
    kinds = [(part.role, part.rank, part.scaling) for part in parts]
    assert kinds == [*lora, ("other", None, None)]
    layers = [
        [f"layer{i}.lora_{role}" for i in each]
        for each in ((0, 2), (1, 3))
        for role in "AB"
    ]
    assert names_of(opt) == [*layers, ["head.weight", "head.bias"]]
    assert [part.multiplier != 1.0 for part in parts] == [
        False,
        False,
        True,
        True,
        False,
    ]
    assert {part.base_lr for part in parts} == {opt.defaults["lr"]} == {LR}
    (group,) = opt.param_groups
    assert group["lr"] == LR


@pytest.mark.parametrize("built", [False, True])
def test_the_dict_that_was_given_is_the_group(built):
    """The dict that the user passed is the group itself, so a value that is written into the dict
    is used by the next step.
    """
    model = mlp((4, 8))
    given = {"params": trained(model)}
    native = AdamW([given], lr=LR)
    given = native.param_groups[0] if built else given
    first = (native,) if built else ([given], AdamW)
    own = {} if built else {"lr": LR}
    opt = RankAwareOptimizer(*first, model=model, tuned_at=AT_16, **own)
    assert opt.param_groups[0] is given
    before = rates_of(opt)
    given["lr"] = 2 * LR
    assert rates_of(opt) == pytest.approx({n: 2 * lr for n, lr in before.items()})
    train(model, opt)
    assert opt.param_groups[0] is given


@each_form
def test_exceptions_of_the_user(form):
    """Every form of the call accepts rates=, other_lr= and law=, and the first matching pattern of
    rates= is used.
    """
    patterns = {"head.bias": 0.5, "layer0.lora_B": 0.75, "layer0.*": 0.125}
    options = {"rates": patterns, "other_lr": 0.25, "law": "loraplus"}
    assert rates_of(form(mlp(), AdamW, {}, **options)) == pytest.approx(
        {
            "layer0.lora_A": 0.125,
            "layer0.lora_B": 0.75,
            "layer1.lora_A": LR,
            "layer1.lora_B": 16 * LR,
            "head.weight": 0.25,
            "head.bias": 0.5,
        }
    )


def test_a_part_of_the_model_is_named_by_the_whole():
    """If a submodule is passed beside model=, only its parameters train, under their names in the model and at the
    model's reference.
    """
    model = mlp((4, 4, 8))
    opt = RankAwareOptimizer(model.layer2, AdamW, model=model, lr=LR)
    assert names_of(opt) == [["layer2.lora_A"], ["layer2.lora_B"]]
    assert all(part.multiplier < 1 for part in opt.rates.groups)


# --- a learning rate that says where it was tuned -------------------------------------------------------------------

AT_8 = Reference(rank=8, alpha=8)
RATE = ra.Rate(LR, reference=AT_8)


@each_form
def test_a_rate_says_where_it_was_tuned(form):
    """A Rate with a configuration needs no tuned_at=, and gives the same learning rates as a plain number with it."""
    model = mlp((4, 8))
    given = {"lr": RATE} if form is not by_instance else {}
    if form is by_instance:
        opt = RankAwareOptimizer(AdamW(trained(model), lr=RATE), model=model)
    else:
        opt = RankAwareOptimizer(model, AdamW, **given)
    same = RankAwareOptimizer(mlp((4, 8)), AdamW, lr=LR, tuned_at=AT_8)
    assert rates_of(opt) == rates_of(same)
    assert opt.report().title == same.report().title


def test_a_suggestion_is_right_for_a_model_of_several_ranks():
    """A suggested learning rate is used unchanged for the model's most common rank, and converted
    for the other ranks.
    """
    model = mlp((4, 4, 16))
    rate = ra.suggest_lr(model)
    rates = rates_of(RankAwareOptimizer(model, AdamW, lr=rate))
    assert rates["layer0.lora_A"] == float(rate) > rates["layer2.lora_A"]


AT_ANOTHER = ["r=16,alpha=16", "r=8,alpha=16", "full", replace(AT_8, init="B")]


@pytest.mark.parametrize("tuned_at", AT_ANOTHER)
def test_another_place_than_the_rates_own_is_refused(tuned_at):
    """A tuned_at= that contradicts the configuration of a Rate raises an error, but a plain number
    is accepted with any tuned_at=.
    """
    with pytest.raises(
        OptimizerError, match=r"tuned_at= describes .*rank 8, alpha 8.*float"
    ):
        RankAwareOptimizer(mlp(), AdamW, lr=RATE, tuned_at=tuned_at)
    RankAwareOptimizer(mlp(), AdamW, lr=float(RATE), tuned_at=tuned_at)
    RankAwareOptimizer(mlp(), AdamW, lr=RATE, tuned_at="r=8,alpha=8")


@each_form
def test_groups_and_checkpoints_hold_plain_numbers(form):
    """Groups contain plain floats wherever a Rate was passed, so that a checkpoint loads with weights_only=True."""
    model = mlp((4, 8))
    params = [{"params": trained(model.layer0), "lr": RATE}, {"params": trained(model.layer1)}]  # fmt: skip
    own = {"rates": {"*lora_B": RATE}, "other_lr": RATE, "model": model}
    if form is by_instance:
        opt = RankAwareOptimizer(AdamW(params, lr=RATE), **own)
    else:
        opt = RankAwareOptimizer(params, AdamW, lr=RATE, **own)
    opt.add_param_group({"params": [model.head.weight], "lr": RATE})
    opt.add_param_group({"params": [model.head.bias]})
    train(model, opt, steps=1)
    assert {type(group["lr"]) for group in opt.param_groups} == {float}
    assert {type(part.lr) for part in opt.rates.groups} == {float}
    torch.save(opt.state_dict(), file := io.BytesIO())
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["lr"] == LR


# --- multipliers out of range ---------------------------------------------------------------------------------------


@each_form
def test_a_multiplier_out_of_all_range_is_warned_of(form):
    """An alpha of 1e-12 gives a warning that names the multiplier, because nobody can mean it, but
    a usual alpha gives no warning.
    """
    with pytest.warns(
        ra.RankAwareWarning,
        match=r"by [0-9.]+e\+06, .* between 0.0001 and 10000\..*alpha",
    ):
        form(mlp((4, 4), scalings=1e-12 / 4), AdamW, {}, tuned_at=AT_16)
    form(mlp((4, 4), scalings=1e-2), AdamW, {}, tuned_at=AT_16)


# --- groups that are added later ------------------------------------------------------------------------------------


@each_form
def test_a_later_group_is_split_and_scaled(form):
    """A new adapter is added as one group, and is split, named and converted as at construction."""
    model = mlp((4,), head=False)
    opt = form(model, AdamW, {}, tuned_at=AT_16)
    for own, lr in (({"lr": 0.5, "weight_decay": 0.2}, 0.5), ({}, LR)):
        model.layer9 = PlainLoRA(nn.Linear(16, 16), 8, 1.0)
        count = len(opt.param_groups)
        opt.add_param_group({"params": trained(model.layer9), **own})
        assert len(opt.param_groups) == count + 1
        group, parts = opt.param_groups[-1], opt.rates.groups[-2:]
        decay = own.get("weight_decay", 0.01)
        assert (group["lr"], group["weight_decay"]) == (lr, decay)
        assert [(part.role, part.rank) for part in parts] == [("A", 8), ("B", 8)]
        rates = [part.lr for part in parts]
        assert rates == pytest.approx([lr * multiplier(8)] * 2)
        assert names_of(opt)[-2:] == [["layer9.lora_A"], ["layer9.lora_B"]]
        surveyed = {factor.name for factor in opt.report().survey.factors}
        assert {"layer9.lora_A", "layer9.lora_B"} <= surveyed
        train(model, opt)
        model.old = model.layer9


@pytest.mark.parametrize(
    "lose", [lambda model, opt: copy.deepcopy(opt), lambda model, opt: opt]
)
def test_a_later_group_needs_the_model(lose):
    """Adding a group to a copy, or to an optimizer whose model was deleted, raises an error,
    because ranks cannot be read without the model.
    """
    model = mlp()
    opt = lose(model, by_class(model, AdamW, {}))
    del model
    gc.collect()
    layer = nn.ModuleDict({"new": PlainLoRA(nn.Linear(16, 16), 8, 1.0)})
    with pytest.raises(OptimizerError, match=r"its model was deleted.*model="):
        opt.add_param_group({"params": trained(layer)})


# --- parameters that are unfrozen later -----------------------------------------------------------------------------


@pytest.mark.parametrize("built", [True, False])
def test_frozen_factors_that_were_listed_have_their_rate_when_thawed(built):
    """A frozen adapter among the listed parameters gets the learning rate of its own rank, and
    trains at it once it is unfrozen.
    """
    model = mlp((4, 8))
    model.layer0.requires_grad_(False)
    listed = list(model.parameters())
    given = (AdamW(listed, lr=LR),) if built else (listed, AdamW)
    own = {} if built else {"lr": LR}
    rates = rates_of(RankAwareOptimizer(*given, model=model, tuned_at=AT_16, **own))
    thawed = rates_of(by_class(mlp((4, 8)), AdamW, {}, tuned_at=AT_16))
    assert {name: rates[name] for name in thawed} == thawed
