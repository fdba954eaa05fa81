"""Tests of learning rates, surveys, states and errors under DDP, FSDP1, FSDP2 and ZeroRedundancyOptimizer.

FSDP2's parameters are DTensors, whose local shapes do not show the rank. FSDP1's parameters are
flat shares, so the declared ranks are used unchecked.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

import rankaware_optim as ra
from rankaware_optim import InspectionError, OptimizerError, RankAwareOptimizer

from ...helpers.models import BASES, STYLES, adapted, same, trained
from .training import (
    AT_16,
    FORMS,
    KINDS,
    LR,
    by_class,
    by_hand,
    expected_tags,
    new_model,
    tagged,
    train,
    weights,
)
from .worker import WORLD

IGNORED = (
    # torch.distributed.optim uses torch.jit at import
    ("`torch.jit", DeprecationWarning, "torch"),
    (".* has both parameters with requires_grad", UserWarning, "torch"),
)


def flat(model: nn.Module, policy: Any = None) -> nn.Module:
    device = torch.device("cpu")
    return FSDP(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {
    "ddp": DistributedDataParallel,
    "fsdp1": flat,
    "fsdp1, layers": partial(flat, policy=ModuleWrapPolicy(set(STYLES.values()))),
    "fsdp2": sharded,
}
each_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)


def own(wrapper: str) -> dict[str, str]:
    """Return the arguments that a user must add under FSDP1, whose flat shares do not show how an
    adapter started.
    """
    return {"init": "A"} if wrapper.startswith("fsdp1") else {}


# --- training -------------------------------------------------------------------------------------------------------


def ours(form: str, kind: str, wrapper: str, first: str) -> dict[str, Any]:
    model = new_model()
    opt = FORMS[form](model, kind) if first == "optimizer" else None
    model = WRAPPERS[wrapper](model)
    opt = opt or FORMS[form](model, kind, **own(wrapper))
    train(model, opt)
    return {"weights": weights(model), "tags": tagged(opt)}


def native(kind: str, wrapper: str) -> dict[str, torch.Tensor]:
    model = WRAPPERS[wrapper](new_model())
    train(model, by_hand(model, kind))
    return weights(model)


ORDERS = [*((wrapper, "wrapper") for wrapper in WRAPPERS), ("ddp", "optimizer")]


@pytest.mark.parametrize(("wrapper", "first"), ORDERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_wrapped_model_trains_as_by_hand(pair, form, kind, wrapper, first):
    """A wrapped model gets exactly the native weights, and the learning rate of each rank under the
    unwrapped name.
    """
    expected = pair.run(native, kind, wrapper)
    answers = pair.run(ours, form, kind, wrapper, first)
    for got, hand in zip(answers, expected, strict=True):
        assert same(got["weights"], hand)
        assert got["tags"] == expected_tags(kind=kind)


def zero(model: nn.Module, kind: str, form: str) -> Any:
    """Return a ZeroRedundancyOptimizer around our class, or around the native class on our parameter groups."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    native_class, settings = KINDS[kind]
    own = {"tuned_at": AT_16, "model": model, "init": "A"}
    if form == "class":
        made = partial(RankAwareOptimizer, optimizer=native_class, **own)
        return ZeroRedundancyOptimizer(trained(model), made, lr=LR, **settings)
    groups = ra.rank_aware_param_groups(
        trained(model), lr=LR, named=False, optimizer=native_class, **own
    )
    return ZeroRedundancyOptimizer(groups, native_class, lr=LR, **settings)


def halved(kind: str, form: str) -> dict[str, torch.Tensor]:
    """Return the weights after three steps at the learning rates and three more at half of them."""
    model = DistributedDataParallel(new_model())
    opt = by_hand(model, kind) if form == "hand" else zero(model, kind, form)
    train(model, opt, 0, 3)
    for group in opt.param_groups:
        group["lr"] /= 2
    train(model, opt, 3, 6)
    return weights(model)


