"""Conversions of learning rates: closed forms, properties, uses of the result, notes, and arguments
that raise an error.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankaware_optim import (
    MuA,
    RankAwareError,
    RankAwareOptimizer,
    RankAwareWarning,
    Rate,
    Reference,
    convert_lr,
    inspect_model,
    rank_aware_param_groups,
)
from rankaware_optim.sweeps import fit_sweep

from ..helpers.models import mlp, trained

LAWS = ["mua", "mua-paper", "constant", "loraplus", MuA(tokens=3.0)]
ranks = st.integers(1, 4096)
scalings = st.floats(2.0**-12, 2.0**12)
inits = st.sampled_from("AB")


def references(init: str, fan_in: float | None = None) -> st.SearchStrategy[Reference]:
    """Return a strategy for LoRA references of one init and width."""
    return st.builds(
        lambda r, s: replace(Reference(r, s * r, init=init), fan_in=fan_in),
        ranks,
        scalings,
    )


# --- closed forms ---------------------------------------------------------------------------------------------------


FORMS = [
    ("r=16,alpha=16", "r=64,alpha=64", "mua-paper", 1 / 2),
    ("r=16,alpha=4,rslora", "r=64,alpha=4,rslora", "mua-paper", 2**-0.5),
    ("r=16,alpha=16,init=B", "r=64,alpha=16,init=B", "mua-paper", 4.0),
    ("r=16,alpha=16,init=B", "full,fan_in=4096", "mua-paper", (1 + 2**-16) ** 0.25),
    ("full,fan_in=64", "full,fan_in=256", "mua-paper", 1 / 4),
    ("r=16,alpha=16,fan_in=4096", "full", "constant", 1.0),
]


@pytest.mark.parametrize(("from_", "to", "law", "ratio"), FORMS)
def test_the_laws_single_rate(from_, to, law, ratio):
    """At a large width, the converted learning rate is the given one times the ratio in the law's
    closed form.
    """
    if "fan_in" not in from_ + to:
        from_ += ",fan_in=1e12"
    assert convert_lr(2e-4, from_=from_, to=to, law=law).lr == pytest.approx(
        2e-4 * ratio, rel=1e-4
    )


@given(data=st.data(), init=inits)
def test_a_width_named_once_holds_for_both(data, init):
    """It does not matter which of the two references states the width, or whether both do, and
    without a width 4096 is assumed.
    """
    a, b = data.draw(references(init)), data.draw(references(init))
    for width in (512, 4096):
        wide_a, wide_b = replace(a, fan_in=width), replace(b, fan_in=width)
        pairs = ((wide_a, b), (a, wide_b), (wide_a, wide_b))
        (rate,) = {convert_lr(1e-3, from_=x, to=y).lr for x, y in pairs}
    assert convert_lr(1e-3, from_=a, to=b).lr == rate


# --- the class Rate -------------------------------------------------------------------------------------------------


def test_a_rate_is_taken_wherever_an_optimizer_takes_one():
    """A Rate is accepted as `lr=`, `other_lr=`, in `rates=` and in groups, and is stored there as a
    plain float.
    """
    model, rate = mlp((4,)), Rate(2e-4)
    own = {"layer0.lora_A": Rate(3e-4)}
    options = {"rates": own, "other_lr": Rate(5e-4), "law": "constant"}
    groups = [{"params": trained(model), "lr": rate}]
    for opt in (
        RankAwareOptimizer(model, "adamw", lr=rate, **options),
        RankAwareOptimizer(groups, "adamw", model=model, lr=1e-3, **options),
    ):
        assert {type(group["lr"]) for group in opt.param_groups} == {float}
        rates = [part.lr for part in opt.rates.groups]
        assert {type(lr) for lr in rates} == {float}
        assert rates == pytest.approx([3e-4, 2e-4, 5e-4])
    native = rank_aware_param_groups(model, lr=rate)
    assert {type(group["lr"]) for group in native} == {float}


@pytest.mark.parametrize(
    ("batches", "moved"), [((16, 64), 2.0), ((64, 16), 0.5), ((8, 128), 2.0)]
)
def test_a_rate_moves_with_the_square_root_of_the_batch(batches, moved):
    """If both references have a batch size, the learning rate also changes with the square root of
    their ratio, which counts up to a factor of 4.
    """
    at, to = (Reference(16, 32, fan_in=64, batch=batch) for batch in batches)
    other = replace(to, rank=4)
    assert convert_lr(1e-3, from_=at, to=to).lr == pytest.approx(1e-3 * moved)
    without = convert_lr(1e-3, from_=replace(at, batch=None), to=other).lr
    assert convert_lr(1e-3, from_=at, to=other).lr == pytest.approx(without * moved)


# --- notes and errors -----------------------------------------------------------------------------------------------

SAID = [
    ("r=16,alpha=32", "r=16,alpha=8", "so 4096 was assumed", True),
    ("r=16,alpha=32,fan_in=64", "r=16,alpha=8", "No width", False),
    ("r=16,alpha=32", "r=16,alpha=8,rslora", "note", False),
    ("r=16,alpha=32,fan_in=64", "full", "within a factor of 2.7", True),
    ("r=16,alpha=32,batch=8", "r=16,alpha=32,batch=64", "From batch 8 to 64", True),
    ("r=16,alpha=16", "r=16,alpha=1e-2", "between 0.0001 and 10000", False),
    ("r=16,alpha=16", "r=16,alpha=1e-12", "between 0.0001 and 10000", True),
]


@pytest.mark.parametrize(("from_", "to", "words", "is_said"), SAID)
def test_it_says_what_the_rate_follows_from(from_, to, words, is_said):
    """The printed result has a caution about an assumed width, full finetuning, the batch size or
    an extreme multiplier only if it applies.
    """
    text = str(convert_lr(2e-4, from_=from_, to=to))
    assert bool(re.search(words, text)) is is_said


R16, R8B = "r=16,alpha=16", "r=8,alpha=8,init=B"


@pytest.mark.parametrize(("init", "of_full"), [("A", "largest"), ("B", "mean")])
def test_typed_widths_give_the_optimizers_number(init, of_full):
    """For full finetuning, convert_lr with the mean fan-in for LoRA and the full width gives the
    optimizer's learning rate, and a note states both widths.
    """
    shapes = ((16, 64), (64, 16), (16, 16))
    model = torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in shapes))
    mean = inspect_model(model, method="full").width
    width = {"largest": 64.0, "mean": mean}[of_full]
    assert mean < 64.0
    at = Reference(16, 32, init=init)
    opt = RankAwareOptimizer(model, "adamw", lr=1e-3, tuned_at=at, method="full")
    full = Reference(method="full", fan_in=width)
    converted = convert_lr(1e-3, from_=replace(at, fan_in=mean), to=full)
    for part in opt.rates.groups:
        assert part.lr == pytest.approx(converted.lr)
    (words,) = [
        note for note in converted.notes if note.startswith("The conversion used")
    ]
    assert f"mean fan-in {mean:g} for LoRA" in words
    assert f"{of_full} fan-in {width:g} for full finetuning" in words


GIVEN = {"lr": 1e-3, "from_": R16, "to": R16, "law": "mua"}
REFUSED = [
    {"from_": f"{R16},fan_in=64", "to": R8B},
    {"to": "full"},
    {"from_": "full"},
    {"from_": 16},
    {"from_": "full", "to": "r=16"},
    {"lr": 1e308, "to": "r=16,alpha=1e-12"},
    *({"lr": lr} for lr in (0.0, -1e-3, math.nan, math.inf, "2e-4", True)),
    {"law": "nonsense"},
    {"law": 3},
]


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_cannot_be_converted_is_refused(wrong):
    """An impossible learning rate, reference, law or conversion raises one of our errors."""
    with pytest.raises(RankAwareError):
        convert_lr(**(GIVEN | wrong))


positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
anything = st.builds(
    Reference,
    rank=st.integers(1, 2**31 - 1),
    alpha=st.floats(1e-12, 1e12),
    rslora=st.booleans(),
    init=inits,
    fan_in=st.none() | st.floats(1e-9, 1e61),
    method=st.sampled_from(["lora", "full"]),
)


@given(lr=positive, a=anything, b=anything, law=st.sampled_from(LAWS))
@settings(max_examples=500)
def test_extreme_numbers_raise_our_errors_only(lr, a, b, law):
    """Any learning rate between any two references is converted to a positive finite number or
    raises one of our errors.
    """
    try:
        c = convert_lr(lr, from_=a, to=b, law=law)
    except RankAwareError:
        return
    assert 0 < c.lr < math.inf


# --- to full finetuning of large models -----------------------------------------------------------------------------


WIDE = "fan_in=4096"


@pytest.mark.parametrize("inner", [4096, 14336, 28672])
def test_a_wide_model_has_one_ratio_to_full_finetuning(inner):
    """In wide models, full finetuning's learning rate is 1/26 of that at rank 16 and alpha 32,
    whatever the width and from whichever rank it is converted.
    """
    there = convert_lr(2.6e-4, f"r=16,alpha=32,{WIDE}", f"full,fan_in={inner}").lr
    assert there == pytest.approx(1e-5)
    first = convert_lr(2.6e-4, f"r=64,alpha=64,{WIDE}", "r=16,alpha=32").lr
    direct = convert_lr(2.6e-4, f"r=64,alpha=64,{WIDE}", f"full,fan_in={inner}").lr
    assert direct == pytest.approx(first / 26)
    back = convert_lr(direct, f"full,fan_in={inner}", f"r=64,alpha=64,{WIDE}").lr
    assert back == pytest.approx(2.6e-4)


@pytest.mark.parametrize(
    ("from_", "law", "factor"),
    [
        (f"r=16,alpha=32,{WIDE}", "falling", 2.8),
        ("r=16,alpha=32,fan_in=512", "falling", 1.0),
        (f"r=16,alpha=32,{WIDE}", "mua-paper", 1.0),
        (f"r=16,alpha=32,init=B,{WIDE}", "falling", 1.0),
    ],
)
def test_bfloat16_weights_of_a_wide_model_have_a_higher_rate(from_, law, factor):
    """For full finetuning in bfloat16, the learning rate is 2.8 times as high in the cases where
    this was measured, and unchanged in all others.
    """
    plain = convert_lr(1e-4, from_, "full,fan_in=4096", law=law)
    found = convert_lr(1e-4, from_, "full,fan_in=4096", law=law, dtype="bfloat16")
    assert found.lr == pytest.approx(factor * plain.lr)


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.0), (torch.bfloat16, 2.8)]
)
def test_the_wrapper_reads_the_dtype_off_the_model(dtype, factor):
    """The optimizer converts as convert_lr does, and multiplies the learning rate by 2.8 if the
    model's weights train in bfloat16.
    """
    with torch.device("meta"):
        model = torch.nn.Linear(4096, 8, dtype=dtype)
    at = f"r=16,alpha=32,{WIDE}"
    opt = RankAwareOptimizer(model, "adamw", lr=2.6e-4, tuned_at=at, method="full")
    assert opt.rates["weight"].lr == pytest.approx(factor * 1e-5)
    assert "factor of 2.7" in " ".join(str(opt.report()).split())
    assert ("multiplied by 2.8" in str(opt.report())) == (factor != 1.0)


def test_a_recipe_of_a_wide_model_says_that_bfloat16_raised_its_rate():
    """With a recipe from LoRA runs only, bfloat16 weights train at 2.8 times the learning rate of
    float32 weights, and the report says so.
    """
    rows = [
        {
            "rank": rank,
            "alpha": 32,
            "fan_in": 4096.0,
            "lr": 2.0**x,
            "loss": (x + 12) ** 2,
        }
        for rank in (4, 16)
        for x in range(-15, -8)
    ]
    recipe = fit_sweep(rows, full_fan_in=4096.0)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("meta"):
            model = torch.nn.Linear(4096, 8, dtype=dtype)
        with pytest.warns(RankAwareWarning):
            opt = RankAwareOptimizer(model, "adamw", recipe=recipe, method="full")
        rates[dtype] = opt.rates["weight"].lr
        said = "was multiplied by 2.8" in " ".join(str(opt.report()).split())
        assert said == (dtype == torch.bfloat16)
    assert rates[torch.bfloat16] == pytest.approx(2.8 * rates[torch.float32])
