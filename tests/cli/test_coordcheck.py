"""The command `rankaware coordcheck`: its table, its verdict as an exit code, its figure, and what it refuses."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from rankaware_optim.cli._adapters import coordcheck
from rankaware_optim.cli._main import main
from rankaware_optim.transfer import coordinate_check

SMALL = ("--shape", "128x128", "--tokens", "128")


def call(*arguments):
    """The command under the group's rules for errors."""
    group = type(main)("rankaware", commands=[coordcheck])
    return CliRunner().invoke(group, ["coordcheck", *(str(a) for a in arguments)])


def ranks_and(column: str, output: str) -> dict[str, str]:
    """A column of the printed table by rank, of a check of one layer."""
    lines = [
        line.split()
        for line in output.splitlines()
        if re.match(r"\s+(layer|\S+x\S+)\s", line)
    ]
    heads = lines[0]
    return {
        cells[heads.index("rank")]: cells[heads.index(column)] for cells in lines[1:]
    }


RIGHT = [
    (),
    ("--ranks", "2,8,32"),
    ("--init", "B"),
    ("--optimizer", "torch.optim:RMSprop", "--steps", 2),
    ("--alpha", 16),
    ("--alpha", 16, "--rslora"),
    ("--lr", 0.02),
]


@pytest.mark.parametrize("options", RIGHT)
def test_a_right_law_passes(options):
    """The law at the check's own tokens is called rank-invariant, below a row for every rank, with exit code 0."""
    result = call(*SMALL, *options, "--strict")
    assert result.exit_code == 0, result.output
    assert "Feature updates are rank-invariant" in result.output
    ranks = options[1] if "--ranks" in options else "4,16,64"
    assert list(ranks_and("change", result.output)) == ranks.split(",")


WRONG = [
    ("--law", "constant"),
    ("--law", "mua-paper", "--tokens", 2048),
    ("--law", "constant", "--alpha", 16),
    ("--law", "constant", "--alpha", 16, "--init", "B"),
    ("--optimizer", "SGD", "--law", "constant", "--alpha", 16),
]


@pytest.mark.parametrize("options", WRONG)
def test_a_wrong_law_is_flagged(options):
    """A law that is wrong by a power of the rank is said to be, and is exit code 1 only where asked for."""
    plain, strict = call(*SMALL, *options), call(*SMALL, *options, "--strict")
    assert "Feature updates are NOT rank-invariant" in plain.output
    assert (plain.exit_code, strict.exit_code) == (0, 1)
    assert plain.output == strict.output


SCALINGS = [
    ((), (1, 1)),
    (("--alpha", "rank"), (1, 1)),
    (("--alpha", 16), (4, 1)),
    (("--alpha", 16, "--rslora"), (8, 4)),
]


@pytest.mark.parametrize(("options", "scalings"), SCALINGS)
def test_alpha_says_how_the_multiplier_follows_the_rank(options, scalings):
    """Left out, alpha follows the rank and s is 1; a number is divided by the rank, or by its root."""
    result = call(*SMALL, "--ranks", "4,16", *options)
    assert ranks_and("scaling", result.output) == {
        "4": f"{scalings[0]}",
        "16": f"{scalings[1]}",
    }


def test_it_prints_what_the_function_sees():
    """The printed report is that of `coordinate_check` with the same arguments; a shape is (n_out, n_in)."""
    result = call(
        "--shape",
        "64x32",
        "--shape",
        "32×32",
        "--tokens",
        64,
        "--ranks",
        "2, 8",
        "--lr",
        0.01,
    )
    shapes = {"64x32": (64, 32), "32x32": (32, 32)}
    assert (
        result.output
        == f"{coordinate_check(shapes, 'AdamW', tokens=64, ranks=(2, 8), lr=0.01)}\n"
    )


def test_one_layer_is_checked_by_default():
    """Without arguments it is a layer of 1024 × 1024."""
    result = call()
    assert result.exit_code == 0
    assert set(ranks_and("fan_in", result.output).values()) == {"1024"}


