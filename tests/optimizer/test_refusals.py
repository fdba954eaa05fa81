"""Arguments that are refused: each raises one of our errors, which names the argument, and leaves
everything unchanged.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

import rankaware_optim as ra
from rankaware_optim import (
    OptimizerError,
    Power,
    RankAwareError,
    RankAwareOptimizer,
    Reference,
    rank_aware_param_groups,
)

from ..helpers.models import PlainLoRA, mlp, same, snapshot, trained
from ..helpers.optimizers import called
from ..helpers.recipes import RECIPE

LR = 1e-2
AT_16 = Reference(rank=16, alpha=16)


# --- arguments ------------------------------------------------------------------------------------------------------

NO_RATES = (0, -1.0, math.nan, math.inf, "1e-3", True)
# impossible arguments, by the name that the error must have
BAD = {
    "lr": [
        *({"lr": value} for value in (*NO_RATES, 10**400, torch.ones(2))),
        {"lr": ra.Rate(math.nan)},
        {"recipe": RECIPE},
    ],
    "other_lr": [{"other_lr": value} for value in NO_RATES],
    "rates": [
        *({"rates": {"head.*": value}} for value in NO_RATES),
        {"rates": 1e-3},
        {"rates": ["head.*"]},
        {"rates": {3: 1.0}},
        *({"rates": {name: 1.0}} for name in ("layer0", "x*", "layer0.base_layer.*")),
    ],
    "batch": [{"batch": value} for value in (0, -1, math.nan, math.inf, True, "64")],
    "steps": [
        {"steps": 9},
        *({"recipe": RECIPE, "lr": None, "steps": value} for value in (0, 2.5)),
    ],
    "law": [
        {"law": "nua"},
        {"law": ra.MuA},
        {"law": 3},
        {"law": "mua", "lr": None, "recipe": RECIPE},
    ],
    "multiplier": [
        {"law": Power(exponent=2.0), "lr": 5e-324, "tuned_at": AT_16},
        {"law": Power(exponent=-2.0), "lr": 1e308, "tuned_at": AT_16},
        {
            "law": Power(exponent=-2.0),
            "lr": torch.tensor(6e4).half(),
            "tuned_at": AT_16,
        },
    ],
    "tuned_at": [{"tuned_at": AT_16, "lr": None, "recipe": RECIPE}],
    "alpha": [{"tuned_at": "r=16"}],
    "recipe": [
        {"recipe": value, "lr": None} for value in ("no_such.toml", {"lr": 1e-3}, 3)
    ],
    "method": [{"method": "none"}],
    "init": [{"init": "C"}],
}
ROWS = [
    pytest.param(field, row, id=f"{field} {number}")
    for field, rows in BAD.items()
    for number, row in enumerate(rows)
]


@pytest.mark.filterwarnings("ignore:Recipe 'digits'")
@pytest.mark.parametrize(("field", "given"), ROWS)
def test_every_bad_value_is_our_error_and_names_its_field(field, given):
    """Every impossible value raises a short error with a cause and a cure that names the argument,
    and leaves the model unchanged.
    """
    model = mlp((4, 64), scalings=2.0, width=64)
    before = snapshot(model)
    with pytest.raises(RankAwareError) as caught:
        RankAwareOptimizer(model, AdamW, **{"lr": LR, **given})
    assert field in str(caught.value)
    assert caught.value.cause.endswith(".")
    assert caught.value.cure.endswith(".")
    assert len(str(caught.value)) < 600
    assert same(before, snapshot(model))


def native_groups(model):
    return rank_aware_param_groups(model, lr=LR, tuned_at=AT_16)


def read_before(model):
    """Return an exhausted iterator of parameters, as a user has who counted the parameters first."""
    params = filter(lambda param: param.requires_grad, model.parameters())
    assert len(list(params)) == 6
    return params


def parallel_lists(model):
    """Return a group with an option that has one value for each parameter."""
    return [{"params": trained(model), "lr_scales": [1.0] * 6}]


FIRST = [
    # the first argument, model=, and a pattern of the error
    (trained, None, r"expected, but a list of Parameter was passed.*as model="),
    (lambda m: [m, 1], None, r"expected, but a list of Sequential and int was passed"),
    (lambda m: m.parameters(), None, r"type generator was passed|<generator"),
    (lambda m: AdamW, None, "A model was expected"),
    (lambda m: SimpleNamespace(model=m, args=None), None, r"attach\(trainer"),
    (lambda m: m.head, None, "get_peft_model.*method='full'.* register"),
    (lambda m: m.requires_grad_(False), None, "all of them are frozen.*is_trainable="),
    (
        lambda m: trained(mlp()),
        lambda m: m,
        r"does not belong to a model in model=.*model=\[",
    ),
    (lambda m: [*trained(m), nn.Parameter(torch.ones(1))], lambda m: m, "other_lr="),
    (lambda m: [1.0], lambda m: m, "type float was passed"),
    (lambda m: [{"params": trained(m), "lr": 0.0}], lambda m: m, "group's lr is 0.0"),
    (lambda m: [{"lr": LR}], lambda m: m, r"must contain 'params'.*\['lr'\]"),
    (lambda m: [], lambda m: m, "got no parameters.*an? iterator|filter"),
    (read_before, lambda m: m, "got no parameters"),
    (lambda m: [{"params": []}, {"params": []}], lambda m: m, "got no parameters"),
    (parallel_lists, lambda m: m, "'lr_scales' has 6 values"),
    (native_groups, lambda m: m, "rank_aware_param_groups.*plain"),
]


@pytest.mark.parametrize(("first", "model", "words"), FIRST)
def test_what_is_no_model_or_not_its_parameters_is_refused(first, model, words):
    """If something else than a model or its parameters is passed, the error says what was passed
    and what to pass instead.
    """
    of = mlp()
    given = {} if model is None else {"model": model(of)}
    with pytest.raises(RankAwareError, match=words):
        RankAwareOptimizer(first(of), AdamW, lr=LR, **given)


@pytest.mark.parametrize(
    ("own", "given"), [({}, {"other_lr": 2e-3}), ({"lr": 2e-3}, {})]
)
def test_a_parameter_outside_the_model_may_have_a_rate(own, given):
    """A parameter outside the model, such as a parameter of the loss, may train at an explicit
    learning rate.
    """
    model, stranger = mlp(), nn.Parameter(torch.ones(()))
    groups = [{"params": trained(model)}, {"params": [stranger], **own}]
    options = {"model": model, "lr": LR, "tuned_at": AT_16, **given}
    made = rank_aware_param_groups(groups, **options)
    (rate,) = (g["lr"] for g in made for _, p in g["params"] if p is stranger)
    assert rate == pytest.approx(2e-3)


SWAPPED = [
    (lambda m: (AdamW(trained(m), lr=LR), m), r"RankAwareOptimizer\(opt, model=model"),
    (
        lambda m: (trained(m), m),
        r"Pass the model as the keyword argument model=, .*model=model",
    ),
]


@pytest.mark.parametrize(("given", "words"), SWAPPED)
def test_a_model_in_the_optimizers_place_is_refused(given, words):
    """Passing the model as the second argument raises an error that shows the right call."""
    with pytest.raises(OptimizerError, match=words):
        RankAwareOptimizer(*given(mlp()))


def test_options_of_the_optimizer_may_be_as_long_as_its_parameters():
    """A list with one value for each parameter is accepted if it is AdamW's betas, or if the group
    is not split into parts.
    """
    model = mlp((4,), head=False)
    group = {"params": trained(model), "betas": [0.8, 0.9]}
    RankAwareOptimizer([group], AdamW, model=model, lr=LR)
    group = {"params": [model.layer0.lora_A], "lr_scales": [1.0]}
    RankAwareOptimizer([group], AdamW, model=model, lr=LR)


class TakesAnything(SGD):
    """An optimizer that ignores unknown arguments, as many optimizers of other packages do."""

    def __init__(self, params, lr=LR, **unused):
        super().__init__(params, lr)


@pytest.mark.parametrize("kind", [AdamW, TakesAnything])
@pytest.mark.parametrize("near", ["tuned_att", "recipes", "other_lrs"])
def test_a_keyword_that_is_nearly_ours_is_refused_by_name(kind, near):
    """A misspelled argument of ours raises an error with the right name, but an argument of the
    optimizer class is accepted.
    """
    with pytest.raises(RankAwareError, match=rf"{near}=.* Use {near[:-1]}="):
        RankAwareOptimizer(mlp(), kind, lr=LR, **{near: 1.0})
    RankAwareOptimizer(mlp(), TakesAnything, lr=LR, unheard=1, nesterov=True)


def test_plain_groups_refuse_what_the_optimizer_does_not_take():
    """rank_aware_param_groups raises an error for an unknown argument, although it builds no
    optimizer that would do so.
    """
    with pytest.raises(OptimizerError, match=r"keyword argument .optimizer_class"):
        rank_aware_param_groups(mlp(), lr=LR, optimizer_class=SGD)


# --- classes --------------------------------------------------------------------------------------------------------


class NoDefault(SGD):
    """An optimizer whose learning rate has no default."""

    def __init__(self, params, lr):
        super().__init__(params, lr)


class Whole(SGD):
    """An optimizer that takes the model and makes its parameter groups itself."""

    def __init__(self, model, lr=LR):
        super().__init__(trained(model), lr=lr)


class ByConfig(SGD):
    """An optimizer that takes its learning rate in a configuration object, as nadir's classes do."""

    def __init__(self, params, config=None):
        super().__init__(params, lr=LR)


