"""The table of conventions for reading adapters: replicas of libraries that no test environment
has, conventions of third parties, and modules that are no adapters.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from types import SimpleNamespace

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
from rankaware_optim.inspection import (
    Reading,
    _conventions,
    conventions,
    is_other_adapter,
    other_kind,
)
from rankaware_optim.inspection._conventions import CONVENTIONS, LAYOUTS
from rankaware_optim.testing import check_convention

from ..helpers.models import adapted
from ..helpers.oracle import oracle
from ..helpers.real_adapters import CASES, IN, OUT, read
from ..helpers.replicas import (
    REPLICAS,
    deepspeed_linear,
    megatron,
    x,
)


@pytest.fixture
def registered():
    """Return a function that registers conventions for the duration of one test."""
    rows = []

    def register(row):
        register_convention(row)
        rows.append(row)

    yield register
    for row in rows:
        register_convention(row, remove=True)


@pytest.mark.parametrize("case", REPLICAS, ids=lambda case: case.name)
def test_a_replica_is_read_and_trains_as_read(case):
    """A replica of a library's layer is read with the right rank, fans, scaling, kind and init, and
    its output and its training agree with these values.
    """
    assert read(case.make(4, 8.0)) == case.expected(4, 8.0)
    assert check_convention(case.make, *case.inputs()) < 1e-9
    assert oracle(case.make, *case.inputs()) < 1e-12


CONV = SimpleNamespace(
    kernel_size=(3, 3), weight=torch.empty(8, 4, 3, 3), out_channels=8
)
CORE = SimpleNamespace(weight=torch.empty(4, 4, 3, 3))
BLOCKS = SimpleNamespace(values=lambda: [SimpleNamespace(nblocks=2)])
LAYOUT_READS = [
    # the layout, attributes of the owner, the shapes of A and B, and the reading
    ("rows", {}, (4, 12), (20, 4), Reading(4, 4, 12, 20)),
    ("rows", {"groups": 2}, (4, 6, 3), (8, 2, 1), Reading(4, 4, 18, 8, inner=0.5)),
    ("blocks", {"lora_B": BLOCKS}, (4, 12), (20, 2), Reading(4, 4, 12, 20, inner=0.5)),
    ("columns", {}, (12, 4), (4, 20), Reading(4, 4, 12, 20)),
    ("columns", {}, (3, 12, 4), (3, 4, 20), Reading(4, 4, 12, 20, kind="experts")),
    ("experts", {}, (3, 4, 12), (3, 20, 4), Reading(4, 4, 12, 20, kind="experts")),
    (
        *("stacked", {"num_experts": 3}, (12, 10), (20, 12)),
        Reading(4, 4, 10, 20, kind="experts"),
    ),
    (
        *("merged", {"enable_lora": [True, False, True]}, (8, 12), (20, 4)),
        Reading(4, 4, 12, 20),
    ),
    (
        *("kernel", {"conv": CONV}, (12, 12), (24, 12)),
        Reading(4, 4, 36, 8, inner=3, kind="conv"),
    ),
    (
        *("tucker", {"lora_mid": CORE}, (4, 6, 1, 1), (8, 4, 1, 1)),
        Reading(4, 4, 54, 8, kind="conv"),
    ),
]


@pytest.mark.parametrize(("layout", "owner", "a", "b", "reading"), LAYOUT_READS)
def test_every_layout_reads_rank_and_fans(layout, owner, a, b, reading):
    """Each layout in the table computes rank, fan-in, fan-out and inner features from the shapes of
    A and B.
    """
    assert LAYOUTS[layout](SimpleNamespace(**owner), a, b) == reading


def test_a_rank_declared_in_a_configuration_is_compared():
    """A DeepSpeed layer whose `lora_config` declares another rank than its shapes have raises an
    error.
    """
    layer = deepspeed_linear(4, 8.0)
    layer.lora_config.lora_r = 16
    with pytest.raises(InspectionError, match="declares rank 16"):
        inspect_model(layer)


def test_the_check_leaves_the_random_state_alone():
    """check_convention draws random numbers, but does not change the global random state."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_convention(megatron, x)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_stays_as_it_is(frozen):
    """check_convention also accepts layers of which only A or only B trains, as in LoRA-FA."""

    def make(rank, alpha):
        layer = adapted(rank=rank, scaling=alpha / rank, init="other")
        getattr(layer, frozen).requires_grad_(False)
        return layer

    assert len(inspect_model(make(4, 8.0)).factors) == 1
    assert check_convention(make, x) < 1e-12
    assert oracle(make, x) < 1e-12


