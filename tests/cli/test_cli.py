"""The command `rankaware`: what it prints, and that errors are one sentence and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from rankaware_optim import Power, RankAwareWarning, Recipe, Reference
from rankaware_optim.cli._main import main
from rankaware_optim.transfer import convert_lr

COMMANDS = ("inspect", "convert", "show", "lr", "plot", "diff", "report")
AT_16 = Reference(rank=16, alpha=32, fan_in=64, batch=16.0)


@pytest.fixture
def recipe(tmp_path):
    """A saved recipe: its path and itself."""
    made = Recipe(
        name="digits",
        fitted_lr=2e-3,
        reference=AT_16,
        law=Power(exponent=0.1, full_factor=1.5),
        covariance=np.diag([0.04, 0.01, 0.09]),
        ceiling=3e-2,
        scaling_rule="fixed",
        full_fan_in=64.0,
        ranks=(4, 64),
        settings={"weight_decay": 0.01},
        steps=100,
        versions={"torch": "2.6"},
        tensors={
            "rank": np.array([4, 64]),
            "lr": np.array([1e-3, 2e-3]),
            "value": np.array([0.5, 0.4]),
        },
    )
    return made.save(tmp_path / "digits.toml"), made


@pytest.fixture
def folder(tmp_path):
    """A PEFT folder of two layers and a head."""
    names = ("base_model.model.q", "base_model.model.v")
    tensors = {f"{name}.lora_A.weight": torch.zeros(8, 32) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.zeros(48, 8) for name in names}
    made = tmp_path / "adapter"
    made.mkdir()
    save_file(
        {**tensors, "base_model.model.score.weight": torch.zeros(2, 2)},
        made / "adapter_model.safetensors",
    )
    (made / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 16, "init_lora_weights": True})
    )
    return made


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], prog_name="rankaware")


def number(output: str, name: str) -> float:
    """The number after `name` on its own line."""
    return float(re.search(rf"^{name}\s+(\S+)", output, re.MULTILINE)[1])


def test_the_module_is_the_command():
    """`python -m rankaware_optim --help` lists the commands."""
    done = subprocess.run(
        [sys.executable, "-m", "rankaware_optim", "--help"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: rankaware ")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_the_version_is_told():
    """--version names the versions that a report of an error needs."""
    lines = call("--version").output.splitlines()
    assert [line.split()[0] for line in lines] == [
        "rankaware-optim",
        "torch",
        "peft",
        "optuna",
    ]
    assert re.fullmatch(r"rankaware-optim \d+\.\d+\.\d+", lines[0])


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_reads_a_peft_folder(folder):
    """Like factors share a line: role, rank, scaling, init, fans and count; other tensors are named."""
    done = call("inspect", folder)
    assert done.exit_code == 0
    assert re.search(r"peft +linear +A +8 +2 +B = 0 +32 +48 +2", done.output)
    assert re.search(r"peft +linear +B +8 +2 +B = 0 +32 +48 +2", done.output)
    assert re.search(r" other +1 +no LoRA factor: the base rate", done.output)


def test_inspect_adds_rates_to_a_base_rate(folder):
    """--lr with --tuned-at adds the law's multipliers and rates; at its own configuration nothing changes."""
    own, other = (
        call("inspect", folder, "--lr", "2e-4", "--tuned-at", at)
        for at in ("r=8,alpha=16", "r=64,alpha=16")
    )
    assert own.exit_code == other.exit_code == 0
    assert own.output.count(" 0.0002 ") == 2
    assert other.output.count(" 0.0002 ") == 0
    assert own.output.count("default law: from rank 8, alpha 16, B = 0") == 2


def test_inspect_names_every_tensor_if_asked(folder):
    """--per-module gives each factor and other tensor its own line."""
    done = call("inspect", folder, "--per-module")
    names = [
        f"base_model.model.{name}.lora_{half}.weight" for name in "qv" for half in "AB"
    ]
    assert done.exit_code == 0
    assert all(
        done.output.count(name) == 1
        for name in [*names, "base_model.model.score.weight"]
    )


def test_inspect_takes_a_law_by_name(folder):
    """--law loraplus shows B's sixteenfold rate."""
    done = call("inspect", folder, "--lr", "1e-4", "--law", "loraplus")
    assert re.search(r"peft +linear +A .* 0\.0001 +loraplus", done.output)
    assert re.search(r"peft +linear +B .* 0\.0016 +loraplus", done.output)


