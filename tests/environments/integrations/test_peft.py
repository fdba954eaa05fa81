"""PEFT's own layers and configurations, inspected and trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rankaware_optim import (
    RankAwareOptimizer,
    Reference,
    inspect_model,
)

from ...helpers.models import same, snapshot
from ...helpers.recipes import RECIPE

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.peft,
    # PEFT warns of what these tests do on purpose: several adapters, tied or grouped layers.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning"),
]

AT_16 = Reference(rank=16, alpha=16)


class Net(nn.Module):
    """An embedding, two linear layers, two convolutions (one grouped) and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(30, 16)
        self.q, self.v = nn.Linear(16, 16), nn.Linear(16, 24)
        self.conv, self.grouped = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1, groups=4),
        )
        self.head = nn.Linear(24 + 8, 3)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        words = self.v(self.q(self.emb(tokens)).tanh()).mean(dim=1)
        return self.head(
            torch.cat(
                [words, self.grouped(self.conv(image).tanh()).mean(dim=(2, 3))], dim=1
            )
        )


def wrapped(
    *, r: int = 4, alpha: float = 8, targets: tuple[str, ...] = ("q", "v"), **options
) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(
        Net(),
        peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **options),
    )


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 3) -> None:
    source = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(30, (4, 5), generator=source)
        model(
            tokens, torch.randn(4, 3, 6, 6, generator=source)
        ).square().mean().backward()
        opt.step()
        opt.zero_grad()


def test_the_tuner_and_the_injected_model_give_the_same_factors():
    """A PeftModel, its tuner and a model with injected adapters differ in names alone."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q"])
    injected = peft.inject_adapter_in_model(config, Net())
    model = wrapped(targets=("q",))
    surveys = [inspect_model(m).factors for m in (model, model.base_model, injected)]
    nameless = [[replace(f, name="", layer="") for f in factors] for factors in surveys]
    assert nameless[0] == nameless[1] == nameless[2]


@pytest.mark.parametrize("targets", [("q", "v"), ("emb", "q", "conv", "grouped")])
def test_a_resume_changes_no_rate(targets):
    """A trained pair keeps its declared init, so an optimizer built in mid-training has the same rates."""
    model = wrapped(targets=targets)
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    train(model, opt)
    again = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    assert again.rates.groups == opt.rates.groups


def test_init_b_made_by_hand():
    """Where the user drew B and zeroed A of a declared B = 0, the zeros win."""
    model = wrapped()
    for name, param in model.named_parameters():
        if "lora_" in name:
            (nn.init.zeros_ if "lora_A" in name else nn.init.normal_)(param)
    assert {f.init for f in inspect_model(model).factors} == {"B"}


def test_only_what_trains_counts():
    """Of several adapters those that require a gradient are factors, each as its configuration declares."""
    model = wrapped()
    wide = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=["q"], init_lora_weights="olora"
    )
    model.add_adapter("wide", wide)
    of_default, of_wide = ("default", 4, 2.0, "A"), ("wide", 16, 1.0, "other")
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


OWN = {"te": True, "unet": "olora"}


@pytest.mark.parametrize("declared", [OWN, {"te": "olora", "unet": True}])
@pytest.mark.parametrize("shared", [False, True])
def test_two_peft_models_in_one_keep_their_own_configurations(declared, shared):
    """A text encoder and a UNet under one optimizer have the inits that each declares, or one shared configuration."""
    parts = {part: wrapped(init_lora_weights=init) for part, init in declared.items()}
    wanted = {part: "A" if init is True else "other" for part, init in declared.items()}
    if shared:
        config = peft.LoraConfig(r=4, target_modules=["q", "v"])
        for part, model in parts.items():
            parts[part] = peft.get_peft_model(model.unload(), config)
        wanted = dict.fromkeys(declared, "A")
    both = nn.ModuleDict(parts)
    for name, param in both.named_parameters():
        if "lora_" in name:  # as after training
            nn.init.normal_(param)
    found = {(f.name.partition(".")[0], f.init) for f in inspect_model(both).factors}
    assert found == {*wanted.items()}


def test_meta_adapters_keep_their_declared_init():
    """On the meta device the declared init still holds."""
    model = wrapped().to("meta")
    assert {f.init for f in inspect_model(model).factors} == {"A"}


@pytest.mark.parametrize("built", [False, True])
def test_swapping_the_optimizer_on_a_uniform_peft_model_changes_nothing(built):
    """Without tuned_at, training a uniform PEFT model is bit for bit the native optimizer's."""
    targets = ("emb", "q", "v", "conv", "grouped")
    ours, native = wrapped(targets=targets), wrapped(targets=targets)
    if built:
        opt = RankAwareOptimizer(
            torch.optim.AdamW(ours.parameters(), lr=1e-2), model=ours
        )
    else:
        opt = RankAwareOptimizer(ours, torch.optim.AdamW, lr=1e-2)
    train(ours, opt)
    train(native, torch.optim.AdamW(native.parameters(), lr=1e-2))
    assert same(snapshot(ours), snapshot(native))


@pytest.mark.parametrize("rslora", [False, True])
def test_a_config_and_a_saved_adapter_name_a_reference(rslora, tmp_path):
    """tuned_at takes PEFT's own LoraConfig, and a folder that PEFT saved and loads and saves again beside our recipe."""
    config = peft.LoraConfig(
        r=16, lora_alpha=32, use_rslora=rslora, target_modules=["q", "v"]
    )
    made = peft.get_peft_model(Net(), config)
    made.save_pretrained(tmp_path)
    RECIPE.save(tmp_path / "recipe.toml")
    at = Reference(rank=16, alpha=32, rslora=rslora)
    opts = [
        RankAwareOptimizer(wrapped(), "adamw", lr=1e-3, tuned_at=given)
        for given in (at, config, tmp_path)
    ]
    rates = [[group.lr for group in opt.rates.groups] for opt in opts]
    assert rates[0] == rates[1] == pytest.approx(rates[2])
    assert 1e-3 not in rates[0]
    again = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    ours, theirs = (
        {n: p for n, p in snapshot(m).items() if "lora_" in n} for m in (again, made)
    )
    assert same(ours, theirs)
