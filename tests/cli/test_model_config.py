"""Tests of --model-config, which reads the widths of a model, and --judge, which assesses a learning rate."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from rankaware_optim import InspectionError, Reference, convert_lr, suggest_lr
from rankaware_optim.cli import main
from rankaware_optim.inspection import read_widths

from ..helpers.recipes import RECIPE

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}
# The hidden size, mean fan-in and largest fan-in of a block's linear layers, counted in transformers' own modules.
WIDTHS = {
    "llama": (LLAMA, (4096, 5636, 11008)),
    "grouped queries": (
        {**LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8},
        (4096, 6853, 14336),
    ),
    "wider heads": (
        {
            "model_type": "gemma2",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
        },
        (2304, 4174, 9216),
    ),
    "other names, no gate": (
        {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_inner": None},
        (768, 1536, 3072),
    ),
    "text inside": ({"model_type": "llava", "text_config": LLAMA}, (4096, 5636, 11008)),
}
BAD = {
    "no size": ({"model_type": "resnet"}, "does not contain hidden_size"),
    "a text": ({"hidden_size": "4096"}, "hidden_size is '4096'"),
    "a negative size": ({"hidden_size": -1}, "hidden_size is -1"),
    "a list": ([1], "must be a JSON object"),
}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    RECIPE.save("digits.toml")
    return tmp_path / "config.json"


def call(command: str):
    return CliRunner().invoke(main, command.split(), prog_name="rankaware")


@pytest.mark.parametrize("name", WIDTHS)
def test_the_widths_are_those_of_the_models_layers(name, tmp_path):
    """`read_widths` gives the hidden size, the mean fan-in and the largest fan-in of a config.json or of its folder."""
    config, widths = WIDTHS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_widths(tmp_path) == read_widths(tmp_path / "config.json") == widths


@pytest.mark.parametrize("name", BAD)
def test_a_file_without_the_widths_is_an_error(name, tmp_path):
    """For a config.json without the widths, the error names the file and says what is wrong in it."""
    config, words = BAD[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InspectionError, match=words) as caught:
        read_widths(tmp_path)
    assert "config.json" in str(caught.value)
    with pytest.raises(InspectionError, match="Cannot read"):
        read_widths(tmp_path / "nowhere")


def test_suggest_takes_the_width_of_its_method(config):
    """`suggest` uses the hidden size for LoRA and the largest fan-in for full finetuning, and names the widths."""
    lora = call("suggest --rank 16 --alpha 32 --model-config config.json").output
    wanted = suggest_lr(Reference(16, 32), hidden_size=4096)
    assert lora.startswith(f"{wanted!s}\n")
    assert "hidden size of 4096" in lora
    assert "mean fan-in is 5636" in lora
    full = call("suggest --full --model-config .").output
    wanted = suggest_lr(Reference(method="full", fan_in=11008))
    assert full.startswith(f"{wanted!s}\n")


@pytest.mark.parametrize(("to", "width"), [("full", 11008), ("r=64", 5636)])
def test_convert_takes_the_width_of_each_method(to, width, config):
    """`convert` uses the mean fan-in for LoRA and the largest for full finetuning, unless fan_in= is in the configuration."""
    command = f"convert 2e-4 --from r=16,alpha=32 --to {to} --model-config . --json"
    document = json.loads(call(command).stdout)
    wanted = convert_lr(2e-4, "r=16,alpha=32,fan_in=5636", f"{to},fan_in={width}")
    assert document["lr"] == wanted.lr
    assert document["from"] == "r=16,alpha=32,fan_in=5636"
    own = (
        f"convert 2e-4 --from r=16,alpha=32,fan_in=64 --to {to} --model-config . --json"
    )
    assert json.loads(call(own).stdout)["from"] == "r=16,alpha=32,fan_in=64"


def test_convert_names_the_widths_that_it_read(config):
    """With --model-config a note contains the widths of the model. Without it there is no such note."""
    asked = "convert 2e-4 --from r=16,alpha=32 --to r=64"
    assert "mean fan-in is 5636" in call(f"{asked} --model-config .").output
    assert "mean fan-in" not in call(asked).output


CONFLICTS = {
    "suggest --full --hidden-size 4096": "--fan-in",
    "suggest --rank 16 --alpha 32 --fan-in 4096": "--hidden-size",
    "suggest --rank 16 --alpha 32 --hidden-size 64 --model-config .": "Remove --hidden-size",
    "suggest --rank 16 --alpha 32 --judge 0": "learning rate to judge is 0",
    "suggest --rank 16 --alpha 32 --model-config nowhere": "Cannot read the model configuration nowhere: ",
    "lr digits.toml --judge -1": "must be a positive finite number, but -1",
}


@pytest.mark.parametrize("command", CONFLICTS)
def test_a_wrong_width_or_rate_to_judge_is_one_error(command, config):
    """For wrong widths or a wrong learning rate to judge, only an error is printed, which names the option or the value."""
    done = call(command)
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    assert CONFLICTS[command] in done.stderr


def test_a_rate_is_judged_by_the_suggestions_interval(config):
    """`suggest --judge` says by what factor a learning rate is too high, or that it is in the suggested interval."""
    asked = "suggest --rank 16 --alpha 32 --hidden-size 4096 --judge"
    assert "times too high" in call(f"{asked} 1e-1").output.splitlines()[-1]
    assert "in its 90 % interval" in call(f"{asked} 2e-4").output.splitlines()[-1]


def test_lr_judges_as_the_recipe_does(config):
    """`lr --judge` prints the recipe's judgement after the learning rate, and adds it to the JSON."""
    judged = RECIPE.judge(1e-5, 8, alpha=8)
    asked = "lr digits.toml --rank 8 --alpha 8 --judge 1e-5"
    assert call(asked).output.splitlines()[-1] == str(judged)
    document = json.loads(call(f"{asked} --json").stdout)
    assert document["judged"]["factor"] == pytest.approx(judged.factor)
    assert document["judged"]["inside"] is False