def test_inspect_reads_a_kohya_file(tmp_path):
    """alpha in the file gives the scaling."""
    path = tmp_path / "lora.safetensors"
    pair = {
        "x.lora_down.weight": torch.zeros(8, 32),
        "x.lora_up.weight": torch.zeros(48, 8),
    }
    save_file({**pair, "x.alpha": torch.tensor(4.0)}, path)
    done = call("inspect", path)
    assert done.exit_code == 0
    assert re.search(
        r"lora_down/lora_up +linear +A +8 +0\.5 +unknown +32 +48 +1", done.output
    )
    assert " other " not in done.output


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_note(folder):
    """What the package warns of is printed to standard error as a note, and the command succeeds."""
    config = {"r": 8, "lora_alpha": 16, "init_lora_weights": "pissa"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = call("inspect", folder, "--lr", "1e-4")
    assert done.exit_code == 0
    assert done.stderr.startswith("note: ")
    assert "Warning" not in done.output


# --- convert --------------------------------------------------------------------------------------------------------


def test_convert_names_an_adapter_as_reference(folder):
    """--from and --to take an adapter's folder, at its own width."""
    done = call("convert", "2e-4", "--from", folder, "--to", "r=64,alpha=16")
    assert (
        done.output.rstrip("\n")
        == convert_lr(2e-4, from_=folder, to="r=64,alpha=16").explain()
    )


def test_convert_prints_what_convert_lr_gives():
    """--from, --to and --law are those of `convert_lr`."""
    words = {"from_": "r=16,alpha=32,fan_in=512", "to": "r=128,alpha=16,rslora"}
    for law in ("mua", "loraplus"):
        done = call(
            "convert",
            "2e-4",
            "--from",
            words["from_"],
            "--to",
            words["to"],
            "--law",
            law,
        )
        assert (done.exit_code, done.output.rstrip("\n")) == (
            0,
            convert_lr(2e-4, **words, law=law).explain(),
        )


def test_convert_says_how_an_option_gives_the_width():
    """Without a width the note says how the reference gives it, and giving it ends the note."""
    printed = call("convert", "2e-4", "--from", "r=16,alpha=32", "--to", "r=64").output
    assert "Add your model's to the reference, such as fan_in=2048." in printed
    assert (
        "No width"
        not in call(
            "convert", "2e-4", "--from", "r=16,alpha=32,fan_in=4096", "--to", "r=64"
        ).output
    )


# --- recipes --------------------------------------------------------------------------------------------------------


def test_show_prints_what_a_recipe_holds(recipe):
    """Base rate, band, ceiling, law, optimizer, horizon and what was seen."""
    done = call("show", recipe[0])
    assert done.exit_code == 0
    at_16 = "0.002 at rank 16, alpha 32, B = 0, mean fan-in 64"
    for text in (
        "digits",
        at_16,
        "0.03",
        "times rank^0.1, times 1.5",
        "AdamW",
        "100 steps",
        "ranks 4, 64; 2 trials",
        "torch 2.6",
    ):
        assert text in done.output


RATES = [
    (["--rank", 16], {"rank": 16}),
    (["--rank", 4], {"rank": 4}),
    (["--rank", 4, "--alpha", 64], {"rank": 4, "alpha": 64}),
    (
        ["--rank", 4, "--alpha", 64, "--rslora"],
        {"rank": 4, "alpha": 64, "rslora": True},
    ),
    (["--rank", 256], {"rank": 256}),
    (["--rank", 16, "--fan-in", 4096], {"rank": 16, "fan_in": 4096}),
    (["--rank", 16, "--init", "B"], {"rank": 16, "init": "B"}),
    (["--full"], {"method": "full"}),
    (["--full", "--fan-in", 4096], {"method": "full", "fan_in": 4096}),
    (
        ["--rank", 16, "--steps", 5000, "--batch", 256],
        {"rank": 16, "steps": 5000, "batch": 256},
    ),
]


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(("arguments", "target"), RATES)
def test_lr_prints_the_recipes_rate(arguments, target, recipe):
    """The rate, its band and ceiling are those of Recipe.at, to three digits; extrapolation and notes are said once."""
    path, made = recipe
    done = call("lr", path, *arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankAwareWarning)
        rate = made.at(**target)
    assert done.exit_code == 0
    assert number(done.stdout, "lr") == pytest.approx(rate.lr, rel=5e-3)
    assert f"at        {rate.configuration}" in done.stdout.splitlines()
    if rate.ceiling is None:
        assert "ceiling" not in done.stdout
    else:
        assert number(done.stdout, "ceiling") == pytest.approx(rate.ceiling, rel=5e-3)
    assert number(done.stdout, "90 % band") == pytest.approx(rate.low, rel=5e-3)
    assert ("extrapolated" in done.stdout) == rate.extrapolated
    assert [done.stdout.count(note) for note in rate.notes] == [1] * len(rate.notes)
    assert done.stderr == ""


@pytest.mark.parametrize("option", ["--from", "--to"])
def test_lr_names_the_command_that_moves_a_rate(option):
    """A rate that was tuned elsewhere has no recipe, and `lr` says which command moves it."""
    done = call("lr", "2e-4", option, "r=16,alpha=32")
    assert done.exit_code == 2
    assert (
        f"{option} moves a rate without a recipe: use rankaware convert" in done.stderr
    )
    assert option not in call("lr", "--help").output


def test_plot_writes_a_figure(recipe, tmp_path):
    """plot draws the recipe and prints where."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures" / "out.png"
    done = call("plot", recipe[0], "-o", out)
    assert (done.exit_code, done.output.strip()) == (0, str(out))
    assert out.read_bytes().startswith(b"\x89PNG")


# --- errors ---------------------------------------------------------------------------------------------------------

BAD = [
    (["inspect", "nowhere"], "nowhere"),
    (["inspect", "digits.toml"], "digits.toml"),
    (["inspect", "adapter", "--lr", "0"], "lr is 0"),
    (["inspect", "adapter", "--lr", "nan"], "lr is nan"),
    (["inspect", "adapter", "--lr", "1e-3", "--law", "unheard-of"], "Known are"),
    (["inspect", "adapter", "--lr", "1e-3", "--tuned-at", "r=8"], "alpha"),
    (
        ["inspect", "adapter", "--lr", "1e-3", "--tuned-at", "r=x"],
        'as "r=16,alpha=32,rslora,init=B,fan_in=4096',
    ),
    (["inspect", "pickled.bin"], "pickled.bin is a pickle"),
    (["convert", "1e-3", "--from", "r=8", "--to", "r=8,alpha=8"], "alpha"),
    (["convert", "1e-3", "--from", "r=8,alpha=8", "--to", "r=x"], "r=x"),
    (["convert", "1e-3", "--from", "r=8,alpha=8", "--to", "full"], "fan_in"),
    (["convert", "nan", "--from", "r=8,alpha=8", "--to", "r=8,alpha=8"], "lr is nan"),
    (
        ["convert", "1e-3", "--from", "full", "--to", "full", "--law", "unheard-of"],
        "Known are",
    ),
    (["show", "nowhere.toml"], "no recipe at nowhere.toml"),
    (["show", "adapter"], "no recipe at adapter/rankaware/recipe.toml"),
    (["show", "broken.toml"], "cannot be read"),
    (["lr", "nowhere.toml", "--rank", "8"], "no recipe at nowhere.toml"),
    (["lr", "digits.toml", "--rank", "0"], "--rank=0"),
    (["lr", "digits.toml", "--rank", "8", "--alpha", "-1"], "--alpha=-1"),
    (["lr", "digits.toml", "--rank", "8", "--fan-in", "0"], "--fan-in=0"),
    (["lr", "digits.toml", "--rank", "8", "--steps", "-5"], "Error: --steps is -5"),
    (["lr", "digits.toml", "--rank", "8", "--batch", "nan"], "Error: --batch is nan"),
    (["plot", "nowhere.toml", "-o", "out.png"], "no recipe at nowhere.toml"),
    (["show", f"{'x' * 300}.toml"], "cannot be read"),
    (
        ["fit", "sweep.csv", "-o", "out.toml"],
        "choose one by columns={'loss': ...} (--column loss=...)",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    BAD,
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_an_error_is_a_sentence(
    arguments, message, recipe, folder, tmp_path, monkeypatch
):
    """Bad input ends with code 1 and one line that begins with Error, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("schema = ")
    (tmp_path / "sweep.csv").write_text("rank,lr\n4,1e-3\n")
    before = sorted(tmp_path.rglob("*"))
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


USAGE = [
    ["lr", "digits.toml"],
    ["lr", "digits.toml", "--full", "--rank", "8"],
    ["lr", "digits.toml", "--rank", "x"],
    ["lr", "digits.toml", "--rank", "8", "--init", "C"],
    ["lr", "digits.toml", "--full", "--alpha", "8"],
    ["lr", "digits.toml", "--full", "--init", "B"],
    ["lr", "digits.toml", "--full", "--rslora"],
    ["lr", "digits.toml", "--rank", "8", "--rslora"],
    ["convert", "1e-3", "--to", "r=8,alpha=8"],
    ["convert", "x", "--from", "r=8,alpha=8", "--to", "r=8,alpha=8"],
    ["convert", "-1", "--from", "r=8,alpha=8", "--to", "r=8,alpha=8"],
    ["convert", "--from", "r=8,alpha=8", "--to", "r=16"],
    ["plot", "digits.toml"],
    ["suggest", "--full", "--init", "B"],
    ["inspect", "adapter", "--tuned-at", "r=8,alpha=8"],
    ["inspect", "adapter", "--law", "mua"],
    ["unheard-of"],
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_wrong_usage_shows_the_usage(arguments, recipe, monkeypatch, tmp_path):
    """Options that contradict one another or are missing end with code 2 and the usage."""
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr


def test_help_is_printed_where_the_console_lacks_a_letter():
    """On a console of another encoding, such as Windows', help is printed with a mark for the letters that it lacks."""
    command = [sys.executable, "-m", "rankaware_optim", "lr", "--help"]
    done = subprocess.run(
        command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?rank" in done.stdout


def test_no_traceback_reaches_the_shell(tmp_path):
    """In a real process too, an error is one line and exit code 1."""
    command = [
        sys.executable,
        "-m",
        "rankaware_optim",
        "show",
        str(tmp_path / "nowhere.toml"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: There is no recipe")
    assert len(done.stderr.strip().splitlines()) == 1
