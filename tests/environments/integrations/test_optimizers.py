"""Every optimizer class of six packages: the same numbers as the native class with groups by hand, saved and loaded."""

from __future__ import annotations

import importlib
import inspect
import warnings

import pytest
import torch
from torch.optim import Optimizer

from rankaware_optim import OptimizerError, RankAwareOptimizer
from rankaware_optim.optimizer import effective_lr

from ...helpers.models import mlp, same, snapshot
from .by_hand import (
    AT_16,
    LR,
    Case,
    by_class,
    by_instance,
    loads_safely,
    multiplier,
    native,
    run,
    through_file,
)

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:This overload of:UserWarning"
    ),  # torch_optimizer: torch's old signatures
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning"),
]

P = "pytorch_optimizer."
PACKAGES = ("torch.optim", "torch_optimizer", "pytorch_optimizer", "schedulefree")
EIGHT_BITS = ("bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit")

# What a class needs beside a rate: settings, groups, a closure, a wide model (eight-bit state starts at 4096 numbers).
NEEDS = {
    "torch.optim.Muon": {"groups": "matrices"},
    "torch.optim.SparseAdam": {"sparse": True},
    "torch_optimizer.Adahessian": {"graph": True},
    P + "AdaHessian": {"graph": True},
    P + "SophiaH": {"graph": True},
    P + "AdaShift": {"settings": {"keep_num": 2}},
    P + "BSAM": {"settings": {"num_data": 8}, "closure": True},
    P + "Ranger21": {"settings": {"num_iterations": 8}},
    P + "SpectralSphere": {"groups": "matrices"},
    **{
        P + name: {"groups": "muon"}
        for name in (
            "AdaGO",
            "AdaMuon",
            "DistributedMuon",
            "Muon",
            "MuonClip",
            "NorMuon",
        )
    },
    **{
        f"schedulefree.{name}ScheduleFreeClosure": {"closure": True}
        for name in ("AdamW", "RAdam", "SGD")
    },
    **{name: {"width": 1024} for name in EIGHT_BITS},
}

# Refused before anything is built, with a sentence that says this.
HOLDS = "wraps another optimizer, whose groups would not change"
ONE_RATE = "estimates one rate for all groups"
REFUSED = {
    "torch.optim.LBFGS": "takes one parameter group only",
    "torch_optimizer.Lookahead": HOLDS,
    P + "A2Grad": "has no rate in its groups",
    P + "AdaLOMO": "steps inside the backward pass",
    P + "AdamMini": "takes a model and makes its groups itself",
    P + "AliG": "has no rate in its groups",
    P + "DAdaptAdaGrad": ONE_RATE,
    P + "DAdaptAdam": ONE_RATE,
    P + "DAdaptAdan": ONE_RATE,
    P + "DAdaptLion": ONE_RATE,
    P + "DAdaptSGD": ONE_RATE,
    P + "FriendlySAM": HOLDS,
    P + "GSAM": HOLDS,
    P + "LBFGS": "takes one parameter group only",
    P + "LOMO": "steps inside the backward pass",
    P + "LoRARite": "steps A and B as one pair out of one group",
    P + "LookSAM": HOLDS,
    P + "Lookahead": HOLDS,
    P + "Magma": HOLDS,
    P + "OrthoGrad": HOLDS,
    P + "PCGrad": HOLDS,
    P + "Prodigy": ONE_RATE,
    P + "SAM": HOLDS,
    P + "SafeFP16Optimizer": HOLDS,
    P + "ScheduleFreeWrapper": HOLDS,
    P + "TRAC": HOLDS,
    P + "WSAM": HOLDS,
}

# Take no new groups once they are built: the class form alone.
SNAPSHOTS = {
    "torch_optimizer.AdaBound",
    P + "AdaBound",
    P + "SRMM",
    P + "ScheduleFreeAdamW",
    P + "ScheduleFreeSGD",
}

# Their state holds objects beside tensors and numbers: weights_only=True reads it on neither side.
PICKLED = {
    P + "AdaShift",
    P + "Conda",
    P + "SCION",
    P + "SCIONLight",
    P + "ScalableShampoo",
}


