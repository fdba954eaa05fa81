"""Modules named in files: whatever text of a file is put in the place of a module's name, nothing of it is imported.

A module `payload` lies where Python finds it. Every text of a file is replaced by its name in turn, and texts are added
where a reader might look for one.
"""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import tomli
import tomli_w
from attacks.checkpoints import build, step
from attacks.damage import places
from attacks.outcomes import Attack, Outcomes
from attacks.victim import SHIPPED, calibration, prepare
from safetensors.numpy import save_file

import rankaware_optim as ra
from rankaware_optim.cli import main as command
from rankaware_optim.reports import diff_recipes, write_report
from rankaware_optim.sweeps import fit_sweep

PAYLOAD = "class Adam: pass\nLaw = Adam\ncreate_network = Adam\n"
NAMES = (
    "payload:Adam",
    "payload.Adam",
    "payload",
    "payload:Law?exponent=1",
    "payload.Adam(lr=1)",
)
LAWS: tuple[dict[str, Any], ...] = (
    {"name": "payload:Law"},
    {"name": "power", "law": {"name": "payload:Law"}},
    {"name": "power", "law": "payload:Law"},
    {"name": "measured", "tokens": 8, "steps": 4, "seed": 0, "optimizer": "payload:Adam", "settings": "{}"},
    {
        "name": "power",
        "exponent": 0.0,
        "full_factor": 1.0,
        "pivot": 16.0,
        "to_full": False,
        "law": {
            "name": "measured", "tokens": 8, "steps": 4, "seed": 0, "target": 1.0, "ratio": 1.0,
            "optimizer": "payload:Adam", "settings": "{}",
        },
    },
)  # fmt: skip


def renamed(document: Any) -> Iterator[Any]:
    """Copies of a nested document, each with one text replaced by a module's name."""
    texts = [
        i
        for i, (inner, key) in enumerate(places(document))
        if isinstance(inner[key], str)
    ]
    for i in texts:
        for name in NAMES:
            made = copy.deepcopy(document)
            inner, key = list(places(made))[i]
            inner[key] = name
            yield made


def imports_nothing(read: Callable[[], object]) -> None:
    """Read a file, which may be refused. Then `payload` must not have been imported, nor tests of the folder run."""
    before = set(sys.modules)
    try:
        with (
            suppress(ra.RankAwareError, click.ClickException),
            redirect_stdout(io.StringIO()),
        ):
            read()
        new = {
            name
            for name in set(sys.modules) - before
            if name.partition(".")[0] == "payload"
        }
    finally:
        sys.modules.pop("payload", None)
    if new:
        raise AssertionError("the module that a file names was imported")


def run_command(*words: object) -> None:
    command.main([str(word) for word in words], standalone_mode=False)


# --- recipes --------------------------------------------------------------------------------------------------------


def recipe_readers(path: Path) -> list[Callable[[], object]]:
    def load() -> ra.Recipe:
        return ra.Recipe.load(path)

    def optimizer() -> None:
        model, _ = build((4, 16), "adamw", {}, "raise")
        ra.RankAwareOptimizer(model, "adamw", recipe=path, other_lr=1e-3)

    return [
        lambda: str(load()) + str(load().at()),
        lambda: load().at(rank=8),
        lambda: load().at(method="full"),
        lambda: diff_recipes(load(), ra.Recipe.load(SHIPPED)),
        lambda: write_report(load(), path.with_suffix(".html")),
        optimizer,
        partial(run_command, "lr", path, "--rank", 8),
        partial(run_command, "show", path),
    ]


