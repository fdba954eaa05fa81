"""Conversions: closed forms, a rate in every use, and training that the two-rate form leaves unchanged."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import math
import pickle
import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankaware_optim import (
    Falling,
    InspectionError,
    InvalidReferenceError,
    Law,
    LawError,
    LoRAPlus,
    MuA,
    OptimizerError,
    Power,
    RankAwareError,
    RankAwareOptimizer,
    Rate,
    Reference,
    inspect_model,
    rank_aware_param_groups,
    suggest_lr,
)
from rankaware_optim.inspection import parse_reference
from rankaware_optim.laws import kappa
from rankaware_optim.optimizer import effective_lr
from rankaware_optim.transfer import Conversion, convert_lr

from ..helpers.models import BASES, STYLES, adapted, mlp
from ..helpers.optimizers import DISTANCE
from ..helpers.oracle import distance, trained
from ..helpers.real_adapters import CASES

LAWS = ["mua", "mua-paper", "constant", "loraplus", MuA(tokens=3.0, ratio=4.0)]
ranks = st.integers(1, 4096)
scalings = st.floats(2.0**-12, 2.0**12)
inits = st.sampled_from("AB")


def references(init: str, fan_in: float | None = None) -> st.SearchStrategy[Reference]:
    """LoRA references of one init and width."""
    return st.builds(
        lambda r, s: replace(Reference.from_scaling(r, s, init=init), fan_in=fan_in),
        ranks,
        scalings,
    )


# --- closed forms ---------------------------------------------------------------------------------------------------


def limit(reference: Reference, tokens: float | None) -> float:
    """µA's rate at a width without bound, up to a factor that all ranks and scalings share."""
    s = reference.scaling
    return (
        1 / s if reference.init == "B" else (s * kappa(reference.rank, tokens)) ** -0.5
    )


@pytest.mark.parametrize("init", "AB")
@pytest.mark.parametrize(("law", "tokens"), [("mua", 1.0), ("mua-paper", None)])
def test_without_a_width_the_rate_is_the_limit(law, tokens, init):
    """At every rank from 1 to 4096 and the extremes of scaling the rate is the closed form of a large width."""
    start = Reference(rank=16, alpha=16, init=init)
    for rank, s in itertools.product(range(1, 4097, 3), (1 / 4096, 1.0, 4096.0)):
        to = Reference.from_scaling(rank, s, init=init)
        expected = limit(to, tokens) / limit(start, tokens)
        assert convert_lr(1.0, from_=start, to=to, law=law).lr == pytest.approx(
            expected, rel=1e-12
        )


FORMS = [
    ("r=16,alpha=16", "r=64,alpha=64", "mua-paper", 1 / 2),
    ("r=16,alpha=16", "r=64,alpha=16", "mua-paper", 1.0),
    ("r=16,alpha=16", "r=16,alpha=64", "mua-paper", 1 / 2),
    ("r=16,alpha=16", "r=16,alpha=64", "mua", 1 / 2),
    ("r=16,alpha=4,rslora", "r=64,alpha=4,rslora", "mua-paper", 2**-0.5),
    ("r=16,alpha=16,init=B", "r=64,alpha=64,init=B", "mua", 1.0),
    ("r=16,alpha=16,init=B", "r=64,alpha=16,init=B", "mua-paper", 4.0),
    ("r=16,alpha=16,init=B", "full,fan_in=4096", "mua-paper", (1 + 2**-16) ** 0.25),
    ("full,fan_in=64", "full,fan_in=256", "mua-paper", 1 / 4),
    ("full", "full", "mua", 1.0),
    ("r=16,alpha=16,fan_in=4096", "full", "constant", 1.0),
]


@pytest.mark.parametrize(("from_", "to", "law", "ratio"), FORMS)
def test_the_laws_single_rate(from_, to, law, ratio):
    """The single rate is the one given times the law's closed form, scale by scale."""
    assert convert_lr(2e-4, from_=from_, to=to, law=law).lr == pytest.approx(
        2e-4 * ratio, rel=1e-4
    )


@dataclass(frozen=True)
class Row:
    """A change, and what it makes of A's and B's rate, of their eps and decay, and of the drawn factor."""

    from_: str
    to: str
    rates: tuple[float, float]
    scales: tuple[float, float] = (1.0, 1.0)
    a_scale: float = 1.0
    exact: bool = True
    law: str | MuA | LoRAPlus = "mua-paper"


