"""Tests of `rankaware convert --as TOOL`, which prints lines that can be pasted into the config of a training tool."""

from __future__ import annotations

import ast
import re

import pytest
from click.testing import CliRunner

import rankaware_optim as ra
from rankaware_optim.cli import main
from rankaware_optim.cli._convert import TOOLS
from rankaware_optim.inspection import parse_reference

LR, FROM, TO = "2e-4", "r=16,alpha=32,fan_in=512", "r=64,alpha=16,rslora,fan_in=512"


def run(tool, *options, to=TO, origin=FROM):
    command = ["convert", LR, "--from", origin, "--to", to, "--as", tool, *options]
    return CliRunner().invoke(main, command)


def printed(tool, *options, **sites):
    done = run(tool, *options, **sites)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_given_the_rank(tool):
    """The lines for every tool have the target's rank, and a comment has both learning rates and configurations."""
    out = printed(tool)
    assert re.search(r"\b64\b", re.sub(r"#.*", "", out))
    assert f"# 0.0002 was tuned at {FROM}; at {TO} it is " in out


def test_trls_lines_are_python():
    """The lines for TRL are valid Python that calls `attach` with the requested learning rate, reference and law."""
    calls = [
        n
        for n in ast.walk(ast.parse(printed("trl", "--law", "mua")))
        if isinstance(n, ast.Call)
    ]
    (attach,) = [c for c in calls if ast.unparse(c.func) == "rankaware_optim.attach"]
    arguments = {k.arg: ast.literal_eval(k.value) for k in attach.keywords}
    assert parse_reference(arguments["tuned_at"]) == parse_reference(FROM)
    assert (arguments["lr"], arguments["law"]) == (2e-4, "mua")


PASTED = {
    "axolotl": "lora_target_linear: true  # or the layers of your run\npeft_use_rslora: true\nlearning_rate: {}\n",
    "kohya": "--network_dim 64 --network_alpha 128 \\\n--learning_rate {}\n",
    "swift": "--lora_rank 64 --lora_alpha 16 \\\n--use_rslora true \\\n--learning_rate {} --target_modules all-linear"
    "  # or the layers of your run\n",
    "ai-toolkit": "network:\n  type: lora\n  linear: 64\n  linear_alpha: 128\ntrain:\n  lr: {}\n",
    "automodel": "dim: 64\n  alpha: 128\noptimizer:\n  lr: {}\n",
    "diffusers": "--rank 64 --learning_rate {}\n",
    "llamafactory": "lora_alpha: 16\nlora_target: all  # or the layers of your run\nuse_rslora: true\nlearning_rate: {}\n",
    "onetrainer": "LoRA rank: 64\nLoRA alpha: 128\nLearning rate: {}\n",
    "verl": "actor_rollout_ref.model.lora_rank=64 \\\nactor_rollout_ref.model.lora_alpha=128 \\\n"
    "actor_rollout_ref.actor.optim.lr={}\n",
}


@pytest.mark.parametrize("tool", PASTED)
def test_what_is_pasted_has_the_tools_names(tool):
    """The lines for a tool use the tool's own names for rank, alpha, rsLoRA and the converted learning rate."""
    wanted = f"{ra.convert_lr(2e-4, from_=FROM, to=TO).lr:.4g}"
    assert printed(tool).endswith(PASTED[tool].format(wanted))


@pytest.mark.parametrize("tool", TOOLS)
def test_without_rslora_no_line_names_it(tool):
    """If the target does not use rsLoRA, no line mentions it, and alpha is the target's own."""
    plain = printed(tool, to="r=64,alpha=32,fan_in=512")
    assert "rslora" not in plain
    alpha = r"\bscale: 0\.5$" if tool == "mlx" else r"alpha\W+32\b|alpha = rank"
    assert re.search(alpha, plain, re.MULTILINE)


NO_LINES = [
    (
        "kohya",
        {"origin": f"{FROM},init=B", "to": "r=64"},
        "B starts at zero, but --to describes rank 64, alpha 32, init B",
    ),
    (
        "trl",
        {"to": "full,fan_in=512"},
        "--to describes full finetuning",
    ),
]


@pytest.mark.parametrize(("tool", "sites", "message"), NO_LINES)
def test_what_no_tool_can_train_has_no_lines(tool, sites, message):
    """Converting from an adapter with init B, or to full finetuning, with --as is an error."""
    done = run(tool, **sites)
    assert done.exit_code == 1
    assert message in done.output


@pytest.mark.parametrize("option", [["--optimizer", "sgd"], ["--json"]], ids=str)
def test_the_lines_of_a_tool_go_with_no_other_form(option):
    """Using --optimizer or --json together with --as is an error that says to remove them."""
    words = ["convert", "2e-4", "--from", "r=16,alpha=16", "--to", "r=64,alpha=64"]
    done = CliRunner().invoke(main, [*words, "--as", "trl", *option])
    assert done.exit_code == 2
    assert "Remove --optimizer and --json" in done.output