@pytest.mark.parametrize("form", ["class", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_redundancy_trains_as_by_hand(pair, kind, form):
    """ZeroRedundancyOptimizer with our class or our groups trains exactly as native DDP with groups by hand."""
    hand = pair.run(halved, kind, "hand")
    for got, expected in zip(pair.run(halved, kind, form), hand, strict=True):
        assert same(got, expected)


def zero_resumed(kind: str) -> list[dict[str, torch.Tensor]]:
    straight, broken = (DistributedDataParallel(new_model()) for _ in range(2))
    train(straight, zero(straight, kind, "class"), 0, 6)
    opt = zero(broken, kind, "class")
    train(broken, opt, 0, 3)
    states = []
    for rank in range(WORLD):
        opt.consolidate_state_dict(rank)
        states += [opt.state_dict()] if rank == dist.get_rank() else []
    again = zero(broken, kind, "class")
    again.load_state_dict(*states)
    train(broken, again, 3, 6)
    return [weights(straight), weights(broken)]


@pytest.mark.parametrize("kind", KINDS)
def test_zero_redundancy_around_ours_resumes(pair, kind):
    """A run that is resumed from the consolidated state of ZeroRedundancyOptimizer continues exactly."""
    for straight, broken in pair.run(zero_resumed, kind):
        assert same(straight, broken)


# --- surveys --------------------------------------------------------------------------------------------------------


def pieces(style: str, kind: str, init: str = "A") -> nn.Module:
    """Return two single layers of ranks 4 and 1. Of the layer of rank 1, one process holds nothing."""
    torch.manual_seed(0)
    layers = (adapted(style, kind, rank=rank, init=init) for rank in (4, 1))
    return nn.Sequential(*layers)


def peft_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    layers = OrderedDict(first=nn.Linear(16, 16), last=nn.Linear(16, 16))
    ranks = {"r": 4, "lora_alpha": 4, "rank_pattern": {"last": 8}}
    config = LoraConfig(target_modules=[*layers], **ranks)
    return get_peft_model(nn.Sequential(layers), config)


def factors(model: nn.Module, **options: Any) -> list[Any]:
    return [asdict(factor) for factor in ra.inspect_model(model, **options).factors]


def factors_of_pieces(wrapper: str, style: str, kind: str, init: str) -> list[Any]:
    options = {"init": init} if own(wrapper) else {}
    return factors(WRAPPERS[wrapper](pieces(style, kind, init)), **options)


def factors_of_peft() -> list[Any]:
    return factors(flat(peft_model()))


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wrapper", ["fsdp1, layers", "fsdp2"])
def test_a_survey_of_shards(pair, wrapper, style, kind, init):
    """The survey of a sharded model equals that of the whole model, even on a process without a row
    of a LoRA matrix.
    """
    expected = factors(pieces(style, kind, init))
    answers = pair.run(factors_of_pieces, wrapper, style, kind, init)
    assert answers == [expected, expected]


def test_a_survey_of_peft_in_flat_shares(pair):
    """PEFT declares rank, fans and init, so its adapters need no further arguments under FSDP1."""
    pytest.importorskip("peft")
    expected = factors(peft_model())
    assert pair.run(factors_of_peft) == [expected, expected]


# --- states ---------------------------------------------------------------------------------------------------------


def resumed(wrapper: str, through: str, kind: str) -> list[dict[str, torch.Tensor]]:
    """Return the weights of a run of six steps, and of one that a new optimizer continued after three."""
    straight, broken = (WRAPPERS[wrapper](new_model()) for _ in range(2))
    train(straight, by_class(straight, kind, **own(wrapper)), 0, 6)
    opt = by_class(broken, kind, **own(wrapper))
    train(broken, opt, 0, 3)
    state = opt.state_dict()
    if through == "gathered":
        state = FSDP.optim_state_dict(broken, opt)
        state = FSDP.optim_state_dict_to_load(broken, opt, state)
    again = by_class(broken, kind, init="A")
    again.load_state_dict(state)
    train(broken, again, 3, 6)
    return [weights(straight), weights(broken)]


# On a CPU, FSDP.optim_state_dict gathers every moment of a parameter into one buffer, for native
# optimizers too. AdamW's first moment would come out as its second, so only optimizers with a
# single moment can be gathered there.
@pytest.mark.parametrize(
    ("wrapper", "through", "kind"),
    [
        *((wrapper, "shards", "AdamW") for wrapper in WRAPPERS if wrapper != "ddp"),
        ("fsdp1", "gathered", "SGD"),
        ("fsdp1, layers", "gathered", "SGD"),
    ],
)
def test_a_sharded_optimizer_resumes(pair, wrapper, through, kind):
    """A new optimizer continues a run exactly from its state_dict, or from one that FSDP1 gathered
    and sharded again.
    """
    for straight, broken in pair.run(resumed, wrapper, through, kind):
        assert same(straight, broken)


# --- errors ------------------------------------------------------------------------------------------------


def flat_shares(missing: str, init: str | None) -> str:
    layers = flat(pieces("plain", "linear"))
    for module in layers.modules():
        if missing in ("rank", "any rank") and hasattr(module, "lora_A"):
            module.r = None if missing == "rank" else 0
        if missing == "fans" and hasattr(module, "in_features"):
            module.in_features = None
    with pytest.raises(InspectionError) as refused:
        by_class(layers, init=init)
    return str(refused.value)


def sharded_too_late(form: str) -> str:
    model = new_model()
    opt = FORMS[form](model)
    fully_shard(model)
    before = weights(model)
    with pytest.raises(OptimizerError) as refused:
        train(model, opt, 0, 1)
    assert same(before, weights(model))
    return str(refused.value)


def class_of_ours() -> str:
    model = new_model()
    with pytest.raises(OptimizerError) as refused:
        type(by_class(model))(model.parameters(), lr=LR)
    return str(refused.value)


TOO_LATE = "shard the model (fully_shard, FSDP). Then build"
REFUSALS = [
    (flat_shares, ("init", None), "Pass init='A'"),
    (flat_shares, ("rank", "A"), "declares no rank"),
    (flat_shares, ("any rank", "A"), "declares rank 0"),
    (flat_shares, ("fans", "A"), "has the attribute in_features"),
    *((sharded_too_late, (form,), TOO_LATE) for form in FORMS),
    (class_of_ours, (), "cannot create new optimizers"),
]


@pytest.mark.parametrize(("attempt", "how", "sentence"), REFUSALS)
def test_what_cannot_be_known_or_held_is_refused(pair, attempt, how, sentence):
    """Flat shares without declarations, sharding after the optimizer and a call of our class are errors."""
    for said in pair.run(attempt, *how):
        assert sentence in said
