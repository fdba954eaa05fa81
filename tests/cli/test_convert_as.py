"""`rankaware convert --as TOOL`: lines to paste, whose numbers and references are those that were asked for."""

from __future__ import annotations

import ast
import re

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import rankaware_optim as ra
from rankaware_optim.cli import main
from rankaware_optim.cli._convert import TOOLS, as_words
from rankaware_optim.inspection import parse_reference

LR, FROM, TO = "2e-4", "r=16,alpha=32,fan_in=512", "r=64,alpha=16,rslora,fan_in=512"


def printed(tool, *options, to=TO):
    done = CliRunner().invoke(
        main, ["convert", LR, "--from", FROM, "--to", to, "--as", tool, *options]
    )
    assert done.exit_code == 0, done.output
    return done.output


sizes = st.floats(1e-3, 1e5).map(lambda x: float(f"{x:g}"))


@given(
    rank=st.integers(1, 10**6),
    alpha=sizes,
    rslora=st.booleans(),
    init=st.sampled_from("AB"),
    fan_in=st.none() | sizes,
    batch=st.none() | sizes,
)
def test_words_of_a_reference_are_read_back(**fields):
    """A reference in words is read back as itself."""
    reference = ra.Reference(**fields)
    assert parse_reference(as_words(reference)) == reference


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_is_given_the_rank(tool):
    """The lines of every tool name the target's rank, and their comments the tuned rate and what it becomes."""
    out = printed(tool)
    assert re.search(r"\b64\b", re.sub(r"#.*", "", out))
    assert f"# 0.0002 was tuned at {FROM}; at {TO} it is " in out


@pytest.mark.parametrize(
    ("to", "batch"), [("r=16,alpha=32,batch=64", 64), ("r=16,alpha=32,batch=16", None)]
)
def test_another_batch_is_given_too(to, batch):
    """Where the rate moves with the batch, attach gets the new batch."""
    done = CliRunner().invoke(
        main,
        ["convert", LR, "--from", "r=16,alpha=32,batch=16", "--to", to, "--as", "trl"],
    )
    given = re.search(r"batch=(\d+)\)$", done.output, re.MULTILINE)
    assert (given and int(given[1])) == batch


def test_trls_lines_are_python():
    """TRL's lines parse, and their reference and law are those asked for."""
    calls = [
        n
        for n in ast.walk(ast.parse(printed("trl", "--law", "mua")))
        if isinstance(n, ast.Call)
    ]
    (attach,) = [
        c for c in calls if ast.unparse(c.func) == "rankaware_optim.integrations.attach"
    ]
    arguments = {k.arg: ast.literal_eval(k.value) for k in attach.keywords}
    assert parse_reference(arguments["tuned_at"]) == parse_reference(FROM)
    assert (arguments["lr"], arguments["law"]) == (2e-4, "mua")


def test_tools_without_rslora_get_the_alpha_that_gives_the_same_multiplier():
    """kohya, Automodel and OneTrainer divide alpha by the rank: alpha 16 over √64 is alpha 128 over 64."""
    for tool, words in (
        ("kohya", "--network_alpha 128 "),
        ("automodel", "alpha: 128"),
        ("onetrainer", "alpha: 128"),
    ):
        assert words in printed(tool)


def test_numbers_to_type_are_the_conversions():
    """OneTrainer's and the diffusers scripts' number is convert_lr's, and the latter's alpha is said to be the rank."""
    wanted = f"{ra.convert_lr(2e-4, from_=FROM, to=TO).lr:.4g}"
    assert f"Learning rate: {wanted}" in printed("onetrainer")
    assert f"--learning_rate {wanted}" in printed("diffusers")
    assert "These scripts train at alpha = rank" in printed("diffusers")
    assert "These scripts" not in printed("diffusers", to="r=64,alpha=64,fan_in=512")


PASTED = {
    "axolotl": "adapter: lora\nlora_r: 64\nlora_alpha: 16\npeft_use_rslora: true\nlearning_rate: {}\n",
    "kohya": "--network_dim 64 --network_alpha 128 \\\n--learning_rate {}\n",
    "swift": "--tuner_type lora --lora_rank 64 --lora_alpha 16 --use_rslora true \\\n--learning_rate {}\n",
    "ai-toolkit": "network:\n  type: lora\n  linear: 64\n  linear_alpha: 128\ntrain:\n  lr: {}\n",
    "llamafactory": "finetuning_type: lora\nlora_rank: 64\nlora_alpha: 16\nuse_rslora: true\nlearning_rate: {}\n",
    "mlx": "fine_tune_type: lora\nlearning_rate: {}\nlora_parameters:  # all three are required; scale multiplies,"
    " it is no alpha\n  rank: 64\n  scale: 2\n  dropout: 0.0\n",
    "unsloth": "model = FastLanguageModel.get_peft_model(model, r=64, lora_alpha=16, use_rslora=True)\n"
    "args = SFTConfig(learning_rate={})\n",
    "verl": "actor_rollout_ref.model.lora_rank=64 \\\nactor_rollout_ref.model.lora_alpha=128 \\\n"
    "actor_rollout_ref.actor.optim.lr={}\n",
}


@pytest.mark.parametrize("tool", PASTED)
def test_what_is_pasted_has_the_tools_names(tool):
    """A tool that builds its optimizer gets the converted rate under its own names; rsLoRA's word, if it has one, or alpha for it."""
    wanted = f"{ra.convert_lr(2e-4, from_=FROM, to=TO).lr:.4g}"
    assert printed(tool).endswith(f"\n{PASTED[tool].format(wanted)}")
    plain = printed(tool, to="r=64,alpha=32,fan_in=512")
    assert "rslora" not in re.sub(r"#.*", "", plain)
    multiplier = r"\bscale: 0\.5$" if tool == "mlx" else r"alpha\W+32\b"
    assert re.search(multiplier, plain, re.MULTILINE)


def test_ai_toolkit_is_said_to_ignore_alpha_for_transformers():
    """ai-toolkit trains transformers at alpha = rank, so another alpha has a sentence, and alpha = rank has none."""
    words = (
        "# Transformers such as FLUX train at alpha = rank: convert --to r=64,alpha=64."
    )
    assert words in printed("ai-toolkit")
    assert "Transformers" not in printed("ai-toolkit", to="r=64,alpha=64,fan_in=512")


@pytest.mark.parametrize("tool", TOOLS)
def test_init_b_has_no_such_lines(tool):
    """No tool's own settings start adapters at Init[B], so lines for it would train at a rate of another init."""
    done = CliRunner().invoke(
        main, ["convert", LR, "--from", f"{FROM},init=B", "--to", "r=64", "--as", tool]
    )
    assert done.exit_code == 1
    assert "at Init[A]" in done.output


def test_full_finetuning_has_no_such_lines():
    """--as is for adapters: to full finetuning it is a sentence."""
    done = CliRunner().invoke(
        main, ["convert", LR, "--from", FROM, "--to", "full,fan_in=512", "--as", "trl"]
    )
    assert done.exit_code == 1
    assert "for adapters" in done.output
