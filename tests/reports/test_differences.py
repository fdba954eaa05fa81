"""Two recipes compared: their rates, and every field."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from click.testing import CliRunner

from rankaware_optim import Power, Recipe, Reference
from rankaware_optim.cli import main
from rankaware_optim.reports import diff_recipes

from ..helpers.recipes import KINDS

RECIPE = replace(
    KINDS["full too"], settings={"a": 1}, other_rates={"head.weight": 1e-3}
)
OTHERS = {
    "reference": Reference(rank=8, alpha=8),
    "scaling_rule": "alpha",
    "law": Power(exponent=0.2),
    "missing": "x.trials.safetensors",
    "layers": {"q": 64.0},
    "source": {"train": "other"},
    "versions": {"torch": "9"},
}


def changed(name):
    """The recipe with another value of one field."""
    value = getattr(RECIPE, name)
    if name in OTHERS:
        other = OTHERS[name]
    elif isinstance(value, dict):
        other = {key: 2 * inner for key, inner in value.items()}
    elif isinstance(value, bool):
        other = not value
    elif isinstance(value, (str, tuple)):
        other = value + ("more" if isinstance(value, str) else (1,))
    else:
        other = 1 if value is None else 2 * value + 1
    return replace(RECIPE, **{name: other})


@pytest.mark.parametrize("name", [field.name for field in fields(Recipe)])
def test_every_field_is_compared(name):
    """A recipe that differs in one field differs in it alone, and equal ones do not, NaN being alike."""
    other = changed(name)
    assert diff_recipes(RECIPE, other).fields == (name,)
    assert name in str(diff_recipes(other, RECIPE))
    assert str(diff_recipes(other, replace(other))) == "The two recipes are equal."


def test_rates_are_compared_at_the_ranks_of_either_and_in_full():
    """A base rate 32 times as high is so everywhere, beside both rates, and it is said whether bands overlap."""
    other = replace(RECIPE, fitted_lr=32 * RECIPE.fitted_lr, ranks=(4, 16))
    found = diff_recipes(RECIPE, other)
    assert [*found.rates] == ["rank 4", "rank 16", "rank 64", "full finetuning"]
    first, second = found.rates["rank 64"]
    assert (first, second.lr) == (RECIPE.at(rank=64), pytest.approx(32 * first.lr))
    line = next(line for line in str(found).splitlines() if "rank 64" in line)
    assert line.split()[-4:] == [f"{first.lr:.3g}", f"{second.lr:.3g}", "32", "apart"]
    near = replace(RECIPE, fitted_lr=1.05 * RECIPE.fitted_lr)
    assert str(diff_recipes(RECIPE, near)).count("overlap") == 3


def test_rates_that_were_not_compared_are_not_called_equal():
    """Where the recipes have no configuration in common, a sentence says so."""
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
    assert str(diff_recipes(one, other)).startswith("They have no configuration in")


@pytest.mark.parametrize(("change", "code"), [({}, 0), ({"steps": 200}, 1)])
def test_the_command_ends_like_diff(change, code, tmp_path):
    """Exit code 0 only where the recipes hold the same."""
    first = RECIPE.save(tmp_path / "a.toml")
    second = replace(RECIPE, **change).save(tmp_path / "b.toml")
    done = CliRunner().invoke(main, ["diff", str(first), str(second)])
    assert (done.exit_code, "differ: steps." in done.output) == (code, bool(change))
