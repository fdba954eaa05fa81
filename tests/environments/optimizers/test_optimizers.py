"""Tests of every optimizer class of 25 packages, each compared with the native class on groups by hand."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch

from rankaware_optim import OptimizerError, RankAwareOptimizer, RankAwareWarning
from rankaware_optim._optimizers import (
    goes_to_adam,
    known_optimizer,
)

from ...helpers.models import mlp, same, snapshot
from . import displacement
from .by_hand import (
    LR,
    by_class,
    by_instance,
    native,
    run,
    through_file,
)
from .cases import (
    CASES,
    CLASSES,
    LOADS_NOT,
    NO_STEP,
    PICKLED,
    REFUSED,
    SNAPSHOTS,
    P,
    classes,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is of an unknown family"),
    pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You are using weight_decay:UserWarning"),
    # torch_optimizer uses old signatures of torch
    pytest.mark.filterwarnings("ignore:This overload of:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning"),
    pytest.mark.filterwarnings("ignore:rank=None. It will be set:UserWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported:UserWarning"),
]

# The other low-bit classes of these two packages use the same code.
OF_EACH_KIND = ("bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit")
TESTED = [
    key
    for key in CASES
    if key in OF_EACH_KIND
    or not (key in NO_STEP or key.startswith(("bitsandbytes", "torchao")))
]
each_case = pytest.mark.parametrize("key", TESTED)


@pytest.fixture(autouse=True)
def eager():
    """Switch compilation off. torchao compiles its step, but eager steps give the same numbers
    without a compiler.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def one_process(request):
    """Start a process group of one process for the optimizers that communicate."""
    of_test = getattr(request.node, "callspec", None)
    key = of_test and of_test.params.get("key")
    if key not in (P + "DeMo", P + "DistributedMuon"):
        yield
        return
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("form", [by_class, by_instance])
@each_case
def test_training_equals_the_native_class_with_groups_by_hand(key, form):
    """Training gives exactly the same weights as the native class with the same groups written by hand."""
    if form is by_instance and key in SNAPSHOTS:
        pytest.skip("it keeps rates of its first groups: class form only")
    case = CASES[key]
    ours, hand, start = case.model(), case.model(), snapshot(case.model())
    run(case, hand, native(case, hand))
    run(case, ours, form(case, ours))
    assert same(snapshot(ours), snapshot(hand))
    assert not same(snapshot(ours), start)


# for a class that changes its own learning rate
@pytest.mark.filterwarnings("ignore:Loading the checkpoint changed")
@each_case
def test_a_saved_state_continues_as_natively(key):
    """A run continues exactly from a saved state in a new optimizer, and ends as the native class does."""
    if key in LOADS_NOT:
        pytest.skip("its own load fails")
    case = CASES[key]
    safely = key not in PICKLED
    ours, ours_whole = _resumed(case, by_class, safely)
    hand, hand_whole = _resumed(case, native, safely)
    assert same(ours_whole, hand_whole)
    assert same(ours, hand)
    assert same(ours, ours_whole)


def _resumed(case, make, safely):
    """Return the weights of a resumed run and of an uninterrupted one."""
    model, fresh = case.model(), case.model()
    opt, other = make(case, model), make(case, fresh)
    run(case, model, opt, 0, 4)
    state = through_file(opt, safely=safely)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    for parts in ((model, opt), (fresh, other)):
        run(case, *parts, 4, 8)
    return snapshot(fresh), snapshot(model)


@pytest.mark.parametrize("key", sorted(displacement.JUDGED))
def test_each_factor_moves_at_its_rate_in_its_familys_form(key):
    """Under constant gradients, each LoRA matrix moves in proportion to its learning rate and in
    the form of its family.

    displacement.py lists the classes to which this does not apply, with the reasons.
    """
    found = displacement.judged(displacement.JUDGED[key])
    assert found.as_by_hand
    listed = key in displacement.NOT_BY_RATE, key in displacement.OF_ANOTHER_FORM
    assert (bool(found.wrong_rates), bool(found.other_forms)) == listed, found


@pytest.mark.parametrize("module", ["timm.optim.muon", "adv_optm.util.Muon_util"])
def test_what_a_muon_hands_to_its_adam_is_as_its_package_decides(module):
    """For every shape, we predict whether this package's Muon trains such a parameter with its built-in Adam."""
    suits = pytest.importorskip(module)._is_suitable_for_muon
    row = known_optimizer(f"{module.partition('.')[0]}.Muon")[1]
    sides = (1, 2, 3, 4, 5, 16, 31, 32, 33, 512, 513, 4096)
    shapes = [(side,) for side in sides]
    shapes += [*product(sides, sides), *product(sides, sides, (1, 3))]
    shapes += [(rows, columns, 3, 3) for rows, columns in product(sides, sides)]
    for shape in shapes:
        param = torch.empty(shape, device="meta")
        assert goes_to_adam(row, {}, shape) != suits(param), shape


