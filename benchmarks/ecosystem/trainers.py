"""Which trainers take this package by one line? A row per tool, from real runs of the tests in its environment.

    .tox/axolotl/bin/python benchmarks/ecosystem/trainers.py    # or swift, automodel, unsloth, kohya, integrations

It runs the tests of every tool that is installed in this environment, including its examples, and replaces their rows
in results/trainers.json. The rows of other environments stay. A tool that no test can run has a row that says which
source was read.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import click
import torch
from compatibility import rows
from recording import RESULTS, commit, machine, record

RESTS_ON = ()  # outcomes: made again at a release
INTEGRATIONS = "tests/environments/integrations"
TITLE = "One line in every trainer"


class Tool(NamedTuple):
    """A tool, its package, the line by which it takes ours, its example, and its tests as paths and -k expressions."""

    name: str
    package: str
    line: str
    example: str
    tests: tuple[tuple[str, str], ...]
    read: str = ""  # the source that was read, where no test can run


TRAINERS = f"{INTEGRATIONS}/test_trainers.py"
ATTACH = f"{INTEGRATIONS}/test_attach.py"
EXAMPLES = f"{INTEGRATIONS}/test_examples.py"
TOOLS = (
    Tool(
        "transformers Trainer",
        "transformers",
        "`ra.integrations.attach(trainer, AdamW, ...)` or `trainer_factory`",
        "transformers_trainer.py",
        (
            (TRAINERS, "not lightning and not accelerate and not SFT"),
            (
                ATTACH,
                "arguments or given or refused or second_run or another or groups_that",
            ),
            (EXAMPLES, "transformers"),
        ),
    ),
    Tool(
        "TRL: SFT, Reward, DPO, KTO, GRPO, RLOO",
        "trl",
        "`ra.integrations.attach(trainer, AdamW, ...)`",
        "trl_sft.py, trl_grpo.py",
        (
            (TRAINERS, "SFT"),
            (ATTACH, "SFT or Reward or DPO or KTO or GRPO or RLOO"),
            (EXAMPLES, "trl"),
        ),
    ),
    Tool(
        "PEFT",
        "peft",
        "`create_rankaware_optimizer(model, AdamW, lr=..., ...)`",
        "peft_loop.py",
        ((ATTACH, "pefts or eight_bit"), (EXAMPLES, "peft_loop")),
    ),
    Tool(
        "Lightning, LightningCLI",
        "lightning",
        "`configure_optimizers`; YAML `class_path: rankaware_optim.RankAwareOptimizer`",
        "lightning_module.py, lightning_cli.py",
        ((TRAINERS, "lightning"), (EXAMPLES, "lightning")),
    ),
    Tool(
        "Hydra",
        "hydra-core",
        "YAML `_partial_: true`",
        "hydra_app.py",
        ((EXAMPLES, "hydra"),),
    ),
    Tool(
        "accelerate",
        "accelerate",
        "`accelerator.prepare(opt)`",
        "",
        ((TRAINERS, "accelerate"),),
    ),
    Tool(
        "diffusers' loop",
        "diffusers",
        "`RankAwareOptimizer(unet, AdamW, ...)`",
        "diffusers_loop.py",
        ((EXAMPLES, "diffusers"),),
    ),
    Tool(
        "Axolotl",
        "axolotl",
        "YAML `plugins:` and `rankaware:`",
        "axolotl.yaml",
        (("tests/environments/axolotl", ""),),
    ),
    Tool(
        "ms-swift",
        "ms-swift",
        "`--external_plugins FILE --optimizer rankaware`",
        "swift.sh",
        (("tests/environments/swift", ""),),
    ),
    Tool(
        "NeMo Automodel",
        "nemo-automodel",
        "YAML printed by `rankaware convert --as automodel`",
        "",
        (("tests/environments/automodel", ""),),
    ),
    Tool(
        "Unsloth",
        "unsloth",
        "`ra.integrations.attach(trainer, AdamW, ...)`",
        "",
        (("tests/environments/unsloth", ""),),
    ),
    Tool(
        "kohya sd-scripts",
        "SD_SCRIPTS",
        "`--network_module rankaware_optim.integrations.kohya`",
        "kohya.sh",
        (("tests/environments/kohya", ""),),
    ),
    Tool(
        "diffusers' scripts",
        "",
        "numbers of `rankaware convert --as diffusers`",
        "",
        (),
        "examples/text_to_image/train_text_to_image_lora.py at 000280f5 builds AdamW itself",
    ),
    Tool(
        "OneTrainer",
        "",
        "numbers of `rankaware convert --as onetrainer`",
        "",
        (),
        "modules/util/enum/Optimizer.py at 04015e82 lists the optimizers there are",
    ),
    Tool(
        "LLaMA-Factory",
        "",
        "YAML printed by `rankaware convert --as llamafactory`",
        "",
        (),
        "src/llamafactory/hparams/finetuning_args.py at ff6d4d12 names the arguments",
    ),
    Tool(
        "verl",
        "",
        "arguments printed by `rankaware convert --as verl`",
        "",
        (),
        "docs/advance/ppo_lora.rst at b178a3cd names the arguments",
    ),
    Tool(
        "ai-toolkit",
        "",
        "YAML printed by `rankaware convert --as ai-toolkit`",
        "",
        (),
        "toolkit/lora_special.py at 27a03a91 sets alpha = rank for transformers",
    ),
    Tool(
        "mlx-lm",
        "",
        "YAML printed by `rankaware convert --as mlx`",
        "",
        (),
        "mlx_lm/tuner/lora.py at d78bf58e multiplies by scale",
    ),
)
NOTES = (
    "A row is of the tests that its tool's environment ran, on a CPU, at the commit and date named: real trainings "
    "of a few steps. Those of transformers, TRL, PEFT, Lightning and accelerate are compared bit for bit with "
    "groups written out or with the tool's own optimizer; the others by the report that they print and the rates "
    "that they log or set. A tool without a version was not run: its source was read.",
)


@click.command()
@click.option("--only", help="The name of one tool.")
def main(only: str | None) -> None:
    """Run what is installed here, and write results/trainers.json and .md."""
    chosen = [
        tool
        for tool in TOOLS
        if only in (None, tool.name) and (installed(tool) or not tool.tests)
    ]
    made = {tool.name: row_of(tool) for tool in chosen}
    # read now: another environment may have written while the tests ran
    file = RESULTS / "trainers.json"
    known = (
        {row["tool"]: row for row in json.loads(file.read_text())["rows"]}
        if file.exists()
        else {}
    )
    known |= made
    ordered = [known[tool.name] for tool in TOOLS if tool.name in known]
    record("trainers", TITLE, ordered, machine(torch.get_num_threads()), NOTES)


def installed(tool: Tool) -> str:
    """The installed version of a tool, or "". kohya's scripts are not a package, so theirs is their clone's commit."""
    if tool.package == "SD_SCRIPTS":
        clone = os.environ.get("SD_SCRIPTS", "")
        if not Path(clone, "networks").is_dir():
            return ""
        git = ["git", "-C", clone, "rev-parse", "--short=8", "HEAD"]
        return subprocess.run(
            git, check=False, capture_output=True, text=True
        ).stdout.strip()
    try:
        return version(tool.package)
    except (PackageNotFoundError, ValueError):
        return ""


def row_of(tool: Tool) -> dict[str, str]:
    """A tool's row of the table, from its tests."""
    at = commit()
    found = [
        row
        for path, chosen in tool.tests
        for row in rows(path, "-W", "ignore", "-k", chosen)
    ]
    passed, failed = sum(row.passed for row in found), sum(row.failed for row in found)
    skipped = {reason for row in found for reason in row.limits}
    cell = [f"{passed} passed"] * bool(passed) + [f"**{failed} failed**"] * bool(failed)
    cell += [f"skipped: {reason}" for reason in sorted(skipped)]
    return {
        "tool": tool.name,
        "version": installed(tool) or "–",
        "beside": ", ".join(
            f"{name} {found}"
            for name in ("transformers", "torch")
            if (found := _version(name))
        ),
        "line": tool.line,
        "example": tool.example or "–",
        "tests": "; ".join(cell) or f"not run; {tool.read}",
        "commit": at,
        "date": datetime.date.today().isoformat(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
