"""FullyShardedDataParallel with use_orig_params: parameters are flat shares, so what is declared must be believed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import rankaware_optim as ra
from rankaware_optim import CheckpointError, InspectionError

from ...helpers.models import BASES, STYLES, adapted, mlp, same
from .training import (
    FORMS,
    KINDS,
    RANKS,
    WIDTH,
    by_class,
    by_hand,
    expected_tags,
    new_model,
    tagged,
    train,
    weights,
)

IGNORED = ((".* has both parameters with requires_grad", UserWarning, "torch"),)
each_policy = pytest.mark.parametrize("policy", ["whole", "layers"])


def sharded(policy: str = "layers", init: str = "A") -> nn.Module:
    return wrapped(new_model(init=init), policy)


def wrapped(model: nn.Module, policy: str = "layers") -> nn.Module:
    layers = ModuleWrapPolicy(set(STYLES.values())) if policy == "layers" else None
    return FSDP(
        model,
        auto_wrap_policy=layers,
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def ours(form: str, kind: str, policy: str) -> dict[str, Any]:
    model = sharded(policy)
    opt = FORMS[form](model, kind, init="A")
    train(model, opt)
    return {"weights": weights(model), "tags": tagged(opt)}


def native(kind: str, policy: str) -> dict[str, torch.Tensor]:
    model = sharded(policy)
    train(model, by_hand(model, kind))
    return weights(model)


@each_policy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_fsdp1_trains_as_by_hand(pair, form, kind, policy):
    """Every share of a weight is the native optimizer's bit for bit, at the rate of its declared rank."""
    for got, hand in zip(
        pair.run(ours, form, kind, policy), pair.run(native, kind, policy), strict=True
    ):
        assert same(got["weights"], hand)
        assert got["tags"] == expected_tags(kind=kind)


def trained_whole(policy: str) -> dict[str, torch.Tensor]:
    model = sharded(policy)
    train(model, by_class(model, init="A"))
    with FSDP.summon_full_params(model):
        return weights(model)


@each_policy
def test_fsdp1_trains_as_one_process(pair, policy):
    """Sharded over two processes the model trains as in one, to rounding."""
    model = new_model()
    train(model, by_class(model))
    for got in pair.run(trained_whole, policy):
        torch.testing.assert_close(got, weights(model), rtol=1e-4, atol=1e-6)


# --- what shards do not show ----------------------------------------------------------------------------------------


def shards(style: str, kind: str, init: str) -> list[Any]:
    layers = wrapped(pieces(style, kind, init))
    return [asdict(factor) for factor in ra.inspect_model(layers, init=init).factors]


def pieces(style: str, kind: str, init: str = "A") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(adapted(style, kind, rank=rank, init=init) for rank in (4, 1))
    )


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("style", STYLES)
def test_survey_of_flat_shards(pair, style, kind, init):
    """Rank and fans of flat and empty shards are those declared, in every convention and on both processes."""
    expected = [
        asdict(factor) for factor in ra.inspect_model(pieces(style, kind, init)).factors
    ]
    assert pair.run(shards, style, kind, init) == [expected, expected]


def refusal(model: str, init: str | None) -> str:
    layers = wrapped(pieces("plain", "linear"))
    for module in layers.modules():
        if model == "no rank" and hasattr(module, "lora_A"):
            module.r = None
        if model == "no fans" and hasattr(module, "in_features"):
            module.in_features = None
        if model == "no rank at all" and hasattr(module, "lora_A"):
            module.r = 0
    try:
        by_class(layers, init=init)
    except InspectionError as error:
        return str(error)
    return ""


REFUSALS = [
    ("no init", None, "Give init='A'"),
    ("no rank", "A", "declares no rank"),
    ("no rank at all", "A", "declares rank 0"),
    ("no fans", "A", "has its fan-in"),
]


@pytest.mark.parametrize(
    ("model", "init", "sentence"), REFUSALS, ids=[model for model, _, _ in REFUSALS]
)
def test_what_flat_shards_do_not_tell_is_asked(pair, model, init, sentence):
    """What neither shards nor declarations tell is refused with a sentence, by both processes alike."""
    first, second = pair.run(refusal, model, init)
    assert sentence in first
    assert sentence in second


def peft_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = nn.Sequential(
        OrderedDict(first=nn.Linear(16, 16), act=nn.Tanh(), last=nn.Linear(16, 16))
    )
    config = LoraConfig(
        target_modules=["first", "last"], r=4, lora_alpha=4, rank_pattern={"last": 8}
    )
    return get_peft_model(base, config)


def survey_of_peft(sharded: bool) -> list[Any]:
    model = peft_model()
    if sharded:
        model = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    return [asdict(factor) for factor in ra.inspect_model(model).factors]


def test_survey_of_peft_in_flat_shards(pair):
    """PEFT declares rank, fans and init, so its adapters need no help under FSDP1."""
    pytest.importorskip("peft")
    assert pair.run(survey_of_peft, True) == pair.run(survey_of_peft, False)


# --- state ----------------------------------------------------------------------------------------------------------


def resumed(
    policy: str, through: str, kind: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    straight, broken = sharded(policy), sharded(policy)
    train(straight, by_class(straight, kind, init="A"), 0, 6)
    opt = by_class(broken, kind, init="A")
    train(broken, opt, 0, 3)
    state = opt.state_dict()
    if through == "full":
        state = FSDP.optim_state_dict(broken, opt)
        state = FSDP.optim_state_dict_to_load(broken, opt, state)
    again = by_class(broken, kind, init="A")
    again.load_state_dict(state)
    train(broken, again, 3, 6)
    return weights(straight), weights(broken)


# On CPU, FSDP.optim_state_dict gathers every moment of a parameter into one buffer, for native optimizers too, so that
# AdamW's first moment comes out as its second: only optimizers of one moment can be gathered there.
@pytest.mark.parametrize(
    ("through", "kind"), [("shards", "AdamW"), ("shards", "SGD"), ("full", "SGD")]
)
@each_policy
def test_state_of_fsdp1_resumes(pair, policy, through, kind):
    """A state of shards, or one that FSDP gathered and cut again, goes on bit for bit."""
    for straight, broken in pair.run(resumed, policy, through, kind):
        assert same(straight, broken)


def other_rank() -> str:
    saved = wrapped(mlp(RANKS[::-1], width=WIDTH, seed=3))
    opt = by_class(saved, init="A")
    train(saved, opt, 0, 1)
    try:
        by_class(sharded(), init="A").load_state_dict(opt.state_dict())
    except CheckpointError as error:
        return str(error)
    return ""


def test_state_of_another_rank(pair):
    """Another rank is refused on every process."""
    assert all("has rank" in sentence for sentence in pair.run(other_rank))