# The roots τ of the paper's conditions: s·r·τ·(1 + n·τ) = 1 at s·r = 16, and s²·n²·(τ² + r²·τ⁴) = 1 at s = 1, r = 16.
A_64, A_4096 = (
    (math.sqrt(16**2 + 4 * 16 * 64) - 16) / (2 * 16 * 64),
    (math.sqrt(16**2 + 4 * 16 * 4096) - 16) / 2**17,
)
B_256 = math.sqrt((math.sqrt(1 + 4 * 16**2 / 256**2) - 1) / (2 * 16**2))
ROWS = [
    Row("r=16,alpha=32", "r=16,alpha=8", (1.0, 4.0), (1.0, 0.25), 2.0),
    Row("r=16,alpha=8,init=B", "r=16,alpha=32,init=B", (0.25, 1.0), (4.0, 1.0), 0.5),
    Row("r=16,alpha=32", "r=16,alpha=2,rslora", (1.0, 4.0), (1.0, 0.25), 2.0),
    Row("r=16,alpha=32", "r=16,alpha=8,rslora", (1.0, 1.0)),
    Row("r=16,alpha=32", "r=16,alpha=8,fan_in=64", (1.0, 4.0), (1.0, 0.25), 2.0),
    Row("r=16,alpha=32", "r=16,alpha=8", (1.0, 64.0), (1.0, 0.25), 2.0, law="loraplus"),
    Row(
        "r=16,alpha=8,init=B",
        "r=16,alpha=32,init=B",
        (0.25, 4.0),
        (4.0, 1.0),
        0.5,
        law=MuA(ratio=4.0),
    ),
    Row("r=16,alpha=16", "r=64,alpha=64", (0.5, 0.5), exact=False),
    Row(
        "r=16,alpha=16",
        "r=64,alpha=64",
        (0.5, 2.0),
        exact=False,
        law=MuA(tokens=None, ratio=4.0),
    ),
    Row(
        "r=16,alpha=16,fan_in=64",
        "r=16,alpha=16,fan_in=256,init=B",
        (B_256 / A_64,) * 2,
        exact=False,
    ),
    Row("r=1,alpha=16,fan_in=4096", "full", (1 / 4096 / A_4096,) * 2, exact=False),
    Row("full,fan_in=4096", "full", (1.0, 1.0)),
    Row(
        "r=16,alpha=32,batch=8",
        "r=16,alpha=8,batch=16",
        (2**0.5, 4 * 2**0.5),
        (1.0, 0.25),
        2.0,
        exact=False,
    ),
    Row("r=16,alpha=32,batch=8", "r=16,alpha=8", (1.0, 4.0), (1.0, 0.25), 2.0),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.from_}->{row.to}")
def test_the_two_rates(row):
    """At equal rank, init, width the zero factor takes s/s′ and its eps and decay the inverse, else the law rules."""
    c = convert_lr(2e-4, from_=row.from_, to=row.to, law=row.law)
    assert (c.lr_a, c.lr_b) == pytest.approx(
        [2e-4 * rate for rate in row.rates], rel=1e-9
    )
    assert (
        (c.eps_scale_a, c.eps_scale_b)
        == (c.weight_decay_scale_a, c.weight_decay_scale_b)
        == row.scales
    )
    assert (c.a_scale, c.exact) == (row.a_scale, row.exact)


@pytest.mark.parametrize(
    ("family", "exact"), [("sign-like", True), ("gradient-like", False)]
)
@pytest.mark.parametrize(
    "around",
    [lambda law: law, lambda law: Falling(law=law), lambda law: Power(law=law)],
)
def test_exactness_is_of_the_innermost_laws_family(around, family, exact):
    """A change of alpha is exact where the law, or the one within it, is for updates that know no scale."""
    law = around(MuA(family=family))
    assert (
        convert_lr(
            2e-4, from_="r=16,alpha=32,fan_in=64", to="r=16,alpha=8", law=law
        ).exact
        is exact
    )


