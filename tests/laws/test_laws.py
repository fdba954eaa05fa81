"""Scaling laws: their values, how they compose, and how they are found by name, stored and checked."""

from __future__ import annotations

import math
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import rankaware_optim as ra
from rankaware_optim import (
    Constant,
    Factor,
    Falling,
    InvalidReferenceError,
    Law,
    LawError,
    LoRAPlus,
    MuA,
    Power,
    Reference,
)
from rankaware_optim._optimizers import optimizer_family
from rankaware_optim.laws import (
    beyond_batches,
    checked_batch_multiplier,
    checked_multiplier,
    get_law,
    law_from_dict,
    law_to_dict,
)

from ..helpers.models import mlp
from ..helpers.optimizers import called, muon, with_defaults
from .sites import Site, ranks, sites, widths

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD
LAW_TABLE = {
    "mua": MuA(),
    "mua-paper": MuA(tokens=None),
    "mua-three-tokens": MuA(tokens=3.0),
    "constant": Constant(),
    "loraplus": LoRAPlus(),
    "mua-spectral": MuA(family="spectral"),
    "mua-spectral-matched": MuA(family="spectral", shape_factor="match_rms_adamw"),
    "mua-gradient": MuA(family="gradient-like", tokens=64.0),
    "mua-relative": MuA(family="relative-scale"),
    "mua-unknown": MuA(family="unknown"),
    "power": Power(exponent=-0.3),
    "power-full": Power(
        exponent=-0.45, full_factor=0.5, pivot=8.0, to_full=True, law=MuA(tokens=4.0)
    ),
    "power-pivot": Power(exponent=0.18, full_factor=2.0, law=MuA(tokens=None)),
    "falling": Falling(),
    "falling-knee": Falling(knee=0.5, power=0.5, law=MuA(tokens=4.0)),
}
laws = st.sampled_from(list(LAW_TABLE.values()))
tokens = st.none() | st.floats(0.25, 1e5)
inits = st.sampled_from("AB")


def move(law: Law, to: Site, origin: Site) -> float:
    """Return the law's multiplier for `to`, for a learning rate that was tuned at `origin`."""
    return law.multiplier(to.factor(), origin.reference())


# --- composition ----------------------------------------------------------------------------------------------------


@given(law=laws, a=sites, b=sites, c=sites)
def test_multipliers_compose(law, a, b, c):
    """Converting a learning rate from a to b and then to c gives the same as converting it from a
    to c, even if one of them is full finetuning.
    """
    assert move(law, b, a) * move(law, c, b) == pytest.approx(move(law, c, a), rel=1e-9)


# --- the forms of the optimizer families ----------------------------------------------------------------------------


@pytest.mark.parametrize(("to_full", "stands_for"), [(False, 16), (True, 4096)])
def test_power_at_full_finetuning(to_full, stands_for):
    """For full finetuning, Power uses its pivot in place of the rank, or the fan-in if to_full is
    set.
    """
    full, lora = Site("full", fan_in=4096), Site(fan_in=4096)
    law = Power(-0.45, full_factor=0.5, to_full=to_full)
    expected = move(MuA(), full, lora) * 0.5 * (stands_for / 4) ** -0.45
    assert move(law, full, lora) == pytest.approx(expected)


def test_an_unresolved_reference_is_refused():
    """A law that needs the width raises an error if the reference has no fan-in."""
    with pytest.raises(LawError, match=r"rank 4.*has no fan-in.*reference.resolve"):
        MuA().multiplier(Site().factor(), Reference(rank=4, alpha=4))


def fall(point: Site, knee: float, power: float) -> float:
    """Return the factor by which `Falling` puts a configuration's learning rate above full
    finetuning's, beyond the inner law.
    """
    if point.init != "B":
        return 1.0
    lowest = min(point.rank, point.fan_in)
    return ((knee + point.fan_in) / (knee + lowest)) ** power


@given(to=sites, origin=sites, knee=st.floats(0.0, 1e4), power=st.floats(0.0, 1.0))
def test_falling_is_the_inner_law_times_its_fall(to, origin, knee, power):
    """If A starts at zero, learning rates fall as (knee + min(rank, fan-in))^-power beyond the
    inner law, and meet full finetuning's at rank = fan-in.
    """
    moved = fall(to, knee, power) / fall(origin, knee, power)
    expected = move(MuA(), to, origin) * moved
    law = Falling(knee, power)
    assert move(law, to, origin) == pytest.approx(expected, rel=1e-9)


