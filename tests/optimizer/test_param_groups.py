"""Parameter groups: which multiplier each parameter gets, how groups are split and ordered, and the report's notes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rankaware_optim import (
    Falling,
    RankAwareOptimizer,
    RankAwareWarning,
    Reference,
    rank_aware_param_groups,
)
from rankaware_optim._types import Factor

from ..helpers.models import TuneLoRA, adapted, mlp, trained
from ..helpers.optimizers import called, names_of

LR = 1e-3
AT_16 = Reference(rank=16, alpha=16)
AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


def values_of(groups: list[dict], key: str) -> dict[str, float]:
    """Return the value of one key of the groups, by parameter name."""
    return {name: group[key] for group in groups for name, _ in group["params"]}


def multipliers(model: nn.Module, **options) -> dict[str, float]:
    """Return the multiplier of every parameter, by name."""
    groups = rank_aware_param_groups(model, lr=LR, **options)
    return values_of(groups, "rank_multiplier")


def rates(model: nn.Module, **options) -> dict[str, float]:
    """Return the learning rate of every parameter, by name."""
    return values_of(rank_aware_param_groups(model, lr=LR, **options), "lr")


def expected(
    rank: int,
    scaling: float,
    reference: Reference,
    *,
    width: float = 16,
    init: str = "A",
) -> float:
    """Return the default law's multiplier from the reference to this rank and scaling, at a width
    that both share.
    """
    factor = Factor("w", "A", rank, width, width, scaling, init)
    at = replace(reference, fan_in=reference.fan_in or width)
    return Falling().multiplier(factor, at)


# --- splitting into groups ------------------------------------------------------------------------------------------


@given(
    ranks=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=4).map(tuple),
    scaling=st.sampled_from([0.25, 1.0, 2.0]),
    init=st.sampled_from("AB"),
    lr=st.floats(1e-6, 1.0),
    reference=st.none()
    | st.builds(Reference, rank=st.integers(1, 64), alpha=st.integers(1, 64)),
)
@settings(max_examples=50)
def test_groups_hold_everything_once_at_their_rate(ranks, scaling, init, lr, reference):
    """Every parameter that trains is in exactly one group, no group is empty, and a group's lr is
    the base learning rate times its multiplier.
    """
    model = mlp(ranks, scalings=scaling, init=init)
    groups = rank_aware_param_groups(model, lr=lr, tuned_at=reference)
    listed = [name for group in groups for name, _ in group["params"]]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(listed) == sorted(names)
    for group in groups:
        assert group["params"]
        assert group["lr"] == pytest.approx(lr * group["rank_multiplier"])


REFERENCES = [
    None,
    AT_16,
    Reference(rank=4, alpha=16),
    Reference(rank=8, alpha=8, fan_in=64),
]


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("scalings", [(1.0, 1.0, 1.0), (1.0, 0.5, 1.0)])
def test_multipliers_are_the_laws(scalings, reference):
    """The multiplier of a LoRA matrix is the law's, from the given reference or else from the
    model's most common rank and alpha.
    """
    ranks = (4, 8, 4)
    model = mlp(ranks, scalings=scalings)
    found = multipliers(model, tuned_at=reference)
    at = reference or Reference(rank=4, alpha=4)
    for i, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True)):
        value = pytest.approx(expected(rank, scaling, at))
        assert found[f"layer{i}.lora_A"] == found[f"layer{i}.lora_B"] == value
    assert found["head.weight"] == found["head.bias"] == 1.0


def test_the_users_groups_are_not_changed():
    """rank_aware_param_groups does not change the dicts and lists that the user passes."""
    model = mlp()
    params = trained(model)
    users = [{"params": params, "lr": LR}]
    rank_aware_param_groups(users, lr=1.0, model=model, tuned_at=AT_16)
    assert users == [{"params": params, "lr": LR}]
    assert len(params) == 6


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


FORMS = {
    "parameters": lambda model: iter(trained(model)),
    "named": lambda model: iter(named(model)),
    "named dicts": lambda model: [{"params": named(model)}],
    "generator": lambda model: ({"params": p} for p in [trained(model)]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_parameters_is_taken(form):
    """Parameters, named parameters and dicts of them give the same groups as the model."""
    model = mlp((4, 8))
    groups = rank_aware_param_groups(FORMS[form](model), model=model, lr=LR)
    assert str(groups) == str(rank_aware_param_groups(model, lr=LR))


@pytest.mark.parametrize("named", [True, False])
def test_names_can_be_left_out(named):
    """With named=False the groups contain parameters without names, and a torch optimizer accepts
    groups with and without names.
    """
    groups = rank_aware_param_groups(mlp(), lr=LR, named=named)
    assert isinstance(groups[0]["params"][0], tuple) is named
    assert len(AdamW(groups).param_groups) == 3


def test_a_groups_scheduled_rates_are_multiplied_with_its_rate():
    """The wrapper multiplies a group's initial_lr like its lr, but groups for a plain optimizer
    have no initial_lr.
    """
    model = mlp()
    options = {"lr": 1.0, "model": model, "tuned_at": AT_16}
    group = {"params": trained(model), "lr": LR, "initial_lr": 2 * LR}
    for native in rank_aware_param_groups([group], **options):
        assert "initial_lr" not in native
    opt = RankAwareOptimizer([group], AdamW, **options)
    assert opt.param_groups[0]["initial_lr"] == 2 * LR
    starts = [part.initial_lr for part in opt.rates.groups]
    assert starts == pytest.approx([2 * part.lr for part in opt.rates.groups])


# --- parameters outside the model -----------------------------------------------------------------------------------


def test_a_tensor_outside_the_model_takes_no_name_of_it():
    """A parameter outside the model is named by its group and position, even if the user gave it a name of the model."""
    model = mlp((4,))
    stranger = [("head.bias", nn.Parameter(torch.ones(2)))]
    groups = [{"params": named(model)}, {"params": stranger, "lr": 0.5}]
    opt = RankAwareOptimizer(groups, SGD, model=model, lr=LR, init="A")
    *of_model, of_stranger = names_of(opt)
    own = [name for name, _ in named(model)]
    assert [name for part in of_model for name in part] == own
    assert of_stranger == ["group1.unnamed.0"]


# --- inits, embeddings, widths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "other"), ["AB", "BA"])
def test_inits_are_not_crossed(init, other):
    """If the model's init differs from the reference's, the learning rate is converted with the law
    for the model's init, and a note says so.
    """
    reference = replace(AT_16, init=other, fan_in=16)
    found = multipliers(mlp(init=init), tuned_at=reference)
    value = expected(4, 1.0, replace(reference, init=init), init=init)
    assert found["layer0.lora_A"] == pytest.approx(value)
    (said,) = notes_of(mlp(init=init), tuned_at=reference)
    assert "converted with the scaling law for init" in said
    assert not notes_of(mlp(init=init))


def test_adapters_without_a_zero_factor_stay_at_the_base_rate():
    """Adapters in which neither A nor B started at zero, as with PiSSA, keep the base learning rate
    with a warning, unless init= is set.
    """
    model = mlp((4, 8), init="other")
    with pytest.warns(
        RankAwareWarning, match=r"neither A nor B .* init='A' .*='B'"
    ) as caught:
        groups = rank_aware_param_groups(model, lr=LR, tuned_at=AT_16)
    assert caught[0].filename == __file__
    assert set(values_of(groups, "rank_multiplier").values()) == {1.0}
    for init in ("A", "B"):
        at = replace(AT_16, init=init)
        found = multipliers(model, init=init, tuned_at=at)
        value = expected(4, 1.0, at, init=init)
        assert found["layer0.lora_A"] == pytest.approx(value)


def test_unknown_inits_count_as_a():
    """Adapters on the meta device, whose values cannot be read, are treated as if B started at
    zero, with a note.
    """
    model = nn.Sequential(adapted(device="meta"))
    found = multipliers(model, tuned_at=AT_16)
    assert found["0.lora_A"] == pytest.approx(expected(4, 2.0, AT_16, width=12))
    assert "as if B had started at zero" in notes_of(model)[0]


@pytest.mark.parametrize("init", ["A", "B"])
def test_embeddings_are_scaled_along_their_own_law_at_width_one(init):
    """The learning rate of an adapted embedding is converted for its own init and at width 1, so
    the size of the vocabulary does not matter.
    """
    embedding = adapted(kind="embedding", scaling=1.0, init=init)
    model = nn.ModuleDict({"lin": adapted(scaling=1.0), "emb": embedding})
    value = expected(4, 1.0, replace(AT_16, init=init, fan_in=1), width=1, init=init)
    found = multipliers(model, tuned_at=AT_16)
    assert found["emb.lora_A"] == pytest.approx(value)
    assert multipliers(model)["emb.lora_A"] == 1.0
    # There is no note, because embeddings usually have another init than other layers.
    assert notes_of(model, tuned_at=AT_16) == ()


def test_pinned_weights_do_not_count_for_the_width():
    """A LoRA matrix with an explicit learning rate is left out when the width of the model is
    computed.
    """
    model = nn.Sequential(adapted(scaling=1.0), adapted(kind="conv", scaling=1.0))
    at = replace(AT_16, fan_in=64)
    found = multipliers(model, tuned_at=at, rates={"1.*": 1.0})
    assert found["0.lora_A"] == pytest.approx(expected(4, 1.0, at, width=12))


# --- learning rates that stay unchanged, and adapters without a law -------------------------------------------------

AS_TUNED = [
    {},
    {"tuned_at": Reference(rank=4, alpha=4)},
    {"tuned_at": AT_16, "rates": {"layer*": LR}},
]


@pytest.mark.parametrize("options", AS_TUNED)
def test_a_rate_used_as_it_was_tuned_does_not_move(options):
    """A learning rate stays unchanged, without a note, if it is explicit or if the model has the
    rank and alpha at which it was tuned.
    """
    assert set(multipliers(mlp((4,)), **options).values()) == {1.0}
    assert notes_of(mlp((4,)), **options) == ()


def test_adapters_without_a_law_are_said_where_a_rate_was_moved():
    """With tuned_at= a warning says that no scaling law covers LoKr's parameters, but without
    tuned_at= only the report lists them.
    """
    model = mlp((4,))
    model.lokr_w1 = nn.Parameter(torch.ones(2, 2))
    with pytest.warns(
        RankAwareWarning, match=r"No scaling law covers LoKr: 1 .*lokr_w1"
    ):
        notes_of(model, tuned_at=AT_16)
    report = RankAwareOptimizer(model, AdamW, lr=LR).report()
    assert report.survey.unsupported == {"lokr_w1": "LoKr"}
    assert notes_of(model, tuned_at=AT_16, other_lr=LR) == ()


def adalora() -> nn.Module:
    """Return a layer as PEFT's AdaLoRA builds it, with a singular value for every unit of rank between A and B."""
    layer = adapted("container", init="other")
    layer.lora_A, layer.lora_B, layer.lora_E = (
        nn.ParameterDict({"default": torch.ones(shape)})
        for shape in ((4, 12), (20, 4), (4, 1))
    )
    return layer