class HasAdam(SGD):
    """An optimizer that trains vectors with an Adam of its own at three times the learning rate, as
    Kronos does.
    """

    def __init__(self, params, lr=LR):
        super().__init__(params, lr=lr)
        vectors = [p for g in self.param_groups for p in g["params"] if p.dim() < 2]
        self._adam = torch.optim.Adam(vectors, lr=3 * lr)


class Dealt(SGD):
    """An optimizer whose constructor exchanges the parameters between its groups."""

    def __init__(self, params, lr=LR):
        super().__init__(params, lr)
        dealt = [group["params"] for group in self.param_groups]
        for group, other in zip(self.param_groups, dealt[::-1], strict=True):
            group["params"] = other


KINDS = [
    (None, "Pass a class"),
    (nn.Linear, "must be a torch optimizer class"),
    (RankAwareOptimizer, "must be a torch optimizer class"),
    ("adamx", r"Unknown optimizer 'adamx': .*torch\.optim .* one of .*AdamW.*SGD"),
    ("torch.optim.Lamb", r"Unknown optimizer 'Lamb': .*torch\.optim"),
    ("no_such_package:Lamb", "'no_such_package'.* cannot be imported"),
    (torch.optim.LBFGS, "LBFGS cannot use .*because it takes one parameter group only"),
    (HasAdam, "HasAdam, because HasAdam contains another optimizer"),
    (Dealt, "Dealt rearranges its groups.*wrap it"),
    (Whole, "could not create the optimizer Whole.*wrap it"),
    (ByConfig, "could not create the optimizer ByConfig.*wrap it"),
    (getattr(torch.optim, "Muon", Whole), "could not create the optimizer "),
]


