"""Calibration in place on PEFT's own layers: compared with models built again, what comes back, and what is refused."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import rankaware_optim as ra
from rankaware_optim import InspectionError

from ...helpers.fingerprint import changed, fingerprint
from ...helpers.real_adapters import mixture

peft = pytest.importorskip("peft")
from .test_peft import Net, wrapped  # noqa: E402

pytestmark = [
    pytest.mark.peft,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::rankaware_optim.RankAwareWarning"),
]

AdamW = torch.optim.AdamW
STEPS = 5


def step(model, i):
    source = torch.Generator().manual_seed(i)
    tokens = torch.randint(30, (4, 5), generator=source)
    return model(tokens, torch.randn(4, 3, 6, 6, generator=source)).square().mean()


def calibrate(model, *, step=step, ranks=(4, 8), trials=4, **options):
    return ra.calibrate_in_place(
        model, step, AdamW, ranks=ranks, steps=STEPS, trials=trials, **options
    )


@pytest.mark.parametrize("odd", [None, float("nan")])
def test_experts_are_calibrated(odd):
    """PEFT parametrizes experts in each forward pass: this is no write, and the model comes back as it was."""
    model = mixture(4, 4.0)
    if odd is not None:
        next(p for n, p in model.named_parameters() if n.endswith("gate_up_proj")).data[
            2, 0, 0
        ] = odd
    before = fingerprint(model)

    def forward(model, i):
        tokens = torch.randint(30, (2, 5), generator=torch.Generator().manual_seed(i))
        return model(input_ids=tokens, labels=tokens).loss.nan_to_num()

    nothing_trains = pytest.warns(ra.RankAwareWarning, match="nothing was trained")
    with nullcontext() if odd is None else nothing_trains:
        recipe = calibrate(model, step=forward)
    assert len(recipe.tensors["lr"]) == 4
    assert not changed(before, fingerprint(model))

    def writes(model, i):
        with torch.no_grad():
            next(
                p for n, p in model.named_parameters() if n.endswith("gate_up_proj")
            ).add_(1.0)
        return forward(model, i)

    with pytest.raises(
        ra.CalibrationError, match=r"wrote the frozen parameter .*experts.*gate_up_proj"
    ):
        calibrate(model, step=writes)


CASES = {
    "linear": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "bias": {"lora_bias": True},
    "pattern": {
        "targets": ("q", "v", "conv"),
        "rank_pattern": {"v": 8},
        "alpha_pattern": {"v": 4},
    },
    "embedding": {"targets": ("q", "emb")},
    "convolution": {"targets": ("conv", "grouped", "q")},
    "head": {"modules_to_save": ["head"]},
}


def at(rank, case, rule):
    """The case built by PEFT itself at `rank`, from rank 4 and alpha 8."""
    options = dict(CASES[case])
    root = 0.5 if options.get("use_rslora") else 1.0
    grown = rank / 4
    alpha = {"fixed": grown**root, "alpha": 1.0}[rule]
    if "rank_pattern" in options:
        options["rank_pattern"] = {
            key: int(r * grown) for key, r in options["rank_pattern"].items()
        }
        options["alpha_pattern"] = {
            key: a * alpha for key, a in options["alpha_pattern"].items()
        }
    return wrapped(r=rank, alpha=8 * alpha, **options)


@pytest.mark.parametrize("rule", ["fixed", "alpha"])
@pytest.mark.parametrize("case", CASES)
def test_in_place_is_as_built_anew(case, rule):
    """PEFT's model at another rank, made in place or built by PEFT, gives the same losses and the same recipe."""
    if (case, rule) == ("rslora", "alpha"):
        rule = "rslora"

    def train(trial):
        model = at(trial.rank, case, "alpha" if rule == "rslora" else rule)
        ra.initialize(model, "A", variance="peft", seed=trial.seed)
        opt = trial.optimizer(model)
        torch.manual_seed(trial.seed)
        for i in range(trial.steps):
            loss = step(model, i)
            loss.backward()
            opt.step()
            opt.zero_grad()
            yield loss

    def seeded_step(model, i):
        if i == 0:
            # building a model drew from the generator, making one again does not
            torch.manual_seed(5)
        return step(model, i)

    rebuilt = ra.calibrate(
        train, AdamW, ranks=(4, 8), steps=STEPS, trials=3, seeds=(5,)
    )
    model = at(4, case, "alpha")
    before = fingerprint(model)
    recipe = calibrate(model, step=seeded_step, trials=3, seeds=(5,), scaling_rule=rule)
    assert changed(before, fingerprint(model)) == []
    assert np.array_equal(
        rebuilt.tensors["curve"], recipe.tensors["curve"], equal_nan=True
    )
    assert (rebuilt.fitted_lr, rebuilt.scaling_rule) == (
        recipe.fitted_lr,
        recipe.scaling_rule,
    )