@given(
    data=st.data(),
    init=inits,
    fan_in=st.none() | st.integers(1, 2**16),
    law=st.sampled_from(LAWS),
)
def test_conversions_compose(data, init, fan_in, law):
    """Going by way of a third configuration gives the same rate, and back again the first."""
    a, b, c = (data.draw(references(init, fan_in)) for _ in range(3))
    there = convert_lr(2e-4, from_=a, to=b, law=law)
    direct = convert_lr(2e-4, from_=a, to=c, law=law)
    assert convert_lr(there, from_=b, to=c, law=law).lr == pytest.approx(direct.lr)
    assert convert_lr(there, from_=b, to=a, law=law).lr == pytest.approx(2e-4)


@given(data=st.data(), init=inits, law=st.sampled_from(LAWS), lr=st.floats(1e-8, 1.0))
def test_the_same_configuration_keeps_the_rate(data, init, law, lr):
    """Converted to itself a rate is the same to the last bit, exact, with nothing to scale."""
    a = data.draw(references(init))
    c = convert_lr(lr, from_=a, to=a, law=law)
    assert (c.lr, c.lr_a, c.a_scale, c.eps_scale_a, c.eps_scale_b, c.exact) == (
        lr,
        lr,
        1.0,
        1.0,
        1.0,
        True,
    )


@given(data=st.data(), init=inits)
def test_a_width_named_once_holds_for_both(data, init):
    """It makes no difference which of the two references names the width, nor whether both do."""
    a, b = (
        data.draw(references(init)),
        data.draw(references("B" if init == "A" else "A")),
    )
    wide_a, wide_b = replace(a, fan_in=512), replace(b, fan_in=512)
    rates = {
        convert_lr(1e-3, from_=x, to=y)
        for x, y in ((wide_a, b), (a, wide_b), (wide_a, wide_b))
    }
    assert len(rates) == 1


@dataclass(frozen=True)
class WideB(Law):
    """B learns n / r times as fast as A: a law of two rates that part without bound."""

    name = "wide-b"

    def multiplier(self, factor, reference):
        return factor.fan_in / factor.rank if factor.role == "B" else 1.0


def test_a_law_without_a_limit_asks_for_the_width():
    """Rates that grow with the width for ever are refused without one, and converted from the tuned pair with one."""
    with pytest.raises(
        InvalidReferenceError,
        match=r"'wide-b' has no limit at a large width.* Give fan_in=",
    ):
        convert_lr(1e-3, from_="r=8,alpha=8", to="r=8,alpha=4", law=WideB())
    c = convert_lr(1e-3, from_="r=8,alpha=8,fan_in=64", to="r=8,alpha=4", law=WideB())
    assert (c.lr, c.lr_a, c.lr_b) == pytest.approx([1e-3, 1e-3, 16e-3])
    assert "'wide-b' gives B a separate rate" in c.explain()


# --- a rate ---------------------------------------------------------------------------------------------------------

CONVERTED = convert_lr(2e-4, from_="r=16,alpha=32", to="r=16,alpha=8")


def test_it_is_a_rate_and_no_float():
    """It is a `Rate` whose float is its lr, without a band, and printed it explains itself."""
    assert isinstance(CONVERTED, Rate)
    assert not isinstance(CONVERTED, float)
    assert type(float(CONVERTED)) is float
    assert float(CONVERTED) == CONVERTED.lr == pytest.approx(4e-4 * DISTANCE)
    assert (CONVERTED.low, CONVERTED.high, CONVERTED.ceiling) == (0.0, math.inf, None)
    assert str(CONVERTED) == CONVERTED.explain()


def test_torch_trusts_no_class_of_ours():
    """Importing the package leaves torch's list of safe globals alone."""
    trusted = torch.serialization.get_safe_globals()
    assert not [
        kind
        for kind in trusted
        if getattr(kind, "__module__", "").startswith("rankaware_optim")
    ]


COPIES = [
    copy.copy,
    copy.deepcopy,
    dataclasses.replace,
    *(
        lambda c, p=p: pickle.loads(pickle.dumps(c, p))
        for p in range(2, pickle.HIGHEST_PROTOCOL + 1)
    ),
]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_and_pickles_keep_everything(copied):
    """A copy is equal in every attribute."""
    other = copied(CONVERTED)
    assert other == CONVERTED
    assert dataclasses.asdict(other) == dataclasses.asdict(CONVERTED)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Conversion)])
