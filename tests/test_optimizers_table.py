"""Tests of the table of optimizers, which finds a class by its name or by the names of its base classes."""

from __future__ import annotations

import pytest

from rankaware_optim import Constant, MuA
from rankaware_optim._optimizers import (
    _KNOWN,
    goes_to_adam,
    known_name,
    known_optimizer,
    optimizer_family,
)
from rankaware_optim.laws import FORMS, ONE_RATE
from rankaware_optim.transfer._suggest import FACTORS

from .golden.cases import FAMILIES as GOLDEN
from .golden.cases import class_named
from .laws.test_conditions import CONDITIONS


def named(name: str, *bases: type) -> type:
    return type(name, bases or (object,), {})


VARIANTS = [
    ("PagedAdamW8bit", "adamw", "sign-like"),
    ("AdamW4bit", "adamw", "sign-like"),
    ("AdamWFp8", "adamw", "sign-like"),
    ("Lion8bit", "lion", "sign-like"),
    ("LARS8bit", "lars", "first-step"),
    ("Muon", "muon", "spectral"),
    ("FusedAdam", "adamw", "sign-like"),
    ("DeepSpeedCPUAdam", "adamw", "sign-like"),
    ("AdamW_adv", "adamw", "sign-like"),
    ("AdamWScheduleFreeClosure", "adamwschedulefree", "sign-like"),
    ("_AdamW", "adamw", "sign-like"),
    ("AdamMini", "", "unknown"),
]


@pytest.mark.parametrize(("name", "known", "family"), VARIANTS)
def test_what_keeps_its_state_in_fewer_bits_is_its_base(name, known, family):
    """An 8-bit, 4-bit, fp8, paged or fused variant of an optimizer, and its subclasses, have the optimizer's family."""
    assert known_name(name) == known
    assert (
        optimizer_family(named(name))
        == optimizer_family(named("Mine", named(name)))
        == family
    )


def test_a_class_that_estimates_its_rates_says_so():
    """The reason why ProdigyPlusScheduleFree takes no learning rate per rank is that it estimates its own."""
    reason = known_optimizer("ProdigyPlusScheduleFree")[1].one_rate
    assert "estimates its learning rates" in reason


NAMESAKES = [
    ("torchium", "Shampoo", "unknown"),
    ("torchium", "AdamW", "sign-like"),
    ("pytorch_optimizer", "Shampoo", "spectral"),
    ("pytorch_optimizer", "AdaGO", "spectral"),
    ("pytorch_optimizer", "AdaMuon", "sign-like"),
    ("adv_optm", "AdaMuon_adv", "unknown"),
]


@pytest.mark.parametrize(("package", "name", "family"), NAMESAKES)
def test_a_bare_name_counts_in_the_packages_of_its_row(package, name, family):
    """A row of the table that lists packages applies only to classes from these packages and to their subclasses."""
    kind = type(name, (), {"__module__": f"{package}.optimizers"})
    mine = type(name, (kind,), {"__module__": "__main__"})
    assert optimizer_family(kind) == optimizer_family(mine) == family


def test_settings_decide_where_the_class_does_not():
    """Settings can change the family: Adafactor without parameter scaling is sign-like, and LARS without decay is SGD."""
    lars = type("LARS", (), {"__module__": "torch_optimizer.lars"})
    assert optimizer_family(named("Adafactor")) == "floored-scale"
    assert (
        optimizer_family(named("Adafactor"), {"scale_parameter": False}) == "sign-like"
    )
    assert optimizer_family(lars) == "gradient-like"
    assert (
        optimizer_family(lars, {"weight_decay": 0.1})
        == optimizer_family(named("LARS"))
        == "first-step"
    )


SHAPES = [
    ((64,), True),
    ((64, 128), False),
    ((3, 64), True),
    ((4, 512), False),
    ((4, 513), True),
    ((513, 4), True),
    ((96, 3, 4, 4), False),
]


@pytest.mark.parametrize(("shape", "to_adam"), SHAPES)
def test_a_thin_matrix_goes_to_adam_where_its_class_does_so(shape, to_adam):
    """timm's Muon trains vectors and thin matrices with Adam unless use_muon=True, and torch's Muon only vectors."""
    timm, torchs = known_optimizer("timm.Muon")[1], known_optimizer("Muon")[1]
    vector = len(shape) == 1
    assert goes_to_adam(timm, {"use_muon": None}, shape) == to_adam
    assert goes_to_adam(timm, {"use_muon": True}, shape) == vector
    assert goes_to_adam(torchs, {}, shape) == vector


def test_every_family_has_a_condition_and_a_golden_case():
    """Every optimizer family has a tested condition or a single learning rate, and is in the golden files."""
    rows = _KNOWN.values()
    families = {"unknown", *(row.family for row in rows)}
    families |= {switch.family for row in rows for switch in row.switches}
    golden = [(class_named(name), given) for name, given in GOLDEN.values()]
    assert FORMS.keys() == CONDITIONS.keys()
    assert FORMS.keys() | ONE_RATE.keys() == families
    assert {optimizer_family(kind, given) for kind, given in golden} == families
    for kind, given in golden:
        form = FORMS.get(optimizer_family(kind, given))
        assert isinstance(MuA().bind(kind, given), Constant) == (form is None)


@pytest.mark.parametrize("name", _KNOWN)
def test_every_row_speaks_of_what_exists(name):
    """Every row of the table has a known family, and a relation to AdamW only if a rule for this relation exists."""
    row = known_optimizer(name)[1]
    assert row.family in {*FORMS, *ONE_RATE}
    assert {switch.family for switch in row.switches} <= {*FORMS, "unknown"}
    assert not row.relation or row.relation in FACTORS
    assert row.family == "unknown" or not row.one_rate