MATCHED = {"adjust_lr_fn": "match_rms_adamw"}
SPECTRAL = {"family": "spectral"}
LARS_OF = called("LARS", "torch_optimizer")
BOUND = [
    # an optimizer, its settings, the fields of µA that they set, and whether `Falling` stays
    (AdamW, {}, {}, True),
    (called("Unheard"), {}, {"family": "unknown"}, True),
    muon({}, SPECTRAL, False),
    muon(MATCHED, {**SPECTRAL, "shape_factor": "match_rms_adamw"}, False),
    (
        with_defaults("Muon", "timm", **MATCHED),
        {},
        {**SPECTRAL, "shape_factor": "match_rms_adamw"},
        False,
    ),
    (
        with_defaults("Muon_adv", "adv_optm", rms_rescaling=True),
        {},
        {**SPECTRAL, "shape_factor": "match_rms_adamw"},
        False,
    ),
    (
        called("Muon", "pytorch_optimizer"),
        {"use_adjusted_lr": True},
        {**SPECTRAL, "shape_factor": "match_rms_adamw"},
        False,
    ),
    (called("Lamb"), {}, {"family": "relative-scale"}, False),
    (LARS_OF, {}, {"family": "gradient-like"}, False),
]


@pytest.mark.parametrize(("optimizer", "settings", "form", "falls"), BOUND)
def test_binding_takes_the_optimizers_form(optimizer, settings, form, falls):
    """Binding a law to an optimizer sets the form for that optimizer's family, and removes
    `Falling` unless the optimizer is an Adam or unknown.
    """
    law = MuA(tokens=3.0)
    bound = law.bind(optimizer, settings)
    assert bound == replace(law, **form)
    assert bound.family == optimizer_family(optimizer, settings)
    assert bound.bind(AdamW, {}) == law
    assert Power(0.1, law=law).bind(optimizer, settings) == Power(0.1, law=bound)
    assert Power(law=Falling(law=bound)).family == bound.family
    fallen = Falling(law=bound) if falls else bound
    assert Falling(law=law).bind(optimizer, settings) == fallen
    other = Falling(law=LoRAPlus()).bind(optimizer, settings)
    assert other.family is None
    assert (other == LoRAPlus()) == (not falls)


# --- laws by name ---------------------------------------------------------------------------------------------------

NAMED = [
    ("mua", MuA(tokens="family")),
    ("mua-paper", MuA(tokens=None)),
    ("constant", Constant()),
    ("loraplus", LoRAPlus(ratio=16.0)),
    (
        "power",
        Power(exponent=0.0, full_factor=1.0, pivot=16.0, to_full=False, law=MuA()),
    ),
    ("falling", Falling(knee=0.0, power=1 / 3)),
    ("rankaware_optim:MuA", MuA()),
    ("test_law_module:HALF", Power(exponent=-0.5)),
]


@pytest.mark.parametrize(("name", "law"), NAMED)
def test_laws_by_name(name, law, own_module):
    """get_law returns the law for a name or a package.module:Class with its defaults, and returns
    an instance as it is.
    """
    assert get_law(name) == law
    assert get_law(law) is law
    assert law.bind(AdamW, {}) == law


BAD_NAMES = ["nua", "", "mua?tokens=16", 7, None, [], MuA, ":", "nowhere_at_all:Law"]
BAD_NAMES += [f"rankaware_optim:{name}" for name in ("NoSuchLaw", "Reference")]
BAD_NAMES += [f"test_law_module:{name}" for name in ("WORD", "Needs")]
BAD_NAMES += ["test_broken_module:Law"]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_what_names_no_law_is_refused(name, own_module):
    """Unknown names and modules, and objects that are no law, raise a LawError that contains the
    name.
    """
    with pytest.raises(LawError) as caught:
        get_law(name)
    named = name.__name__ if isinstance(name, type) else repr(name)
    assert named in caught.value.cause or "Law" in caught.value.cause


def test_only_the_class_of_a_law_is_told_to_add_parentheses():
    """If law= is a class of a law, the error suggests an instance. For other classes that would not help."""
    with pytest.raises(LawError, match=r"law=MuA\(\)"):
        get_law(MuA)
    with pytest.raises(LawError) as caught:
        get_law(int)
    assert "int()" not in str(caught.value)


@dataclass(frozen=True)
class Halving(Law):
    """A law of the user's own."""

    exponent: float = -0.5
    name = "halving"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return (factor.rank / reference.rank) ** self.exponent


@pytest.fixture
def registered():
    ra.register_law(Halving())
    yield
    ra.register_law(Halving(), remove=True)


def test_a_registered_law_is_known_by_its_name(registered):
    """A registered law is found by its name and read back from a dict with its parameters, until it
    is removed.
    """
    law = Halving(exponent=-0.25)
    assert get_law("halving") == Halving()
    assert law_from_dict(law_to_dict(Power(law=law))) == Power(law=law)
    ra.register_law(Halving())  # registering it again is allowed
    ra.register_law(Halving(), remove=True)
    with pytest.raises(LawError, match=r"Unknown law 'halving'.*register_law\("):
        get_law("halving")