def test_attributes_are_read_only(name):
    """A conversion cannot be changed under its user."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(CONVERTED, name, 1.0)


def adamw(weights: torch.nn.Module, lr: Rate) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights.parameters(), lr=float(lr))


def wrapped(weights: torch.nn.Module, lr: Rate) -> torch.optim.Optimizer:
    """Ours, which takes a `Rate` wherever it takes a rate, and makes no difference between factors here."""
    return RankAwareOptimizer(weights, torch.optim.AdamW, lr=lr, law="constant")


RATES = [CONVERTED, suggest_lr(Reference(rank=16, alpha=32, fan_in=4096)), Rate(4e-4)]


@pytest.mark.parametrize("build", [adamw, wrapped])
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: type(rate).__name__)
def test_an_optimizer_takes_it_as_its_rate(build, rate):
    """It trains as at the plain float, schedulers multiply it, and its checkpoint loads with weights_only=True."""
    states = []
    for lr in (rate, Rate(float(rate))):
        torch.manual_seed(0)
        model = mlp((4,))
        optimizer = build(model, lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1 / (1 + step)
        )
        for _ in range(3):
            sum(
                p.square().sum() for p in model.parameters() if p.requires_grad
            ).backward()
            optimizer.step()
            scheduler.step()
        states.append([param.detach() for param in model.parameters()])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        for group in torch.load(file, weights_only=True)["param_groups"]:
            assert (type(group["lr"]), group["initial_lr"]) == (float, float(rate))
    assert all(map(torch.equal, *states))


def test_a_rate_is_taken_wherever_an_optimizer_takes_one():
    """`rates=`, `other_lr=`, groups and `rank_aware_param_groups` keep plain floats of it."""
    model = mlp((4,))
    (name, *_), rate = (
        [name for name, p in model.named_parameters() if p.requires_grad],
        Rate(2e-4),
    )
    options = {"rates": {name: Rate(3e-4)}, "other_lr": Rate(5e-4), "law": "constant"}
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}
    ]
    for optimizer in (
        RankAwareOptimizer(model, torch.optim.AdamW, lr=rate, **options),
        RankAwareOptimizer(groups, torch.optim.AdamW, model=model, lr=1e-3, **options),
    ):
        assert {type(group["lr"]) for group in optimizer.param_groups} == {float}
        assert [
            effective_lr(group) for group in optimizer.param_groups
        ] == pytest.approx([3e-4, 2e-4, 5e-4])
    assert {type(group["lr"]) for group in rank_aware_param_groups(model, lr=rate)} == {
        float
    }


@pytest.mark.parametrize(
    "bad", [Rate(0.0), Rate(math.nan), Rate(-1e-3)], ids=lambda rate: str(rate.lr)
)
def test_an_impossible_rate_is_refused(bad):
    """A `Rate` is checked like the number that it is."""
    with pytest.raises(OptimizerError, match="positive finite"):
        RankAwareOptimizer(mlp((4,)), torch.optim.AdamW, lr=bad)


# --- words ----------------------------------------------------------------------------------------------------------

DISTANT = r"A rate that the law moves keeps a distance: × 0\.9"
SAID = [
    ("r=16,alpha=32", "r=16,alpha=8", r"As one rate: 0\.00036 \(approximate\)"),
    ("r=16,alpha=32", "r=16,alpha=8", r"0\.0002 for A, 0\.0008 for B \(exact\)"),
    (
        "r=16,alpha=32",
        "r=16,alpha=8",
        r"multiply B's eps by 0\.25 and its weight decay by 0\.25",
    ),
    (
        "r=16,alpha=32",
        "r=16,alpha=8",
        r"undone by the rate of B alone, or .* × 2 with A's initial values × 2",
    ),
    (
        "r=16,alpha=32,init=B",
        "r=16,alpha=8,init=B",
        r"the rate of A alone, or .* with B's initial values × 2",
    ),
    (
        "r=16,alpha=32",
        "r=16,alpha=8",
        r"decoupled weight decay and without gradient clipping",
    ),
    ("r=16,alpha=32", "r=16,alpha=8", r"No width was given"),
    (
        "r=16,alpha=32",
        "r=16,alpha=8,rslora",
        r"One rate for all: 0\.0002 \(exact\)\.\nnote: Both configurations train equally",
    ),
    (
        "r=16,alpha=32",
        "r=8,alpha=32",
        r"With another rank the rates follow the default law",
    ),
    (
        "r=16,alpha=32,fan_in=64",
        "r=8,alpha=32,init=B",
        r"With another rank and init the",
    ),
    ("r=16,alpha=32,fan_in=64", "full", r"start at half of it"),
    (
        "r=16,alpha=32,batch=8",
        "r=16,alpha=32,batch=64",
        r"The batch changes from 8 to 64",
    ),
    ("r=16,alpha=32", "r=16,alpha=8", DISTANT),
    ("r=16,alpha=32", "r=8,alpha=32", DISTANT),
    ("r=16,alpha=32,fan_in=64", "r=16,alpha=32,init=B", DISTANT),
]


@pytest.mark.parametrize(("from_", "to", "said"), SAID)
def test_it_explains_itself(from_, to, said):
    """The words name the rates, what is exact, what becomes of eps and decay, and the cautions."""
    assert re.search(said, convert_lr(2e-4, from_=from_, to=to).explain())


NOT_SAID = [
    ("r=16,alpha=32,fan_in=64", "r=16,alpha=8", "No width"),
    ("r=16,alpha=32", "r=16,alpha=32", "No width"),
    ("r=16,alpha=32", "r=8,alpha=32", r"\bexact|\beps"),
    ("full,fan_in=64", "r=8,alpha=32", "start at half"),
    ("r=16,alpha=32", "r=16,alpha=8,rslora", "distance"),
    ("r=16,alpha=32,batch=8", "r=16,alpha=32,batch=64", "distance"),
    ("r=16,alpha=32", "r=8,alpha=32", "(?s)distance.*distance"),
]


@pytest.mark.parametrize(("from_", "to", "said"), NOT_SAID)
def test_it_says_nothing_that_does_not_apply(from_, to, said):
    """No caution is given without its cause."""
    assert not re.search(said, convert_lr(2e-4, from_=from_, to=to).explain())


WORDS = [
    ("r=16,alpha=32", Reference(16, 32)),
    (" rank = 16 , alpha=32.5, ", Reference(16, 32.5)),
    ("r=16,alpha=32,rslora", Reference(16, 32, rslora=True)),
    (
        "r=16,alpha=32,init=B,fan_in=4096,batch=64",
        Reference(16, 32, init="B", fan_in=4096, batch=64),
    ),
    ("full", Reference(method="full")),
    ("full, fan_in=4096, batch=8", Reference(method="full", fan_in=4096, batch=8)),
]


@pytest.mark.parametrize(("text", "reference"), WORDS)
def test_a_reference_is_read_from_words(text, reference):
    """Rank, alpha, rsLoRA, init, width and batch, or full finetuning with a width and batch."""
    assert parse_reference(text) == reference


BAD_WORDS = [
    ("", r"lacks rank"),
    ("r=16", r"lacks alpha"),
    ("alpha=32", r"lacks rank"),
    ("r=x,alpha=1", r"'r=x' is not a part of a reference"),
    ("r=1.5,alpha=1", r"'r=1\.5' is not a part"),
    ("r=" + "9" * 5000 + ",alpha=1", r"is not a part"),
    ("r=0,alpha=1", r"rank=0"),
    ("r=8,alpha=nan", r"alpha=nan"),
    ("r=8,alpha=-1", r"alpha=-1"),
    ("r=8,alpha=8,fan_in=inf", r"fan_in=inf"),
    ("r=8,alpha=8,batch=0", r"batch=0"),
    ("r=8,alpha=8,init=C", r"init is 'A' .* not 'C'"),
    ("r=8,alpha=8,beta=1", r"'beta=1' is not a part"),
    ("r=8,alpha=8,rslora=maybe", r"'rslora=maybe' is not a part"),
    ("16", r"'16' is not a part"),
    ("=", r"'=' is not a part"),
    ("r=8,alpha=8,r=8", r"'r=8' gives rank a second time"),
    ("r=8,rank=16,alpha=8", r"'rank=16' gives rank a second time"),
    ("r=8,alpha=8,rslora,rslora", r"gives rslora a second time"),
    ("full,full", r"gives method a second time"),
    ("full,r=8", r"Full finetuning has no rank"),
    ("full,rslora", r"Full finetuning has no rslora"),
]


@pytest.mark.parametrize(("text", "message"), BAD_WORDS)
def test_words_that_make_no_reference_are_refused(text, message):
    """What is missing, unknown, doubled or impossible is named by an error of ours."""
    with pytest.raises(InvalidReferenceError, match=message):
        parse_reference(text)


@pytest.mark.parametrize(("init", "of_full"), [("A", "largest"), ("B", "mean")])
def test_typed_widths_give_the_optimizers_number(init, of_full):
    """To full finetuning, the mean fan-in typed for LoRA and the full width give the optimizer's rate, in words too."""
    shapes = ((16, 64), (64, 16), (16, 16))
    model = torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in shapes))
    survey = inspect_model(model, method="full")
    width = {"largest": 64.0, "mean": survey.width}[of_full]
    assert survey.width < 64.0
    at = Reference(16, 32, init=init)
    opt = RankAwareOptimizer(model, "adamw", lr=1e-3, tuned_at=at, method="full")
    from_ = replace(at, fan_in=survey.width)
    converted = convert_lr(1e-3, from_=from_, to=Reference(method="full", fan_in=width))
    for group in opt.param_groups:
        assert effective_lr(group) == pytest.approx(converted.lr)
    (words,) = [note for note in converted.notes if note.startswith("The width")]
    assert (
        f"LoRA, {survey.width:g}, and the {of_full} for full finetuning, {width:g},"
        in words
    )


