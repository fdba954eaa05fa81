"""Tests of optimizers of other packages, which must train as the native class with groups by hand.

The folder `optimizers` beside this one has every class of 25 packages.
"""

from __future__ import annotations

import pytest
import torch

from ...helpers.models import same, snapshot
from ..optimizers.by_hand import Case, by_class, by_instance, native, run, through_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is of an unknown family"),
    # torch_optimizer uses old signatures of torch
    pytest.mark.filterwarnings("ignore:This overload of:UserWarning"),
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning"),
]
TWENTY = [
    ("torch.optim", "AdamW", {}),
    ("torch.optim", "SGD", {}),
    ("torch.optim", "Adafactor", {}),
    ("torch.optim", "Muon", {"groups": "matrices"}),
    ("torch.optim", "SparseAdam", {"sparse": True}),
    ("torch_optimizer", "Adahessian", {"graph": True}),
    ("torch_optimizer", "Shampoo", {}),
    ("pytorch_optimizer", "ADOPT", {}),
    ("pytorch_optimizer", "Muon", {"groups": "muon"}),
    ("pytorch_optimizer", "SOAP", {}),
    ("pytorch_optimizer", "BSAM", {"settings": {"num_data": 8}, "closure": True}),
    ("schedulefree", "AdamWScheduleFree", {}),
    ("schedulefree", "SGDScheduleFreeClosure", {"closure": True}),
    ("bitsandbytes.optim", "AdamW8bit", {"width": 1024}),
    ("torchao.optim", "AdamW8bit", {"width": 1024}),
    ("timm.optim", "Lamb", {}),
    ("optimi", "Lion", {}),
    ("adv_optm", "Muon_adv", {"groups": "muon"}),
    ("lion_pytorch", "Lion", {}),
    ("transformers.optimization", "Adafactor", {"settings": {"relative_step": False}}),
]
LOADS_NOT = "adv_optm"  # in a fresh optimizer


@pytest.fixture(autouse=True)
def eager():
    """Switch compilation off. torchao compiles its step, but eager steps give the same numbers
    without a compiler.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(("package", "name", "needs"), TWENTY)
def test_it_trains_and_resumes_as_the_native_class_with_groups_by_hand(
    package, name, needs
):
    """Built from the class or from an instance, it trains exactly as the native class with groups
    by hand, and resumes exactly.
    """
    case = Case(getattr(pytest.importorskip(package), name), **needs)
    hand, start = case.model(), snapshot(case.model())
    run(case, hand, native(case, hand))
    assert not same(snapshot(hand), start)
    for form in (by_class, by_instance):
        ours = case.model()
        run(case, ours, form(case, ours))
        assert same(snapshot(ours), snapshot(hand))
    if package == LOADS_NOT:
        return
    half, rest = (
        (model, by_class(case, model)) for model in (case.model(), case.model())
    )
    run(case, *half, 0, 4)
    state = through_file(half[1], safely=True)
    rest[0].load_state_dict(half[0].state_dict())
    rest[1].load_state_dict(state)
    for model, opt in (half, rest):
        run(case, model, opt, 4, 8)
    assert same(snapshot(half[0]), snapshot(rest[0]))
