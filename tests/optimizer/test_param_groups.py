"""Groups: which parameter gets which multiplier, how groups are cut and ordered, and what the report says of them."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankaware_optim import (
    Falling,
    InspectionError,
    MuA,
    OptimizerError,
    Power,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
    convert_lr,
    inspect_model,
    rank_aware_param_groups,
)
from rankaware_optim._types import Factor
from rankaware_optim.inspection import Walk, walk
from rankaware_optim.optimizer import PlanOptions, make_plan, plan_rates
from rankaware_optim.optimizer._param_groups import user_groups

from ..helpers.models import adapted, mlp
from ..helpers.optimizers import DISTANCE, muon, used

LR = 1e-3
AT_16 = Reference(rank=16, alpha=16)

UNHEARD = type("Unheard", (torch.optim.Optimizer,), {})


def multipliers(groups: list[dict]) -> dict[str, float]:
    """Multiplier by parameter name."""
    return {
        name: group["rank_multiplier"]
        for group in groups
        for name, _ in group["params"]
    }


def expected(
    rank: int,
    scaling: float,
    reference: Reference,
    *,
    width: float = 16,
    init: str = "A",
) -> float:
    """The default law's multiplier at a width that both sides share, with the distance of a rate that moves."""
    factor = Factor("w", "A", rank, width, width, scaling, init)
    moved = Falling().multiplier(
        factor, replace(reference, fan_in=reference.fan_in or width)
    )
    return used(Falling(), moved)


# --- cutting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3, 12])
def test_a_uniform_model_has_three_groups(layers):
    """A uniform model has one group of A, one of B and one of other parameters, however many layers."""
    groups = rank_aware_param_groups(mlp((4,) * layers), lr=LR, tuned_at=AT_16)
    assert [(g["lora_role"], len(g["params"])) for g in groups] == [
        ("A", layers),
        ("B", layers),
        ("other", 2),
    ]


@given(
    ranks=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4).map(tuple),
    scaling=st.sampled_from([0.25, 1.0, 2.0]),
    init=st.sampled_from("AB"),
    lr=st.floats(1e-6, 1.0),
    reference=st.none()
    | st.builds(Reference, rank=st.integers(1, 64), alpha=st.integers(1, 64)),
)
@settings(max_examples=50)
def test_groups_hold_everything_once_at_their_rate(ranks, scaling, init, lr, reference):
    """Every trainable parameter is in one group, none is empty, and a native group's lr is base × multiplier."""
    model = mlp(ranks, scalings=scaling, init=init)
    groups = rank_aware_param_groups(model, lr=lr, tuned_at=reference)
    listed = [name for group in groups for name, _ in group["params"]]
    assert sorted(listed) == sorted(
        name for name, p in model.named_parameters() if p.requires_grad
    )
    assert all(group["params"] for group in groups)
    assert all(
        group["lr"] == pytest.approx(lr * group["rank_multiplier"]) for group in groups
    )


@pytest.mark.parametrize(
    "reference",
    [None, AT_16, Reference(rank=4, alpha=16), Reference(rank=8, alpha=8, fan_in=64)],
)
@pytest.mark.parametrize("scalings", [1.0, (1.0, 0.5, 1.0)])
def test_multipliers_are_the_laws(scalings, reference):
    """A factor's multiplier is the law's at the model's width; by default from the model's dominant configuration."""
    ranks, each = (
        (4, 8, 4),
        scalings if isinstance(scalings, tuple) else (scalings,) * 3,
    )
    found = multipliers(
        rank_aware_param_groups(
            mlp(ranks, scalings=scalings), lr=LR, tuned_at=reference
        )
    )
    for i, (rank, scaling) in enumerate(zip(ranks, each, strict=True)):
        value = expected(rank, scaling, reference or Reference(rank=4, alpha=4))
        assert (
            found[f"layer{i}.lora_A"]
            == found[f"layer{i}.lora_B"]
            == pytest.approx(value)
        )
    assert found["head.weight"] == found["head.bias"] == 1.0


