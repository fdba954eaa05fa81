"""Every optimizer class of six packages: the same numbers as the native class with groups by hand, saved and loaded."""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from rankaware_optim import OptimizerError, RankAwareOptimizer

from ..models import mlp, same, snapshot
from .by_hand import AT_16, LR, Case, by_class, by_instance, loads_safely, native, run, through_file

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning"),
]


def classes(package: str) -> dict[str, type[Optimizer]]:
    """The optimizer classes of a package by name, none where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(package)
        except ImportError:
            return {}
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value) and value is not Optimizer}
    return {f"{package}.{name}": value for name, value in sorted(found.items()) if issubclass(value, Optimizer)}


PACKAGES = ("torch.optim", "torch_optimizer", "pytorch_optimizer", "schedulefree")
CLASSES = {key: value for package in PACKAGES for key, value in classes(package).items()}
EXTRA = ("bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW8bit")
CLASSES |= {key: found[key] for key in EXTRA if key in (found := classes(key.rpartition(".")[0]))}
SPECIAL = {}
HOLDERS = {}
FAILS = {}
SNAPSHOTS = {}

CASES = [pytest.param(key, id=key) for key in CLASSES if key not in HOLDERS and key not in FAILS]


def case_of(key):
    return Case(CLASSES[key], **SPECIAL.get(key, {}))


@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("form", [by_class, by_instance])
def test_same_numbers(key, form):
    case = case_of(key)
    ours, hand = case.model(), case.model()
    start = snapshot(hand)
    run(case, hand, native(case, hand))
    run(case, ours, form(case, ours))
    assert not same(start, snapshot(hand))
    assert same(snapshot(ours), snapshot(hand))


@pytest.mark.parametrize("key", CASES)
def test_resume(key):
    case = case_of(key)
    ends = []
    safely = None
    whole = []
    for make in (native, by_class):
        model = case.model()
        opt = make(case, model)
        run(case, model, opt, 0, 4)
        if safely is None:
            safely = loads_safely(opt)
        state = through_file(opt, weights_only=safely)
        fresh = case.model()
        fresh.load_state_dict(model.state_dict())
        other = make(case, fresh)
        other.load_state_dict(state)
        run(case, model, opt, 4, 8)
        run(case, fresh, other, 4, 8)
        ends.append(snapshot(fresh))
        whole.append(snapshot(model))
    assert same(*ends), "ours resumed differs from native resumed"
    assert same(*whole)
    if same(ends[0], whole[0]):
        assert same(ends[1], whole[1])
    print("SAFE" if safely else "UNSAFE", "EXACT" if same(ends[0], whole[0]) else "INEXACT")
