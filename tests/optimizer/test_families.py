"""Optimizer families: each group is scaled by the law for the update that its parameters really get."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import rankaware_optim as ra
from rankaware_optim import MuA, RankAwareOptimizer, Reference
from rankaware_optim._types import Factor

from ..helpers.models import mlp, trained
from ..helpers.optimizers import called, rates_of, with_defaults

AT_16 = Reference(rank=16, alpha=16)
LR = 1e-3


def law_of(family: str, rank: int, alpha: float = 16.0) -> float:
    """Return the default law's multiplier for a LoRA matrix of this rank and alpha under an
    optimizer family, for a learning rate tuned at rank 16 and alpha 16.
    """
    law = MuA(tokens=2.0 if family == "sign-like" else 8.0, family=family)
    scaled = ra.Falling(law=law) if family == "sign-like" else law
    factor = Factor("f", "A", rank, 16, 16, alpha / rank)
    return scaled.multiplier(factor, Reference(16, 16, fan_in=16))


def moved(model: nn.Module, opt: Optimizer) -> dict[str, float]:
    """Return how far each parameter moves in one step."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt.step()
    return {
        name: float((before[name] - p.detach()).flatten()[0])
        for name, p in model.named_parameters()
    }


def kept_alpha(*ranks: int) -> nn.Module:
    """Return a float64 model whose layers have these ranks, all with alpha 16."""
    scalings = tuple(16 / rank for rank in ranks)
    return mlp(ranks, scalings=scalings, dtype=torch.float64)


def two_groups(model: nn.Module, to_muon: dict, to_adam: dict) -> list[dict]:
    """Return the first layer and the head as one group, and the second layer as the other."""
    first = [*trained(model.layer0), *model.head.parameters()]
    return [
        {"params": first, **to_adam},
        {"params": trained(model.layer1), **to_muon},
    ]


SPELLINGS = [
    ("Muon", {"use_muon": True}, {"use_muon": False}),
    ("SingleDeviceMuonWithAuxAdam", {"use_muon": True}, {"use_muon": False}),
    ("NorMuon", {"use_muon": True}, {"use_muon": False}),
    ("Muon_adv", {"optim_type": "muon"}, {"optim_type": "adam"}),
    ("Muon_adv", {"use_muon": True}, {"use_muon": False}),
    ("Muon", {"algorithm": "muon"}, {"algorithm": "adamw"}),
    ("Dion", {"algorithm": "dion"}, {"algorithm": "lion"}),
    ("Muon", {}, {"use_fallback": True}),
]


def assert_by_family(by_name: dict[str, float]) -> None:
    """Check that the first layer moved by Adam's law, the second by Muon's, and the head at the base learning rate."""
    wanted = {
        "layer0.lora_A": law_of("sign-like", 64),
        "layer1.lora_A": law_of("spectral", 64),
        "layer1.lora_B": law_of("spectral", 64),
        "head.weight": 1.0,
    }
    for name, multiplier in wanted.items():
        assert by_name[name] == pytest.approx(LR * multiplier, rel=1e-9)


@pytest.mark.parametrize(("name", "to_muon", "to_adam"), SPELLINGS)
@pytest.mark.parametrize("form", ["class", "instance"])
def test_an_adam_group_of_muon_has_adams_law(name, to_muon, to_adam, form):
    """However a package marks the Adam groups of its Muon, each group is scaled by the law for its
    own update, and the report says so.
    """
    model, kind = kept_alpha(64, 64), called(name)
    groups = two_groups(model, to_muon, to_adam)
    if form == "class":
        opt = RankAwareOptimizer(groups, kind, model=model, lr=LR, tuned_at=AT_16)
    else:
        opt = RankAwareOptimizer(kind(groups, lr=LR), model=model, tuned_at=AT_16)
    assert_by_family(moved(model, opt))
    families = {name: part.family for name, part in opt.rates.items()}
    assert families["layer0.lora_A"] == "sign-like"
    assert families["layer1.lora_A"] == "spectral"
    assert ", spectral: converted from rank 16" in str(opt.report()).replace(
        "\n  ", " "
    )


def test_muon_that_marks_parameters_in_its_state_is_read_there():
    """If Muon marks in its state which parameters Adam trains, as Moonlight's does, the marks
    decide which law scales a parameter.
    """
    model, kind = kept_alpha(64, 64), called("Muon")
    built = kind(trained(model), lr=LR)
    for layer, to_muon in (
        (model.layer0, False),
        (model.layer1, True),
        (model.head, False),
    ):
        for param in trained(layer):
            built.state[param]["use_muon"] = to_muon
    opt = RankAwareOptimizer(built, model=model, tuned_at=AT_16)
    assert_by_family(moved(model, opt))