@pytest.mark.parametrize(("kind", "message"), KINDS)
def test_a_class_that_cannot_have_a_rate_per_rank_is_refused(kind, message):
    """A class that would train parameters at the wrong learning rates, or not at all, raises an
    error.
    """
    model = mlp((4, 64))
    before = snapshot(model)
    with pytest.raises(OptimizerError, match=message):
        RankAwareOptimizer(model, kind, lr=LR, tuned_at=AT_16)
    assert same(before, snapshot(model))


def test_a_rate_that_nobody_tuned_is_refused_where_a_reference_says_that_it_was():
    """tuned_at= without lr= raises an error, because the class's default learning rate was not
    tuned there, and so does a class without a default.
    """
    with pytest.raises(
        OptimizerError, match=r"0\.001, the default learning rate of AdamW"
    ):
        RankAwareOptimizer(mlp(), AdamW, tuned_at=AT_16)
    with pytest.raises(OptimizerError, match="NoDefault has no default learning rate"):
        RankAwareOptimizer(mlp(), NoDefault)


@pytest.mark.parametrize("kind", [Whole, ByConfig])
def test_what_cannot_be_built_on_groups_is_wrapped_as_an_instance(kind):
    """An instance of a class that takes the model or a configuration can be wrapped, and trains
    each rank at its own learning rate.
    """
    model = mlp((4, 64))
    built = kind(model if kind is Whole else trained(model))
    opt = RankAwareOptimizer(built, model=model, tuned_at=AT_16)
    assert {part.rank for part in opt.rates.groups} == {4, 64, None}
    assert all(part.lr == part.base_lr * part.multiplier for part in opt.rates.groups)


