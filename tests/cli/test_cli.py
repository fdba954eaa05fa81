"""Tests of the command `rankaware`: its output, and errors that are one line and an exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

from rankaware_optim import Power, RankAwareWarning, Reference, convert_lr
from rankaware_optim.cli import main
from rankaware_optim.laws import Falling

from ..helpers.adapters import peft_folder
from ..helpers.recipes import RECIPE

RECIPE = replace(
    RECIPE,
    reference=Reference(rank=16, alpha=32, fan_in=64, batch=16.0),
    law=Power(exponent=0.1, full_factor=1.5),
    steps=100,
    versions={"torch": "2.6"},
)
RATE = {"lr", "low", "high", "ceiling", "extrapolated", "notes", "configuration"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Return the current directory, which has a recipe, a PEFT adapter, an adapter from kohya, and broken files."""
    monkeypatch.chdir(tmp_path)
    RECIPE.save("digits.toml")
    layers = [f"base_model.model.{name}" for name in "qv"]
    score = ["base_model.model.score.weight"]
    adapter = tmp_path / "adapter"
    peft_folder(adapter, layers=layers, others=score, init_lora_weights=True)
    kohya = {
        "x.lora_down.weight": np.zeros((8, 32)),
        "x.lora_up.weight": np.zeros((48, 8)),
        "x.alpha": np.array(4.0),
    }
    save_file(kohya, "kohya.safetensors")
    (tmp_path / "broken.toml").write_text("schema = ")
    (tmp_path / "sweep.csv").write_text("rank,lr\n4,1e-3\n")
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="rankaware")


def test_the_module_is_the_command():
    """`python -m rankaware_optim --help` lists every command once, and --version names four packages."""
    done = in_a_process("--help")
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode()
    assert said.startswith("Usage: rankaware ")
    assert [said.count(f"\n  {name} ") for name in main.commands] == [1] * 9
    lines = call("--version").output.splitlines()
    packages = ["rankaware-optim", "torch", "peft", "optuna"]
    assert [line.split()[0] for line in lines] == packages
    assert re.fullmatch(r"rankaware-optim \d+\.\d+\.\d+", lines[0])


PRINTED = {  # a command, and patterns of its output
    "inspect adapter": [
        r"peft +linear +A +8 +2 +A +32 +48 +2",
        r"peft +linear +B +8 +2 +A +32 +48 +2",
        r" other +1 +not a LoRA matrix",
    ],
    "inspect kohya.safetensors": [
        r"lora_down/lora_up +linear +A +8 +0\.5 +unknown +32 +48 +1"
    ],
    "convert 2e-4 --from r=16,alpha=32 --to r=64": [r"for example fan_in=2048\."],
    "show digits.toml": [re.escape(line) for line in str(RECIPE).splitlines()],
}


@pytest.mark.parametrize("command", PRINTED)
def test_a_command_prints_what_was_asked_for(command):
    """The output of `inspect`, `convert` and `show` contains the expected LoRA matrices, notes and facts."""
    done = call(*command.split())
    assert done.exit_code == 0, done.output
    assert [p for p in PRINTED[command] if not re.search(p, done.output)] == []


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_note(folder):
    """A warning of the package is printed to standard error as a note, and the command succeeds."""
    (folder / "digits.trials.safetensors").write_bytes(b"damaged")
    done = call("show", "digits.toml")
    assert done.exit_code == 0
    assert done.stderr.startswith("note: ")
    assert "Warning" not in done.output


CONVERSIONS = [
    ("r=16,alpha=32,fan_in=512", "r=128,alpha=16,rslora", "mua"),
    ("r=16,alpha=32,fan_in=512", "r=128,alpha=16,rslora", "loraplus"),
    ("adapter", "r=64,alpha=16", "falling"),
]


