"""The table of conventions: replicas of libraries that no test environment has, third-party rows, what is no pair."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rankaware_optim as ra
from rankaware_optim import (
    Convention,
    InspectionError,
    inspect_model,
    register_convention,
)
from rankaware_optim.inspection import Reading, conventions, other_kind
from rankaware_optim.inspection._conventions import CONVENTIONS
from rankaware_optim.inspection._survey import is_other_adapter
from rankaware_optim.testing import check_convention

from ..helpers.models import STYLES, adapted
from ..helpers.oracle import oracle
from ..helpers.real_adapters import CASES, IN, OUT, read
from ..helpers.replicas import (
    REPLICAS,
    deepspeed_linear,
    direct,
    drawn,
    images,
    megatron,
    x,
    zeros,
)


@pytest.fixture
def registered():
    """Registers conventions for one test."""
    rows = []

    def register(row):
        register_convention(row)
        rows.append(row)

    yield register
    for row in rows:
        register_convention(row, remove=True)


@pytest.mark.parametrize("case", REPLICAS, ids=lambda case: case.name)
def test_a_replica_is_read_and_trains_as_read(case):
    """A replica's row gives rank, fans, scaling, kind and init, and passes the ones-probe and the oracle."""
    assert read(case.make(4, 8.0)) == case.expected(4, 8.0)
    assert check_convention(case.make, *case.inputs()).probe < 1e-9
    assert oracle(case.make, *case.inputs()) < 1e-12


def test_a_rank_declared_in_a_configuration_is_compared():
    """DeepSpeed's layer declares its rank in `lora_config`, and another than the shapes' is an error."""
    layer = deepspeed_linear(4, 8.0)
    layer.lora_config.lora_r = 16
    with pytest.raises(InspectionError, match="declares rank 16"):
        inspect_model(layer)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
@pytest.mark.parametrize("style", STYLES)
def test_the_models_of_these_tests_conform(style, kind):
    """Every style of tests/models.py passes the ones-probe and the oracle."""
    inputs = {
        "linear": x,
        "conv": images[:, :3],
        "embedding": torch.arange(12).reshape(3, 4),
    }[kind]

    def make(rank, alpha):
        return adapted(style, kind, rank=rank, scaling=alpha / rank)

    assert check_convention(make, inputs).probe == pytest.approx(0.0, abs=1e-12)
    assert oracle(make, inputs) < 1e-12


def test_the_check_leaves_the_random_state_alone():
    """The global generator is where it was."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_convention(megatron, x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_stays_as_it_is(frozen):
    """Where only one of the two factors trains, as in LoRA-FA, that one takes the whole change of scaling."""

    def make(rank, alpha):
        layer = adapted(rank=rank, scaling=alpha / rank, init="other")
        getattr(layer, frozen).requires_grad_(False)
        return layer

    found = check_convention(make, x)
    assert len(found.factors) == 1
    assert found.probe < 1e-12
    assert oracle(make, x) < 1e-12


def test_a_layer_that_answers_with_more_than_a_tensor_needs_run():
    """A tuple is an error with a cure, and `run` picks the tensor from it."""

    def make(rank, alpha):
        layer = adapted(rank=rank, scaling=alpha / rank)
        layer.register_forward_hook(lambda m, args, out: (out, None))
        return layer

    with pytest.raises(InspectionError, match="returns a tuple"):
        check_convention(make, x)
    assert check_convention(make, x, run=lambda module, x: module(x)[0]).probe < 1e-12


# --- what the check must not let pass -------------------------------------------------------------------------------


def changed(name, value):
    """The PEFT-like layer with one attribute that lies."""

    def make(rank, alpha):
        layer = adapted("plain", rank=rank, scaling=alpha / rank)
        layer.held = layer.multiplier
        setattr(layer, name, value(rank, alpha))
        return layer

    return make


def swapped_fans(owner, a, b):
    return Reading(a[0], b[1], b[0], a[1])


LIES = {
    "a rank that is another": (
        lambda r, alpha: adapted(rank=r + 1),
        None,
        "'rank'.*rank 3 instead of 2",
    ),
    "no pair": (
        lambda r, alpha: nn.Linear(IN, OUT),
        None,
        "'found' fails: No trainable LoRA pair",
    ),
    "another row": (
        lambda r, alpha: adapted(rank=r),
        Convention("kohya", "lora_down", "lora_up"),
        "'found'.*read as lora_A/lora_B, not as kohya",
    ),
    "a scaling that is alpha": (
        changed("scaling", direct),
        None,
        "'ones-probe'.*scaling 3 × rank 2",
    ),
    "fans the wrong way round": (
        lambda r, alpha: adapted(rank=r, scaling=alpha / r),
        Convention("turned", "lora_A", "lora_B", layouts=(swapped_fans,)),
        "'ones-probe'.*fan-in 20",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_check_names_what_fails(lie):
    """A convention that is read wrongly is an error that names the check and the numbers."""
    make, row, sentence = LIES[lie]
    with pytest.raises(InspectionError, match=sentence):
        check_convention(make, x, convention=row)


def test_the_oracle_of_these_tests_tells_a_wrong_scaling():
    """Behind a nonlinearity there is no ones-probe; two trainings then tell a scaling that is not alpha's."""

    def make(rank, alpha, lie=False):
        model = nn.Sequential(adapted(rank=rank, scaling=alpha / rank), nn.Tanh())
        if lie:
            model[0].held = model[0].multiplier
            model[0].scaling = alpha**2
        return model

    assert check_convention(make, x).probe is None
    assert oracle(make, x) < 1e-12 < 1e-6 < oracle(partial(make, lie=True), x)


