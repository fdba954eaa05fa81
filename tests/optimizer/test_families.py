"""The family belongs to the group: the law of a group is that of the update which its parameters really get."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import rankaware_optim as ra
from rankaware_optim import MuA, RankAwareOptimizer, Reference
from rankaware_optim._types import Factor
from rankaware_optim.optimizer._plan import _WARNED

from ..helpers.models import mlp

AT_16 = Reference(rank=16, alpha=16)
LR = 1e-3
RECIPES = Path(__file__).parents[2] / "recipes"


class Moves(Optimizer):
    """Moves every entry by its group's rate, and remembers nothing. Tests name subclasses after real optimizers."""

    def __init__(self, params, lr=1e-3, **settings):
        super().__init__(params, {"lr": lr, **settings})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.data -= float(group["lr"])


def named(name: str, package: str = "somewhere") -> type[Optimizer]:
    return type(name, (Moves,), {"__module__": f"{package}.optimizer"})


def law_of(family: str, rank: int, alpha: float = 16.0) -> float:
    """The default law's multiplier for a factor of this rank at alpha 16, in a family."""
    law = MuA(tokens=1.0 if family == "sign-like" else 8.0, family=family)
    scaled = ra.Falling(law=law) if family == "sign-like" else law
    factor = Factor("f", "A", rank, 16, 16, alpha / rank)
    multiplier = scaled.multiplier(factor, Reference(16, 16, fan_in=16))
    return multiplier * (0.9 if family == "sign-like" else 1.0)


def moved(model: nn.Module, opt: Optimizer) -> dict[str, float]:
    """How far each parameter moves in a step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    return {
        name: float((before[name] - p.detach()).flatten()[0])
        for name, p in model.named_parameters()
    }


def kept_alpha(*ranks: int) -> nn.Module:
    """A model whose layers have these ranks, all at alpha 16."""
    model = mlp(ranks, head=True)
    for layer in model.children():
        if hasattr(layer, "r"):
            layer.scaling = 16 / layer.r
    return model


def two_groups(model: nn.Module, to_muon: dict, to_adam: dict) -> list[dict]:
    """The first layer and the head in one group, the second layer in the other."""
    first = [*model.layer0.parameters(), *model.head.parameters()]
    trained = [p for p in first if p.requires_grad]
    return [
        {"params": trained, **to_adam},
        {
            "params": [p for p in model.layer1.parameters() if p.requires_grad],
            **to_muon,
        },
    ]


SPELLINGS = [
    ("Muon", {"use_muon": True}, {"use_muon": False}),
    ("MuonWithAuxAdam", {"use_muon": True}, {"use_muon": False}),
    ("SingleDeviceMuonWithAuxAdam", {"use_muon": True}, {"use_muon": False}),
    ("AdaMuon", {"use_muon": True}, {"use_muon": False}),
    ("Muon_adv", {"optim_type": "muon"}, {"optim_type": "adam"}),
    ("Muon_adv", {"use_muon": True}, {"use_muon": False}),
    ("Muon", {"algorithm": "muon"}, {"algorithm": "adamw"}),
    ("Dion", {"algorithm": "dion"}, {"algorithm": "lion"}),
]


@pytest.mark.parametrize(("name", "to_muon", "to_adam"), SPELLINGS)
@pytest.mark.parametrize("form", ["class", "instance"])
def test_an_adam_group_of_muon_has_adams_law(name, to_muon, to_adam, form):
    """In every spelling of Muon with an auxiliary Adam, a factor moves by its own group's law, and the report says it."""
    model, kind = kept_alpha(64, 64), named(name)
    groups = two_groups(model, to_muon, to_adam)
    if form == "class":
        opt = RankAwareOptimizer(groups, kind, model=model, lr=LR, tuned_at=AT_16)
    else:
        opt = RankAwareOptimizer(kind(groups, lr=LR), model=model, tuned_at=AT_16)
    by_name = moved(model, opt)
    assert by_name["layer0.lora_A"] == pytest.approx(
        LR * law_of("sign-like", 64), rel=1e-5
    )
    assert by_name["layer1.lora_B"] == pytest.approx(
        LR * law_of("spectral", 64), rel=1e-5
    )
    assert by_name["head.weight"] == pytest.approx(LR, rel=1e-5)
    families = {name: row.family for row in opt.report().rows for name in row.names}
    assert families["layer0.lora_A"] == "sign-like"
    assert families["layer1.lora_A"] == "spectral"
    assert ", spectral: from rank 16" in str(opt.report()).replace("\n  ", " ")


def test_muon_that_marks_parameters_in_its_state_is_read_there():
    """Moonlight's Muon, which ms-swift uses, has one group and marks in the state which parameters Adam gets."""
    model, kind = kept_alpha(64, 64), named("Muon")
    built = kind([p for p in model.parameters() if p.requires_grad], lr=LR)
    for name, param in model.named_parameters():
        if param.requires_grad:
            built.state[param]["use_muon"] = name.startswith("layer1")
    by_name = moved(model, RankAwareOptimizer(built, model=model, tuned_at=AT_16))
    assert by_name["layer0.lora_A"] == pytest.approx(
        LR * law_of("sign-like", 64), rel=1e-5
    )
    assert by_name["layer1.lora_A"] == pytest.approx(
        LR * law_of("spectral", 64), rel=1e-5
    )


