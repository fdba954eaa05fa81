"""Two recipes compared: every field, and the rates in words and numbers."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from click.testing import CliRunner

from rankaware_optim import Power, Recipe, Reference
from rankaware_optim.cli._main import main
from rankaware_optim.reports import diff_recipes, diff_text

RECIPE = Recipe(
    name="digits",
    fitted_lr=2e-3,
    reference=Reference(rank=16, alpha=32, fan_in=64, batch=8),
    law=Power(exponent=0.1, full_factor=1.5),
    covariance=np.diag([0.04, 0.01, 0.09]),
    lean=0.25,
    ceiling=3e-2,
    scaling_rule="fixed",
    full_fan_in=64.0,
    ranks=(4, 64),
    settings={"weight_decay": 0.01},
    steps=100,
    warmup=0.05,
    other_rates={"head.weight": 1e-3},
    layers={"q": 64.0},
    versions={"torch": "2.6"},
    source={"train": "train"},
    notes=("one",),
    tensors={
        "rank": np.array([4, 64]),
        "lr": np.array([1e-3, 2e-3]),
        "value": np.array([0.5, math.nan]),
    },
)
OTHERS = {
    "scaling_rule": "alpha",
    "method": "full",
    "init": "B",
    "law": Power(exponent=0.2),
}


def other(name, value):
    """Another value of a field, whatever it holds."""
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, dict):
        return {key: other(key, inner) for key, inner in value.items()}
    if isinstance(value, (bool, type(None))):
        return 1 if value is None else not value
    return value + value if isinstance(value, (str, tuple)) else 2 * value + 1


def changes():
    """A change of every field of a recipe, and of its reference."""
    for f in fields(Recipe):
        if f.name not in ("reference", "missing"):
            yield f.name, {f.name: other(f.name, getattr(RECIPE, f.name))}
    for f in fields(Reference):
        value = other(f.name, getattr(RECIPE.reference, f.name))
        yield (
            f"reference.{f.name}",
            {"reference": replace(RECIPE.reference, **{f.name: value})},
        )


CHANGES = dict(changes())


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_is_compared(name):
    """A recipe that differs in one field differs, and equal ones do not."""
    changed = replace(RECIPE, **CHANGES[name])
    assert diff_recipes(RECIPE, changed)
    assert diff_recipes(changed, RECIPE)
    assert not diff_recipes(changed, replace(changed))


def words(**change) -> dict:
    return {d.what: d for d in diff_recipes(RECIPE, replace(RECIPE, **change))}


def test_rates_are_compared_at_the_ranks_seen_and_in_full():
    """A base rate 32 times as high is so everywhere, said as a factor, beside both rates."""
    found = words(fitted_lr=32 * RECIPE.fitted_lr)
    for place, rate in {
        "rank 4": RECIPE.at(4),
        "rank 64": RECIPE.at(64),
        "rank 16": RECIPE.at(),
    }.items():
        assert found[f"at {place}"].words == "× 32, bands apart"
        assert found[f"at {place}"].first.startswith(
            f"{rate.lr:.3g} ({rate.low:.3g} to "
        )
    assert "at full finetuning" in found
    assert found["fit.fitted_lr"].words == "× 32"
    assert "versions.torch" not in found


def test_rates_that_only_one_recipe_has_are_left_out():
    """Where no rule gives alpha there is no common rate, which is not an error."""
    found = words(scaling_rule="unknown", fitted_lr=4e-3)
    assert {what for what in found if what.startswith("at ")} == {
        "at rank 16",
        "at full finetuning",
    }


def test_rates_that_were_not_compared_are_not_called_equal():
    """Where the recipes have no configuration in common, the sentence says so."""
    one, other = (
        replace(
            RECIPE,
            scaling_rule="unknown",
            reference=Reference(rank, 8),
            ranks=(rank,),
            full_fan_in=None,
        )
        for rank in (4, 8)
    )
    assert "no configuration in common" in diff_text(diff_recipes(one, other))


SENTENCES = [
    ({}, "The two recipes are equal."),
    (
        {"versions": {"torch": "2.7"}},
        "The rates are the same. The fields below differ.",
    ),
    (
        {"fitted_lr": 2.1e-3},
        "The rates differ. Their 90 % bands overlap at every common rank.",
    ),
    (
        {"law": Power(2.5, full_factor=1.5)},
        "The rates differ by more than their 90 % bands at rank 4, rank 64.",
    ),
]


@pytest.mark.parametrize(
    ("change", "sentence"), SENTENCES, ids=[sentence for _, sentence in SENTENCES]
)
def test_a_sentence_says_whether_it_matters(change, sentence):
    """The first line says whether rates differ, and whether by more than their bands."""
    assert (
        diff_text(diff_recipes(RECIPE, replace(RECIPE, **change))).splitlines()[0]
        == sentence
    )


def test_trials_are_counted():
    """Of tensors it is said how many values differ, NaN being alike; of other shapes, the shapes."""
    found = words(
        tensors={
            **RECIPE.tensors,
            "lr": np.array([1e-3, 5e-3]),
            "rank": np.array([4, 8, 64]),
        }
    )
    assert found["trials.lr"].words == "1 of 2 values differ"
    assert (
        found["trials.rank"].first,
        found["trials.rank"].second,
        found["trials.rank"].words,
    ) == (
        "2",
        "3",
        "",
    )
    assert "trial.value" not in found


@pytest.mark.parametrize(("change", "code"), [({}, 0), ({"steps": 200}, 1)])
def test_the_command_ends_like_diff(change, code, tmp_path):
    """Exit code 0 where the recipes hold the same, 1 where they differ, 2 where one cannot be read."""
    first, second = (
        RECIPE.save(tmp_path / "a.toml"),
        replace(RECIPE, **change).save(tmp_path / "b.toml"),
    )
    done = CliRunner().invoke(main, ["diff", str(first), str(second)])
    assert (done.exit_code, "horizon.steps" in done.output) == (code, bool(change))
    done = CliRunner().invoke(main, ["diff", str(first), str(tmp_path / "c.toml")])
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: There is no recipe at")