R16, R8B = "r=16,alpha=16", "r=8,alpha=8,init=B"
REFUSED = [
    (
        1e-3,
        R16,
        R8B,
        "mua",
        InvalidReferenceError,
        r"From B = 0 to A = 0 .* width.* Give fan_in=",
    ),
    (
        1e-3,
        R16,
        "full",
        "mua",
        InvalidReferenceError,
        r"From B = 0 to full finetuning .* Give fan_in=",
    ),
    (
        1e-3,
        "full",
        R16,
        "constant",
        InvalidReferenceError,
        r"From full finetuning to B = 0",
    ),
    (1e-3, 16, R16, "mua", InvalidReferenceError, r"16 is not a reference"),
    (1e-3, R16, None, "mua", InvalidReferenceError, r"None is not a reference"),
    (1e-3, R16, "", "mua", InvalidReferenceError, r"lacks rank"),
    (1e-3, "full", "r=16", "mua", InvalidReferenceError, r"lacks alpha"),
    (
        1e-3,
        R16,
        "no/such/adapter",
        "mua",
        InspectionError,
        r"There is no folder or file no/such/adapter",
    ),
    (1e-3, R16, "r=16,alpha=5e-324", "mua", InvalidReferenceError, r"alpha=5e-324"),
    (
        1e-3,
        R16,
        "r=1" + "0" * 400 + ",alpha=1",
        "mua",
        InvalidReferenceError,
        r"rank=1000.*to 2147483647",
    ),
    (
        1e308,
        R16,
        "r=16,alpha=1e-12",
        "mua",
        RankAwareError,
        r"range of floating point|inf",
    ),
    (1e308, R16, "r=16,alpha=1", "mua", OptimizerError, r"The converted lr is inf"),
    (0.0, R16, R16, "mua", OptimizerError, r"lr is 0"),
    (-1e-3, R16, R16, "mua", OptimizerError, r"lr is -0"),
    (math.nan, R16, R16, "mua", OptimizerError, r"lr is nan"),
    (math.inf, R16, R16, "mua", OptimizerError, r"lr is inf"),
    ("2e-4", R16, R16, "mua", OptimizerError, r"lr is '2e-4'"),
    (True, R16, R16, "mua", OptimizerError, r"lr is True"),
    (1e-3, R16, R16, "nonsense", LawError, r"nonsense"),
    (1e-3, R16, R16, 3, LawError, r"not 3"),
]