GROUPS_OF_ONE_CLASS = [
    ("Adafactor", "somewhere", {"scale_parameter": False}, "sign-like"),
    ("Adafactor", "somewhere", {"scale_parameter": True}, "floored-scale"),
    ("Lamb", "torch_optimizer", {"adam": True}, "sign-like"),
    ("Lamb", "timm", {"weight_decay": 0.0}, "sign-like"),
    ("Lamb", "timm", {"weight_decay": 0.1}, "relative-scale"),
    ("Lamb", "torch_optimizer", {"weight_decay": 0.0}, "relative-scale"),
    ("LARS", "torch_optimizer", {"weight_decay": 0.0}, "gradient-like"),
    ("LARS", "torch_optimizer", {"weight_decay": 0.1}, "first-step"),
    ("AdamW_adv", "adv_optm", {"spectral_normalization": True}, "rank-aware"),
    ("AdamW_adv", "adv_optm", {"spectral_normalization": False}, "sign-like"),
    ("Muon_adv", "adv_optm", {"spectral_normalization": True}, "rank-aware"),
]


@pytest.mark.parametrize(("name", "package", "settings", "family"), GROUPS_OF_ONE_CLASS)
def test_settings_of_a_group_choose_its_family(name, package, settings, family):
    """A group's settings put it into another family, while the group beside it stays in the class's."""
    model, kind = kept_alpha(4, 4), named(name, package)
    groups = two_groups(model, {}, settings)
    opt = RankAwareOptimizer(groups, kind, model=model, lr=LR, tuned_at=AT_16)
    families = {name: row.family for row in opt.report().rows for name in row.names}
    assert families["layer0.lora_A"] == family
    by_name = moved(model, opt)
    keeps = family in ("rank-aware", "floored-scale", "first-step")
    expected = 1.0 if keeps else law_of(family, 4)
    assert by_name["layer0.lora_A"] == pytest.approx(LR * expected, rel=1e-5)


def test_a_vector_of_a_spectral_optimizer_is_adams():
    """In full finetuning Muon's biases move as under Adam, its matrices as under Muon."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    at = Reference(rank=16, alpha=16, fan_in=64)
    kinds = {}
    for name in ("Muon", "AdamW"):
        opt = RankAwareOptimizer(
            model, named(name), lr=LR, tuned_at=at, method="full", law="mua"
        )
        kinds[name] = moved(model, opt)
    assert kinds["Muon"]["0.bias"] == pytest.approx(kinds["AdamW"]["0.bias"], rel=1e-5)
    assert kinds["Muon"]["0.weight"] != pytest.approx(
        kinds["AdamW"]["0.weight"], rel=0.1
    )


KEPT = [
    ("AdamW_adv", "adv_optm", {"spectral_normalization": True}),
    ("LoRAMuon", "somewhere", {}),
]


@pytest.mark.parametrize(("name", "package", "settings"), KEPT)
def test_what_moves_by_rank_itself_keeps_one_rate(name, package, settings):
    """An optimizer whose own rule moves with the rank is not moved twice: one rate, and a sentence why."""
    model = kept_alpha(4, 64)
    opt = RankAwareOptimizer(
        model, named(name, package), lr=LR, tuned_at=AT_16, **settings
    )
    assert {round(rate / LR, 4) for rate in moved(model, opt).values()} <= {0.0, 1.0}
    assert "by its own rule its updates move with the rank" in " ".join(
        str(opt.report()).split()
    )


# --- unknown classes ------------------------------------------------------------------------------------------------


def test_an_unknown_class_warns_once():
    """A class of an unknown family warns in Python, once a process."""
    kind = named("Unheard")
    with pytest.warns(ra.RankAwareWarning, match="Unheard is of an unknown family"):
        RankAwareOptimizer(mlp((4,)), kind, lr=LR, tuned_at=AT_16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RankAwareOptimizer(mlp((4,)), kind, lr=LR, tuned_at=AT_16)
    assert kind in _WARNED


def test_a_class_derived_from_adamw_that_changes_gradients_is_unknown():
    """PEFT's Riemannian optimizer derives from AdamW, and is not taken for it."""
    kind = type("RiemannianPreconditionedOptimizer", (torch.optim.AdamW,), {})
    with pytest.warns(ra.RankAwareWarning, match="unknown family"):
        RankAwareOptimizer(mlp((4,)), kind, lr=LR, tuned_at=AT_16)


