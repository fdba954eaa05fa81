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


def run(tool, *options, to=TO, origin=FROM):
    command = ["convert", LR, "--from", origin, "--to", to, "--as", tool, *options]
    return CliRunner().invoke(main, command)


def printed(tool, *options, **sites):
    done = run(tool, *options, **sites)
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


def test_trls_lines_are_python():
    """TRL's lines parse, and their reference and law are those asked for."""
    calls = [
        n
        for n in ast.walk(ast.parse(printed("trl", "--law", "mua")))
        if isinstance(n, ast.Call)
    ]
    (attach,) = [c for c in calls if ast.unparse(c.func) == "rankaware_optim.attach"]
    arguments = {k.arg: ast.literal_eval(k.value) for k in attach.keywords}
    assert parse_reference(arguments["tuned_at"]) == parse_reference(FROM)
    assert (arguments["lr"], arguments["law"]) == (2e-4, "mua")


AT_16, OF_64 = "r=16,alpha=32,batch=16", "r=64,alpha=64,fan_in=512"
RATE = f"{ra.convert_lr(2e-4, from_=FROM, to=TO).lr:.4g}"
TRANSFORMERS = (
    "# Transformers such as FLUX train at alpha = rank: convert --to r=64,alpha=64."
)
PRINTED = [
    # a tool, from where to where, and what is printed or, for None, is not
    ("trl", {"origin": AT_16, "to": "r=16,alpha=32,batch=64"}, "batch=64)\n", None),
    ("trl", {"origin": AT_16, "to": "r=16,alpha=32,batch=16"}, None, "batch=16)\n"),
    ("automodel", {}, "alpha: 128", None),
    ("onetrainer", {}, "alpha: 128", None),
    ("onetrainer", {}, f"Learning rate: {RATE}", None),
    ("diffusers", {}, f"--learning_rate {RATE}", None),
    ("diffusers", {}, "These scripts train at alpha = rank", None),
    ("diffusers", {"to": OF_64}, None, "These scripts"),
    ("ai-toolkit", {}, TRANSFORMERS, None),
    ("ai-toolkit", {"to": OF_64}, None, "Transformers"),
]


@pytest.mark.parametrize(("tool", "sites", "there", "missing"), PRINTED)
def test_a_tool_is_given_what_it_needs(tool, sites, there, missing):
    """Another batch, the alpha that stands for rsLoRA, a number to type, and a caution, each where it applies."""
    out = printed(tool, **sites)
    assert there is None or there in out
    assert missing is None or missing not in out


PASTED = {
    "axolotl": "adapter: lora\nlora_r: 64\nlora_alpha: 16\nlora_target_linear: true\npeft_use_rslora: true\nlearning_rate: {}\n",
    "kohya": "--network_dim 64 --network_alpha 128 \\\n--learning_rate {}\n",
    "swift": "--tuner_type lora --lora_rank 64 --lora_alpha 16 --use_rslora true \\\n--target_modules all-linear"
    " --learning_rate {}\n",
    "ai-toolkit": "network:\n  type: lora\n  linear: 64\n  linear_alpha: 128\ntrain:\n  lr: {}\n",
    "llamafactory": "finetuning_type: lora\nlora_rank: 64\nlora_alpha: 16\nlora_target: all\nuse_rslora: true\nlearning_rate: {}\n",
    "mlx": "fine_tune_type: lora\nlearning_rate: {}\nlora_parameters:  # all three are required; scale multiplies,"
    " it is no alpha\n  rank: 64\n  scale: 2\n  dropout: 0.0\n",
    "unsloth": "model = FastLanguageModel.get_peft_model(\n"
    "    model, r=64, lora_alpha=16, use_rslora=True, target_modules=layers\n)\n"
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


NO_LINES = [
    *(
        (tool, {"origin": f"{FROM},init=B", "to": "r=64"}, "at init A")
        for tool in TOOLS
    ),
    ("trl", {"to": "full,fan_in=512"}, "for adapters"),
]


@pytest.mark.parametrize(("tool", "sites", "message"), NO_LINES)
def test_what_no_tool_can_train_has_no_lines(tool, sites, message):
    """No tool's settings start adapters at A = 0, where the rate is another, and --as is for adapters."""
    done = run(tool, **sites)
    assert done.exit_code == 1
    assert message in done.output