GROUPS_OF_ONE_CLASS = [
    ("Lamb", "torch_optimizer", {"adam": True}, "sign-like"),
    ("Lamb", "timm", {"weight_decay": 0.0}, "sign-like"),
    ("LARS", "torch_optimizer", {"weight_decay": 0.1}, "first-step"),
    ("AdamW_adv", "adv_optm", {"spectral_normalization": True}, "rank-aware"),
    ("Muon_adv", "adv_optm", {"spectral_normalization": True}, "rank-aware"),
    (
        "Muon_adv",
        "adv_optm",
        {"use_muon": False, "adam_spectral_normalization": True},
        "rank-aware",
    ),
    ("MARS", "pytorch_optimizer", {"mars_type": "shampoo"}, "spectral"),
]


@pytest.mark.parametrize(("name", "package", "settings", "family"), GROUPS_OF_ONE_CLASS)
def test_settings_of_a_group_choose_its_family(name, package, settings, family):
    """The settings of a group can give it another optimizer family than the group beside it has."""
    model, kind = kept_alpha(4, 4), called(name, package)
    groups = two_groups(model, {}, settings)
    opt = RankAwareOptimizer(groups, kind, model=model, lr=LR, tuned_at=AT_16)
    families = {name: part.family for name, part in opt.rates.items()}
    assert families["layer0.lora_A"] == family
    by_name = moved(model, opt)
    keeps = family in ("rank-aware", "floored-scale", "first-step")
    expected = 1.0 if keeps else law_of(family, 4)
    assert by_name["layer0.lora_A"] == pytest.approx(LR * expected, rel=1e-9)


THIN = [
    # rank, width, package and class, the group's settings, the family
    (2, 64, "timm.Muon", {}, "sign-like"),
    (4, 512, "timm.Muon", {}, "spectral"),
    (2, 64, "timm.Muon", {"use_muon": True}, "spectral"),
    (2, 64, "adv_optm.AdaMuon_adv", {}, "sign-like"),
    (2, 64, "adv_optm.Muon_adv", {"adam_spectral_normalization": True}, "rank-aware"),
    (16, 64, "adv_optm.Muon_adv", {"adam_spectral_normalization": True}, "spectral"),
    (2, 64, "pytorch_optimizer.Muon", {"use_muon": True}, "spectral"),
    (2, 64, "torch.Muon", {}, "spectral"),
]


@pytest.mark.parametrize(("rank", "width", "name", "settings", "family"), THIN)
@pytest.mark.parametrize("form", ["class", "instance"])
def test_a_thin_factor_is_of_what_trains_it(rank, width, name, settings, family, form):
    """If a Muon passes thin matrices to its Adam, those are scaled by Adam's law and all others by Muon's."""
    model = mlp((rank,), width=width, head=False, dtype=torch.float64)
    package, kind = name.split(".")
    kind = called(kind, package)
    groups = [{"params": trained(model), **settings}]
    if form == "class":
        opt = RankAwareOptimizer(groups, kind, model=model, lr=LR, tuned_at=AT_16)
    else:
        opt = RankAwareOptimizer(kind(groups, lr=LR), model=model, tuned_at=AT_16)
    assert {row.family for row in opt.report().rows} == {family}
    noted = any(f"is {family}" in note for note in opt.report().notes)
    assert noted == (family != "sign-like")
    assert len(opt.report().notes) == noted
    law = ra.Falling() if family == "sign-like" else MuA(tokens=8.0, family="spectral")
    factor = Factor("f", "A", rank, width, width, 1.0)
    at = Reference(16, 16, fan_in=width)
    expected = 1.0 if family == "rank-aware" else law.multiplier(factor, at)
    assert moved(model, opt)["layer0.lora_A"] == pytest.approx(LR * expected, rel=1e-9)


