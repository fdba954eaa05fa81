"""The report and the survey: their rows, the reasons for learning rates, and the sentences on likely mistakes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from rankaware_optim import (
    Falling,
    Power,
    RankAwareOptimizer,
    Reference,
    Survey,
)
from rankaware_optim._types import Factor
from rankaware_optim.optimizer import Report

from ..helpers.models import adapted, mlp, trained

LR = 1e-3
AT_16 = Reference(rank=16, alpha=16)
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def report_of(model: nn.Module, **options) -> Report:
    """Return the report of an AdamW on `model` with these options."""
    return RankAwareOptimizer(model, AdamW, lr=LR, **options).report()


def test_the_report_lists_every_group():
    """A report has one row for each learning rate, with role, rank, scaling, init, present learning rate and reason."""
    options = {"tuned_at": AT_16, "rates": {"head.bias": 0.5}}
    opt = RankAwareOptimizer(mlp((4, 8)), AdamW, lr=LR, **options)
    for group in opt.param_groups:  # as a scheduler does
        group["lr"] = 0.125
    rows = opt.report().rows
    seen = [(row.role, row.rank, row.scaling, row.init, len(row.names)) for row in rows]
    lora = [(role, rank, 1.0, "A", 1) for rank in (4, 8) for role in "AB"]
    assert seen == [*lora, *[("other", None, None, None, 1)] * 2]
    assert rows == opt.rates.groups
    assert {row.base_lr for row in rows} == {0.125}
    reasons = [
        *["default law: converted from rank 16, alpha 16, init A"] * 4,
        "not a LoRA matrix: base learning rate (other_lr= or rates= sets another)",
        "set by rates=",
    ]
    assert [row.why for row in rows] == reasons


def test_without_a_reference_a_mixed_model_moves_about_its_own():
    """If tuned_at= is missing and the model has several ranks, a note names the most common one as the reference."""
    report = RankAwareOptimizer(mlp((4, 4, 8), head=False), "adamw", lr=LR).report()
    assert "default law: converted from rank 4, alpha 4, init A" in {
        row.why for row in report.rows
    }
    (note,) = [note for note in report.notes if "tuned_at" in note]
    assert note.startswith(
        "tuned_at= was not passed, so we assume that lr was tuned at rank 4, alpha 4, init A"
    )


def test_the_report_is_at_most_100_columns_wide():
    """No line of a report is longer than 100 characters, even with wide layers, long names and
    several groups.
    """
    wide = mlp((4, 16), width=64, scalings=1 / 3)
    model = nn.ModuleDict({"a" * 60: adapted(rank=4), "wide": wide})
    model["scores"] = nn.Linear(14336, 3)
    groups = [{"params": [p], "lr": 1.2345e-5} for p in trained(model)]
    options = {
        "model": model,
        "tuned_at": AT_16,
        "lr": LR,
        "law": Power(0.25, law=Falling()),
        "batch": 64,
    }
    text = str(RankAwareOptimizer(groups, "adamw", **options).report())
    assert max(map(len, text.splitlines())) <= 100
    assert "check: head" not in text
    assert "a" * 60 in text or "wide" in text


class Language(nn.Module):
    """A model in which every kind of parameter trains beside an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 16)
        self.q = adapted()
        self.input_layernorm = nn.LayerNorm(16)
        self.proj = nn.Linear(16, 16)
        self.gate = nn.Parameter(torch.ones(3))
        self.lm_head = nn.ModuleDict({"modules_to_save": nn.Linear(16, 8, bias=False)})


def test_rows_of_other_parameters_can_be_told_apart():
    """Rows of parameters outside LoRA say which parts of the model they are, even if the user split
    the groups by weight decay.
    """
    model = Language()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if "lora" in n]},
        {"params": [p for n, p in named if "lora" not in n and p.dim() > 1]},
        {"params": [p for n, p in named if p.dim() == 1], "weight_decay": 0.0},
    ]
    opt = RankAwareOptimizer(groups, AdamW, model=model, lr=LR, tuned_at=AT_16)
    printed = " ".join(str(opt.rates).split())
    assert "embeddings, weights: 2 tensors" in printed
    assert "head: 1 tensor," in printed
    assert "biases, norms, vectors: 4 tensors" in printed
    table = str(opt.report())
    for part in ("embeddings", "head", "weights", "biases", "norms", "vectors"):
        assert part in table
    assert max(map(len, table.splitlines())) <= 100