def classes(package: str) -> dict[str, type[Optimizer]]:
    """The optimizer classes of a package by name, none where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(package)
        except ImportError:
            return {}
    members = {
        name: value
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value)
    }
    return {
        f"{package}.{n}": v
        for n, v in members.items()
        if issubclass(v, Optimizer) and v is not Optimizer
    }


CLASSES = {
    key: value for package in PACKAGES for key, value in classes(package).items()
}
for eight_bits in EIGHT_BITS:
    known = classes(eight_bits.rpartition(".")[0])
    CLASSES |= {eight_bits: known[eight_bits]} if eight_bits in known else {}
CASES = {
    key: Case(kind, **NEEDS.get(key, {}))
    for key, kind in CLASSES.items()
    if key not in REFUSED
}
each_case = pytest.mark.parametrize("key", CASES)


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step; eager steps give the same numbers and need no compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def one_process(request):
    """A process group of one, for the optimizers that communicate."""
    key = (
        request.node.callspec.params.get("key")
        if hasattr(request.node, "callspec")
        else None
    )
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
    """Several steps give the parameters of the native class given the same groups by hand, bit for bit."""
    if form is by_instance and key in SNAPSHOTS:
        pytest.skip("it keeps rates of its first groups: class form only")
    case = CASES[key]
    ours, hand, start = case.model(), case.model(), snapshot(case.model())
    run(case, hand, native(case, hand))
    run(case, ours, form(case, ours))
    assert same(snapshot(ours), snapshot(hand))
    assert not same(snapshot(ours), start)


@pytest.mark.parametrize("key", CASES)
def test_a_saved_state_continues_as_natively(key):
    """State saved and loaded into a fresh optimizer continues bit for bit, and as the native class's does."""
    case = CASES[key]
    safely, (hand, hand_whole) = _resumed(case, native)
    ours_safely, (ours, ours_whole) = _resumed(case, by_class)
    assert ours_safely == safely
    assert same(ours_whole, hand_whole)
    assert same(ours, hand)
    assert same(ours, ours_whole)
    assert safely == (key not in PICKLED)


def _resumed(case, make):
    """Whether its state loads with weights_only; and the parameters of a resumed and of an uninterrupted run."""
    model, fresh = case.model(), case.model()
    opt, other = make(case, model), make(case, fresh)
    run(case, model, opt, 0, 4)
    safely = loads_safely(opt)
    state = through_file(opt, weights_only=safely)
    fresh.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    for parts in ((model, opt), (fresh, other)):
        run(case, *parts, 4, 8)
    return safely, (snapshot(fresh), snapshot(model))


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in REFUSED if key in CLASSES])
def test_refused_with_a_sentence(key):
    """A class that cannot have a rate per rank is refused, by name, and the model is left as it was."""
    model = mlp((4, 8))
    before = snapshot(model)
    with pytest.raises(OptimizerError, match=REFUSED[key]) as caught:
        RankAwareOptimizer(model, CLASSES[key], lr=LR)
    assert CLASSES[key].__name__ in str(caught.value)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("key", sorted(SNAPSHOTS & CASES.keys()))
def test_instances_that_keep_rates_by_group_are_refused(key):
    """An instance that snapshots its groups is refused with the way out, and left as it was."""
    case = CASES[key]
    built = case.kind(case.own(model := case.model()), lr=LR)
    with pytest.raises(
        OptimizerError, match="Give the class and its settings instead of the instance"
    ):
        RankAwareOptimizer(built, model=model)
    assert type(built) is case.kind
    assert len(built.param_groups) == 1


def test_muon_refuses_what_is_no_matrix_and_names_it():
    """torch's Muon with a bias among its parameters is refused by the bias's name, before it is built."""
    with pytest.raises(
        OptimizerError, match=r"Muon takes only matrices, but 1 .* such as head\.bias"
    ):
        RankAwareOptimizer(mlp((4, 8)), torch.optim.Muon, lr=LR)


def test_an_optimizer_that_groups_by_itself_is_wrapped_as_an_instance():
    """AdamMini makes its groups from a model: its instance keeps them, each factor at the rate of its rank."""
    kind = pytest.importorskip("pytorch_optimizer").AdamMini
    model = mlp((4, 8))
    opt = RankAwareOptimizer(kind(model, lr=LR), model=model, tuned_at=AT_16)
    rates = {
        name: effective_lr(group)
        for group in opt.param_groups
        for name in group["param_names"]
    }
    assert rates["layer0.lora_A"] == LR * multiplier(4, Case(kind))
    assert rates["layer1.lora_B"] == LR * multiplier(8, Case(kind))
    run(Case(kind), model, opt)


# --- the whole of each package --------------------------------------------------------------------------------------

# The least number of classes that pass, and what the package calls all of its own.
AT_LEAST = {
    "torch.optim": 14,
    "torch_optimizer": 29,
    "pytorch_optimizer": 105,
    "schedulefree": 9,
}


@pytest.mark.parametrize("package", AT_LEAST)
def test_so_many_classes_pass(package):
    """At least so many classes of each package are in the table that must pass."""
    if not classes(package):
        pytest.skip(f"{package} is not installed")
    assert (
        len([key for key in CASES if key.rpartition(".")[0] == package])
        >= AT_LEAST[package]
    )


def test_every_name_of_pytorch_optimizer_is_a_row():
    """All that pytorch_optimizer loads by name is in the table, passing or refused."""
    module = pytest.importorskip("pytorch_optimizer")
    assert {
        module.load_optimizer(name) for name in module.get_supported_optimizers()
    } <= set(CLASSES.values())
