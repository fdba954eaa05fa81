"""PEFT's own layers and configurations, inspected and trained."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from rankaware_optim import (
    InspectionError,
    InvalidReferenceError,
    MuA,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
    inspect_model,
)
from rankaware_optim._types import Factor
from rankaware_optim.optimizer import effective_lr

from ...helpers.models import same, snapshot
from ...helpers.optimizers import DISTANCE
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


def seen(model: nn.Module) -> dict[str, Factor]:
    """The A factors by the last part of their layer's name."""
    return {
        f.layer.rsplit(".", 1)[-1]: f
        for f in inspect_model(model).factors
        if f.role == "A"
    }


LAYERS = [
    ("q", "linear", 16, 16, "A", "peft"),
    ("v", "linear", 16, 24, "A", "peft"),
    ("conv", "conv", 27, 8, "A", "peft"),
    ("grouped", "conv", 72, 8, "A", "peft"),
    ("emb", "embedding", 30, 16, "B", "peft-embedding"),
]


@pytest.mark.parametrize(
    ("layer", "kind", "fan_in", "fan_out", "init", "convention"), LAYERS
)
def test_layers(layer, kind, fan_in, fan_out, init, convention):
    """PEFT's layers are read with their fans, rank, scaling and init; an embedding starts at Init[B]."""
    factors = inspect_model(wrapped(targets=(layer,))).factors
    assert [f.role for f in factors] == ["A", "B"]
    for f in factors:
        assert (f.rank, f.scaling, f.adapter) == (4, 2.0, "default")
        assert (f.kind, f.fan_in, f.fan_out, f.init, f.convention) == (
            kind,
            fan_in,
            fan_out,
            init,
            convention,
        )


def test_the_peft_model_is_left_as_found():
    """Inspection changes no bit of the model or the random state."""
    model = wrapped(targets=("emb", "q", "conv"))
    before, random = snapshot(model), torch.get_rng_state()
    inspect_model(model)
    assert same(before, snapshot(model))
    assert torch.equal(random, torch.get_rng_state())


def test_the_tuner_and_the_injected_model_give_the_same_factors():
    """A PeftModel, its tuner and a model with injected adapters differ in names alone."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q"])
    injected = peft.inject_adapter_in_model(config, Net())
    model = wrapped(targets=("q",))
    surveys = [inspect_model(m).factors for m in (model, model.base_model, injected)]
    nameless = [[replace(f, name="", layer="") for f in factors] for factors in surveys]
    assert nameless[0] == nameless[1] == nameless[2]


SCALINGS = [
    ({}, (4, 2.0), (4, 2.0)),
    ({"rank_pattern": {"v": 8}}, (4, 2.0), (8, 1.0)),
    ({"alpha_pattern": {"v": 32}}, (4, 2.0), (4, 8.0)),
    ({"use_rslora": True}, (4, 4.0), (4, 4.0)),
    ({"use_rslora": True, "rank_pattern": {"v": 16}}, (4, 4.0), (16, 2.0)),
    ({"use_dora": True}, (4, 2.0), (4, 2.0)),
]


@pytest.mark.parametrize(("options", "q", "v"), SCALINGS)
def test_rank_and_scaling_as_declared(options, q, v):
    """rank_pattern, alpha_pattern, rslora and DoRA give each pair its own rank and effective multiplier."""
    found = seen(wrapped(**options))
    assert [(found[name].rank, found[name].scaling) for name in "qv"] == [q, v]


OTHERS = [
    ({"use_dora": True}, {"lora_magnitude_vector"}),
    ({"modules_to_save": ["head"]}, {"modules_to_save"}),
    ({"bias": "lora_only"}, {"base_layer.bias"}),
    ({"lora_bias": True}, {"lora_B.default.bias"}),
]


@pytest.mark.parametrize(("options", "parts"), OTHERS)
def test_the_rest_is_other(options, parts):
    """DoRA's magnitudes, saved modules and biases are other, and keep the base rate."""
    model = wrapped(**options)
    survey = inspect_model(model)
    assert len(survey.factors) == 4
    assert survey.other
    assert all(any(part in name for part in parts) for name in survey.other)
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3, tuned_at=AT_16)
    (group,) = (group for group in opt.param_groups if group["lora_role"] == "other")
    assert group["param_names"] == list(survey.other)
    assert effective_lr(group) == 1e-3