def test_a_mixed_model_is_scaled_around_its_dominant_rank():
    """Without tuned_at the most common rank keeps the base rate, a higher one gets less, a lower one more."""
    found = multipliers(rank_aware_param_groups(mlp((4, 2, 4, 8)), lr=LR))
    assert found["layer0.lora_A"] == found["layer2.lora_B"] == 1.0
    assert found["layer3.lora_A"] < 1.0 < found["layer1.lora_A"]


def test_users_groups_are_split_and_never_merged():
    """Two groups of the user's with equal options stay two; each keeps its options, and its own rate is multiplied."""
    model = mlp((4, 8))
    first, second = (
        list(model.get_submodule("layer0").parameters()),
        list(model.get_submodule("layer1").parameters()),
    )
    users = [
        {"params": first, "lr": 5e-4, "weight_decay": 0.3},
        {"params": second, "weight_decay": 0.3, "betas": (0.5, 0.6)},
        {"params": list(model.get_submodule("head").parameters()), "weight_decay": 0.3},
    ]
    for group in users:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    groups = rank_aware_param_groups(users, lr=LR, model=model, tuned_at=AT_16)
    assert {g["weight_decay"] for g in groups} == {0.3}
    found = {g["params"][0][0]: g for g in groups}
    assert found.keys() == {
        "layer0.lora_A",
        "layer0.lora_B",
        "layer1.lora_A",
        "layer1.lora_B",
        "head.weight",
    }
    assert found["layer0.lora_A"]["lr"] == pytest.approx(5e-4 * expected(4, 1.0, AT_16))
    assert found["layer1.lora_B"]["lr"] == pytest.approx(LR * expected(8, 1.0, AT_16))
    assert found["layer1.lora_B"]["betas"] == (0.5, 0.6)
    assert "betas" not in found["layer0.lora_A"]


def test_the_users_groups_are_not_changed():
    """The dicts and lists that the user passes are left as they were."""
    model = mlp()
    params = [p for p in model.parameters() if p.requires_grad]
    users = [{"params": params, "lr": LR}]
    rank_aware_param_groups(users, lr=1.0, model=model, tuned_at=AT_16)
    assert users == [{"params": params, "lr": LR}]
    assert len(params) == 6