@pytest.mark.parametrize("case", CASES)
def test_full_finetuning_in_place(case):
    """Full finetuning starts from the base model's function and trains what was adapted, DoRA's weights too."""
    model, losses = at(4, case, "alpha"), []
    with model.disable_adapter():
        base = step(model, 0)
    trained = set()

    def watched(model, i):
        names = {
            name for name, param in model.named_parameters() if param.requires_grad
        }
        loss = step(model, i)
        if not any("lora_A" in name or "lora_embedding_A" in name for name in names):
            trained.update(names)
            losses.extend([loss.item()] * (i == 0))
        return loss

    before = fingerprint(model)
    recipe = calibrate(model, step=watched, ranks=(4, None), trials=4)
    assert changed(before, fingerprint(model)) == []
    assert recipe.full_seen
    assert losses == [base.item()] * recipe.tensors["rank"].tolist().count(0)
    assert not any("lora" in name for name in trained)
    assert sum("base_layer.weight" in name for name in trained) == len(
        CASES[case].get("targets", ("q", "v"))
    )
    assert any("modules_to_save" in name for name in trained) == (case == "head")


def test_the_configuration_says_what_the_model_is():
    """While a trial runs, PEFT's configuration is that of an adapter built at its rank: it could be saved."""
    model, seen = at(4, "pattern", "alpha"), set()

    def watched(model, i):
        config = model.peft_config["default"]
        seen.add(
            (
                config.r,
                config.lora_alpha,
                config.rank_pattern["v"],
                config.alpha_pattern["v"],
            )
        )
        rebuilt = peft.get_peft_model(Net(), copy.deepcopy(config))
        assert {n: p.shape for n, p in rebuilt.named_parameters()} == {
            n: p.shape for n, p in model.named_parameters()
        }
        own = {
            n: m.scaling for n, m in rebuilt.named_modules() if hasattr(m, "scaling")
        }
        assert own == {
            n: m.scaling for n, m in model.named_modules() if hasattr(m, "scaling")
        }
        return step(model, i)

    calibrate(model, step=watched)
    assert seen == {(4, 8, 8, 4), (8, 16, 16, 8)}


def test_another_adapter_stays_out_of_it():
    """Only the adapter that trains is made again; a frozen second one is not touched."""
    model = at(4, "linear", "alpha")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q"]))
    ranks = set()

    def watched(model, i):
        ranks.add(
            (model.base_model.model.q.r["default"], model.base_model.model.q.r["other"])
        )
        return step(model, i)

    before = fingerprint(model)
    calibrate(model, step=watched)
    assert ranks == {(4, 2), (8, 2)}
    assert changed(before, fingerprint(model)) == []


def adalora():
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q"]
    )
    return peft.get_peft_model(Net(), config)


def merged():
    model = at(4, "linear", "alpha")
    model.merge_adapter()
    return model


def loha():
    torch.manual_seed(0)
    return peft.get_peft_model(Net(), peft.LoHaConfig(r=4, target_modules=["q"]))


REFUSED = [
    (adalora, {}, "needs the init of its convention|cannot be made at another rank"),
    (merged, {}, "merged into its base weight"),
    (loha, {}, r"\(LoHa\) that cannot be made"),
    (
        lambda: wrapped(init_lora_weights="pissa"),
        {},
        "subtracted their product from the base weight",
    ),
    (
        lambda: wrapped(targets=("conv", "grouped")),
        {"ranks": (4, 6)},
        "cannot be made at rank 6",
    ),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_what_is_refused(make, options, message):
    """What cannot be made at another rank is a sentence, and the model is as it was."""
    model = make()
    before = fingerprint(model)
    with pytest.raises(InspectionError, match=message):
        calibrate(model, **options)
    assert changed(before, fingerprint(model)) == []
