"""The report and the survey's explanation: what is shown, why, and which accidents are pointed out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rankaware_optim import (
    Falling,
    MuA,
    Power,
    RankAwareOptimizer,
    Reference,
    Survey,
    inspect_model,
    rank_aware_param_groups,
)
from rankaware_optim._types import Factor, Rated
from rankaware_optim.inspection import other_kind
from rankaware_optim.inspection._survey import unsupported
from rankaware_optim.optimizer import (
    PlanOptions,
    Report,
    effective_lr,
    make_plan,
    plan_rates,
)
from rankaware_optim.optimizer._report import make_report

from ..helpers.models import adapted, mlp
from ..helpers.recipes import RECIPE

LR = 1e-3
AT_16 = Reference(rank=16, alpha=16)


def report_of(model: nn.Module, **options) -> Report:
    """The report of the groups that `options` make of `model`."""
    survey = inspect_model(model)
    made = make_plan(survey, PlanOptions(**options))
    groups = rank_aware_param_groups(model, lr=LR, **options)
    return make_report(groups, made, survey, "")


def test_the_report_lists_every_group():
    """A report has one row a group with role, rank, scaling, init, count, multiplier, rate and reason."""
    model = mlp((4, 8))
    made = make_plan(
        inspect_model(model), PlanOptions(tuned_at=AT_16, rates={"head.bias": 0.5})
    )
    groups = rank_aware_param_groups(
        model, lr=LR, tuned_at=AT_16, rates={"head.bias": 0.5}
    )
    for group in groups:
        group["param_names"], group["params"] = zip(*group["params"], strict=True)
    rows = make_report(groups, made, inspect_model(model), "title").rows
    seen = [(r.role, r.rank, r.scaling, r.init, r.count) for r in rows]
    lora = [(role, rank, 1.0, "A", 1) for rank in (4, 8) for role in "AB"]
    assert seen == [
        *lora,
        ("other", None, None, None, 1),
        ("other", None, None, None, 1),
    ]
    assert [(r.multiplier, r.lr) for r in rows] == [
        (g["rank_multiplier"], g["lr"]) for g in groups
    ]
    assert [r.base_lr for r in rows] == pytest.approx([LR] * len(rows))
    assert rows[0].reason == "default law: from rank 16, alpha 16, B = 0"
    assert rows[-2].reason == (
        "no LoRA factor: the base rate (other_lr= or rates= sets another)"
    )
    assert rows[-1].reason == "given by rates="
    assert rows[-1].names == ("head.bias",)


REASONS = [
    ({"other_lr": 0.1}, "A", "other", "given by other_lr="),
    (
        {"law": MuA(tokens=4.0), "tuned_at": AT_16},
        "A",
        "B",
        "mua with tokens 4: from rank 16, alpha 16, B = 0",
    ),
    (
        {"law": "constant", "tuned_at": AT_16},
        "A",
        "A",
        "constant: from rank 16, alpha 16, B = 0",
    ),
    (
        {},
        "other",
        "A",
        "neither factor started at zero, so no law covers it: the base rate",
    ),
]


@pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")
@pytest.mark.parametrize(("options", "init", "role", "reason"), REASONS)
def test_reasons(options, init, role, reason):
    """Every row says why its rate is what it is."""
    model = mlp(init=init)
    rows = report_of(model, **options).rows
    assert {row.reason for row in rows if row.role == role} == {reason}


def test_a_recipe_and_a_family_are_reasons_too():
    """A row names the recipe, full finetuning and a family that is not Adam's; the band is below the table."""
    model = mlp((4,), scalings=2.0, width=64, head=False)
    report = RankAwareOptimizer(model, "adamw", recipe=RECIPE).report()
    assert all(row.reason.startswith("recipe: from rank ") for row in report.rows)
    assert any("lies between" in note for note in report.notes)
    full = RankAwareOptimizer(
        nn.Linear(4, 4), "sgd", method="full", lr=LR, tuned_at=AT_16
    )
    assert {row.reason for row in full.report().rows} == {
        "default law, gradient-like: full finetuning, from rank 16, alpha 16, B = 0"
    }