# --- third-party rows -----------------------------------------------------------------------------------------------


class Gain(nn.Module):
    """A third-party layer: reduce (in, r), expand (r, out), `gain` the multiplier."""

    def __init__(self, rank, alpha):
        super().__init__()
        self.base = nn.Linear(IN, OUT).requires_grad_(False)
        self.reduce, self.expand = drawn(IN, rank), zeros(rank, OUT)
        self.width, self.gain = rank, alpha / rank

    def forward(self, x):
        return self.base(x) + self.gain * x @ self.reduce @ self.expand


STRANGER = Convention(
    "gain", "reduce", "expand", layouts=("columns",), rank=("width",), scaling=("gain",)
)


def test_a_third_party_convention_in_five_lines(registered):
    """A row that is registered and checked is read like the built-in ones, by the optimizer too."""
    assert check_convention(Gain, x, convention=STRANGER).probe < 1e-12
    assert STRANGER not in conventions()
    registered(STRANGER)
    model = Gain(4, 8.0)
    assert [
        (f.role, f.rank, f.fan_in, f.scaling) for f in inspect_model(model).factors
    ] == [("A", 4, IN, 2.0), ("B", 4, IN, 2.0)]
    opt = ra.RankAwareOptimizer(
        model, torch.optim.AdamW, lr=1e-3, tuned_at=ra.Reference(rank=16, alpha=16)
    )
    assert {g["lora_role"] for g in opt.param_groups if g.get("lora_role")} == {
        "A",
        "B",
    }


def test_a_registered_row_goes_before_built_in_ones(registered):
    """Where a registered row and a built-in one fit the same attributes, the registered one reads them."""
    registered(Convention("mine", "lora_A", "lora_B", kind="mine"))
    assert {(f.convention, f.kind) for f in inspect_model(adapted()).factors} == {
        ("mine", "mine")
    }


BAD_ROWS = [
    ("nothing", "A convention is a Convention, not 'nothing'"),
    (replace(STRANGER, name="peft"), "Another convention is called 'peft'"),
    (
        replace(STRANGER, init="C"),
        "The init of the convention 'gain' is 'A' (B = 0 at the start)",
    ),
]


@pytest.mark.parametrize(("row", "sentence"), BAD_ROWS)
def test_rows_that_make_no_sense_are_refused(row, sentence):
    """What is no row is an error at registration, and nothing is registered."""
    before = conventions()
    with pytest.raises(InspectionError, match=re.escape(sentence)):
        register_convention(row)
    assert conventions() == before


