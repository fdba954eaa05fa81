"""--json: one document a command, of the shape that its help names."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from rankaware_optim import convert_lr
from rankaware_optim.cli import main
from rankaware_optim.cli._options import echo_result

from ..helpers.recipes import RECIPE

RATE = {"lr", "low", "high", "ceiling", "extrapolated", "notes", "configuration"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A recipe, an adapter with a head, and a sweep, where one stands."""
    monkeypatch.chdir(tmp_path)
    RECIPE.save("r.toml")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 16})
    )
    tensors = {
        "q.lora_A.weight": (8, 32),
        "q.lora_B.weight": (48, 8),
        "head.weight": (2, 2),
    }
    made = {
        f"base_model.model.{name}": np.zeros(shape, np.float32)
        for name, shape in tensors.items()
    }
    save_file(made, tmp_path / "adapter" / "adapter_model.safetensors")
    losses = [
        (r, 2.0**x, 1 + 0.1 * (x + 11) ** 2) for r in (8, 64) for x in range(-14, -8)
    ]
    rows = [f"{r},{r},64,{lr},{loss}" for r, lr, loss in losses]
    (tmp_path / "sweep.csv").write_text("\n".join(["rank,alpha,fan_in,lr,loss", *rows]))


def document(*arguments, code: int = 0):
    """What the command prints with --json."""
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


KEYS = [
    (["lr", "r.toml", "--rank", "8"], RATE),
    (["inspect", "adapter"], {"factors", "others", "checks", "notes"}),
]


@pytest.mark.filterwarnings("ignore::rankaware_optim.RankAwareWarning")
@pytest.mark.parametrize(
    ("arguments", "keys"),
    KEYS,
    ids=lambda value: " ".join(value) if type(value) is list else "",
)
def test_an_object_has_these_keys(arguments, keys):
    """The document is an object with exactly these keys, whatever is unknown being null."""
    assert document(*arguments).keys() == keys


def test_the_numbers_are_those_of_python():
    """lr, convert and suggest give what Recipe.at, convert_lr and suggest_lr return, to the last digit."""
    rate, found = RECIPE.at(8), document("lr", "r.toml", "--rank", 8)
    assert [found["lr"], found["low"], found["high"], found["ceiling"]] == [
        rate.lr,
        rate.low,
        rate.high,
        rate.ceiling,
    ]
    words = ("--from", "r=16,alpha=32", "--to", "r=16,alpha=16")
    made = convert_lr(2e-4, from_=words[1], to=words[3])
    assert document("convert", "2e-4", *words)["lr"] == made.lr


def test_convert_says_from_where_to_where():
    """It has the rate before, both places in words that --from and --to read, and no bound it does not know."""
    found = document("convert", "2e-4", "--from", "r=16,alpha=32", "--to", "r=64")
    assert found.keys() == RATE | {"from_lr", "from", "to"}
    assert [found[key] for key in ("from_lr", "from", "to")] == [
        2e-4,
        "r=16,alpha=32",
        "r=64,alpha=32",
    ]
    assert found["high"] is None


def test_inspect_names_every_tensor():
    """Factors and other parameters have their names; a factor its rate and the reason with --lr, else null."""
    plain, rated = (
        document("inspect", "adapter"),
        document("inspect", "adapter", "--lr", "1e-4"),
    )
    assert [f["role"] for f in plain["factors"]] == ["A", "B"]
    assert [other["name"] for other in plain["others"]] == [
        "base_model.model.head.weight"
    ]
    assert all(one["lr"] is one["reason"] is None for one in plain["factors"])
    assert [(one["lr"], bool(one["reason"])) for one in rated["factors"]] == [
        (1e-4, True)
    ] * 2


def test_convert_refuses_json_beside_as():
    """--as prints a configuration, so --json beside it is wrong usage."""
    words = [
        "convert",
        "1e-4",
        "--from",
        "r=8,alpha=8",
        "--to",
        "r=4",
        "--as",
        "trl",
        "--json",
    ]
    assert CliRunner().invoke(main, words).exit_code == 2


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_json_cannot_hold_is_null(value, capsys):
    """Numbers that are not finite are null, so that every parser reads the document."""
    echo_result(True, {"a": [value, 1.0]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.0]}