def test_a_vector_of_a_spectral_optimizer_is_adams():
    """In full finetuning with Muon, biases are scaled as with Adam and matrices as with Muon."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).double()
    at = Reference(rank=16, alpha=16, fan_in=64)
    given = {"lr": LR, "tuned_at": at, "method": "full", "law": "mua"}
    muon, adam = (
        rates_of(RankAwareOptimizer(model, called(name), **given))
        for name in ("Muon", "AdamW")
    )
    assert muon["0.bias"] == pytest.approx(adam["0.bias"])
    assert muon["0.weight"] != pytest.approx(adam["0.weight"], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_full_finetuning_all_parameters_have_one_rate(dtype):
    """In full finetuning, embeddings and biases train at the same learning rate as the weights, in
    float32 and in bfloat16.
    """
    width = 1024  # from this width on, the learning rate depends on the dtype
    model = nn.Sequential(nn.Embedding(4, width), nn.Linear(width, width)).to(dtype)
    at_16 = Reference(rank=16, alpha=16, fan_in=width)
    opt = RankAwareOptimizer(
        model, torch.optim.AdamW, lr=LR, tuned_at=at_16, method="full"
    )
    assert len(rates_of(opt)) == 3
    assert len(set(rates_of(opt).values())) == 1


# --- unknown classes ------------------------------------------------------------------------------------------------


def test_a_class_derived_from_adamw_that_changes_gradients_is_unknown():
    """PEFT's Riemannian optimizer inherits from AdamW but makes other updates, so its optimizer
    family is unknown.
    """
    kind = type("RiemannianPreconditionedOptimizer", (torch.optim.AdamW,), {})
    with pytest.warns(ra.RankAwareWarning, match="unknown family"):
        RankAwareOptimizer(mlp((4,)), kind, lr=LR, tuned_at=AT_16)


# --- optimizers that compute their own learning rates ---------------------------------------------------------------

OWN_RATES = [
    ("RAdam", "torch_optimizer", {}, "keeps one step size for all groups"),
    ("A2GradUni", "torch_optimizer", {}, "never reads"),
    ("ASGD", "pytorch_optimizer", {}, "measures its rates itself"),
    (
        "Adafactor",
        "torch_optimizer",
        {"relative_step": True},
        "Set relative_step=False",
    ),
    ("AdaFactor", "pytorch_optimizer", {"relative_step": True}, "Set relative_step"),
    ("Apollo", "torch_optimizer", {"warmup": 5}, "Set warmup=0"),
    ("ApolloDQN", "pytorch_optimizer", {"warmup_steps": 500}, "Set warmup_steps=0"),
    (
        "Ranger21",
        "pytorch_optimizer",
        {"disable_lr_scheduler": False},
        "Set disable_lr_scheduler=True",
    ),
]


def in_settings(model, kind, settings, safe):
    return RankAwareOptimizer(model, kind, lr=LR, **settings)


def in_a_group(model, kind, settings, safe):
    groups = [{"params": trained(model), **settings}]
    return RankAwareOptimizer(groups, kind, model=model, lr=LR, **safe)


def in_an_instance(model, kind, settings, safe):
    return RankAwareOptimizer(kind(trained(model), lr=LR, **settings), model=model)


def in_a_later_group(model, kind, settings, safe):
    first, later = trained(model.layer0), trained(model.layer1)
    opt = RankAwareOptimizer(first, kind, model=model, lr=LR, **safe)
    opt.add_param_group({"params": later, **settings})


@pytest.mark.parametrize(("name", "package", "settings", "message"), OWN_RATES)
@pytest.mark.parametrize(
    "give", [in_settings, in_a_group, in_an_instance, in_a_later_group]
)
def test_what_makes_its_own_rates_is_refused(name, package, settings, message, give):
    """An optimizer that computes its own learning rates raises an error, and is accepted if the
    setting for that is switched off.
    """
    model, kind = kept_alpha(4, 16), called(name, package)
    safe = {key: not value for key, value in settings.items()}
    with pytest.raises(ra.OptimizerError, match=message):
        give(model, kind, settings, safe)
    for changed in [safe] * bool(settings):
        give(model, kind, changed, changed)


@pytest.mark.parametrize(("name", "package", "settings", "message"), OWN_RATES)
def test_a_default_that_makes_its_own_rates_is_refused(
    name, package, settings, message
):
    """If a class computes its own learning rates by default, the error says so before any other
    problem, and switching that setting off makes the class acceptable.
    """
    kind = with_defaults(name, package, **{"lr": None, **settings})
    with pytest.raises(ra.OptimizerError, match=message):
        RankAwareOptimizer(kept_alpha(4), kind)
    safe = {key: not value for key, value in settings.items()}
    for changed in [safe] * bool(settings):
        in_a_later_group(kept_alpha(4, 16), kind, {}, changed)


# --- methods that step a single parameter ---------------------------------------------------------------------------


WAYS = [
    "step_parameter",
    "update_step",
]  # of adv_optm, called from a hook of the gradient, and of bitsandbytes


def step_one(self: Optimizer, p: nn.Parameter, group: dict, i: int | None = None):
    """Step one parameter, as such methods of real optimizers do."""
    p.data.sub_(p.grad, alpha=float(group["lr"]))


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_another_way_to_step_is_at_the_multiplied_rate(way, by_keyword):
    """A method that steps a single parameter uses the base learning rate times the multiplier, and
    the group shows the base learning rate again afterwards.
    """
    model = kept_alpha(4, 64)
    kind = type("ByParameter", (torch.optim.SGD,), {way: step_one})
    opt = RankAwareOptimizer(model, kind, lr=LR, rates={"layer0.*": LR / 4})
    by_name = rates_of(opt)
    assert by_name["layer0.lora_A"] == LR / 4
    (group,) = opt.param_groups
    names = {param: name for name, param in model.named_parameters()}
    for param in group["params"]:
        before, param.grad = param.detach().clone(), torch.ones_like(param)
        if by_keyword:
            getattr(opt, way)(p=param, group=group)
        else:
            getattr(opt, way)(param, group, 0)
        expected = torch.full_like(param, by_name[names[param]])
        assert torch.allclose(before - param, expected)
    assert group["lr"] == LR


# --- several models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["models", "parameters", "instance"])
def test_each_of_several_models_moves_by_its_ranks(form):
    """With several models, every LoRA matrix is scaled by its own rank, and parameter names begin
    with the number of the model.
    """
    both = nn.ModuleList([kept_alpha(4, 16), kept_alpha(64)])
    kind, given = called("Adam"), {"lr": LR, "tuned_at": AT_16}
    if form == "models":
        opt = RankAwareOptimizer(list(both), kind, **given)
    elif form == "parameters":
        opt = RankAwareOptimizer(trained(both), kind, model=list(both), **given)
    else:
        built = kind(trained(both), lr=LR)
        opt = RankAwareOptimizer(built, model=list(both), tuned_at=AT_16)
    by_name = moved(both, opt)
    for name, multiplier in {
        "0.layer0.lora_A": law_of("sign-like", 4),
        "0.layer1.lora_B": 1.0,
        "1.layer0.lora_A": law_of("sign-like", 64),
    }.items():
        assert by_name[name] == pytest.approx(LR * multiplier, rel=1e-9)
    trains = {name for name, p in both.named_parameters() if p.requires_grad}
    assert rates_of(opt).keys() == trains
    opt.load_state_dict(opt.state_dict())
    # A single model in a list is numbered too, because a second model may be added later.
    alone = RankAwareOptimizer([kept_alpha(4)], kind, **given)
    assert {name.partition(".")[0] for name in rates_of(alone)} == {"0"}


@pytest.mark.parametrize("tuned_at", [AT_16, replace(AT_16, fan_in=512)])
def test_each_of_several_models_has_its_own_width(tuned_at):
    """Each of several models gets the learning rates that it would get alone."""
    both = [mlp((4,), width=16), mlp((4,), width=512)]
    together = RankAwareOptimizer(both, "adamw", lr=LR, tuned_at=tuned_at)
    for number, model in enumerate(both):
        alone = RankAwareOptimizer(model, "adamw", lr=LR, tuned_at=tuned_at)
        for name, rate in rates_of(alone).items():
            assert rates_of(together)[f"{number}.{name}"] == rate


def test_a_later_group_is_of_any_of_several_models():
    """A group that is added later may belong to any of the models, but raises an error once one of
    the models was deleted.
    """
    unet, encoder = kept_alpha(4), kept_alpha(64)
    first = trained(unet)
    both = [unet, encoder]
    opt = RankAwareOptimizer(
        first, torch.optim.SGD, model=both, lr=LR, tuned_at=AT_16, law="mua"
    )
    opt.add_param_group({"params": [encoder.layer0.lora_A]})
    assert opt.rates.groups[-1].names == ("1.layer0.lora_A",)
    assert opt.rates.groups[-1].rank == 64
    later = encoder.layer0.lora_B
    del unet, both, first
    opt.param_groups[0]["params"].clear()
    gc.collect()
    with pytest.raises(ra.OptimizerError, match="its model was deleted"):
        opt.add_param_group({"params": [later]})