def test_the_same_row_may_be_registered_again_but_no_other_of_its_name(registered):
    """Registering is idempotent; a second row of the name is an error, and fine after the first is removed."""
    registered(STRANGER)
    register_convention(STRANGER)
    with pytest.raises(InspectionError, match="Another convention is called 'gain'"):
        register_convention(replace(STRANGER, b="other"))
    for _ in range(2):
        register_convention(STRANGER, remove=True)
    register_convention(replace(STRANGER, b="other"))


# --- rows of installed packages -------------------------------------------------------------------------------------

PLUGIN = """
from rankaware_optim import Convention
ROW = Convention("gain", "reduce", "expand", layouts=("columns",), rank=("width",), scaling=("gain",))
"""
USE = """
import sys, warnings
import torch
from torch import nn
sys.path.insert(0, sys.argv[1])
from rankaware_optim import inspect_model
layer = nn.Module()
layer.reduce, layer.expand = nn.Parameter(torch.ones(12, 4)), nn.Parameter(torch.zeros(4, 20))
layer.width, layer.gain = 4, 2.0
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        survey = inspect_model(layer)
print([(f.convention, f.rank, f.fan_in, f.scaling) for f in survey.factors])
for warning in caught:
    print(warning.message)
"""


@pytest.fixture
def installed(tmp_path):
    """A folder that holds an installed package of one good row and two broken ones."""
    (tmp_path / "gain_rows.py").write_text(PLUGIN)
    info = tmp_path / "gain_rows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gain-rows\nVersion: 1.0\n"
    )
    points = [
        "gain = gain_rows:ROW",
        "broken = not_there_at_all:ROW",
        "none = builtins:dict",
    ]
    (info / "entry_points.txt").write_text(
        "\n".join(["[rankaware_optim.conventions]", *points, ""])
    )
    return tmp_path


def test_a_convention_by_entry_point(installed):
    """An installed package's row is found unasked; broken ones of other packages warn once and are left out."""
    run = subprocess.run(
        [sys.executable, "-c", USE, str(installed)],
        capture_output=True,
        text=True,
        check=True,
    )
    factors, *warned = run.stdout.splitlines()
    assert factors == "[('gain', 4, 12.0, 2.0), ('gain', 4, 12.0, 2.0)]"
    assert sorted(warned) == [
        "The plug-in 'broken' (not_there_at_all:ROW) is left out: No module named 'not_there_at_all'.",
        "The plug-in 'none' (builtins:dict) is left out: it is a type, not a Convention.",
    ]


# --- bad input ------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
junk = st.one_of(
    st.none(),
    st.integers(-2, 6),
    st.floats(),
    st.text(max_size=2),
    st.lists(st.booleans(), max_size=3),
    st.builds(dict),
)


@given(
    row=st.sampled_from(CONVENTIONS),
    shapes=st.tuples(sizes, sizes),
    values=st.lists(junk, min_size=12, max_size=12),
)
def test_any_shapes_and_declarations_give_a_reading_or_our_error(row, shapes, values):
    """Whatever a module declares, its pair has positive rank, fans and scaling, or inspection raises its own error."""
    owner, left = nn.Module(), iter(values)
    for name in (*row.where, *row.rank, *row.scaling, *row.alpha):
        setattr(owner, name.partition(".")[0], next(left))
    for name, shape in ((row.a, shapes[0]), (row.b, shapes[1])):
        param = nn.Parameter(torch.ones(shape))
        setattr(
            owner,
            name,
            nn.ParameterDict({"default": param}) if row.container else param,
        )
    try:
        factors = inspect_model(owner).factors
    except InspectionError:
        return
    for f in factors:
        assert f.rank >= 1
        assert f.fan_in > 0
        assert f.fan_out > 0
        assert 0 < f.scaling < float("inf")


def test_a_declared_rank_of_zero_is_at_odds_with_factors():
    """A rank of 0 beside factors of rank 4 is an error, not an undeclared rank."""
    layer = adapted()
    layer.r = 0
    with pytest.raises(InspectionError, match="declares rank 0 but lora_A has shape"):
        inspect_model(layer)


def refusing(owner, a, b):
    raise InspectionError("This layout knows why.", "Ask it.")