def test_a_layer_without_a_scaling_is_checked_with_scaling_one():
    """check_convention accepts a layer that declares no scaling and adds B·A unscaled."""

    def make(rank, alpha):
        layer = adapted(rank=rank, scaling=1.0)
        del layer.scaling
        layer.forward = lambda inputs: (
            layer.base_layer(inputs) + inputs @ layer.lora_A.T @ layer.lora_B.T
        )
        return layer

    assert check_convention(make, x) < 1e-12


def test_a_model_in_which_more_trains_has_no_error_to_report():
    """check_convention returns None if a head trains too, because the output then shows more than B·A."""

    def make(rank, alpha):
        head = torch.nn.Linear(20, 3)
        return torch.nn.Sequential(adapted(rank=rank, scaling=alpha / rank), head)

    assert check_convention(make, x) is None


# --- what the check must not let pass -------------------------------------------------------------------------------


def swapped_fans(owner, a, b):
    return Reading(a[0], b[1], b[0], a[1])


def honest(rank, alpha):
    return adapted(rank=rank, scaling=alpha / rank)


def lying(rank, alpha):
    """Return a layer that declares alpha as its scaling but multiplies by alpha / rank."""
    layer = honest(rank, alpha)
    layer.held, layer.scaling = layer.multiplier, alpha
    return layer