@pytest.mark.parametrize(("lr", "from_", "to", "law", "error", "message"), REFUSED)
def test_what_cannot_be_converted_is_refused(lr, from_, to, law, error, message):
    """A rate, reference or law that is none, and a step that needs a width, are errors with a cause and a cure."""
    with pytest.raises(error, match=message):
        convert_lr(lr, from_=from_, to=to, law=law)


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
    """Whatever a reference can hold is converted to positive finite numbers or refused by an error of ours."""
    try:
        c = convert_lr(lr, from_=a, to=b, law=law)
    except RankAwareError:
        return
    numbers = (c.lr, c.lr_a, c.lr_b, c.eps_scale_a, c.eps_scale_b, c.a_scale)
    assert all(0 < number < math.inf for number in numbers)


@given(
    st.text(alphabet="ralphinkutoc_=,.0123456789eAB ", max_size=40)
    | st.text(max_size=12)
)
@settings(max_examples=500)
def test_any_text_is_a_reference_or_our_error(text):
    """No text raises anything but an error of ours."""
    with contextlib.suppress(InvalidReferenceError):
        assert isinstance(parse_reference(text), Reference)


# --- the exact oracle: a change of s undone by two rates ------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """A single adapted layer in float64, and how it is trained."""

    style: str = "plain"
    kind: str = "linear"
    rank: int = 4
    init: str = "A"
    s: float = 2.0
    s_new: float = 0.5
    lr: float = 1e-2
    eps: float = 1e-3
    decay: float = 0.1
    law: str | MuA = "mua"
    seed: int = 0

    def conversion(self) -> Conversion:
        a, b = (
            Reference.from_scaling(self.rank, s, init=self.init)
            for s in (self.s, self.s_new)
        )
        return convert_lr(self.lr, from_=a, to=b, law=self.law)

    def run(
        self,
        s: float,
        rate_a: float,
        rate_b: float,
        drawn: float = 1.0,
        **settings: float,
    ) -> list[torch.Tensor]:
        """The outputs of training the same draw at scaling s, the drawn factor multiplied by `drawn`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            options = {
                "rank": self.rank,
                "scaling": s,
                "init": self.init,
                "dtype": torch.float64,
            }
            model = adapted(self.style, self.kind, **options)
            inputs = INPUTS[self.kind]()
        model.pair()[self.init == "B"].data.mul_(drawn)
        groups = {
            role: {
                "lr": rate,
                "eps": self.eps * settings.get(f"eps_{role.lower()}", 1.0),
                "weight_decay": self.decay * settings.get(f"decay_{role.lower()}", 1.0),
            }
            for role, rate in (("A", rate_a), ("B", rate_b))
        }
        return trained(model, (inputs,), groups)

    def tuned(self) -> list[torch.Tensor]:
        """The training that the rate was tuned for: the law's own pair at s."""
        ratio = self.law.ratio if isinstance(self.law, MuA) else 1.0
        return self.run(self.s, self.lr, self.lr * ratio)

    def two_rates(self, *, left_alone: str = "") -> list[torch.Tensor]:
        """The training at s′ by the two-rate form, but for the setting left alone."""
        c = self.conversion()
        scales = {"eps_a": c.eps_scale_a, "eps_b": c.eps_scale_b}
        scales |= {"decay_a": c.weight_decay_scale_a, "decay_b": c.weight_decay_scale_b}
        kept = {
            name: by
            for name, by in scales.items()
            if not left_alone or not name.startswith(left_alone)
        }
        return self.run(self.s_new, c.lr_a, c.lr_b, **kept)

    def one_rate(self, *, drawn: bool = True) -> list[torch.Tensor]:
        """The training at s′ by one rate, lr × a_scale, with the drawn factor rescaled or left."""
        by = self.conversion().a_scale
        rate = self.lr * by
        names = ("eps_a", "eps_b", "decay_a", "decay_b")
        return self.run(
            self.s_new, rate, rate, by if drawn else 1.0, **dict.fromkeys(names, 1 / by)
        )