@pytest.mark.parametrize(("origin", "to", "law"), CONVERSIONS)
def test_convert_gives_what_convert_lr_gives(origin, to, law):
    """`rankaware convert` gives the learning rate of `convert_lr`, and its JSON also has both configurations."""
    command = ["convert", "2e-4", "--from", origin, "--to", to, "--law", law]
    wanted = convert_lr(2e-4, from_=origin, to=to, law=law)
    assert call(*command).output == f"{wanted!s}\n"
    document = json.loads(call(*command, "--json").output)
    assert document.keys() == RATE | {"from_lr", "from", "to"}
    assert (document["lr"], document["from_lr"]) == (wanted.lr, 2e-4)
    again = convert_lr(2e-4, from_=document["from"], to=document["to"], law=law)
    assert again.lr == wanted.lr


ROUNDED = [("bfloat16", " 84 % "), ("float16", " 12 % "), ("float32", "")]


def test_convert_moves_by_the_law_of_the_optimizer():
    """With --optimizer SGD, `rankaware convert` gives the learning rate of the law that is bound to SGD."""
    command = ["convert", "1e-3", "--from", "r=8,alpha=8", "--to", "r=64"]
    law = Falling().bind(torch.optim.SGD, {})
    wanted = convert_lr(1e-3, from_="r=8,alpha=8", to="r=64", law=law)
    document = json.loads(call(*command, "--optimizer", "SGD", "--json").stdout)
    assert document["lr"] == wanted.lr
    assert document["lr"] != json.loads(call(*command, "--json").stdout)["lr"]


@pytest.mark.parametrize(("dtype", "share"), ROUNDED)
def test_convert_says_what_a_dtype_rounds_away(dtype, share):
    """With --dtype, the text and the JSON have one note if rounding to this dtype leaves weights unchanged."""
    command = ["convert", "1e-5", "--from", "full", "--to", "full"]
    lines = call(*command).output.splitlines()
    rounded = [*command, "--dtype", dtype]
    more = call(*rounded).output.splitlines()[len(lines) :]
    assert [share in line and dtype in line for line in more] == [True] * bool(share)
    notes = json.loads(call(*rounded, "--json").output)["notes"]
    assert [f"note: {note}" for note in notes if "standard deviation" in note] == more


def test_an_unknown_end_is_null_in_json():
    """In JSON, both ends of the interval of a converted learning rate are null, because it has no interval."""
    command = ["convert", "1e-3", "--from", "r=8,alpha=8", "--to", "r=64", "--json"]
    document = json.loads(call(*command).stdout)
    assert (document["low"], document["high"]) == (None, None)


RATES = {
    "--rank 4": {"rank": 4},
    "--rank 4 --alpha 64": {"rank": 4, "alpha": 64},
    "--rank 4 --alpha 64 --rslora": {"rank": 4, "alpha": 64, "rslora": True},
    "--rank 256": {"rank": 256},
    "--rank 16 --fan-in 128": {"rank": 16, "fan_in": 128},
    "--rank 16 --init B": {"rank": 16, "init": "B"},
    "--full": {"method": "full"},
    "--full --fan-in 128": {"method": "full", "fan_in": 128},
    "--rank 16 --steps 5000 --batch 256": {"rank": 16, "steps": 5000, "batch": 256},
}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize("options", RATES)
def test_lr_prints_the_recipes_rate(options):
    """`rankaware lr` gives the learning rate of `Recipe.at` as text and as JSON, and shows every note once."""
    command = ["lr", "digits.toml", *options.split()]
    done = call(*command)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankAwareWarning)
        rate = RECIPE.at(**RATES[options])
    assert (done.stdout, done.stderr) == (f"{rate!s}\n", "")
    assert all(done.stdout.count(note) == 1 for note in rate.notes)
    document = json.loads(call(*command, "--json").stdout)
    assert document.keys() == RATE
    for name in ("lr", "low", "high", "ceiling"):
        assert document[name] == getattr(rate, name)


def test_inspect_names_every_tensor_in_json():
    """The JSON of `rankaware inspect` has the LoRA matrices with their roles and the names of the other parameters."""
    plain = json.loads(call("inspect", "kohya.safetensors", "--json").output)
    assert plain.keys() >= {"factors", "other", "unsupported", "checks", "notes"}
    assert [one["role"] for one in plain["factors"]] == ["A", "B"]
    adapter = json.loads(call("inspect", "adapter", "--json").output)
    assert adapter["other"] == ["base_model.model.score.weight"]


