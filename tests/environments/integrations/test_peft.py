"""Tests of PEFT's own layers and configurations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankaware_optim import RankAwareOptimizer, Reference, inspect_model

from ...helpers import real_adapters
from ...helpers.real_adapters import IMAGES, conv, dense, drawn, embedding, tokens

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.peft,
    # PEFT warns of several adapters and of tied or grouped layers, which these tests use on purpose.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning"),
]

AT_16 = Reference(rank=16, alpha=16)
LAYERS = {
    "linear": (dense, drawn(4, 12)),
    "embedding": (embedding, tokens),
    "grouped conv": (conv(2, groups=2), IMAGES),
}


def wrapped(layer=dense, **options) -> nn.Module:
    """Return a model with PEFT's adapter of rank 4 and alpha 8 on its layer."""
    torch.manual_seed(0)
    return real_adapters.peft(layer, **options)(4, 8.0)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_resume_changes_no_rate(kind):
    """A trained pair keeps its declared init, so an optimizer built in mid-training has the same
    learning rates.
    """
    layer, inputs = LAYERS[kind]
    model = wrapped(layer)
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    for _ in range(3):
        model(*inputs()).square().mean().backward()
        opt.step()
        opt.zero_grad()
    again = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    assert again.rates.groups == opt.rates.groups


def test_init_b_made_by_hand():
    """If a user zeroes A and draws B by hand, the init is B, although PEFT's configuration declares A."""
    model = wrapped()
    for name, param in model.named_parameters():
        if "lora_" in name:
            (nn.init.zeros_ if "lora_A" in name else nn.init.normal_)(param)
    assert {f.init for f in inspect_model(model).factors} == {"B"}


def test_only_what_trains_counts():
    """The survey has only the adapters that require gradients, each as its own configuration declares."""
    model = wrapped()
    wide = peft.LoraConfig(
        r=8, lora_alpha=8, target_modules=["q"], init_lora_weights="olora"
    )
    model.add_adapter("wide", wide)
    of_default, of_wide = ("default", 4, 2.0, "A"), ("wide", 8, 1.0, "other")
    assert seen(model) == {of_default}
    model.set_adapter("wide")
    assert seen(model) == {of_wide}
    frozen = inspect_model(model).frozen
    assert {name.split(".")[-2] for name in frozen} == {"default"}
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    assert seen(model) == {of_default, of_wide}


def seen(model: nn.Module) -> set[tuple]:
    factors = inspect_model(model).factors
    return {(f.adapter, f.rank, f.scaling, f.init) for f in factors}


@pytest.mark.parametrize("shared", [False, True])
def test_two_peft_models_in_one_keep_their_own_configurations(shared):
    """In a model made of two PEFT models, each part keeps the init that its own configuration declares."""
    declared = {"te": True, "unet": "olora"}
    parts = {part: wrapped(init_lora_weights=init) for part, init in declared.items()}
    wanted = {("te", "A"), ("unet", "A" if shared else "other")}
    if shared:
        config = peft.LoraConfig(r=4, target_modules=["q"])
        for part, model in parts.items():
            parts[part] = peft.get_peft_model(model.unload(), config)
    both = nn.ModuleDict(parts)
    for name, param in both.named_parameters():
        if "lora_" in name:  # as after training
            nn.init.normal_(param)
    found = {(f.name.partition(".")[0], f.init) for f in inspect_model(both).factors}
    assert found == wanted


def test_meta_adapters_keep_their_declared_init():
    """The declared init of an adapter also holds on the meta device."""
    model = wrapped().to("meta")
    assert {f.init for f in inspect_model(model).factors} == {"A"}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_config_and_a_saved_adapter_name_a_reference(rslora, tmp_path):
    """tuned_at accepts PEFT's LoraConfig and the folder of a saved adapter."""
    config = peft.LoraConfig(
        r=16, lora_alpha=32, use_rslora=rslora, target_modules=["q"]
    )
    base = real_adapters.One(dense())
    made = peft.get_peft_model(base, config)
    made.save_pretrained(tmp_path)
    at = Reference(rank=16, alpha=32, rslora=rslora)
    opts = [
        RankAwareOptimizer(wrapped(), "adamw", lr=1e-3, tuned_at=given)
        for given in (at, config, tmp_path)
    ]
    rates = [[group.lr for group in opt.rates.groups] for opt in opts]
    assert rates[0] == rates[1] == pytest.approx(rates[2])
    assert 1e-3 not in rates[0]


def test_the_other_adapter_trains_after_set_adapter():
    """After set_adapter in the middle of a run, the other adapter trains, at the learning rate of
    its own rank.
    """
    torch.manual_seed(0)
    configs = {name: peft.LoraConfig(r=r, lora_alpha=r, target_modules=["0"]) for name, r in (("first", 4), ("second", 16))}  # fmt: skip
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), configs["first"], adapter_name="first"
    )
    model.add_adapter("second", configs["second"])
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    for active, other, rank in (("first", "second", 4), ("second", "first", 16)):
        model.set_adapter(active)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(2):
            opt.zero_grad()
            model(torch.ones(2, 8)).square().mean().backward()
            opt.step()
        moved = {
            n for n, p in model.named_parameters() if not torch.equal(before[n], p)
        }
        assert {name.split(".")[-2] for name in moved} == {active}
        ranks = {opt.rates[name].rank for name in moved}
        assert ranks == {rank}
        assert not any(f".{other}." in name for name in moved)
    rates = {group.rank: group.lr for group in opt.rates.groups}
    assert rates[4] > rates[16] == pytest.approx(1e-2)