FORMS = {
    "model": lambda model: model,
    "parameters": lambda model: (p for p in model.parameters() if p.requires_grad),
    "named": lambda model: (
        (n, p) for n, p in model.named_parameters() if p.requires_grad
    ),
    "dicts": lambda model: [
        {"params": [p for p in model.parameters() if p.requires_grad]}
    ],
    "named dicts": lambda model: [
        {"params": [(n, p) for n, p in model.named_parameters() if p.requires_grad]}
    ],
    "generator": lambda model: (
        {"params": p} for p in [[p for p in model.parameters() if p.requires_grad]]
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_parameters_is_taken(form):
    """A model, parameters, named parameters and dicts of them give the same groups."""
    model = mlp((4, 8))
    expect = rank_aware_param_groups(model, lr=LR)
    assert str(rank_aware_param_groups(FORMS[form](model), model=model, lr=LR)) == str(
        expect
    )


def test_a_single_tensor_is_taken():
    """A group of one bare tensor is a group."""
    model = mlp()
    (group,) = rank_aware_param_groups(
        [{"params": model.get_parameter("layer0.lora_A")}], model=model, lr=LR
    )
    assert [name for name, _ in group["params"]] == ["layer0.lora_A"]


@pytest.mark.parametrize("named", [True, False])
def test_names_can_be_left_out(named):
    """With named=False groups hold bare tensors; either kind is accepted by a torch optimizer."""
    groups = rank_aware_param_groups(mlp(), lr=LR, named=named)
    assert isinstance(groups[0]["params"][0], tuple) is named
    assert len(torch.optim.AdamW(groups).param_groups) == 3


def test_a_groups_scheduled_rates_are_multiplied_with_its_rate():
    """The rates between which a scheduler moves a group get its multiplier, and a wrapper reads them back as given."""
    model, scheduled = (
        mlp(),
        {"lr": LR, "initial_lr": 2 * LR, "max_lr": 8 * LR, "min_lr": LR / 8},
    )
    native = rank_aware_param_groups(
        [{"params": model.parameters(), **scheduled}],
        lr=1.0,
        model=model,
        tuned_at=AT_16,
    )
    wrapped = RankAwareOptimizer(
        native, torch.optim.AdamW, lr=1.0, model=model, tuned_at=AT_16
    )
    for key, rate in scheduled.items():
        assert [g[key] for g in native] == pytest.approx(
            [rate * g["rank_multiplier"] for g in native]
        )
        assert [g[key] for g in wrapped.param_groups] == pytest.approx(
            [rate] * len(native)
        )


def test_group_values_are_plain():
    """Beside parameters, groups hold only what torch.load(weights_only=True) accepts."""
    for group in rank_aware_param_groups(mlp(), lr=LR):
        values = [value for key, value in group.items() if key != "params"]
        assert all(
            value is None or isinstance(value, (int, float, str)) for value in values
        )


# --- the user's exceptions ------------------------------------------------------------------------------------------


def test_rates_by_pattern():
    """rates= gives any parameter its own rate; the first pattern that matches wins."""
    rates = {"layer0.lora_B": 0.7, "layer0.*": 0.5, "head.*": 0.25}
    groups = rank_aware_param_groups(mlp((4, 8)), lr=LR, tuned_at=AT_16, rates=rates)
    found = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert [found[f"layer0.lora_{role}"] for role in "AB"] == pytest.approx([0.5, 0.7])
    assert [found["head.weight"], found["head.bias"]] == pytest.approx([0.25, 0.25])
    assert found["layer1.lora_A"] == pytest.approx(LR * expected(8, 1.0, AT_16))


def test_other_lr():
    """other_lr= is the rate of all that is no factor, except where a pattern says another."""
    groups = rank_aware_param_groups(mlp(), lr=LR, other_lr=0.1, rates={"*bias": 0.2})
    found = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert [
        found["head.weight"],
        found["head.bias"],
        found["layer0.lora_A"],
    ] == pytest.approx([0.1, 0.2, LR])


def test_groups_keep_the_order_of_the_parameters():
    """Groups come as their first parameters do, whatever their rates."""
    groups = rank_aware_param_groups(mlp(), lr=LR, rates={"layer0.*": 0.5})
    assert [g["lr"] == LR for g in groups] == [False, False, True, True, True]


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1e-3", True, None])
def test_bad_rates_are_refused(value):
    """A rate that is no positive finite number is an error that names where it stands."""
    with pytest.raises(OptimizerError, match=r"^rates\['head\.\*'\] is"):
        rank_aware_param_groups(mlp(), lr=LR, rates={"head.*": value})
    with pytest.raises(OptimizerError, match=r"^lr is"):
        rank_aware_param_groups(mlp(), lr=value)
    if value is not None:
        with pytest.raises(OptimizerError, match=r"^other_lr is"):
            rank_aware_param_groups(mlp(), lr=LR, other_lr=value)


@pytest.mark.parametrize(
    "pattern", ["classifier*", "layer0", "layer9.*", "layer0.base_layer.*"]
)
def test_a_pattern_without_a_match_is_refused(pattern):
    """A pattern that matches no trainable parameter is an error that shows a real name."""
    with pytest.raises(
        OptimizerError, match=r"matches none of 6 trainable parameters.*'head\.bias'"
    ):
        rank_aware_param_groups(mlp(), lr=LR, rates={pattern: 1e-3})


PARAMS_ERRORS = [
    (lambda m: [*_trained(m), _trained(m)[0]], r"layer0\.lora_A is listed twice"),
    (
        lambda m: [{"params": _trained(m)}, {"params": _trained(m)[-1:]}],
        r"head\.bias is listed twice",
    ),
    (lambda m: _trained(mlp()), r"None of the 6 parameters given belongs to the model"),
    (lambda m: [], r"no trainable parameter"),
    (lambda m: [{"params": []}], r"no trainable parameter"),
    (lambda m: [1.0], r"holds a float"),
    (lambda m: ["head.weight"], r"holds a str"),
    (lambda m: [{"params": _trained(m), "lr": 0.0}], r"lr is 0\.0"),
    (lambda m: [{"params": _trained(m), "lr": -1.0}], r"lr is -1\.0"),
    (lambda m: [{"params": _trained(m), "lr": math.nan}], r"lr is nan"),
]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(("params", "message"), PARAMS_ERRORS)
def test_bad_parameters_are_refused(params, message):
    """Parameters listed twice, of another model, none at all, no tensors, or at an impossible rate are an error."""
    model = mlp()
    with pytest.raises(OptimizerError, match=message):
        rank_aware_param_groups(params(model), model=model, lr=LR)


def test_parameters_without_a_model_are_refused():
    """Parameters alone do not tell factors."""
    with pytest.raises(OptimizerError, match="from parameters alone"):
        rank_aware_param_groups(mlp().parameters(), lr=LR)


RATES_OF_A_STRANGER = [
    ({}, {"other_lr": 2e-3}, 2e-3),
    ({"lr": 4e-3}, {}, 4e-3),
]


@pytest.mark.parametrize(("own", "given", "rate"), RATES_OF_A_STRANGER)
def test_a_parameter_outside_the_model_needs_a_rate(own, given, rate):
    """A parameter that is not the model's, such as a loss's own, has the rate given for it, and is refused without."""
    model, stranger = mlp(), nn.Parameter(torch.ones(()))
    groups = [{"params": _trained(model)}, {"params": [stranger], **own}]
    options = {"model": model, "lr": LR, "tuned_at": AT_16}
    made = rank_aware_param_groups(groups, **options, **given)
    rates = [g["lr"] for g in made for _, p in g["params"] if p is stranger]
    assert rates == pytest.approx([rate])
    without = [{"params": _trained(model)}, {"params": [stranger]}]
    with pytest.raises(OptimizerError, match=r"belongs to no model given.*model=\["):
        rank_aware_param_groups(without, **options)


# --- inits, embeddings, widths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "other"), ["AB", "BA"])
def test_inits_are_not_crossed(init, other):
    """A factor of another init than the reference's is scaled along its own init's law, and the report says so."""
    reference = replace(AT_16, init=other, fan_in=16)
    found = multipliers(
        rank_aware_param_groups(mlp(init=init), lr=LR, tuned_at=reference)
    )
    assert found["layer0.lora_A"] == pytest.approx(
        expected(4, 1.0, replace(reference, init=init), init=init)
    )
    notes = plan(mlp(init=init), tuned_at=reference).notes
    assert ["are scaled within their own init" in note for note in notes] == [
        True,
        False,
    ]
    assert not plan(mlp(init=init)).notes


def test_adapters_without_a_zero_factor_stay_at_the_base_rate():
    """PiSSA and similar inits keep the base rate, with a warning that says why."""
    model = mlp((4, 8), init="other")
    with pytest.warns(
        RankAwareWarning, match=r"neither factor zero .* init='A' .*'B'"
    ) as caught:
        groups = rank_aware_param_groups(model, lr=LR, tuned_at=AT_16)
    assert caught[0].filename == __file__
    assert set(multipliers(groups).values()) == {1.0}


@pytest.mark.parametrize("init", ["A", "B"])
def test_a_named_init_is_scaled_without_a_warning(init):
    """Naming the init of such adapters scales them by that init's law."""
    found = multipliers(
        rank_aware_param_groups(
            mlp(init="other"), lr=LR, init=init, tuned_at=replace(AT_16, init=init)
        )
    )
    assert found["layer0.lora_A"] == pytest.approx(
        expected(4, 1.0, replace(AT_16, init=init), init=init)
    )


def test_unknown_inits_count_as_a():
    """On the meta device adapters count as Init[A], with a note."""
    model = nn.Sequential(adapted(device="meta"))
    found = multipliers(rank_aware_param_groups(model, lr=LR, tuned_at=AT_16))
    assert found["0.lora_A"] == pytest.approx(expected(4, 2.0, AT_16, width=12))
    assert "started at B = 0" in plan(model).notes[0]


@pytest.mark.parametrize("init", ["A", "B"])
def test_embeddings_are_scaled_along_their_own_law_at_width_one(init):
    """An embedding is scaled from its own init at width 1: by rank and scaling, never by the vocabulary."""
    embedding = adapted(kind="embedding", scaling=1.0, init=init)
    model = nn.ModuleDict({"lin": adapted(scaling=1.0), "emb": embedding})
    found = multipliers(rank_aware_param_groups(model, lr=LR, tuned_at=AT_16))
    value = expected(4, 1.0, replace(AT_16, init=init, fan_in=1), width=1, init=init)
    assert found["emb.lora_A"] == pytest.approx(value)
    assert multipliers(rank_aware_param_groups(model, lr=LR))["emb.lora_A"] == 1.0


# --- the distance of a moved rate -----------------------------------------------------------------------------------

LAMB = type("Lamb", (torch.optim.SGD,), {})
KEEPS = [
    ({}, DISTANCE),
    ({"law": Falling()}, DISTANCE),
    ({"optimizer_class": torch.optim.AdamW}, DISTANCE),
    ({"optimizer_class": UNHEARD}, DISTANCE),  # of an unknown family
    (
        {"tuned_at": Reference(rank=16, alpha=16, fan_in=16, batch=16), "batch": 64},
        2.0 * DISTANCE,
    ),
    ({"optimizer_class": LAMB}, 1.0),
    ({"law": "mua"}, 1.0),
    ({"law": "mua-paper"}, 1.0),
    ({"law": Falling(power=0.5)}, 1.0),
    ({"law": Falling(law=MuA(tokens=2.0))}, 1.0),
    ({"law": Power(law=Falling())}, 1.0),
]


@pytest.mark.filterwarnings("ignore:.* is of an unknown family")
@pytest.mark.parametrize(("options", "kept"), KEEPS)
def test_a_rate_that_the_default_law_moves_keeps_one_distance(options, kept):
    """The default law's moved rates are multiplied once, with a note. Other laws and families are used as they are."""
    given = {"tuned_at": Reference(rank=16, alpha=16, fan_in=16)} | options
    made = plan(mlp((4, 16)), **given)
    factor = next(f for f in inspect_model(mlp((4, 16))).factors if f.rank == 4)
    groups = rank_aware_param_groups(mlp((4, 16)), lr=LR, **given)
    found = multipliers(groups)
    assert (
        found["layer0.lora_A"]
        == found["layer0.lora_B"]
        == pytest.approx(made.multiplier(factor) * kept)
    )
    # not moved by the law
    assert found["layer1.lora_A"] == found["head.weight"] == made.rule.by_run
    assert sum("keeps a distance: × 0.9" in note for note in made.notes) == (
        kept not in (1.0, 2.0)
    )


def test_what_does_not_move_keeps_no_distance():
    """A rate used as it was tuned, given by name, or for other parameters keeps none, and no note speaks of it."""
    for options in (
        {},
        {"tuned_at": Reference(rank=4, alpha=4)},
        {"tuned_at": AT_16, "rates": {"layer*": LR}},
    ):
        found = multipliers(rank_aware_param_groups(mlp((4,)), lr=LR, **options))
        assert set(found.values()) == {1.0}
        assert not any("distance" in note for note in plan(mlp((4,)), **options).notes)


@pytest.mark.parametrize(
    ("ranks", "to"),
    [
        ((4,), "r=4,alpha=4"),
        ((64,), "r=64,alpha=64"),
        ((16,), "r=16,alpha=16"),
        ((64,), "full"),
    ],
)
def test_a_conversion_is_the_optimizers_rate(ranks, to):
    """convert_lr gives the rate at which the optimizer trains, to all digits."""
    at = Reference(rank=16, alpha=16, fan_in=16)
    model = mlp(ranks) if to != "full" else nn.Linear(16, 16)
    groups = rank_aware_param_groups(
        model, lr=LR, tuned_at=at, method="full" if to == "full" else "lora"
    )
    assert convert_lr(LR, from_=at, to=to).lr == groups[0]["lr"]


# --- full finetuning ------------------------------------------------------------------------------------------------


def whole() -> nn.Module:
    layers = {
        "emb": nn.Embedding(9, 8),
        "in": nn.Linear(8, 32),
        "norm": nn.LayerNorm(32),
        "out": nn.Linear(32, 3),
    }
    return nn.ModuleDict(layers)


def test_full_finetuning_moves_everything_by_one_multiplier():
    """Under method="full" weights, biases, norms and embeddings move from the mean width to the largest."""
    found = multipliers(
        rank_aware_param_groups(whole(), lr=LR, method="full", tuned_at=AT_16)
    )
    mean = (8 * 8 * 32 + 32 * 32 * 3) / (8 * 32 + 32 * 3)
    value = MuA().multiplier(
        Factor("w", "full", None, 32, 32), replace(AT_16, fan_in=mean)
    )
    assert list(found.values()) == pytest.approx([value * DISTANCE] * 7)


def test_full_finetuning_at_its_own_reference_changes_nothing():
    """Without tuned_at a full-finetuning rate is the model's own."""
    assert set(
        multipliers(rank_aware_param_groups(whole(), lr=LR, method="full")).values()
    ) == {1.0}


def test_full_finetuning_with_exceptions():
    """rates= and other_lr= hold under full finetuning too, where biases, norms and embeddings are other."""
    groups = rank_aware_param_groups(
        whole(),
        lr=LR,
        method="full",
        tuned_at=AT_16,
        rates={"out.*": 0.5},
        other_lr=0.1,
    )
    found = {name: group["lr"] for group in groups for name, _ in group["params"]}
    assert [found[n] for n in ("out.weight", "out.bias")] == pytest.approx([0.5, 0.5])
    assert [
        found[n] for n in ("emb.weight", "in.bias", "norm.weight")
    ] == pytest.approx([0.1] * 3)
    moved = MuA().multiplier(Factor("w", "full", None, 8, 32), replace(AT_16, fan_in=8))
    assert found["in.weight"] == pytest.approx(LR * moved * DISTANCE)


@pytest.mark.parametrize(
    ("init", "width"),
    [("A", 32), ("B", (8 * 8 * 32 + 32 * 32 * 3) / (8 * 32 + 32 * 3))],
)
def test_the_width_of_full_finetuning_follows_the_references_init(init, width):
    """From Init[A] the largest fan-in decides full finetuning, from Init[B] the mean one."""
    at = Reference(rank=16, alpha=16, init=init, fan_in=32)
    found = multipliers(
        rank_aware_param_groups(whole(), lr=LR, method="full", tuned_at=at)
    )
    moved = Falling().multiplier(Factor("w", "full", None, width, width), at)
    assert found["in.weight"] == pytest.approx(moved * DISTANCE)


def test_pinned_weights_do_not_count_for_the_width():
    """A weight with its own rate has no say in the width that the others are read at."""
    model = nn.Sequential(adapted(scaling=1.0), adapted(kind="conv", scaling=1.0))
    found = multipliers(
        rank_aware_param_groups(
            model, lr=LR, tuned_at=replace(AT_16, fan_in=64), rates={"1.*": 1.0}
        )
    )
    assert found["0.lora_A"] == pytest.approx(
        expected(4, 1.0, replace(AT_16, fan_in=64), width=12)
    )


def test_a_model_without_pairs_needs_method_full():
    """Without adapters and without method="full" the error says both ways out."""
    with pytest.raises(InspectionError, match=r"Add adapters .* method='full'"):
        rank_aware_param_groups(whole(), lr=LR)


# --- notes and the report -------------------------------------------------------------------------------------------


def plan(model, optimizer_class=None, **options):
    return make_plan(
        inspect_model(model), PlanOptions(**options), optimizer_class=optimizer_class
    )


@pytest.mark.parametrize("takes", [RankAwareOptimizer.__new__, rank_aware_param_groups])
def test_every_planning_option_can_be_given(takes):
    """Each of the options that decide a plan is a keyword of the optimizer and of the function for groups."""
    assert {option.name for option in fields(PlanOptions)} <= inspect.signature(
        takes
    ).parameters.keys()


NOTES = [
    (torch.optim.AdamW, None),
    (torch.optim.RMSprop, None),
    (
        torch.optim.SGD,
        "SGD is gradient-like: in small runs its best rate followed µA's form with alpha but",
    ),
    muon(
        "Muon is spectral: in small runs its best rate followed µA's form with alpha but"
    ),
    (
        type("Lamb", (torch.optim.SGD,), {}),
        "Lamb is relative-scale: µA's form for that family moves its rates",
    ),
    (
        torch.optim.Adafactor,
        "Adafactor is floored-scale: no form of µA is known to hold",
    ),
    (
        type("LARS", (torch.optim.SGD,), {}),
        "LARS is first-step: no form of µA is known to hold",
    ),
    (
        UNHEARD,
        "Unheard is of an unknown family and is scaled as a sign-like",
    ),
]


@pytest.mark.filterwarnings("ignore:.* is of an unknown family")
@pytest.mark.parametrize(("kind", "note"), NOTES)
def test_optimizer_families_are_noted(kind, note):
    """An optimizer that is not sign-like gets a line in the report."""
    assert [
        n.startswith(note or "-") for n in plan(mlp(), optimizer_class=kind).notes
    ] == ([True] if note else [])


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.SGD,
        muon(),
        type("LARS", (torch.optim.SGD,), {}),
        torch.optim.Adafactor,
    ],
)
def test_rank_moves_no_rate_of_these_families(kind):
    """By the default law and by µA alike, their rates stay where alpha follows the rank, and the report says why."""
    at = replace(AT_16, fan_in=16)
    for law in ("falling", "mua"):
        made = rank_aware_param_groups(
            mlp((4,)), lr=LR, tuned_at=at, optimizer_class=kind, law=law
        )
        assert {group["rank_multiplier"] for group in made} == {1.0}
        (note,) = plan(mlp(), optimizer_class=kind, law=law, tuned_at=AT_16).notes
        assert "do the same" in note or "one rate" in note