def test_without_a_reference_nothing_moves_on_a_uniform_model():
    """Where tuned_at was forgotten and one configuration is all there is, every row says that nothing is moved."""
    for model, method in ((mlp(head=False), "lora"), (nn.Linear(4, 4), "full")):
        opt = RankAwareOptimizer(model, "adamw", lr=LR, method=method)
        assert {row.reason for row in opt.report().rows} == {
            "tuned_at not given: nothing is moved"
        }
        assert (
            "tuned_at not given: nothing is moved"
            in opt.report(per_module=True).__str__()
        )


def test_without_a_reference_a_mixed_model_moves_about_its_own():
    """Where tuned_at was forgotten on a model of several ranks, a note names the one that counts as the reference."""
    report = RankAwareOptimizer(mlp((4, 4, 8), head=False), "adamw", lr=LR).report()
    assert "default law: from rank 4, alpha 4, B = 0" in {
        row.reason for row in report.rows
    }
    (note,) = [note for note in report.notes if "tuned_at" in note]
    assert note.startswith(
        "tuned_at not given: lr counts as tuned at rank 4, alpha 4, B = 0"
    )


def test_a_report_and_a_survey_give_one_reason():
    """An adapter without a law has the same words in a report's row as in a survey's table."""
    model = mlp((4,), head=False)
    model.vera_lambda_b = nn.Parameter(torch.zeros(3))
    opt = RankAwareOptimizer(model, torch.optim.SGD, lr=LR)
    (row,) = [row for row in opt.report().rows if row.role == "other"]
    why, _, hint = row.reason.partition(" (")
    assert why == "VeRA: no law, the base rate"
    assert "other_lr= or rates=" in hint
    assert why in inspect_model(model).explain()


def test_the_report_prints_as_a_table():
    """str() of a report is a table with its title, a line a group, and the notes."""
    model = mlp((4, 8))
    survey = inspect_model(model)
    made = make_plan(survey, PlanOptions(tuned_at=replace(AT_16, init="B")))
    groups = rank_aware_param_groups(model, lr=LR)
    text = str(make_report(groups, made, survey, "the title"))
    assert text.splitlines()[0].strip() == "the title"
    assert all(
        word in text
        for word in (
            "role",
            "multiplier",
            "why",
            "no LoRA factor",
            "note: Adapters at B = 0",
        )
    )
    assert max(map(len, text.splitlines())) <= 100


def test_a_row_shows_fans():
    """A group's row names the smallest and largest fan-in and fan-out of its tensors."""
    model = nn.ModuleDict(
        {
            "narrow": adapted(rank=4),
            "wide": mlp((4,), width=64, scalings=2.0, head=False),
        }
    )
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=LR)
    (row,) = [r for r in opt.report().rows if r.role == "A"]
    assert (row.fan_in, row.fan_out) == ((12, 64), (20, 64))
    assert "12–64" in str(opt.report())


NAMES = ["falling", Power(0.25, law=Falling())]


@pytest.mark.parametrize("law", NAMES)
def test_the_report_is_at_most_100_columns_wide(law):
    """Wide fans, several groups of one's own, long names, notes and checks: no line is longer than 100 characters."""
    model = nn.ModuleDict(
        {"a" * 60: adapted(rank=4), "wide": mlp((4, 16), width=64, scalings=1 / 3)}
    )
    model["scores"] = nn.Linear(14336, 3)
    groups = [
        {"params": [p], "lr": 1.2345e-5} for p in model.parameters() if p.requires_grad
    ]
    opt = RankAwareOptimizer(
        groups, "adamw", model=model, tuned_at=AT_16, lr=LR, law=law, batch=64
    )
    text = str(opt.report())
    assert max(map(len, text.splitlines())) <= 100
    assert "check: head" not in text
    assert "a" * 60 in text or "wide" in text


def test_per_module_has_a_line_for_every_tensor():
    """report(per_module=True) lists every parameter by name with its rate and reason."""
    model = mlp((4, 8))
    opt = RankAwareOptimizer(model, torch.optim.AdamW, lr=LR, tuned_at=AT_16)
    lines = str(opt.report(per_module=True)).splitlines()
    for group in opt.param_groups:
        for name in group["param_names"]:
            (line,) = [line for line in lines if f" {name} " in line]
            assert f" {effective_lr(group):.3g} " in line
            assert "default law: from rank 16" in line or "the base rate" in line


