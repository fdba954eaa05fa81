"""Tests of optimizer settings: their plain values, and settings in which groups or tables differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankaware_optim.recipe import (
    constructor_settings,
    plain_value,
    settings_of,
    without_conflicts,
)


class Thing:
    """An object that neither JSON nor TOML can hold."""


GROUPS = [{"lr": 1e-3, "betas": (0.9, 0.99)}, {"lr": 2e-3, "betas": (0.9, 0.99)}]


def test_a_setting_in_which_groups_differ_is_a_list():
    """A setting in which parameter groups differ becomes a list of its distinct values, in the order of the groups."""
    settings = settings_of([*GROUPS, GROUPS[0]], ["lr", "betas"])
    assert settings == {"lr": [1e-3, 2e-3], "betas": [0.9, 0.99]}
    assert settings_of(GROUPS[:1], ["lr"]) == {"lr": 1e-3}


PLAIN = [
    ("text", "text"),
    ((1, (2.5, None)), [1, [2.5, None]]),
    ({3: (1,)}, {"3": [1]}),
    (np.arange(2), [0, 1]),
    (torch.ones(2), [1.0, 1.0]),
    (torch.tensor(0.25), 0.25),
]


@pytest.mark.parametrize(("value", "plain"), PLAIN)
def test_a_plain_value_is_one_of_json(value, plain):
    """`plain_value` turns tuples into lists, keys into strings, and tensors and arrays into numbers or lists."""
    given = plain_value(value)
    assert given == plain
    assert type(given) is type(plain)


def test_an_object_is_named_without_its_address():
    """Two objects of a class have the same plain value, because the memory address is left out."""
    assert plain_value(Thing()) == plain_value(Thing())
    assert plain_value(Thing()).endswith(".Thing object>")


def test_settings_are_those_that_the_constructor_takes():
    """`constructor_settings` drops settings that the class cannot take, and turns lists into tuples."""
    held = {"betas": [0.9, 0.99], "weight_decay": 0.1, "eps": 1e-8, "amsgrad": False}
    others = {"weight_decay": [0.1, 0.2], "foreach": "<object>", "nesterov": True}
    assert constructor_settings({**held, "foreach": "<object>"}, torch.optim.AdamW) == {
        **held,
        "betas": (0.9, 0.99),
    }
    assert constructor_settings(others, torch.optim.AdamW) == {}


def test_tables_agree_on_what_no_two_say_differently():
    """`without_conflicts` merges tables and drops every key to which two tables give different values."""
    tables = [{"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1}]
    assert without_conflicts(tables) == {"a": 1, "c": 4}
    assert without_conflicts([]) == {}