INITS = [
    (True, "A"),
    ("gaussian", "A"),
    (False, "other"),
    ("pissa", "other"),
    ("pissa_niter_4", "other"),
    ("olora", "other"),
    ("orthogonal", "other"),
]


@pytest.mark.parametrize(("declared", "init"), INITS)
def test_declared_inits(declared, init):
    """The init is the declared one; those that start both factors away from zero are other."""
    assert seen(wrapped(init_lora_weights=declared))["q"].init == init


@pytest.mark.parametrize("declared", ["pissa", "olora"])
def test_inits_without_a_law_stay_at_the_base_rate(declared):
    """PiSSA and OLoRA keep the base rate with a warning, unless the user names the init."""
    model = wrapped(init_lora_weights=declared)
    with pytest.warns(RankAwareWarning, match="PiSSA, OLoRA"):
        opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3, tuned_at=AT_16)
    assert {effective_lr(g) for g in opt.param_groups} == {1e-3}
    named = RankAwareOptimizer(
        model, torch.optim.AdamW, lr=1e-3, tuned_at=AT_16, init="A"
    )
    assert {effective_lr(g) for g in named.param_groups} != {1e-3}


@pytest.mark.parametrize("targets", [("q", "v"), ("emb", "q", "conv", "grouped")])
def test_a_resume_changes_no_rate(targets):
    """A trained pair keeps its declared init, so an optimizer built in mid-training has the same rates."""
    model = wrapped(targets=targets)
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    train(model, opt)
    again = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-2, tuned_at=AT_16)
    assert [(g["lr"], g["param_names"]) for g in again.param_groups] == [
        (g["lr"], g["param_names"]) for g in opt.param_groups
    ]


def test_init_b_made_by_hand():
    """Where the user drew B and zeroed A of a declared Init[A], the zeros win."""
    model = wrapped()
    for name, param in model.named_parameters():
        if "lora_" in name:
            (nn.init.zeros_ if "lora_A" in name else nn.init.normal_)(param)
    assert {f.init for f in inspect_model(model).factors} == {"B"}


def test_only_the_active_adapter_counts():
    """Of several adapters only those that require a gradient are factors, each at its own rank."""
    model = wrapped()
    model.add_adapter(
        "wide", peft.LoraConfig(r=16, lora_alpha=16, target_modules=["q", "v"])
    )
    assert {(f.adapter, f.rank) for f in inspect_model(model).factors} == {
        ("default", 4)
    }
    model.set_adapter("wide")
    assert {(f.adapter, f.rank, f.scaling) for f in inspect_model(model).factors} == {
        ("wide", 16, 1.0)
    }
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    assert {(f.adapter, f.rank) for f in inspect_model(model).factors} == {
        ("default", 4),
        ("wide", 16),
    }


def test_adapters_of_different_inits():
    """Each adapter has the init that its own configuration declares."""
    model = wrapped()
    model.add_adapter(
        "p", peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights="olora")
    )
    for name, param in model.named_parameters():
        param.requires_grad_("lora_" in name)
    assert {(f.adapter, f.init) for f in inspect_model(model).factors} == {
        ("default", "A"),
        ("p", "other"),
    }