def test_the_report_keeps_the_init_seen_before_training():
    """A report after training tells the init that the pairs started from, not what trained weights look like."""
    model = mlp((4,), init="B")
    opt = RankAwareOptimizer(model, torch.optim.SGD, lr=LR)
    with torch.no_grad():
        model.layer0.lora_A.add_(1.0)
    assert "other" not in {f.init for f in opt.report().survey.factors}


def test_later_groups_join_the_survey():
    """A group that is added later is explained like the first ones."""
    model = nn.ModuleDict({"one": adapted(), "two": adapted()})
    opt = RankAwareOptimizer(
        [model["one"].lora_A, model["one"].lora_B], torch.optim.SGD, model=model, lr=LR
    )
    opt.add_param_group({"params": [model["two"].lora_A, model["two"].lora_B]})
    shown = str(opt.report(per_module=True))
    assert "one.lora_A" in shown
    assert "two.lora_B" in shown


# --- explain --------------------------------------------------------------------------------------------------------


def test_explain_merges_alike_factors():
    """Without per_module alike factors share a line with their count."""
    shown = inspect_model(mlp((4, 4, 8))).explain()
    lines = [
        line.split()
        for line in shown.splitlines()
        if line.strip().startswith("lora_A/lora_B")
    ]
    assert [(line[2], line[3], line[10]) for line in lines] == [
        ("A", "4", "2"),
        ("B", "4", "2"),
        ("A", "8", "1"),
        ("B", "8", "1"),
    ]


def test_explain_shows_rates_and_reasons():
    """Rates given by name fill the columns lr and why."""
    survey = inspect_model(mlp((4, 8)))
    made = make_plan(survey, PlanOptions(tuned_at=AT_16, rates={"layer1.lora_B": 0.5}))
    rates = plan_rates(made, LR)
    shown = survey.explain(per_module=True, rates=rates)
    assert "given by rates=" in shown
    assert shown.count("default law: from rank 16, alpha 16, B = 0") == 3
    assert (
        survey.explain(rates={"layer0.lora_A": Rated(0.25, "since I say so")}).count(
            "since I say so"
        )
        == 1
    )


def test_explain_names_what_has_no_law():
    """Other parameters are shown by the kind of adapter they belong to, frozen factors as such."""
    names = (
        "q.vera_lambda_b.default",
        "q.lora_magnitude_vector.d.weight",
        "head.weight",
    )
    survey = Survey((), names, frozen=("q.lora_A",), unsupported=unsupported(names))
    shown = survey.explain()
    for words in (
        "VeRA: no law",
        "DoRA magnitude: no law",
        "no LoRA factor: the base rate",
        "does not train",
    ):
        assert words in shown