def kasa() -> nn.Module:
    """Return a layer as PEFT's KaSA builds it, with a diagonal between A and B."""
    layer = adapted("container")
    layer.lora_diag = nn.ParameterDict({"default": torch.ones(4)})
    return layer


LAWLESS = {"AdaLoRA": adalora, "KaSA": kasa}


@pytest.mark.parametrize("options", [{"tuned_at": AT_16}, {"init": "A"}, {}])
@pytest.mark.parametrize("name", LAWLESS)
def test_pairs_that_are_more_than_a_and_b_are_named_and_stay_at_the_base_rate(
    name, options
):
    """AdaLoRA and KaSA are named in a warning and keep the base learning rate with any init=, but a plain pair beside
    them is converted.
    """
    model = nn.ModuleDict({"odd": LAWLESS[name](), "plain": adapted(rank=8)})
    with pytest.warns(
        RankAwareWarning, match=rf"^No scaling law covers {name}: 2 "
    ) as said:
        opt = RankAwareOptimizer(model, AdamW, lr=LR, **options)
    assert len(said) == 1
    assert "init=" not in str(said[0].message)
    (pair,) = {p.why for p in opt.rates.groups if p.role in "AB" and p.rank == 4}
    assert pair == f"{name}: no law covers it, base learning rate"
    assert any(name in check for check in opt.report().survey.audit())
    (plain,) = {p.multiplier for p in opt.rates.groups if p.rank == 8}
    assert (plain != 1.0) == ("tuned_at" in options)