@pytest.mark.parametrize("inits", [(True, "olora"), ("olora", True)])
@pytest.mark.parametrize("shared", [False, True])
def test_two_peft_models_in_one_keep_their_own_configurations(inits, shared):
    """A text encoder and a UNet under one optimizer have the inits that each declares, or one shared configuration."""
    parts = {
        "te": wrapped(init_lora_weights=inits[0]),
        "unet": wrapped(init_lora_weights=inits[1]),
    }
    if shared:
        config = peft.LoraConfig(r=4, target_modules=["q", "v"])
        parts = {
            name: peft.get_peft_model(part.unload(), config)
            for name, part in parts.items()
        }
    both = nn.ModuleDict(parts)
    for name, param in both.named_parameters():
        if "lora_" in name:  # as after training
            nn.init.normal_(param)
    found = {(f.name.partition(".")[0], f.init) for f in inspect_model(both).factors}
    wanted = (True, True) if shared else inits
    assert found == {
        (part, "A" if init is True else "other")
        for part, init in zip(parts, wanted, strict=True)
    }


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
    """tuned_at takes PEFT's own LoraConfig, and a folder that PEFT saved, with a recipe of ours beside or not."""
    config = peft.LoraConfig(
        r=16, lora_alpha=32, use_rslora=rslora, target_modules=["q", "v"]
    )
    made = peft.get_peft_model(Net(), config)
    made.save_pretrained(tmp_path)
    RECIPE.save_beside(tmp_path)
    at = Reference(rank=16, alpha=32, rslora=rslora)
    opts = [
        RankAwareOptimizer(wrapped(), "adamw", lr=1e-3, tuned_at=given)
        for given in (at, config, config.to_dict(), tmp_path)
    ]
    rates = [[effective_lr(group) for group in opt.param_groups] for opt in opts]
    assert rates[0] == rates[1] == rates[2] == pytest.approx(rates[3])
    assert 1e-3 not in rates[0]
    again = peft.PeftModel.from_pretrained(Net(), tmp_path)
    with pytest.raises(InspectionError, match=r"^4 LoRA factors found, all frozen"):
        RankAwareOptimizer(again, "adamw", lr=1e-3)
    trains = peft.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    assert len(inspect_model(trains).factors) == 4
    ours, theirs = (
        {n: p for n, p in snapshot(m).items() if "lora_" in n} for m in (again, made)
    )
    assert same(ours, theirs)
    made.save_pretrained(tmp_path)
    assert "## Learning rate" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_config_without_a_law_is_refused():
    """PiSSA's start, and another kind of adapter, name no reference."""
    for config in (
        peft.LoraConfig(init_lora_weights="pissa"),
        peft.LoHaConfig(r=4, alpha=4),
    ):
        with pytest.raises(InvalidReferenceError, match="is not a reference"):
            RankAwareOptimizer(wrapped(), "adamw", lr=1e-3, tuned_at=config)


@pytest.mark.parametrize(
    ("alphas", "warns"), [({}, True), ({"v": 2}, False), ({"v": 4}, False)]
)
def test_experts_that_keep_alpha_are_pointed_out(alphas, warns):
    """A pattern that divides the rank and keeps alpha has a sentence in the report, and alpha_pattern is its cure."""
    model = wrapped(r=16, alpha=32, rank_pattern={"v": 1}, alpha_pattern=alphas)
    checks = RankAwareOptimizer(model, "adamw", lr=1e-3).report().audit
    (sentence,) = [check for check in checks if "times as strongly" in check] or [""]
    of_v = "base_model.model.v.lora_A.default.weight"
    assert (
        sentence.startswith(f"2 factors ({of_v}, …) are scaled up to 16 times") == warns
    )
    assert ("give alpha_pattern too" in sentence) == warns


def test_a_rank_pattern_is_scaled_around_the_dominant_rank():
    """With rank_pattern the most common rank keeps the base rate and the other is moved by the law, at its distance."""
    model = wrapped(targets=("q", "v", "conv"), rank_pattern={"v": 16})
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3)
    width = inspect_model(model).width
    moved = MuA().multiplier(
        Factor("w", "A", 16, width, width, scaling=0.5),
        Reference(rank=4, alpha=8, fan_in=width),
    )
    found = {
        (g["lora_rank"], g["lora_role"]): effective_lr(g) for g in opt.param_groups
    }
    assert found[4, "A"] == found[4, "B"] == 1e-3
    assert [found[16, "A"], found[16, "B"]] == pytest.approx(
        [1e-3 * moved * DISTANCE] * 2
    )
    train(model, opt)


def test_a_later_adapter_is_added():
    """An adapter added after construction is split and scaled by add_param_group."""
    model = wrapped()
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3)
    model.add_adapter(
        "wide", peft.LoraConfig(r=16, lora_alpha=16, target_modules=["q", "v"])
    )
    model.set_adapter("wide")
    opt.add_param_group(
        {"params": [p for n, p in model.named_parameters() if ".wide." in n]}
    )
    assert [
        (g["lora_role"], g["lora_rank"], len(g["params"]))
        for g in opt.param_groups[-2:]
    ] == [
        ("A", 16, 2),
        ("B", 16, 2),
    ]
    assert all(
        ".wide." in name for g in opt.param_groups[-2:] for name in g["param_names"]
    )
    train(model, opt)


def test_no_warning_of_ours_on_a_plain_adapter():
    """A plain PEFT model is wrapped without any warning."""
    model = wrapped()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3)
