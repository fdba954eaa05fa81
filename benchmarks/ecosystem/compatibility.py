"""Compatibility with torch's ecosystem, from real runs: every check of the tests, ours beside native groups by hand.

    python benchmarks/ecosystem/compatibility.py  # needs packages of tox's integrations and distributed

It runs the test files named below and reads their results. A row is a test: its docstring, the number of cases that
passed, and the reasons of those that are limits. Where a check is about an accident, `NATIVE` probes what native torch
does.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import click
import torch
from recording import RESULTS, machine
from torch import nn
from torch.optim import lr_scheduler

RESTS_ON = ()  # outcomes: made again at a release
ROOT = Path(__file__).parents[2]
SUITES = {
    "Optimizers": [
        "tests/environments/integrations/test_optimizers.py",
        "tests/optimizer/test_wrapper.py",
    ],
    "State": ["tests/optimizer/test_state_dict.py"],
    "Schedulers": [
        "tests/optimizer/test_loops.py",
        "tests/environments/integrations/test_schedules_of_transformers.py",
    ],
    "What wraps around": ["tests/environments/integrations/test_wrappers.py"],
    "Trainers": ["tests/environments/integrations/test_trainers.py"],
    "Distributed, two gloo processes": ["tests/environments/distributed"],
}
PACKAGES = (
    "torch torch-optimizer pytorch_optimizer schedulefree bitsandbytes torchao peft transformers trl lightning "
    "accelerate deepspeed"
)


class Row(NamedTuple):
    """A test function: its docstring, how many cases passed and failed, and why others are limits."""

    name: str  # file::function
    sentence: str
    passed: int
    limits: Counter[str]
    failed: int


@click.command()
def main() -> None:
    """Write results/compatibility.md."""
    lines = ["# Compatibility, from real runs", "", LEGEND, ""]
    for title, paths in SUITES.items():
        lines += [
            f"## {title}",
            "",
            "| check | ours | native, groups by hand |",
            "|---|---|---|",
        ]
        lines += [line(row) for path in paths for row in rows(path)] + [""]
    lines += ["## Limits", "", *(f"* {limit}" for limit in LIMITS), ""]
    lines += [
        "Versions: "
        + ", ".join(f"{name} {_version(name)}" for name in PACKAGES.split())
        + ".",
        "",
    ]
    lines.append(
        f"Made by `python benchmarks/ecosystem/compatibility.py` on {machine(torch.get_num_threads())}"
    )
    (RESULTS / "compatibility.md").write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


LEGEND = (
    "A check passes with all its cases, or names those that are a limit, with the reason. In the native column: what "
    "native torch does in the same accident, probed by this script; «reference» where the check compares ours with the "
    "native class bit for bit; «–» where native has no such thing."
)

LIMITS = (
    "FSDP1 flattens parameters: plain LoRA without a declared init needs `init=`, and full finetuning is refused. "
    "torch's `FSDP.optim_state_dict` gives all moments one buffer on the CPU, for native optimizers too.",
    "torch's distributed checkpoint cannot cut a plain optimizer's group into several: refused when nested, warned "
    "of with full_state_dict=True, torch's own KeyError when flattened.",
    "pytorch_optimizer's AdaShift, Conda, SCION, SCIONLight and ScalableShampoo save objects that weights_only=True "
    "does not read, natively either.",
    "Optimizers that estimate one rate for all groups (Prodigy, D-Adaptation) or hold another optimizer (SAM, "
    "Lookahead) are refused as the inner one; the latter work around ours.",
    "accelerate enables FSDP for accelerators only: on the CPU the test sets its state by hand, then runs its real "
    "code.",
    "Not run: CUDA, capturable stepping, tensor and expert parallel, ZeRO-3, CPU offload.",
)


def rows(path: str, *options: str) -> list[Row]:
    """Run one test file or folder with these options of pytest, and count its cases by test function."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            path,
            f"--junitxml={report}",
            "-q",
            "--tb=no",
            *options,
        ]
        subprocess.run(
            command,
            cwd=ROOT,
            check=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cases = list(ET.parse(report).iter("testcase"))
    sentences = {
        name: text for file in files(path) for name, text in docstrings(file).items()
    }
    grouped: dict[str, list[ET.Element]] = defaultdict(list)
    for case in cases:
        file = case.get("classname", "").rpartition(".")[2]
        grouped[f"{file}::{case.get('name', '').partition('[')[0]}"].append(case)
    return [
        _row(name, sentences.get(name.partition("::")[2], name), group)
        for name, group in grouped.items()
    ]


def _row(name: str, sentence: str, cases: list[ET.Element]) -> Row:
    skipped = [
        case.find("skipped") for case in cases if case.find("skipped") is not None
    ]
    failed = sum(
        case.find("failure") is not None or case.find("error") is not None
        for case in cases
    )
    limits = Counter(s.get("message", "") for s in skipped if s is not None)
    return Row(name, sentence, len(cases) - len(skipped) - failed, limits, failed)


def line(row: Row) -> str:
    """A row of the table."""
    ours = f"pass ({row.passed})" if row.passed else ""
    reasons = [f"limit ({n}): {reason}" for reason, n in row.limits.items()]
    failed = [f"**fail ({row.failed})**"] if row.failed else []
    cell = (
        "; ".join(filter(None, [ours, *reasons, *failed]))
        .replace("|", "\\|")
        .replace("\n", " ")
    )
    compared = any(
        word in row.sentence.lower() for word in ("native", "by hand", "written out")
    )
    native = (
        NATIVE[row.name]() if row.name in NATIVE else "reference" if compared else "–"
    )
    return f"| {row.sentence} | {cell} | {native} |"


def files(path: str) -> list[Path]:
    found = ROOT / path
    return sorted(found.glob("test_*.py")) if found.is_dir() else [found]


def docstrings(file: Path) -> dict[str, str]:
    functions = (
        n
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.FunctionDef)
    )
    return {
        f.name: " ".join((ast.get_docstring(f) or f.name).split()) for f in functions
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


# --- what native torch does in the same accidents -------------------------------------------------------------------


def _adapter(rank: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(rank, 16)), nn.Parameter(torch.randn(16, rank))]