def split() -> nn.Module:
    """Return a fused layer as kohya's scripts build it with `split_qkv`: a list of pairs."""
    layer = nn.Module()
    layer.lora_down = nn.ModuleList([nn.Linear(12, 4), nn.Linear(12, 4)])
    layer.lora_up = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 14)])
    for part in (*layer.lora_down, *layer.lora_up):
        part.bias = None
    return layer


UNREAD = {
    "lora_unet_qkv": (split(), 4),
    "q": (split(), 4),
    "blocks": (nn.ModuleDict({"LoRA_down": nn.Linear(3, 3)}), 2),
    "alone": (nn.ParameterDict({"lora_A": torch.ones(4, 4)}), 1),
}


@pytest.mark.parametrize("options", [{}, {"tuned_at": AT_16}])
@pytest.mark.parametrize("name", UNREAD)
def test_lora_that_was_not_read_is_warned_of(name, options):
    """Parameters that are named after LoRA but belong to no pair keep the base learning rate, with a warning unless
    rates= covers them.
    """
    odd, count = UNREAD[name]
    model = nn.ModuleDict({name: odd, "plain": adapted()})
    message = rf"^No scaling law covers LoRA parameters .*: {count} .* such as {name}\."
    with pytest.warns(RankAwareWarning, match=message) as said:
        notes = notes_of(model, **options)
    assert len(said) == 1
    assert str(said[0].message) in notes
    rank_aware_param_groups(model, lr=LR, **options, rates={f"{name}.*": LR})