def test_a_layouts_own_error_reaches_the_user(registered):
    """An InspectionError that a layout raises is not taken for a reading that does not fit."""
    registered(Convention("refusing", "lora_A", "lora_B", layouts=(refusing, "rows")))
    with pytest.raises(InspectionError, match=r"This layout knows why\. Ask it\."):
        inspect_model(adapted())


BAD_LAYOUTS = [
    lambda owner, a, b: None,
    lambda owner, a, b: (4, 4),
    lambda owner, a, b: {}["rank"],
]


@pytest.mark.parametrize("layout", BAD_LAYOUTS)
def test_a_layout_that_gives_no_reading_does_not_fit(layout):
    """A third-party layout that returns something else, or raises, is an error that names the layer and the shapes."""
    row = Convention("bad layout", "lora_A", "lora_B", layouts=(layout,))
    with pytest.raises(
        InspectionError, match=r"declares rank 2 but lora_A has shape \(2, 12\)"
    ):
        check_convention(lambda r, alpha: adapted(rank=r), x, convention=row)


# --- what is no pair ------------------------------------------------------------------------------------------------


def test_gates_called_lora_are_no_adapter():
    """A base model's trainable gate named `lora`, a Sequential of two linear layers, is not taken for a pair."""
    gate = nn.Sequential(nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, OUT))
    with pytest.raises(InspectionError, match="No trainable LoRA pair"):
        inspect_model(nn.ModuleDict({"lora": gate}))
    survey = inspect_model(nn.ModuleDict({"lora": gate, "up": adapted()}))
    assert {f.layer for f in survey.factors} == {"up"}
    assert len(survey.other) == 4
    assert {other_kind(name) for name in survey.other} == {None}


FEED_FORWARD = [
    ("down", "up"),
    ("A", "B"),
    ("linear_in", "linear_out"),
    ("down_proj", "up_proj"),
]


@pytest.mark.parametrize("names", FEED_FORWARD, ids=str)
def test_ordinary_layers_are_no_adapter(names):
    """Two linear layers with common names and nothing that declares a rank are not taken for a pair."""
    block = nn.ModuleDict({names[0]: nn.Linear(IN, 4), names[1]: nn.Linear(4, OUT)})
    with pytest.raises(InspectionError, match="No trainable LoRA pair"):
        inspect_model(block)


KINDS = [
    ("q.hada_w1_a.default", "LoHa", True),
    ("q.lokr_w2", "LoKr", True),
    ("q.vera_lambda_d.default", "VeRA", True),
    ("q.pvera_lambda_b.default", "PVeRA", True),
    ("q.lora_A.3", "DyLoRA", True),
    ("q.up_list.0", "DyLoRA", True),
    ("q.glora_E.default.none", "GLoRA", True),
    ("q.a1.weight", "GLoRA", True),
    ("q.oft_R.default.weight", "OFT", True),
    ("q.boft_R.default", "BOFT", True),
    ("q.ia3_l.default", "IA³", True),
    ("q.lora_E.default", "AdaLoRA's singular values", False),
    ("q.lora_magnitude_vector.default.weight", "DoRA magnitude", False),
    ("q.lora_magnitude", "DoRA magnitude", False),
    ("q.magnitude", "DoRA magnitude", False),
    ("q.dora_scale", "DoRA magnitude", False),
    ("q.lora_B.default.bias", "LoRA bias", False),
    ("head.modules_to_save.default.weight", "whole copy (modules_to_save)", False),
    ("q.lora_mid.weight", "Tucker core", False),
    ("q.lora_A.default.weight", None, False),
    ("q.lora_A.default", None, False),
    ("head.weight", None, False),
    ("magnitudes.weight", None, False),
    ("soft.weight", None, False),
    ("block.layer1.weight", None, False),
]


@pytest.mark.parametrize(("name", "kind", "adapter"), KINDS)
def test_other_kinds_are_named(name, kind, adapter):
    """A parameter's name tells the kind of adapter it belongs to, and whether that is a separate method."""
    assert other_kind(name) == kind
    assert is_other_adapter(name) is adapter


def test_every_row_has_a_case():
    """Every row is held against a real library or a replica."""
    held = {case.convention for case in (*CASES, *REPLICAS)}
    assert {row.name for row in CONVENTIONS} == held
