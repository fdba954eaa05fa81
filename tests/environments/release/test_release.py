"""Tests of the files that `tox run -e release` builds: each is installed in a clean environment and used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "language-a.toml"
SWAP = """
import torch, rankaware_optim as ra
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
model = get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0"]))
opt = ra.RankAwareOptimizer(model, torch.optim.AdamW, lr=1e-3, tuned_at="r=16,alpha=32")
model(torch.randn(4, 8)).square().mean().backward()
opt.step()
print(opt.report())
"""
USES = (  # a command, and a part of its output
    (["rankaware", "lr", str(RECIPE), "--rank", "32"], "rank 32"),
    (["python", "-c", SWAP], "RankAwareOptimizer(AdamW)"),
    (["rankaware", "report", str(RECIPE), "-o", "recipe.html"], "recipe.html"),
)


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_what_was_built_works_in_a_clean_environment(tmp_path: Path, kind: str) -> None:
    """pip installs the built file with two extras, and then a command, a training step and an HTML page work."""
    (built,) = (ROOT / "dist").glob(kind)
    clean = tmp_path / "clean"
    run(tmp_path, sys.executable, "-m", "venv", str(clean))
    run(
        tmp_path,
        str(clean / "bin" / "pip"),
        "install",
        "--quiet",
        f"{built}[peft,plots]",
    )
    for (program, *options), printed in USES:
        assert printed in run(tmp_path, str(clean / "bin" / program), *options)


def run(folder: Path, *command: str) -> str:
    """Run a command in a folder outside the source tree, and return its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_description_has_no_relative_link(tmp_path: Path) -> None:
    """If the project's URLs include a Repository, every link in the built metadata is absolute."""
    tree = tmp_path / "tree"
    files = run(ROOT, "git", "ls-files").splitlines()
    for name in files:
        if name.startswith(
            ("rankaware_optim/", "README.md", "LICENSE", "hatch_", "pyproject")
        ):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    project = tree / "pyproject.toml"
    heading = "\n[project.urls]\n"
    address = f'{heading}Repository = "https://code.example.org/rankaware-optim"\n'
    text = project.read_text(encoding="utf-8").replace(heading, address)
    project.write_text(text, encoding="utf-8")
    run(tree, sys.executable, "-m", "build", "--wheel")
    (wheel,) = (tree / "dist").glob("*.whl")
    (name,) = (each for each in ZipFile(wheel).namelist() if each.endswith("METADATA"))
    metadata = message_from_bytes(ZipFile(wheel).read(name))
    links = re.findall(r"\]\(([^)]+)\)", metadata.get_payload())
    assert len(links) > 10
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