def _stepped(params: list[nn.Parameter], **options: bool) -> torch.optim.AdamW:
    opt = torch.optim.AdamW(
        [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)], **options
    )
    for param in params:
        param.grad = torch.ones_like(param)
    opt.step()
    return opt


def _another_rank() -> str:
    saved = _stepped(_adapter(8)).state_dict()
    params = _adapter(4)
    opt = _stepped(params, foreach=False)
    opt.load_state_dict(saved)
    try:
        opt.step()
    except RuntimeError as error:
        return (
            f"loads in silence; the first step fails: {str(error).splitlines()[0][:70]}"
        )
    return f"loads in silence and steps on with moments of shape {tuple(opt.state[params[0]]['exp_avg'].shape)}"


def _reversed_groups() -> str:
    params = [nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))]
    opt = _stepped(params)
    opt.state[params[0]]["exp_avg"].fill_(1.0)
    other = torch.optim.AdamW([{"params": [p]} for p in reversed(params)])
    other.load_state_dict(opt.state_dict())
    traded = bool((other.state[params[1]]["exp_avg"] == 1.0).all())
    return "silent: the groups trade their moments" if traded else "pass"


def _one_limit() -> str:
    opt = _stepped(_adapter(4))
    lr_scheduler.OneCycleLR(opt, 1e-2, total_steps=10)
    rates = {group["lr"] for group in opt.param_groups}
    return (
        "silent: OneCycleLR puts every group at one rate" if len(rates) == 1 else "pass"
    )


NATIVE = {
    "test_state_dict::test_another_rank_is_refused_with_both_numbers": _another_rank,
    "test_wrapper::test_a_checkpoint_of_another_rank_is_refused": _another_rank,
    "test_wrapper::test_state_is_matched_by_name": _reversed_groups,
    "test_loops::test_parameters_move_at_the_laws_rate_in_every_loop": _one_limit,
}

if __name__ == "__main__":
    main()