@pytest.fixture
def adapter(tmp_path):
    """An adapter file of three layers, two of them of one shape."""
    fans = {"q": (32, 32), "o": (32, 32), "up": (48, 32)}
    tensors = {
        f"{name}.lora_A.weight": torch.ones(4, n_in) for name, (_, n_in) in fans.items()
    }
    tensors |= {
        f"{name}.lora_B.weight": torch.zeros(n_out, 4)
        for name, (n_out, _) in fans.items()
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


def test_an_adapter_says_the_shapes(adapter):
    """An adapter's layers are checked in place of given shapes, equal ones once, at the ranks asked for."""
    result = call(adapter, "--tokens", 64, "--ranks", "2,8")
    assert result.exit_code == 0, result.output
    rows = [
        line.split()[:4]
        for line in result.output.splitlines()
        if re.match(r"\s+(q|o|up)\s", line)
    ]
    assert [row[1:] for row in rows] == [
        [*fans, rank] for fans in (("32", "32"), ("32", "48")) for rank in "28"
    ]


def test_an_adapter_without_layers_is_refused(tmp_path):
    """A file without a LoRA pair has nothing to check, and is named."""
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    result = call(tmp_path / "head.safetensors")
    assert result.exit_code == 1
    assert re.search(r"Error: .*head\.safetensors", result.output.replace("\n", " "))


def test_a_figure_is_drawn(tmp_path):
    """-o writes the figure, and says where."""
    pytest.importorskip("matplotlib")
    result = call(*SMALL, "--law", "constant", "--strict", "-o", tmp_path / "check.png")
    assert result.exit_code == 1
    assert result.output.endswith(f"Figure: {tmp_path / 'check.png'}\n")
    assert (tmp_path / "check.png").stat().st_size > 10_000


def test_a_missing_matplotlib_is_said(tmp_path, monkeypatch):
    """Without matplotlib the table is printed all the same, and the cure is an installation."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = call(*SMALL, "-o", tmp_path / "check.png")
    assert result.exit_code == 1
    assert "are rank-invariant" in result.output
    assert 'pip install ".[plots]"' in result.output


def test_a_law_of_the_folder_is_found(tmp_path, monkeypatch):
    """A law is importable from the folder one stands in."""
    monkeypatch.chdir(tmp_path)
    source = "from rankaware_optim import Power, MuA\nTilted = Power(exponent=-1.0, law=MuA(tokens=128))\n"
    (tmp_path / "my_tilted_law.py").write_text(source)
    assert (
        "are NOT rank-invariant" in call(*SMALL, "--law", "my_tilted_law:Tilted").output
    )


BAD = [
    (("--shape", "4096"), 2, "'4096' is not a shape: write N_OUTxN_IN"),
    (("--shape", "0x8"), 2, "'0x8' is not a shape"),
    (("--shape", "8x8x8"), 2, "'8x8x8' is not a shape"),
    (("--shape", "-8x8"), 2, "'-8x8' is not a shape"),
    (
        ("--shape", "300000x300000"),
        1,
        "The layer 300000x300000 with 512 tokens at rank 64 needs 1.29 GiB",
    ),
    (("--tokens", 10**9), 1, "with 1000000000 tokens"),
    (("--tokens", 0), 1, "--tokens=0.*positive whole number"),
    (("--steps", 0), 1, "--steps=0"),
    (("--ranks", "4,x"), 2, "'x' is not a valid integer"),
    (("--ranks", ""), 2, "'' is not a valid integer"),
    (("--ranks", "4"), 1, r"--ranks=\(4,\).*at least two"),
    (("--ranks", "0,4"), 1, "two positive ranks"),
    (("--ranks", "4,100000000"), 1, "at rank 100000000"),
    (("--alpha", "rnk"), 2, "'rnk' is not a valid float"),
    (("--alpha", "0"), 1, "alpha.*0"),
    (("--alpha", "nan"), 1, "alpha.*nan"),
    (("--rslora",), 2, "needs a numeric --alpha"),
    (("--init", "C"), 2, "'C' is not one of 'A', 'B'"),
    (("--lr", "nan"), 1, "--lr=nan"),
    (("--lr", "1e30"), 1, "moves by inf"),
    (("--law", "mau"), 1, "mau"),
    (("--law", "nowhere:Law"), 1, "'nowhere:Law' cannot be loaded"),
    (("--optimizer", "adamx"), 1, "Unknown optimizer 'adamx'"),
    (("--optimizer", "LBFGS"), 1, "LBFGS could not step"),
    (("no/such/adapter",), 1, "no/such/adapter"),
    (("no/such/adapter", "--shape", "8x8"), 2, "leave --shape out"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD)
def test_bad_input_is_a_sentence(arguments, code, message):
    """What cannot be checked is said, with a cure, and never a traceback."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert re.search(message, " ".join(result.output.split()))


@pytest.mark.parametrize("name", ["out.unheard-of", "file/out.png"])
def test_a_figure_that_cannot_be_written_is_a_sentence(name, tmp_path):
    """A format or a place that cannot be written is said after the table."""
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    result = call(*SMALL, "-o", tmp_path / name)
    assert result.exit_code == 1
    assert "cannot be written" in result.output