def in_lora(*names: str) -> nn.Module:
    """Return a model named lora_model with a LoRA pair, a head, and parameters of these names
    beside the pair.
    """
    model = nn.ModuleDict({"q": adapted(), "head": nn.Linear(3, 3)})
    for name in names:
        model["q"].register_parameter(name, nn.Parameter(torch.ones(3)))
    return nn.ModuleDict({"lora_model": model})


READ = [
    in_lora(),
    in_lora("lora_magnitude", "dora_scale", "trainable_tokens_delta"),
    TuneLoRA(nn.Linear(12, 20), 4),
]


@pytest.mark.parametrize("model", READ)
def test_parts_of_a_pair_and_what_stands_beside_it_are_no_unread_lora(model):
    """DoRA's magnitudes, biases of LoRA matrices, and a head of a model that is named after LoRA give no warning."""
    if isinstance(model, TuneLoRA):
        model.lora_b.bias = nn.Parameter(torch.zeros(20))
    rank_aware_param_groups(model, lr=LR, tuned_at=replace(AT_16, fan_in=12))


def test_full_finetuning_has_no_unread_lora():
    """In full finetuning, layers with LoRA in their names, such as those of latent attention, are
    ordinary weights.
    """
    model = nn.ModuleDict({"q_lora": nn.Linear(8, 4), "q_lora_norm": nn.LayerNorm(4)})
    rank_aware_param_groups(model, lr=LR, method="full", tuned_at="full")


# --- full finetuning ------------------------------------------------------------------------------------------------


def whole() -> nn.Module:
    layers = {
        "emb": nn.Embedding(9, 8),
        "in": nn.Linear(8, 32),
        "norm": nn.LayerNorm(32),
        "out": nn.Linear(32, 3),
    }
    return nn.ModuleDict(layers)


LARGEST, MEAN = 32.0, (8 * 8 * 32 + 32 * 32 * 3) / (8 * 32 + 32 * 3)


@pytest.mark.parametrize(
    ("init", "width", "fan_in"),
    [("A", LARGEST, None), ("A", LARGEST, 32), ("B", MEAN, 32)],
)
def test_full_finetuning_moves_everything_by_one_multiplier(init, width, fan_in):
    """Full finetuning converts all parameters by one multiplier: to the largest width from init A, and to the mean
    width if A started at zero.
    """
    at = replace(AT_16, init=init, fan_in=fan_in or MEAN)
    moved = Falling().multiplier(Factor("w", "full", None, width, width), at)
    given = replace(at, fan_in=fan_in)
    found = multipliers(whole(), method="full", tuned_at=given)
    assert list(found.values()) == pytest.approx([moved] * 7)
    assert set(multipliers(whole(), method="full").values()) == {1.0}