# --- likely mistakes ------------------------------------------------------------------------------------------------

PAIR = Factor("up.lora_A", "A", 4, 64, 64, layer="up")


def of_one(**changes) -> Survey:
    """Return a survey of one LoRA matrix with these values changed."""
    return Survey((replace(PAIR, **changes),))


AUDIT = [
    (of_one(), None),
    (of_one(rank=64), None),
    (of_one(scaling=8.0), None),
    (of_one(scaling=1 / 64), None),
    (of_one(kind="embedding", rank=128), None),
    (Survey((PAIR,), frozen=("a", "b")), r"does not train: a \(2 in all"),
    (of_one(init="other"), r"neither A nor B started at zero: up\.lora_A"),
    (of_one(init="unknown"), "whose init cannot be read"),
    (of_one(rank=65), "whose rank is larger than the fan-in"),
    (of_one(scaling=8.5), r"above 8 or below 1/64"),
    (of_one(scaling=1 / 65), r"above 8 or below 1/64"),
]


@pytest.mark.parametrize(("survey", "sentence"), AUDIT)
def test_the_audit_points_out_accidents(survey, sentence):
    """Each likely mistake adds one sentence to audit() and to the printed survey, and a sound
    survey has no such sentence.
    """
    found = survey.audit()
    assert len(found) == (sentence is not None)
    if sentence is not None:
        assert re.search(sentence, found[0])
        assert f"check: {found[0]}" in str(survey)


def test_a_head_at_the_adapters_rate_is_pointed_out():
    """The report points out a head at the adapters' base learning rate until the head gets a
    learning rate of its own.
    """
    model = mlp((4,))
    (line,) = report_of(model).audit
    assert line.startswith(
        "head.weight trains at the base learning rate of the adapters"
    )
    assert report_of(model, other_lr=0.1).audit == ()


def test_an_explicit_rate_needs_no_law():
    """LoRA pairs without a law give no warning and no note if their learning rate is explicit."""
    model = mlp((4, 8), init="other", head=False)
    report = report_of(model, tuned_at=AT_16, rates={"layer*": LR})  # warnings fail
    assert {row.why for row in report.rows} == {"set by rates="}
    assert report.notes == ()


@pytest.mark.parametrize("built", [False, True])
def test_frozen_weights_are_no_heads(built):
    """Frozen weights in the optimizer, as in AdamW(model.parameters()), are not pointed out,
    because they do not train.
    """
    model = mlp((4,), head=False)
    listed = list(model.parameters())
    given = (SGD(listed, lr=LR),) if built else (listed, SGD)
    own = {} if built else {"lr": LR}
    opt = RankAwareOptimizer(*given, model=model, **own)
    assert opt.report().audit == ()
    model.layer0.base_layer.weight.requires_grad_(True)
    (line,) = opt.report().audit
    assert line.startswith(
        "layer0.base_layer.weight trains at the base learning rate of the adapters"
    )


def test_an_adapter_outside_the_optimizer_is_pointed_out():
    """The report names an adapter that trains in the model but is not in the optimizer."""
    model = nn.ModuleDict({"one": adapted("container"), "two": adapted("container")})
    for attribute in ("lora_A", "lora_B", "r", "scaling"):
        held = getattr(model["two"], attribute)
        held["second"] = held.pop("default")
    params = [p for p in model["one"].parameters() if p.requires_grad]
    opt = RankAwareOptimizer(params, SGD, model=model, lr=LR)
    assert opt.report().audit == (
        "The LoRA matrices of the adapter 'second' are not in this optimizer, so it does not"
        " train them.",
    )