@pytest.mark.parametrize("name", ["FusedAdam", "DeepSpeedCPUAdam", "PagedAdamW8bit"])
def test_a_recipe_of_adamw_is_at_home_with_its_fused_forms(name):
    """A recipe made with AdamW is used by FusedAdam and the like without a word."""
    recipe = ra.Recipe.load(RECIPES / "language-a.toml")
    model = mlp((16,))
    kind = named(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RankAwareOptimizer(model, kind, recipe=recipe)
    assert not [w for w in caught if "was made with optimizer" in str(w.message)]


# --- several models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["models", "parameters", "instance"])
def test_each_of_several_models_moves_by_its_ranks(form):
    """Factors of a second model move by their own rank when both models are given, in every form."""
    unet, encoder = kept_alpha(4, 16), kept_alpha(64)
    both = [unet, encoder]
    params = [p for model in both for p in model.parameters() if p.requires_grad]
    given = {"lr": LR, "tuned_at": AT_16}
    if form == "models":
        opt = RankAwareOptimizer(both, torch.optim.SGD, law="mua", **given)
    elif form == "parameters":
        opt = RankAwareOptimizer(params, named("Adam"), model=both, **given)
    else:
        built = named("Adam")(params, lr=LR)
        opt = RankAwareOptimizer(built, model=both, tuned_at=AT_16)
    if form == "models":
        return _check_names(opt)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    by_id = {
        id(p): float((b - p.detach()).flatten()[0])
        for p, b in zip(params, before, strict=True)
    }
    expected = {
        unet.layer0.lora_A: law_of("sign-like", 4),
        unet.layer1.lora_B: 1.0,
        encoder.layer0.lora_A: law_of("sign-like", 64),
    }
    for param, multiplier in expected.items():
        assert by_id[id(param)] == pytest.approx(LR * multiplier, rel=1e-4)
    _check_names(opt)


def _check_names(opt):
    """Names begin with the number of the model, a state loads by them, and a gone model is noticed."""
    names = [name for group in opt.param_groups for name in group["param_names"]]
    assert {name.partition(".")[0] for name in names} == {"0", "1"}
    opt.load_state_dict(opt.state_dict())


def test_one_model_in_a_list_is_one_of_several():
    """Its names have its number, so that another may be added in code without other changes."""
    opt = RankAwareOptimizer([kept_alpha(4)], torch.optim.SGD, lr=LR, tuned_at=AT_16)
    names = [name for group in opt.param_groups for name in group["param_names"]]
    assert {name.partition(".")[0] for name in names} == {"0"}


def test_a_later_group_is_of_any_of_several_models():
    """Its names and ranks are those of the model that holds it; once one model is gone, no group is added."""
    unet, encoder = kept_alpha(4), kept_alpha(64)
    first = [p for p in unet.parameters() if p.requires_grad]
    both = [unet, encoder]
    opt = RankAwareOptimizer(
        first, torch.optim.SGD, model=both, lr=LR, tuned_at=AT_16, law="mua"
    )
    opt.add_param_group({"params": [encoder.layer0.lora_A]})
    assert opt.param_groups[-1]["param_names"] == ["1.layer0.lora_A"]
    assert opt.param_groups[-1]["lora_rank"] == 64
    later = encoder.layer0.lora_B
    del unet, both, first
    opt.param_groups[0]["params"].clear()
    gc.collect()
    with pytest.raises(ra.OptimizerError, match="its model is gone"):
        opt.add_param_group({"params": [later]})


def test_a_class_that_takes_the_model_is_built_first():
    """It makes its own groups, so it is wrapped as an instance."""

    class Whole(torch.optim.SGD):
        def __init__(self, model, lr):
            super().__init__([p for p in model.parameters() if p.requires_grad], lr=lr)

    model = kept_alpha(4, 16)
    with pytest.raises(ra.OptimizerError, match="takes a model and makes its groups"):
        RankAwareOptimizer(model, Whole, lr=LR, tuned_at=AT_16)
    opt = RankAwareOptimizer(Whole(model, LR), model=model, tuned_at=AT_16)
    assert {group["lora_rank"] for group in opt.param_groups} == {4, 16, None}


def test_a_built_optimizer_over_a_second_model_is_refused_unless_both_are_given():
    """A text encoder's factors beside a U-Net's are refused where model= names the U-Net alone."""
    unet, encoder = kept_alpha(4), kept_alpha(64)
    params = [
        p for model in (unet, encoder) for p in model.parameters() if p.requires_grad
    ]
    built = torch.optim.AdamW(params, lr=LR)
    with pytest.raises(ra.OptimizerError, match=r"belongs to no model given"):
        RankAwareOptimizer(built, model=unet, tuned_at=AT_16)
    assert type(built) is torch.optim.AdamW
    assert len(built.param_groups) == 1


# --- a scheduler's state --------------------------------------------------------------------------------------------


def test_our_own_checkpoint_with_a_scheduler_says_nothing():
    """A checkpoint of the same optimizer fits its scheduler, and nothing is said."""
    model = kept_alpha(4, 64)
    opt = RankAwareOptimizer(model, torch.optim.SGD, lr=LR, tuned_at=AT_16)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(opt.state_dict())