INPUTS = {
    "linear": lambda: torch.randn(6, 12, dtype=torch.float64),
    "conv": lambda: torch.randn(2, 3, 5, 5, dtype=torch.float64),
    "embedding": lambda: torch.randint(0, 30, (12,)),
}
small_scalings = st.floats(2.0**-5, 2.0**5)
setups = st.builds(
    Setup,
    style=st.sampled_from(sorted(STYLES)),
    kind=st.sampled_from(sorted(BASES)),
    rank=st.integers(1, 8),
    init=inits,
    s=small_scalings,
    s_new=small_scalings,
    lr=st.floats(1e-4, 1e-2),
    eps=st.floats(1e-8, 1e-2),
    decay=st.just(0.0) | st.floats(0.01, 0.5),
    law=st.sampled_from(["mua", MuA(ratio=4.0)]),
    seed=st.integers(0, 2**16),
)
EACH = [
    Setup(style, kind, init=i)
    for style, kind, i in itertools.product(STYLES, BASES, "AB")
]
each = pytest.mark.parametrize(
    "setup", EACH, ids=lambda s: f"{s.style}-{s.kind}-{s.init}"
)


@given(setup=setups)
@settings(max_examples=200)
def test_two_rates_undo_a_change_of_alpha_exactly(setup):
    """In float64 every output of training at s′ by the two-rate form is that of the tuned training at s."""
    assert setup.conversion().exact
    assert distance(setup.tuned(), setup.two_rates()) < 1e-12


