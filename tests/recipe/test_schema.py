"""The schema's page: every field that `save` writes has a row there, and every row is a field."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import tomli
import torch
from safetensors.numpy import load_file

import rankaware_optim as ra
from rankaware_optim._checks import RANGES
from rankaware_optim.optimizer import effective_lr

from ..helpers.models import mlp
from ..helpers.recipes import tensors_of

PAGE = Path(__file__).parents[2] / "recipes" / "SCHEMA.md"
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]*)\| ([^|]+) \| (\d+) \|$", re.M)
TYPES = {
    "text": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "number or unknown": lambda v: v == "unknown" or isinstance(v, (int, float)),
    "whole number": lambda v: type(v) is int,
    "whole number or unknown": lambda v: v == "unknown" or type(v) is int,
    "true or false": lambda v: isinstance(v, bool),
    "list": lambda v: isinstance(v, list),
    "3 lists of 3 numbers": lambda v: [len(row) for row in v] == [3] * 3,
    "any": lambda v: True,
}


def calibrated() -> ra.Recipe:
    """A recipe of two real trials."""

    def train(trial):
        model = mlp((trial.rank, trial.rank), seed=trial.seed)
        groups = trial.optimizer(model, weight_decay=0.01).param_groups
        for _ in range(trial.steps):
            yield effective_lr(groups[0]) + trial.seed

    return ra.calibrate(
        train, torch.optim.AdamW, ranks=(2, 4), steps=3, trials=2, batch=8, warmup=0.1
    )


def swept() -> ra.Recipe:
    """A recipe of a sweep."""
    rows = [
        {"rank": r, "lr": 2.0**-x, "loss": (x - 8) ** 2 / 20 + 1}
        for r in (4, 64)
        for x in (6, 7, 8, 9, 10)
    ]
    return ra.sweeps.fit_sweep(rows, alpha=16, fan_in=64)


def filled(record):
    """The record with a number wherever it holds None, so that every field is written."""
    return replace(
        record, **{f.name: 1 for f in fields(record) if getattr(record, f.name) is None}
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """Every field of both files by dotted path: of a calibration, a sweep, and each with nothing left out."""
    found = {}
    for number, made in enumerate((calibrated(), swept())):
        for kind, recipe in enumerate(
            (made, replace(filled(made), reference=filled(made.reference)))
        ):
            path = recipe.save(
                tmp_path_factory.mktemp("schema") / f"{number}{kind}.toml"
            )
            found |= dict(flat(tomli.loads(path.read_text()))) | load_file(
                tensors_of(path)
            )
    return found


def flat(table, path=""):
    for key, value in table.items():
        yield from (
            flat(value, f"{path}{key}.")
            if isinstance(value, dict)
            else [(f"{path}{key}", value)]
        )


def row_of(path: str, rows) -> str | None:
    """The row that `path` belongs to: its own, or one that ends in a star."""
    stars = [row for row in rows if row.endswith("*") and path.startswith(row[:-1])]
    return path if path in rows else next(iter(stars), None)


def rows() -> dict[str, str]:
    return {
        name: kind.strip()
        for name, kind, *_ in ROW.findall(PAGE.read_text(encoding="utf-8"))
    }


def test_every_field_has_a_row_and_every_row_is_a_field(written):
    """What the page lists is what `save` writes, in both files."""
    page = rows()
    assert [path for path in written if row_of(path, page) is None] == []
    assert [
        row for row in page if row not in {row_of(path, page) for path in written}
    ] == []


def test_the_page_lists_the_ranges_that_are_checked():
    """Its first table is the one of `_checks`."""
    listed = re.findall(
        r"^\| (\w+) \| (\S+) \| (\S+) \|.*\|$", PAGE.read_text(encoding="utf-8"), re.M
    )
    ranges = [(name, f"{low:g}", f"{high:g}") for name, (low, high) in RANGES.items()]
    assert [row for row in listed if row[0] in RANGES] == ranges


def test_every_row_is_whole():
    """No line of the two tables escapes the pattern, and no field is listed twice."""
    lines = [
        line
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    assert len(lines) == len(rows())


def test_every_value_is_of_its_rows_type(written):
    """TOML values are of the type that the page says, and tensors of its dtype and number of axes."""
    page = rows()
    for path, value in written.items():
        kind = page[row_of(path, page)]
        if isinstance(value, np.ndarray):
            dtype, axes = kind.split(" ", 1)
            assert (value.dtype.name, value.ndim) == (dtype, axes.count(",") + 1), path
        else:
            assert TYPES[kind](value), (path, kind, value)