TO_FULL = [
    (torch.optim.AdamW, "falling", "good to a factor of 2 to 4"),
    (torch.optim.SGD, "falling", "was never tried with gradient-like optimizers"),
    (
        type("Lamb", (torch.optim.SGD,), {}),
        "falling",
        "was never tried with relative-scale optimizers",
    ),
    (
        type("LARS", (torch.optim.SGD,), {}),
        "falling",
        "No law moves this LoRA rate to full finetuning",
    ),
    (torch.optim.AdamW, "constant", "No law moves this LoRA rate to full finetuning"),
]


@pytest.mark.parametrize(("kind", "law", "note"), TO_FULL)
def test_a_lora_rate_taken_to_full_finetuning_is_noted(kind, law, note):
    """The report says how good the law's point for full finetuning is, or that no law moved the rate there."""
    survey = inspect_model(whole(), method="full")
    made = make_plan(survey, PlanOptions(tuned_at=AT_16, law=law), optimizer_class=kind)
    assert any(note in each for each in made.notes)


def test_a_law_without_families_is_said_to_know_none():
    """A law that has one form for all is noted as such beside an optimizer of another family."""
    (note,) = plan(mlp(), optimizer_class=torch.optim.SGD, law="loraplus").notes
    assert note == "SGD is gradient-like, for which the law 'loraplus' has no form."