# --- notes and the report -------------------------------------------------------------------------------------------


def notes_of(model, optimizer=AdamW, **options):
    return RankAwareOptimizer(model, optimizer, lr=LR, **options).report().notes


BY_ALPHA = (
    "but not with the rank, because the best learning rates in small runs with {}"
)
NO_FORM = "No correct equations of µA are known"
NO_LAW = "No scaling law converts this LoRA learning rate"
LORA, WHOLE = mlp((4,)), nn.Linear(4, 4)
AT_4 = Reference(rank=4, alpha=4, batch=16)
SAID = [
    # the model, the optimizer, the options, and a part of each note
    (LORA, AdamW, {}, []),
    (LORA, SGD, {}, ["SGD is gradient-like. The learning rates change with alpha"]),
    (LORA, called("Muon"), {}, [BY_ALPHA.format("Muon")]),
    (
        LORA,
        called("Lamb"),
        {},
        ["Lamb is relative-scale. The learning rates follow µA's equations"],
    ),
    (LORA, called("LARS"), {}, [f"LARS is first-step. {NO_FORM}"]),
    (LORA, called("Unheard"), {}, ["Unheard is of an unknown family and is scaled as"]),
    (LORA, SGD, {"law": "loraplus"}, ["for which the law 'loraplus' is not defined"]),
    (LORA, SGD, {"law": "mua", "tuned_at": AT_16}, ["did the same"]),
    (
        LORA,
        called("LARS"),
        {"law": "mua", "tuned_at": AT_16},
        ["train at one learning rate"],
    ),
    (WHOLE, AdamW, {"tuned_at": AT_16}, ["within a factor of 2.7"]),
    (WHOLE, called("LARS"), {"tuned_at": AT_16}, [NO_LAW, "LARS"]),
    (WHOLE, AdamW, {"tuned_at": AT_16, "law": "constant"}, [NO_LAW]),
    (LORA, AdamW, {"tuned_at": AT_4, "batch": 64}, ["a rule of thumb"]),
    (LORA, AdamW, {"tuned_at": AT_4, "batch": 128}, ["as for 4 times the batch"]),
    (LORA, AdamW, {"tuned_at": AT_4, "batch": 16}, []),
    (LORA, AdamW, {"batch": 64}, ["contains no batch size"]),
    (LORA, AdamW, {"tuned_at": AT_4, "batch": 16, "law": "constant"}, []),
]


@pytest.mark.filterwarnings("ignore:.* is of an unknown family")
@pytest.mark.parametrize(("model", "kind", "options", "words"), SAID)
def test_what_is_uncertain_is_noted(model, kind, options, words):
    """The report has one note for each uncertainty: another optimizer family, a conversion to full
    finetuning, or another batch size.
    """
    method = "lora" if model is LORA else "full"
    notes = notes_of(model, kind, method=method, **options)
    assert len(notes) == len(words), notes
    for note, said in zip(notes, words, strict=True):
        assert said in note


BATCHES = [
    (AdamW, 16, 64, 2.0),
    (SGD, 16, 64, 4.0),
    (AdamW, None, 64, 1.0),
    (AdamW, 16, None, 1.0),
    (AdamW, 1, 0.25, 0.5),
]


@pytest.mark.parametrize(("kind", "tuned", "batch", "moved"), BATCHES)
def test_the_batch_moves_every_rate_where_both_sides_name_one(
    kind, tuned, batch, moved
):
    """If both the reference and the run have a batch size, learning rates grow as √batch with Adam
    and as batch with SGD, but explicit ones stay unchanged.
    """
    at = Reference(rank=4, alpha=4, batch=tuned)
    options = {"tuned_at": at, "optimizer": kind, "batch": batch}
    assert set(multipliers(mlp((4,)), **options).values()) == {moved}
    assert rates(mlp((4,)), **options, other_lr=0.5)["head.bias"] == 0.5