def test_a_name_has_one_law(registered):
    """Registering another law under a name that is taken, or an object that is no law, raises a
    LawError.
    """
    of_ours = type("OfOurs", (Halving,), {"name": "mua"})()
    for law in (Halving(exponent=-0.25), of_ours, "mua"):
        with pytest.raises(LawError):
            ra.register_law(law)


def never(trial):
    raise AssertionError("a trial was run")
    yield


@pytest.mark.parametrize(
    "record",
    [
        lambda law: ra.calibrate(never, AdamW, ranks=(4,), steps=4, law=law),
        lambda law: ra.sweeps.fit_sweep(ra.sweeps.DEMO_SWEEP, law=law),
    ],
)
def test_a_law_that_no_recipe_can_record_is_refused_first(record):
    """A law that is not registered raises an error before the first trial runs or a sweep is read,
    and the error says how to register the law.
    """
    with pytest.raises(LawError, match=r"Unknown law 'halving'.*register_law\("):
        record(Halving())


@pytest.mark.parametrize("law", LAW_TABLE.values(), ids=LAW_TABLE)
def test_laws_survive_a_dict_of_plain_values(law):
    """A law that is written to TOML and read back is equal to the original, even if it contains
    another law.
    """
    tomli_w, tomli = pytest.importorskip("tomli_w"), pytest.importorskip("tomli")
    assert law_from_dict(tomli.loads(tomli_w.dumps(law_to_dict(law)))) == law


BROKEN_DICTS = [
    {"name": "nua"},
    {},
    {"name": "mua", "token": 8.0},
    {"name": "mua", "tokens": -8.0},
    {"name": "mua", "tokens": "many"},
    {"name": "power", "law": {"name": "mua", "beta": 1}},
    {"name": "power", "law": "mua"},
    {"name": "power", "exponent": 10**400},
    {"name": "rankaware_optim:MuA"},
    {"name": "constant", "law": 1},
]


@pytest.mark.parametrize("data", BROKEN_DICTS, ids=range(len(BROKEN_DICTS)))
def test_broken_dicts_are_refused(data):
    """A dict with an unknown law or parameter, or with an impossible value, raises a LawError."""
    with pytest.raises(LawError):
        law_from_dict(data)


@dataclass(frozen=True)
class Strange(Law):
    """A law that takes µA's name, and whose every answer is `value`, or raises `value` if that is
    an exception.
    """

    value: object = 1.0
    name: ClassVar[str] = "mua"

    def answer(self, *question):
        if isinstance(self.value, Exception):
            raise self.value
        return self.value

    batch_multiplier = multiplier = answer


@dataclass(frozen=True)
class Steep(Law):
    """A law with a parameter that has no default."""

    exponent: float
    name: ClassVar[str] = "steep"

    def multiplier(self, factor: Factor, reference: Reference) -> float:
        return float((factor.rank or 1) ** self.exponent)


def test_a_parameter_without_a_default_is_named_in_the_report():
    """The report shows the parameter of a user's law, even if the parameter has no default."""
    model = mlp((4,))
    opt = ra.RankAwareOptimizer(
        model, AdamW, lr=1e-3, tuned_at=Reference(rank=4, alpha=4), law=Steep(-0.5)
    )
    assert "steep with exponent -0.5" in str(opt.report())


def test_a_law_that_is_not_registered_cannot_be_stored():
    """Storing a law raises an error if another law is registered under its name."""
    with pytest.raises(LawError, match="another law is registered as 'mua'"):
        law_to_dict(Strange())


NO_TOKENS = (0, -1.0, math.inf, math.nan, "8", True, 1e300)
BAD_PARAMETERS = [
    *((MuA, {"tokens": value}) for value in NO_TOKENS),
    (MuA, {"family": "adam"}),
    (MuA, {"shape_factor": None}),
    (LoRAPlus, {"ratio": -16}),
    *((Power, {"exponent": value}) for value in (math.inf, None, 10**5000)),
    (Power, {"full_factor": 0.0}),
    (Power, {"pivot": -1}),
    (Power, {"law": MuA}),
    (Falling, {"knee": -1.0}),
    (Falling, {"power": 2.0}),
    (Falling, {"law": "mua"}),
]


@pytest.mark.parametrize(("kind", "arguments"), BAD_PARAMETERS)
def test_bad_parameters_are_refused(kind, arguments):
    """An impossible parameter of a law raises an error that names the law and the parameter."""
    with pytest.raises(LawError, match=f"{kind.name}.*{next(iter(arguments))}"):
        kind(**arguments)