# --- existing optimizers --------------------------------------------------------------------------------------------


class KeepsRates(SGD):
    """An optimizer that copies the learning rates of its groups when it is built, as AdaBound does."""

    def __init__(self, params, lr=LR):
        super().__init__(params, lr)
        self.base_lrs = [group["lr"] for group in self.param_groups]


def plain(model, kind=AdamW, **given):
    return kind(trained(model), **{"lr": LR, **given})


def scheduled(model):
    opt = plain(model)
    lr_scheduler.StepLR(opt, 1)
    return opt


def stepped_by_its_own(model):
    opt = plain(model)
    opt.step = lambda closure=None: None
    return opt


def second_rate(model):
    return called("Muon", "omnimuon")(trained(model), lr=LR, matrix_lr=0.02)


def ours(model):
    return RankAwareOptimizer(model, AdamW, lr=LR)


FAR = {"law": Power(exponent=2.0), "tuned_at": AT_16}
BUILT = [
    (lambda m: plain(m, lr=0.0), {}, "lr is 0.0"),
    (lambda m: plain(m, lr=5e-324), FAR, "times the multiplier"),
    (plain, {"lr": LR}, "lr= was passed"),
    (plain, {"eps": 1.0}, "eps= was passed"),
    (plain, {"model": None}, "A model was expected"),
    (plain, {"rates": {"x": 1.0}}, "does not match"),
    # all groups of an existing optimizer have a learning rate, which nobody chose for this parameter
    (lambda m: AdamW([*trained(m), nn.Parameter(torch.ones(1))]), {}, "other_lr="),
    (lambda m: plain(mlp()), {}, "does not belong to a model in model="),
    (lambda m: plain(m, torch.optim.LBFGS), {}, "takes one parameter group"),
    (ours, {}, "already a RankAwareOptimizer"),
    (scheduled, {}, "model=model. right after"),
    (stepped_by_its_own, {}, "model=model. right after"),
    (second_rate, {}, "second learning rate, matrix_lr=0.02"),
    (lambda m: plain(m, HasAdam), {}, "contains another optimizer"),
    (lambda m: plain(m, KeepsRates), {}, "base_lrs.*Pass the class"),
    (lambda m: AdamW(native_groups(m)), {}, "rank_aware_param_groups"),
]


@pytest.mark.parametrize(("make", "options", "message"), BUILT)
def test_a_refused_instance_is_left_as_it_was(make, options, message):
    """An existing optimizer that cannot be wrapped keeps its class, its defaults and its groups."""
    model = mlp()
    opt = make(model)
    before = type(opt), dict(opt.defaults), [dict(g) for g in opt.param_groups]
    with pytest.raises(RankAwareError, match=message):
        RankAwareOptimizer(opt, **{"model": model, **options})
    after = type(opt), dict(opt.defaults), [dict(g) for g in opt.param_groups]
    assert before == after


