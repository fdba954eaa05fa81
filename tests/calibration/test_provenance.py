"""Tests of a recipe's record of its origin: code, package versions, settings, and parameters that trained beside LoRA."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import nn

import rankaware_optim as ra
from rankaware_optim.calibration import _calibration, versions_used

from ..helpers.calibrations import Net, calibrate, made_up, sloping
from ..helpers.models import PlainLoRA

LOOP = """
import torch.nn.functional

def train(trial):
    trial.optimizer(Net(trial.rank))
    yield from (2.0 - (0.05 + 0.1 * trial.lr) * step for step in range(trial.steps))
"""


def loop_in(folder: Path):
    """Return the function `train` of a new file in `folder`."""
    file = folder / "finetune.py"
    file.write_text(LOOP)
    spec = spec_from_file_location(f"finetune_{abs(hash(folder))}", file)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Net = Net
    return module.train


def test_a_recipe_names_the_code_that_made_it(tmp_path):
    """The recipe and its file record the name of the training function, and nothing else of its code."""
    train = loop_in(tmp_path)
    recipe = calibrate(train, trials=2)
    loaded = ra.Recipe.load(recipe.save(tmp_path / "r.toml"))
    assert loaded.source == recipe.source == {"train": "train"}


@pytest.mark.parametrize("now", ["", "'" * 9, "  a\n b\n" * 9])
def test_a_loop_whose_file_was_edited_since_is_no_error(now, tmp_path):
    """A training function can be calibrated even if its file has changed since it was imported."""
    train = loop_in(tmp_path)
    (tmp_path / "finetune.py").write_text(now)
    assert calibrate(train, trials=2).source["train"] == "train"


def test_versions_are_of_what_is_loaded(monkeypatch):
    """A recipe records the versions of Python, this package, torch, Optuna, and the training libraries that are loaded."""
    least = ["python", "rankaware-optim", "torch", "optuna"]
    for name in ("peft", "transformers", "trl", "accelerate", "lightning", "diffusers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert list(versions_used()) == least
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(_calibration, "version", lambda name: f"version of {name}")
    assert versions_used()["peft"] == "version of peft"


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_are_recorded_with_their_defaults(tmp_path):
    """The recipe has every setting, including defaults, except settings that only select an implementation."""
    recipe = calibrate(made_up(weight_decay=0.25, foreach=False), trials=2)
    loaded = ra.Recipe.load(recipe.save(tmp_path / "r.toml"))
    expected = {
        "weight_decay": 0.25,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    assert loaded.settings == recipe.settings == expected


def beside(**settings):
    """Return a loop that trains layer norms and a head beside the LoRA matrices."""

    def train(trial):
        model = Net(trial.rank)
        model.norms, model.head = (
            nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)]),
            nn.Linear(4, 2),
        )
        params = settings.get("groups", lambda model: model)(model)
        own = {name: value for name, value in settings.items() if name != "groups"}
        yield from sloping(trial, params, model=model, **own)

    return train


def by_kind(**options):
    """Return a function that makes two groups: the LoRA matrices with weight decay 0.1, and the rest with `options`."""

    def groups(model):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        pairs = [p for name, p in named if "lora" in name]
        rest = [p for name, p in named if "lora" not in name]
        return [{"params": pairs, "weight_decay": 0.1}, {"params": rest, **options}]

    return groups


def test_settings_are_those_of_the_factors():
    """If groups differ in a setting, the recipe has the setting of the LoRA matrices' groups."""
    recipe = calibrate(beside(groups=by_kind(weight_decay=0.0)), trials=3)
    assert recipe.settings["weight_decay"] == 0.1


def test_settings_that_follow_the_rank_are_no_recipes():
    """A setting that differs between ranks is not in the recipe, but the other settings are."""

    def loop(trial):
        yield from sloping(trial, weight_decay=0.1 / trial.rank)

    settings = calibrate(loop, trials=4).settings
    assert "weight_decay" not in settings
    assert settings["betas"] == (0.9, 0.999)


# --- what trains beside the adapters --------------------------------------------------------------------------------

NORMS = {"norms.*.weight": "base", "norms.*.bias": "base"}
HEAD = {"head.weight": "base", "head.bias": "base"}
OTHERS = [
    ({}, {**NORMS, **HEAD}),
    ({"rates": {"head.*": 3e-3}}, {**NORMS, "head.weight": 3e-3, "head.bias": 3e-3}),
    (
        {"other_lr": 1e-4, "rates": {"head.*": 3e-3}},
        {**dict.fromkeys(NORMS, 1e-4), **dict.fromkeys(HEAD, 3e-3)},
    ),
    ({"groups": by_kind(lr=1e-3)}, dict.fromkeys({**NORMS, **HEAD}, 1e-3)),
    ({"rates": {"norms.0.*": 3e-3}}, HEAD),
]


@pytest.mark.parametrize(("settings", "expected"), OTHERS)
def test_a_recipe_knows_what_trained_beside_the_pairs(settings, expected, tmp_path):
    """The recipe records parameters beside LoRA by name pattern, with "base" or their own learning rate."""
    recipe = calibrate(beside(**settings), trials=3)
    assert (
        ra.Recipe.load(recipe.save(tmp_path / "r.toml")).other_rates
        == recipe.other_rates
        == expected
    )


@pytest.mark.parametrize("how", ["other_lr", "group"])
def test_a_rate_that_is_a_trials_base_rate_by_chance_is_still_its_own(how):
    """A learning rate that was passed for other parameters is recorded as a number, even if it equals a base rate."""
    rate = calibrate(beside(), trials=3).tensors["lr"][1].item()
    given = {"other_lr": {"other_lr": rate}, "group": {"groups": by_kind(lr=rate)}}
    recipe = calibrate(beside(**given[how]), trials=3)
    assert rate in recipe.tensors["lr"]
    assert recipe.other_rates == pytest.approx(dict.fromkeys({**NORMS, **HEAD}, rate))


def test_a_calibrated_head_trains_on_as_it_did():
    """A head that the trials trained gets the base learning rate at another rank, but an unknown layer raises an error."""
    recipe = calibrate(beside(), trials=4, ranks=(4, 64))
    model = Net(64)
    model.head = nn.Linear(4, 2)
    opt = ra.RankAwareOptimizer(model, torch.optim.AdamW, recipe=recipe)
    others = {part.lr for part in opt.rates.groups if part.role == "other"}
    assert others == {recipe.lr}
    model.fresh = nn.Linear(2, 2)
    with pytest.raises(
        ra.RecipeError, match=r"no learning rate for the parameter fresh\.weight"
    ):
        ra.RankAwareOptimizer(model, torch.optim.AdamW, recipe=recipe)


def test_full_finetuning_says_nothing_of_what_trains_beside_pairs():
    """Biases that train only in full trials are not recorded as parameters beside LoRA."""

    def train(trial):
        layer = nn.Linear(8, 8)
        is_full = trial.rank is None
        model = layer if is_full else PlainLoRA(layer, trial.rank, 1.0)
        yield from sloping(trial, model)

    assert calibrate(train, ranks=(2, None), trials=4).other_rates == {}


def test_a_trial_with_another_head_rate_is_refused(tmp_path):
    """Continuing a study with another learning rate for the head raises an error, even if it was set in a group."""
    journal = tmp_path / "study.journal"
    calibrate(beside(groups=by_kind(lr=1e-3)), trials=2, storage=journal)
    with pytest.raises(ra.CalibrationError, match=r"other rates=.*0\.001.*not.*0\.002"):
        calibrate(beside(groups=by_kind(lr=2e-3)), trials=3, storage=journal)