OUT = {
    "calibrate loops:train --ranks 2,4 --steps 5": "made.toml",
    "fit sweep.csv": "made.toml",
    "report digits.toml": "made.html",
    "plot digits.toml": "made.png",
}


@pytest.mark.parametrize("command", OUT)
def test_a_file_that_exists_is_left(command, folder):
    """A command does not overwrite an existing file, and the error says to pass --force."""
    out = folder / OUT[command]
    out.write_text("Notes of many years.\n")
    done = call(*command.split(), "-o", out.name)
    assert done.exit_code == 1
    assert (
        done.stderr
        == f"Error: The file {out.name} already exists. Pass --force to overwrite it.\n"
    )
    assert out.read_text() == "Notes of many years.\n"


# --- errors ---------------------------------------------------------------------------------------------------------

AT_8, LR_OF = "r=8,alpha=8", "lr digits.toml --rank 8"
BAD = {
    "inspect nowhere": "nowhere",
    f"convert 1e-3 --from r=8 --to {AT_8}": "alpha",
    f"convert 1e-3 --from {AT_8} --to r=x": '"r=16,alpha=32,rslora,init=B,fan_in=4096',
    f"convert 1e-3 --from {AT_8} --to ,": "is empty",
    f"convert 0 --from {AT_8} --to {AT_8}": "lr is 0",
    f"convert 1e-3 --from {AT_8},init=pissa --to {AT_8}": "suggest --init pissa",
    "show nowhere.toml": "nowhere.toml cannot be read",
    "show adapter": "adapter cannot be read",
    "show broken.toml": "cannot be read",
    "lr digits.toml --rank 0": "A reference's rank is 0",
    f"{LR_OF} --alpha -1": "A reference's alpha is -1",
    f"{LR_OF} --steps -5": "Error: steps is -5",
    f"{LR_OF} --rslora": "without alpha",
    "lr digits.toml --full --rank 8": "has no rank",
    "plot nowhere.toml -o out.png": "nowhere.toml cannot be read",
    "fit sweep.csv -o out.toml": "loss",
}


@pytest.mark.parametrize("command", BAD)
def test_an_error_is_a_sentence(command, folder):
    """Bad input ends the command with code 1 and one line that begins with "Error", and nothing is written."""
    before = sorted(folder.rglob("*"))
    done = call(*command.split())
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert BAD[command] in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


WIDE = "config.json"
# options that cannot be combined, and the option that the error names
MISUSED = {
    "suggest adapter --rank 8": "Remove --rank",
    "suggest adapter --hidden-size 64": "--hidden-size",
    "suggest --rank 8 --alpha 8 --fan-in 64": "--fan-in",
    "suggest --full --hidden-size 64": "--hidden-size",
    f"suggest --full --fan-in 64 --model-config {WIDE}": "--model-config",
    f"suggest --rank 8 --alpha 8 --hidden-size 64 --model-config {WIDE}": "--model-config",
    f"convert 1e-3 --from {AT_8} --to {AT_8} --dtype bfloat16": "--dtype",
    f"convert 1e-3 --from {AT_8} --to {AT_8} --as peft --json": "--as",
    f"convert 1e-3 --from {AT_8} --to {AT_8} --as peft --optimizer sgd": "--as",
    "fit sweep.csv -o out.toml --where finished": "--where",
}


@pytest.mark.parametrize("command", MISUSED)
def test_options_that_do_not_go_together_are_an_error(command, folder):
    """Options that cannot be combined end the command with code 2 and an error that names the option to change."""
    (folder / WIDE).write_text('{"model_type": "llama", "hidden_size": 64}')
    before = sorted(folder.rglob("*"))
    done = call(*command.split())
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    *_, message = done.stderr.strip().splitlines()
    assert message.startswith("Error: ")
    assert MISUSED[command] in message
    assert sorted(folder.rglob("*")) == before


def in_a_process(*words, **environment) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "rankaware_optim", *words]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, **environment}
    )


def test_help_is_printed_where_the_console_lacks_letters():
    """Help is printed without an error to an output with the encoding cp1252, as on Windows."""
    done = in_a_process("lr", "--help", PYTHONIOENCODING="cp1252")
    assert (done.returncode, done.stderr) == (0, b"")