def run_recipes(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = prepared(folder)
    document = tomli.loads(SHIPPED.read_text())
    (folder / document["tensors"]["file"]).write_bytes(
        SHIPPED.with_name(document["tensors"]["file"]).read_bytes()
    )
    files = [*({**document, "law": law} for law in LAWS), *renamed(document)]
    for number, made in enumerate(files[:: stride(len(files), count)]):
        path = folder / "recipe.toml"
        path.write_text(tomli_w.dumps(made))
        for i, read in enumerate(recipe_readers(path)):
            outcomes.attempt((number, i), partial(imports_nothing, read))
    return outcomes


# --- adapters, checkpoints, sweeps and journals ---------------------------------------------------------------------


CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "init_lora_weights": "pissa",
    "auto_mapping": {"base_model_class": "Adam", "parent_library": "payload"},
    "target_modules": ["q"],
    "bias": "none",
}
METADATA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "8",
    "ss_optimizer": "torch.optim.adamw.AdamW",
    "ss_learning_rate": "1e-4",
    "ss_network_args": json.dumps({"rankaware_network": "payload"}),
}


def run_adapters(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = prepared(folder)
    names = ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight")
    tensors = {
        names[0]: np.zeros((4, 8), np.float32),
        names[1]: np.zeros((8, 4), np.float32),
    }
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for made in renamed({"config": CONFIG, "metadata": METADATA}):
        config.write_text(json.dumps(made["config"]))
        save_file(tensors, file, metadata=made["metadata"])
        for words in (
            ("inspect", folder),
            ("convert", "--from", file, "--to", "r=64"),
            ("suggest", folder),
        ):
            outcomes.attempt(
                words[0], partial(imports_nothing, partial(run_command, *words))
            )
    return outcomes


def run_checkpoints(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = prepared(folder)
    model, opt = build((4, 16), "adamw", {}, "raise")
    step(model, opt)
    state = opt.state_dict()
    for group in state["param_groups"]:
        group |= {"optimizer": "AdamW", "law": "mua", "recipe": "digits"}
    for made in renamed(state):
        outcomes.attempt(
            "checkpoint", partial(imports_nothing, partial(opt.load_state_dict, made))
        )
    return outcomes


def run_sweeps(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = prepared(folder)
    path = folder / "sweep.json"
    row = {
        "model": "m",
        "method": "lora",
        "init": "A",
        "optimizer": "AdamW",
        "law": "mua",
        "fan_in": 64,
    }
    for made in renamed(row):
        rows = [
            {**made, "rank": rank, "alpha": rank, "lr": lr, "loss": loss}
            for rank in (4, 64)
            for lr, loss in ((1e-4, 2.0), (1e-3, 1.0), (1e-2, 1.5))
        ]
        path.write_text(json.dumps(rows))
        outcomes.attempt(
            "sweep",
            partial(imports_nothing, partial(fit_sweep, path, optimizer="adamw")),
        )
    return outcomes


def run_journals(seed: int, count: int, folder: Path) -> Outcomes:
    outcomes = prepared(folder)
    whole, path = folder / "whole.journal", folder / "study.journal"
    calibration(whole, pause=0.0)
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    files = list(renamed(lines))
    for made in files[:: stride(len(files), count)]:
        path.write_text("".join(f"{json.dumps(line)}\n" for line in made))
        read = partial(calibration, path, pause=0.0)
        outcomes.attempt("journal", partial(imports_nothing, partial(suppressed, read)))
    return outcomes


def suppressed(read: Callable[[], object]) -> None:
    """Another error is for the attack on damaged journals."""
    with suppress(Exception):
        read()


def prepared(folder: Path) -> Outcomes:
    prepare()
    (folder / "payload.py").write_text(PAYLOAD)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return Outcomes()


def stride(number: int, count: int) -> int:
    """The step through `number` files that takes about `count`."""
    return max(1, number // max(count, 1))


ATTACKS = (
    Attack("modules named in recipes", 200, 200, run_recipes),
    Attack("modules named in adapters", 1, 1, run_adapters),
    Attack("modules named in checkpoints", 1, 1, run_checkpoints),
    Attack("modules named in sweeps", 1, 1, run_sweeps),
    Attack("modules named in journals", 100, 100, run_journals),
)