KINDS = [
    ("m.hada_w1_a.default", "LoHa"),
    ("m.lokr_w2_b.default", "LoKr"),
    ("m.vera_lambda_d.default", "VeRA"),
    ("m.lora_E.default", "AdaLoRA's singular values"),
    ("m.lora_A.3", "DyLoRA"),
    ("m.up_list.0", "DyLoRA"),
    ("m.ia3_l.default", "IA³"),
    ("m.oft_R.default.weight", "OFT"),
    ("m.boft_R.default", "BOFT"),
    ("m.dora_scale", "DoRA magnitude"),
    ("m.magnitude", "DoRA magnitude"),
    ("m.lora_mid.weight", "Tucker core"),
    ("m.lora_B.default.bias", "LoRA bias"),
    ("score.modules_to_save.default.weight", "whole copy (modules_to_save)"),
    ("m.lora_A.default.weight", None),
    ("m.lora_A.default", None),
    ("magnitudes.weight", None),
    ("head.weight", None),
    ("soft.weight", None),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_kinds_by_name(name, kind):
    """A parameter's name tells the kind of adapter without a law that it belongs to, or that it belongs to none."""
    assert other_kind(name) == kind


# --- audit ----------------------------------------------------------------------------------------------------------

LOHA = "m.hada_w1_a"
PAIR = Factor("up.lora_A", "A", 4, 64, 64, layer="up")


def scaled(*pairs: tuple[int, float], adapters: tuple[str, ...] = ()) -> Survey:
    """A survey of pairs of these ranks and scalings."""
    factors = []
    for number, (rank, scaling) in enumerate(pairs):
        adapter = adapters[number] if adapters else "default"
        of_pair = {"rank": rank, "scaling": scaling, "adapter": adapter}
        factors += [
            replace(PAIR, name=f"{number}.{role}", role=role, **of_pair)
            for role in ("A", "B")
        ]
    return Survey(tuple(factors))


AUDIT = [
    (Survey((PAIR,)), None),
    (Survey((replace(PAIR, rank=64),)), None),
    (Survey((replace(PAIR, scaling=8.0),)), None),
    (Survey((replace(PAIR, scaling=1 / 64),)), None),
    (Survey((replace(PAIR, kind="embedding", rank=128),)), None),
    (
        Survey((), ("m.hada_w1_a", "head.weight"), unsupported={"m.hada_w1_a": "LoHa"}),
        r"^0 LoRA pairs matched .trainable adapters: LoHa",
    ),
    (Survey((), ("head.weight",)), r"^0 LoRA pairs matched .trainable adapters: none"),
    (Survey((PAIR,), frozen=("a", "b")), r"^2 LoRA factors \(a, …\) are not trained"),
    (
        Survey((replace(PAIR, init="other"),)),
        r"^1 factor \(up\.lora_A\) is not covered .* neither factor zero",
    ),
    (Survey((replace(PAIR, init="unknown"),)), r"an init that cannot be read"),
    (Survey((replace(PAIR, rank=65),)), r"not low-rank: the rank is above the fan-in"),
    (Survey((replace(PAIR, scaling=8.5),)), r"above 8 or below 1/64"),
    (Survey((replace(PAIR, scaling=1 / 65),)), r"above 8 or below 1/64"),
    (scaled((16, 1.0), (4, 4.0)), None),
    (scaled((16, 1.0), (2, 7.9)), None),
    (scaled((4, 1.0), (4, 8.0), adapters=("default", "second")), None),
    (
        scaled((8, 1.0), (1, 8.0)),
        r"^2 factors \(1\.A, …\) are scaled up to 8 times as strongly as the rest\. If .* give alpha_",
    ),
    (
        scaled((8, 0.5), (4, 1.0), (1, 4.0), (1, 8.0)),
        r"^4 factors \(2\.A, …\) are scaled up to 16 times",
    ),
]


@pytest.mark.parametrize(("survey", "sentence"), AUDIT)
def test_the_audit_points_out_accidents(survey, sentence):
    """Each known accident has its sentence, in audit() and under the table, and a sound survey has none."""
    found = survey.audit()
    assert len(found) == (sentence is not None)
    if sentence is not None:
        with pytest.raises(ValueError, match=sentence):
            raise ValueError(found[0])
        assert f"check: {found[0]}" in survey.explain()


def test_a_head_at_the_adapters_rate_is_pointed_out():
    """A whole weight at the base rate is an accident until it is given its own rate."""
    model = mlp((4,))
    opt = RankAwareOptimizer(model, torch.optim.SGD, lr=LR)
    (line,) = opt.report().audit
    assert line.startswith("head.weight trains at the adapters' base rate")
    reasons = {r.reason for r in opt.report().rows if r.role == "other"}
    assert "other_lr= or rates=" in reasons.pop()
    assert (
        RankAwareOptimizer(model, torch.optim.SGD, lr=LR, other_lr=0.1).report().audit
        == ()
    )


@pytest.mark.parametrize("built", [False, True])
def test_frozen_weights_are_no_heads(built):
    """Frozen weights among the parameters given, as in AdamW(model.parameters()), train at no rate: no alarm."""
    model = mlp((4,), head=False)
    given = (
        torch.optim.SGD(model.parameters(), lr=LR)
        if built
        else list(model.parameters())
    )
    own = {} if built else {"optimizer": torch.optim.SGD, "lr": LR}
    opt = RankAwareOptimizer(given, model=model, **own)
    assert opt.report().audit == ()
    model.layer0.base_layer.weight.requires_grad_(True)
    (line,) = opt.report().audit
    assert line.startswith("layer0.base_layer.weight trains at the adapters' base rate")


def test_frozen_weights_are_marked():
    """Frozen parameters among those given have a row of their own, which says so until they train."""
    model = mlp((4, 4))
    model.layer1.lora_A.requires_grad_(False)
    opt = RankAwareOptimizer(
        list(model.parameters()), torch.optim.SGD, model=model, lr=LR
    )
    before = [(row.role, row.count) for row in opt.report().rows]
    assert before == [
        ("A", 1),
        ("frozen", 1),
        ("B", 2),
        ("other", 2),
        ("frozen", 4),
    ]
    (why,) = {row.reason for row in opt.report().rows if row.role == "frozen"}
    assert why == "frozen: it does not train until requires_grad is set"
    assert why in str(opt.report(per_module=True))
    assert str(opt.report()).count("  frozen") == 2
    model.requires_grad_(True)
    assert [row.role for row in opt.report().rows] == ["A", "B", "other"]


def test_an_adapter_outside_the_optimizer_is_pointed_out():
    """An adapter that trains in the model and of which no factor is in the optimizer is named."""
    model = nn.ModuleDict({"one": adapted("container"), "two": adapted("container")})
    for attribute in ("lora_A", "lora_B", "r", "scaling"):
        held = getattr(model["two"], attribute)
        held["second"] = held.pop("default")
    params = [p for p in model["one"].parameters() if p.requires_grad]
    opt = RankAwareOptimizer(params, torch.optim.SGD, model=model, lr=LR)
    assert opt.report().audit == (
        "None of the 2 factors of second is in this optimizer.",
    )


def test_a_row_names_its_reason_by_number():
    """The last column counts the reasons from 1, in the order of their rows."""
    report = report_of(mlp((4, 16)), tuned_at=AT_16, other_lr=0.1)
    text = str(report)
    table = [line.split() for line in text.splitlines()]
    table = [cells for cells in table if cells[:1] in (["A"], ["B"], ["other"])]
    for cells, row in zip(table, report.rows, strict=True):
        assert f"why {cells[-1]}: {row.reason}" in text
        assert row.role == "other" or cells[1] == str(row.rank)
        assert f"\n  {row.role} " in text  # words stand at the left


def test_a_hyphened_word_stays_in_one_line():
    """So that a name can be copied."""
    note = " ".join(["some-hyphened-word"] * 12)
    text = str(Report((), (note,), "title"))
    assert text.count("some-hyphened-word") == 12


def test_a_group_without_tags_is_at_its_rate():
    """One that was put into param_groups directly is shown as it is, moved by nothing."""
    model = mlp((4,))
    opt = RankAwareOptimizer(model, torch.optim.SGD, lr=LR, init="A")
    opt.param_groups.append({**opt.defaults, "params": [nn.Parameter(torch.ones(2))]})
    row = opt.report().rows[-1]
    assert (row.role, row.rank, row.multiplier) == ("other", None, 1.0)


@pytest.mark.parametrize(
    ("apart", "note"), [(0, ""), (2, ""), (1, "Your 2 groups are 4")]
)
def test_groups_of_ones_own_that_are_split_have_a_note(apart, note):
    """One group that is split has none, and several that stay whole neither: no scheduler's list is too short."""
    model = mlp((4,))
    factors, head = [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            (factors if "lora" in name else head).append(param)
    groups = {
        0: [{"params": [*factors, *head]}],
        1: [{"params": [*factors, head[0]]}, {"params": head[1:], "weight_decay": 0.1}],
        2: [{"params": [factor]} for factor in factors],
    }[apart]
    opt = RankAwareOptimizer(
        groups,
        torch.optim.AdamW,
        model=model,
        lr=LR,
        init="A",
        rates={"head.weight": 0.1} if apart == 1 else None,
    )
    said = [text for text in opt.report().notes if text.startswith("Your ")]
    assert [text.partition(" here")[0] for text in said] == [note] * bool(note)