def test_what_has_a_rate_by_another_name_for_other_ends_is_wrapped():
    """An optimizer may have further learning rates of a schedule, a preconditioner or a thermostat,
    because these train no parameter.
    """
    given = {"precond_lr": 0.1, "final_lr": 0.1, "thermostat_lr": 0.1}
    RankAwareOptimizer(mlp(), called("Muon", "omnimuon"), lr=LR, **given)
    RankAwareOptimizer(mlp((4, 8)), KeepsRates, lr=LR)


def test_the_class_of_an_instance_cannot_build_another():
    """Calling type(opt) to build another optimizer raises an error, because that optimizer would
    have no multipliers, but type(opt) has the signature of the user's class.
    """
    opt = ours(mlp())
    with pytest.raises(OptimizerError, match=r"Call RankAwareOptimizer\(model, AdamW"):
        type(opt)(trained(mlp()), lr=LR)
    assert inspect.signature(type(opt)) == inspect.signature(AdamW)


def test_a_refused_optimizer_leaves_the_given_dicts():
    """If building the optimizer fails, the user's groups stay unchanged."""
    model = mlp((4, 8))
    mine = {"params": trained(model), "lr": 1e308}
    with pytest.raises(OptimizerError, match="times the multiplier"):
        RankAwareOptimizer([mine], AdamW, model=model, tuned_at=AT_16)
    assert mine.keys() == {"params", "lr"}


# --- groups that are added later ------------------------------------------------------------------------------------


class RatesInGroups(SGD):
    """An optimizer without a default learning rate that sets one in its groups in `__init__`, as
    pytorch_optimizer's Muon does.
    """

    def __init__(self, params, lr=LR):
        super().__init__(params, lr=lr)
        del self.defaults["lr"]


def out_of_range(model):
    """Return a group with one more parameter and one more adapter, whose learning rate is out of range."""
    model.layer9 = PlainLoRA(nn.Linear(16, 16), 1, 1e-3)
    params = [nn.Parameter(torch.ones(2)), *trained(model.layer9)]
    return {"params": params, "lr": 1e308}


def parallel(model):
    """Return a group with one more adapter of two ranks and an option that has a value for each parameter."""
    model.layer8, model.layer9 = (PlainLoRA(nn.Linear(16, 16), r) for r in (2, 4))
    params = [model.layer8.lora_A, model.layer9.lora_A]
    return {"params": params, "lr_scales": [1.0, 2.0]}


LATER = [
    (AdamW, lambda m: {"params": [m.layer0.lora_A]}, "more than one parameter group"),
    (AdamW, lambda m: {"params": [nn.Parameter(torch.ones(2))], "lr": 0.0}, "lr is 0"),
    (AdamW, out_of_range, r"rate 1e\+308 times the multiplier"),
    (RatesInGroups, lambda m: {"params": [m.layer0.base_layer.weight]}, "'lr'"),
    (
        AdamW,
        lambda m: {"params": [nn.Parameter(torch.ones(2))]},
        "does not belong to a model in model=",
    ),
    (
        AdamW,
        lambda m: {"params": trained(mlp())},
        "does not belong to a model in model=",
    ),
    (AdamW, lambda m: {"lr": 1.0}, r"must contain 'params'.*\['lr'\]"),
    (AdamW, parallel, "'lr_scales' has 2 values"),
]


@pytest.mark.parametrize(("kind", "group", "message"), LATER)
def test_bad_later_groups_are_refused(kind, group, message):
    """Adding an impossible group raises an error, and the optimizer's groups and learning rates
    stay unchanged.
    """
    model = mlp()
    opt = RankAwareOptimizer(model, kind, lr=LR)
    before = [dict(g) for g in opt.param_groups]
    rates = dict(opt.rates)
    with pytest.raises(OptimizerError, match=message):
        opt.add_param_group(group(model))
    assert before == [dict(g) for g in opt.param_groups]
    assert rates == dict(opt.rates)