BATCHES = [
    (torch.optim.AdamW, 16, 64, 2.0),
    (torch.optim.AdamW, 16, 16, 1.0),
    (torch.optim.SGD, 16, 64, 4.0),
    (torch.optim.AdamW, None, 64, 1.0),
    (torch.optim.AdamW, 16, None, 1.0),
]


@pytest.mark.parametrize(("kind", "tuned", "batch", "moved"), BATCHES)
def test_the_batch_moves_every_rate_where_both_sides_name_one(
    kind, tuned, batch, moved
):
    """Rates go as √batch for Adam and as batch for SGD, heads too, but only if both batches are given."""
    at = Reference(rank=4, alpha=4, batch=tuned)
    groups = rank_aware_param_groups(
        mlp((4,)), lr=LR, tuned_at=at, optimizer_class=kind, batch=batch
    )
    assert {group["rank_multiplier"] for group in groups} == {moved}
    notes = plan(mlp((4,)), tuned_at=at, optimizer_class=kind, batch=batch).notes
    assert any("a rule of thumb" in note for note in notes) == (moved != 1.0)
    assert any("has no batch" in note for note in notes) == (tuned is None)


def test_a_law_that_does_not_know_the_batch_says_so():
    """Where both sides name a batch and the law moves nothing by it, the report says that too."""
    at = Reference(rank=4, alpha=4, batch=16)
    assert (
        "The law 'constant' does not move rates with the batch."
        in plan(mlp(), tuned_at=at, batch=64, law="constant").notes
    )
    assert not plan(mlp((4,)), tuned_at=at, batch=16, law="constant").notes