@pytest.mark.parametrize("key", sorted(displacement.JUDGED))
def test_another_way_to_step_is_at_the_multiplied_rate(key):
    """Other public methods that move a parameter by its learning rate use the multiplied one, as `step` does."""
    ways = displacement.ways_to_step(displacement.JUDGED[key])
    assert ways == pytest.approx(dict.fromkeys(ways, 1.0))


# --- refused --------------------------------------------------------------------------------------------------------


REFUSALS = {key: REFUSED[key] for key in REFUSED if key in CLASSES}
REFUSALS["torch.optim.Muon"] = "only supports 2D parameters"


@pytest.mark.parametrize("key", REFUSALS)
def test_refused_with_a_sentence(key):
    """A class that cannot have a learning rate for each rank raises an error that names it, and the
    model is unchanged.
    """
    model = mlp((4, 8))
    before = snapshot(model)
    with pytest.raises(OptimizerError, match=REFUSALS[key]) as caught:
        RankAwareOptimizer(model, CLASSES[key], lr=LR)
    assert CLASSES[key].__name__ in str(caught.value)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("key", sorted(SNAPSHOTS & CASES.keys()))
def test_instances_that_keep_rates_by_group_are_refused(key):
    """An instance that cannot take other groups raises an error that says to pass the class, and
    stays unchanged.
    """
    case = CASES[key]
    built = case.kind(case.own(model := case.model()), lr=LR)
    with pytest.raises(OptimizerError, match="Pass the class and its settings instead"):
        RankAwareOptimizer(built, model=model)
    assert type(built) is case.kind
    assert len(built.param_groups) == 1


# --- the whole of each package --------------------------------------------------------------------------------------

# The least number of classes of each package that pass.
AT_LEAST = {
    "torch.optim": 14,
    "torch_optimizer": 25,
    "pytorch_optimizer": 105,
    "schedulefree": 9,
    "timm.optim": 20,
}


@pytest.mark.parametrize("package", AT_LEAST)
def test_so_many_classes_pass(package):
    """A minimum number of classes of each package is tested here and not listed as refused."""
    if not classes(package):
        pytest.skip(f"{package} is not installed")
    passing = [key for key in CASES if key.rpartition(".")[0] == package]
    assert len(passing) >= AT_LEAST[package]


def test_every_name_of_pytorch_optimizer_is_a_row():
    """Every optimizer that pytorch_optimizer can load by name is known to these tests."""
    module = pytest.importorskip("pytorch_optimizer")
    loaded = map(module.load_optimizer, module.get_supported_optimizers())
    assert {*loaded} <= {*CLASSES.values()}


# Settings of a class, and whether steps too small for bfloat16 still move its weights.
ROUNDING = [
    ("optimi.AdamW", {}, True),
    ("optimi.Lion", {"kahan_sum": True}, True),
    ("optimi.AdamW", {"kahan_sum": False}, False),
    ("torchao.optim._AdamW", {"bf16_stochastic_round": True}, True),
    ("torchao.optim._AdamW", {}, False),
    ("adv_optm.AdamW_adv", {}, True),
    ("adv_optm.Lion_adv", {"stochastic_rounding": False}, False),
    (P + "StableAdamW", {}, True),
    (P + "StableAdamW", {"kahan_sum": False}, False),
    (P + "FlashAdamW", {"master_weight_bits": 24}, True),
    (P + "FlashAdamW", {}, False),
    (P + "ROSE", {}, True),
    (P + "ROSE", {"bf16_sr": False}, False),
    ("bitsandbytes.optim.Lion8bit", {}, False),
    ("torch.optim.AdamW", {}, False),
]


@pytest.mark.parametrize(("key", "settings", "keeps"), ROUNDING)
def test_who_moves_bfloat16_weights_by_small_steps(key, settings, keeps):
    """The report warns of bfloat16 rounding exactly if 40 small steps move the weights by less than
    a third of 40 learning rates.
    """
    weight = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(weight.weight, 0.75)
    before = weight.weight.detach().double()
    torch.manual_seed(0)
    signs, rate, steps = torch.randn(64, 64).sign(), 1e-4, 40
    opt = RankAwareOptimizer(
        weight, CLASSES[key], lr=rate, method="full", weight_decay=0.0, **settings
    )
    assert (opt.report().unmoved == ()) == keeps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankAwareWarning)
        for _ in range(steps):
            weight.weight.grad = (0.01 * signs).bfloat16()
            opt.step()
    moved = (signs * (before - weight.weight.detach().double())).mean()
    assert (moved > rate * steps / 3) == keeps