TURNED = Convention("turned", "lora_A", "lora_B", layouts=(swapped_fans,))
KOHYA = Convention("kohya", "lora_down", "lora_up")
LIES = {
    "a rank that is another": (
        lambda rank, alpha: adapted(rank=rank + 1),
        None,
        r"make\(2, 3\) .* read as 3 instead of 2",
    ),
    "two ranks": (
        lambda rank, _: nn.Sequential(adapted(rank=rank), adapted(rank=9)),
        None,
        "read as 2 and 9 instead of 2",
    ),
    "another row": (
        honest,
        KOHYA,
        "'kohya' does not match .* convention 'lora_A/lora_B'",
    ),
    "a scaling that is alpha": (
        lying,
        None,
        "does not compute what its convention states.*scaling 3 × rank 2",
    ),
    "fans the wrong way round": (
        honest,
        TURNED,
        "does not compute what its convention states.*fan-in 20",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_check_names_what_fails(lie):
    """check_convention raises an error that says which value was read wrongly."""
    make, row, sentence = LIES[lie]
    with pytest.raises(InspectionError, match=sentence):
        check_convention(make, x, convention=row)
    assert TURNED not in conventions()


def test_the_oracle_of_these_tests_tells_a_wrong_scaling():
    """The oracle in tests/helpers notices a wrong scaling, even behind a nonlinearity."""

    def squared(rank, alpha):
        layer = honest(rank, alpha)
        layer.held, layer.scaling = layer.multiplier, alpha**2
        return nn.Sequential(layer, nn.Tanh())

    assert oracle(squared, x) > 1e-6


# --- conventions of third parties -----------------------------------------------------------------------------------


STRANGER = Convention(
    "gain", "reduce", "expand", layouts=("columns",), rank=("width",), scaling=("gain",)
)


def test_a_registered_row_goes_before_built_in_ones(registered):
    """A registered convention is tried before a built-in convention that fits the same attributes."""
    registered(Convention("mine", "lora_A", "lora_B", kind="mine"))
    factors = inspect_model(adapted()).factors
    assert {(f.convention, f.kind) for f in factors} == {("mine", "mine")}


BAD_ROWS = [
    ("nothing", "'nothing' is not an instance"),
    (replace(STRANGER, name="peft"), "Another Convention is already called 'peft'"),
    (replace(STRANGER, init="C"), "The init of the convention 'gain' must be 'A', 'B'"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD_ROWS)
def test_rows_that_make_no_sense_are_refused(row, sentence):
    """Registering an impossible convention raises an error and adds nothing to the table."""
    before = conventions()
    with pytest.raises(InspectionError, match=re.escape(sentence)):
        register_convention(row)
    assert conventions() == before


def test_the_same_row_may_be_registered_again_but_no_other_of_its_name(registered):
    """Registering an equal convention again changes nothing, but a different convention of the same
    name raises an error until the first is removed.
    """
    registered(STRANGER)
    register_convention(STRANGER)
    with pytest.raises(
        InspectionError, match="Another Convention is already called 'gain'"
    ):
        register_convention(replace(STRANGER, b="other"))
    for _ in range(2):
        register_convention(STRANGER, remove=True)
    register_convention(replace(STRANGER, b="other"))


def test_broken_rows_of_other_packages_are_left_out(monkeypatch):
    """An entry point of another package that cannot be loaded gives one warning, and all other
    conventions stay available.
    """
    points = [
        EntryPoint("broken", "not_there_at_all:ROW", "g"),
        EntryPoint("none", "builtins:dict", "g"),
        EntryPoint("gain", f"{__name__}:STRANGER", "g"),
    ]
    monkeypatch.setattr(_conventions, "entry_points", lambda group: points)
    _conventions._installed.cache_clear()
    with pytest.warns(ra.RankAwareWarning) as caught:
        rows = conventions()
    assert rows == (STRANGER, *CONVENTIONS) == conventions()
    said = " ".join(str(warning.message) for warning in caught)
    assert len(caught) == 2
    assert "'broken' cannot be imported" in said
    assert "not a subclass of rankaware_optim.Convention" in said
    _conventions._installed.cache_clear()


# --- bad input ------------------------------------------------------------------------------------------------------

sizes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
numbers = st.integers(-2, 6) | st.floats()
lists = st.lists(st.booleans(), max_size=3)
junk = st.none() | numbers | st.text(max_size=2) | lists | st.builds(dict)


@given(
    row=st.sampled_from(CONVENTIONS),
    shapes=st.tuples(sizes, sizes),
    values=st.lists(junk, min_size=12, max_size=12),
)
def test_any_shapes_and_declarations_give_a_reading_or_our_error(row, shapes, values):
    """Whatever shapes and values a module has, its pair is read with positive rank, fans and
    scaling, or raises an InspectionError.
    """
    owner, left = nn.Module(), iter(values)
    for name in (*row.where, *row.rank, *row.scaling, *row.alpha):
        setattr(owner, name.partition(".")[0], next(left))
    for name, shape in zip((row.a, row.b), shapes, strict=True):
        param = nn.Parameter(torch.ones(shape))
        held = nn.ParameterDict({"default": param}) if row.container else param
        setattr(owner, name, held)
    try:
        factors = inspect_model(owner).factors
    except InspectionError:
        return
    for f in factors:
        assert f.rank >= 1
        assert f.fan_in > 0
        assert f.fan_out > 0
        assert 0 < f.scaling < float("inf")


def refusing(owner, a, b):
    raise InspectionError("This layout knows why.", "Ask it.")


def test_a_layouts_own_error_reaches_the_user(registered):
    """An InspectionError that a layout raises reaches the user."""
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
    """If a third-party layout raises an exception or returns no Reading, the error names the
    layer's rank and shapes.
    """
    row = Convention("bad layout", "lora_A", "lora_B", layouts=(layout,))
    message = r"declares rank 2, but lora_A has shape \(2, 12\)"
    with pytest.raises(InspectionError, match=message):
        check_convention(honest, x, convention=row)


# --- modules that are no LoRA pair ----------------------------------------------------------------------------------


def of_layers(first, second):
    """Return two linear layers with these names, with a small width between them."""
    return nn.ModuleDict({first: nn.Linear(IN, 4), second: nn.Linear(4, OUT)})


def gate():
    return nn.Sequential(nn.Linear(IN, 4), nn.Tanh(), nn.Linear(4, OUT))


def half(name):
    """Return a module that has only A or only B."""
    lone = nn.Module()
    lone.register_parameter(name, nn.Parameter(torch.ones(4, 4)))
    return lone


NO_PAIRS = {
    "a gate": nn.ModuleDict({"lora": gate()}),
    **{
        " ".join(names): of_layers(*names)
        for names in (("down", "up"), ("A", "B"), ("linear_in", "linear_out"))
    },
    **{name: half(name) for name in ("lora_A", "lora_B")},
}


@pytest.mark.parametrize("model", NO_PAIRS.values(), ids=list(NO_PAIRS))
def test_ordinary_layers_are_no_adapter(model):
    """Layers of a base model with common names, gates, and half a pair are not taken for an adapter."""
    with pytest.raises(InspectionError, match="No trainable LoRA pair"):
        inspect_model(model)
    survey = inspect_model(nn.ModuleDict({"base": model, "up": adapted()}))
    assert {factor.layer for factor in survey.factors} == {"up"}
    assert len(survey.other) == len(list(model.parameters()))
    assert {other_kind(name) for name in survey.other} == {None}


def test_a_peft_method_that_inspection_does_not_know_is_named():
    """The error for an unknown PEFT method names the method, and does not suggest get_peft_model,
    which the user has already called.
    """
    model = nn.Linear(3, 3)
    model.peft_config = {"default": SimpleNamespace(peft_type="NEWFT")}
    with pytest.raises(InspectionError, match="PEFT method NEWFT") as caught:
        inspect_model(model)
    assert "get_peft_model" not in str(caught.value)


@pytest.mark.parametrize("frozen", [False, True])
def test_new_tokens_alone_are_an_adapter(frozen):
    """A model in which PEFT trains only new tokens is accepted, but beside frozen LoRA matrices an
    error says that these are frozen.
    """
    model = nn.ModuleDict({"embed": nn.Module()})
    model["embed"].trainable_tokens_delta = nn.ParameterDict({"x": torch.ones(2, 3)})
    if frozen:
        model["q"] = adapted().requires_grad_(False)
        with pytest.raises(InspectionError, match="all of them are frozen"):
            inspect_model(model)
    else:
        assert set(inspect_model(model).unsupported.values()) == {"new tokens"}


KINDS = [
    ("q.hada_w1_a.default", "LoHa", True),
    ("q.lora_A.3", "DyLoRA", True),
    ("q.up_list.0", "DyLoRA", True),
    ("q.a1.weight", "GLoRA", True),
    ("attn.adaption_gate", "Adaption Prompt", True),
    ("layers.0.shadow_down.default.weight", "SHADOW", True),
    ("shadow_net.weight", None, False),
    ("embed.trainable_tokens_delta.default", "new tokens", False),
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
    """The name of a parameter tells to which kind of adapter it belongs, and whether that kind is a
    method other than LoRA.
    """
    assert other_kind(name) == kind
    assert is_other_adapter(name) is adapter


def test_every_row_has_a_case():
    """Every convention in the table is tested against a real library or a replica."""
    held = {case.convention for case in (*CASES, *REPLICAS)}
    assert {row.name for row in CONVENTIONS} == held