def test_falling_takes_no_rank_of_full_finetuning():
    """Falling ignores the rank and the init of a reference for full finetuning."""
    plain = Reference(method="full", fan_in=64)
    left = replace(plain, rank=4, alpha=4, init="B")
    target = Site("B", rank=16).factor()
    assert Falling().multiplier(target, left) == Falling().multiplier(target, plain)


AT = Site(fan_in=8)
ASKED = {
    # methods of a law, and the functions that check their answers
    "multiplier": lambda law: checked_multiplier(law, AT.factor(), AT.reference()),
    "batch_multiplier": lambda law: checked_batch_multiplier(law, 2.0),
}


@pytest.mark.parametrize("method", ASKED)
def test_an_unusable_answer_is_refused(method):
    """An answer of a law that is not a positive finite number raises an error that names the
    method, but every positive finite float is accepted.
    """
    for value in (0, -1.0, math.inf, 10**400):
        with pytest.raises(LawError, match=rf"{method}\(\).*Strange.* returned "):
            ASKED[method](Strange(value))
    for value in (sys.float_info.min, 3, sys.float_info.max, 1.0 + 1e-10):
        answer = ASKED[method](Strange(value))
        assert (answer, type(answer)) == (value, float)


@pytest.mark.parametrize("method", ASKED)
def test_a_law_that_raises_is_an_error_of_ours(method):
    """An exception inside a user's law becomes a LawError that states it, but our own errors and
    warnings are raised unchanged.
    """
    failed = rf"exception in its {method}\(\).*ZeroDivisionError.*law="
    with pytest.raises(LawError, match=failed):
        ASKED[method](Strange(ZeroDivisionError("by 0")))
    ours = InvalidReferenceError("A cause.", "A cure.")
    for error in (ours, UserWarning("watch out")):
        with pytest.raises(type(error)) as caught:
            ASKED[method](Strange(error))
        assert caught.value is error


def test_a_correction_leaves_the_batch_to_its_law():
    """For a batch 4 times as large, µA and the corrections around it double the learning rate, but
    a law without a batch rule leaves it unchanged.
    """
    for law in (MuA(), Power(0.5), Falling()):
        assert checked_batch_multiplier(law, 4.0) == pytest.approx(2.0)
    assert checked_batch_multiplier(LoRAPlus(), 4.0) == 1.0


@given(ratio=st.floats(1e-9, 1e9))
def test_a_rate_moves_with_the_batch_as_far_as_that_was_tried(ratio):
    """Learning rates follow the batch size up to a factor of 4 and stay the same beyond it, where a
    note says so.
    """
    within = min(max(ratio, 1 / 4), 4.0)
    for family, power in (("sign-like", 0.5), ("gradient-like", 1.0)):
        moved = checked_batch_multiplier(MuA(family=family), ratio)
        assert moved == pytest.approx(within**power)
    assert bool(beyond_batches(ratio)) == (within != ratio)


@given(alpha=st.integers(1, 64), rank=ranks, width=widths, init=inits, b=tokens)
@example(alpha=16, rank=20, width=512, init="A", b=8.0)
def test_the_own_configuration_is_exactly_one(alpha, rank, width, init, b):
    """At the configuration where the learning rate was tuned, the multiplier is exactly 1 despite
    rounding.
    """
    point = Site(init, rank, alpha / math.sqrt(rank), width)
    assert checked_multiplier(MuA(tokens=b), point.factor(), point.reference()) == 1.0


GOOD = {"rank": 4, "alpha": 4.0}
BAD_FIELDS = [
    *(("rank", value) for value in (None, 0, -4, 4.5, True, "4", math.inf, 2**31)),
    ("rank", 10**5000),
    *(("alpha", value) for value in (None, 1e300, 0, -1.0, math.nan)),
    *(("fan_in", 0), ("batch", -1), ("init", "C"), ("method", "qlora")),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=range(len(BAD_FIELDS)))
def test_bad_references_are_refused(name, value):
    """An impossible value, or a missing rank or alpha, raises an error that names its field."""
    with pytest.raises(InvalidReferenceError, match=name):
        Reference(**(GOOD | {name: value}))


def test_full_finetuning_has_no_scaling():
    """For full finetuning the scaling is 1, even if a rank and an alpha were passed."""
    assert Reference(method="full", rank=4, alpha=16.0).scaling == 1.0
    assert Reference(rank=4, alpha=16.0).scaling == 4.0


@pytest.mark.parametrize("law", LAW_TABLE.values(), ids=LAW_TABLE)
def test_a_law_is_a_value(law):
    """Equal laws have equal hashes, and the parameters of a law cannot be changed after it was built."""
    assert hash(replace(law)) == hash(law)
    for name in vars(law):
        with pytest.raises(FrozenInstanceError):
            setattr(law, name, getattr(law, name))