@each
def test_every_convention_and_kind_converts_exactly(setup):
    """Both the two-rate form and one rate with the drawn factor rescaled reproduce the tuned training."""
    assert distance(setup.tuned(), setup.two_rates()) < 1e-12
    assert distance(setup.tuned(), setup.one_rate()) < 1e-12


@given(setup=setups.filter(lambda s: s.law == "mua"))
@settings(max_examples=60)
def test_one_rate_is_exact_with_the_drawn_factor_rescaled(setup):
    """With the drawn factor × √(s/s′), one rate × √(s/s′) and eps and decay divided by it change no output."""
    assert distance(setup.tuned(), setup.one_rate()) < 1e-12


@each
@pytest.mark.parametrize("left_alone", ["eps", "decay"])
def test_eps_and_decay_must_be_scaled(setup, left_alone):
    """Leaving eps or the decay alone changes the training, so the comparison can fail."""
    assert distance(setup.tuned(), setup.two_rates(left_alone=left_alone)) > 1e-6


@each
def test_one_rate_alone_is_approximate(setup):
    """With the drawn factor left as it is, neither lr × a_scale nor the law's rate reproduces the tuned training."""
    c = setup.conversion()
    assert distance(setup.tuned(), setup.one_rate(drawn=False)) > 1e-4
    assert distance(setup.tuned(), setup.run(setup.s_new, c.lr, c.lr)) > 1e-4


# libraries warn of their own deprecations while they are imported and built
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.init in "AB"], ids=lambda c: c.name
)
def test_the_libraries_own_adapters_convert_exactly(case):
    """A real library's adapter at another alpha trains, by the two-rate form, as the tuned one did."""
    if not case.installed():
        pytest.skip(f"needs {case.package}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tuned, other = (case.make(4, alpha).double() for alpha in (8.0, 3.0))
    drawn = dict(tuned.named_parameters())
    for name, param in other.named_parameters():
        param.data.copy_(drawn[name].data)
    a, b = (inspect_model(model).factors[0] for model in (tuned, other))
    from_, to = (Reference.from_scaling(f.rank, f.scaling, init=f.init) for f in (a, b))
    c = convert_lr(1e-2, from_=from_, to=to)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in case.inputs())
    settings = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    before = trained(tuned, inputs, {"A": settings, "B": settings})
    moved = {
        "A": {
            "lr": c.lr_a,
            "eps": 1e-3 * c.eps_scale_a,
            "weight_decay": 0.1 * c.weight_decay_scale_a,
        },
        "B": {
            "lr": c.lr_b,
            "eps": 1e-3 * c.eps_scale_b,
            "weight_decay": 0.1 * c.weight_decay_scale_b,
        },
    }
    after = trained(other, inputs, moved)
    assert float((before[0] - before[-1]).abs().max()) > 1e-6
    assert distance(before, after) < 1e-12


@pytest.mark.parametrize(
    ("alpha", "said"), [(16, False), (1e-2, False), (1e-12, True), (1e12, True)]
)
def test_a_rate_out_of_all_range_says_so(alpha, said):
    """A conversion that multiplies the rate by more than 1e4, or less than 1e-4, carries a note with the number."""
    made = convert_lr(2e-4, from_="r=16,alpha=16", to=f"r=16,alpha={alpha:g}")
    assert any("beyond 0.0001 to 10000" in note for note in made.notes) is said