def test_rates_of_their_own_do_not_move_with_the_batch():
    """A rate given by name or for others is what it was given as, whatever the batch."""
    at = Reference(rank=4, alpha=4, batch=16)
    groups = rank_aware_param_groups(
        mlp((4,)), lr=LR, tuned_at=at, batch=64, other_lr=0.5
    )
    assert {group["lora_role"]: group["lr"] for group in groups} == {
        "other": 0.5,
        "A": 2 * LR,
        "B": 2 * LR,
    }


@pytest.mark.parametrize("batch", [0, -1, float("nan"), float("inf"), True, "64"])
def test_an_impossible_batch_is_refused(batch):
    """A batch that is no positive number is an error."""
    with pytest.raises(OptimizerError, match=r"^batch is .* Give a positive number"):
        plan(mlp(), batch=batch)


def test_full_finetuning_from_a_lora_rate_is_noted():
    """Moving a LoRA rate to full finetuning by the law alone is noted as a rough guess."""
    made = make_plan(inspect_model(whole(), method="full"), PlanOptions(tuned_at=AT_16))
    assert any("good to a factor of 2 to 4" in note for note in made.notes)


def test_a_tensor_outside_the_model_takes_no_name_of_it():
    """It keeps a name of its own, or is numbered in its group; the model's tensors have the model's names."""
    model = mlp((4,))
    mine, taken, nameless = (nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad]},
        {"params": [("mine", mine), ("head.bias", taken)], "lr": 0.5},
        {"params": [nameless], "lr": 0.25},
    ]
    opt = RankAwareOptimizer(groups, torch.optim.SGD, model=model, lr=LR, init="A")
    names = {group["user_group"]: [] for group in opt.param_groups}
    for group in opt.param_groups:
        names[group["user_group"]] += group["param_names"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(names[0]) == sorted(trained)
    assert names[1] == ["mine", "group1.head.bias.1"]
    assert names[2] == ["group2.unnamed.0"]


def test_a_plan_prints_without_the_survey():
    """Its text is of the decisions, not of every tensor."""
    plan = make_plan(inspect_model(mlp((4,))), PlanOptions(tuned_at=AT_16))
    assert "lora_A" not in repr(plan)


def test_a_batch_may_be_a_share():
    """It is positive, in the unit of the reference's."""
    assert PlanOptions(batch=0.5).batch == 0.5
    with pytest.raises(OptimizerError, match="batch is 0"):
        PlanOptions(batch=0)


def test_a_planned_rate_that_is_given_is_as_given():
    """No law multiplies it."""
    options = PlanOptions(tuned_at=AT_16, rates={"layer0.lora_A": 0.1})
    rates = plan_rates(make_plan(inspect_model(mlp((4,))), options), LR)
    assert rates["layer0.lora_A"].lr == 0.1
    assert rates["layer0.lora_B"].lr > LR


def test_an_optimizer_that_holds_another_is_refused():
    """Whatever the attribute is called: the groups inside would not change."""

    class Holds(torch.optim.SGD):
        def __init__(self, params, lr):
            params = list(params)
            super().__init__(params, lr=lr)
            self.fast = torch.optim.SGD(params, lr=lr)

    model = mlp((4,))
    with pytest.raises(OptimizerError, match="Holds wraps another optimizer"):
        RankAwareOptimizer(Holds(model.parameters(), lr=LR), model=model, init="A")


class Name(str):
    """A name that counts how often it is hashed."""

    hashed = 0

    def __hash__(self):
        Name.hashed += 1
        return super().__hash__()


def test_building_is_linear_in_groups():
    """Ten times the groups look at ten times the names, not at a hundred times."""
    found = []
    for count in (10, 100):
        model = nn.ParameterList(torch.zeros(2) for _ in range(count))
        modules, parameters = walk(model)
        walked = Walk(modules, [(Name(name), p) for name, p in parameters])
        Name.hashed = 0
        user_groups([{"params": [p]} for p in model], model, walked)
        found.append(Name.hashed)
    assert 0 < found[1] <= 10 * found[0]
