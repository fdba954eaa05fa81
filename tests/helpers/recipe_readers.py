"""Every reader of recipes, on recipes that name modules. Started as a script, since an import cannot be undone.

Arguments: a folder of an honest recipe `honest.toml`, and a folder of recipes that name modules. The honest one is read
first, so that every module of ours and of our requirements is there. A line is a recipe, a reader, how it ended and
what it imported, as JSON.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

import rankaware_optim as ra
from rankaware_optim.cli import main as command

from .models import mlp


def readers(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way in which the package reads the recipe at `path`."""
    yield "load", lambda: ra.Recipe.load(path)
    asked = [
        {},
        {"rank": 8},
        {"rank": 8, "alpha": 4},
        {"rank": 4, "init": "B"},
        {"rank": None},
        {"method": "full"},
    ]
    for where in (*asked, {"rank": 8, "steps": 10}, {"rank": 8, "fan_in": 128.0}):
        yield f"at {where}", lambda where=where: ra.Recipe.load(path).at(**where)
    yield "save", lambda: ra.Recipe.load(path).save(path.with_name("saved.toml"))
    for options in ({}, {"steps": 50, "batch": 8}):
        for kind in ("adamw", torch.optim.SGD):
            options = {"other_lr": 1e-3, **options}
            yield (
                f"optimizer {options}",
                lambda kind=kind, options=options: optimizer(kind, path, options),
            )
    yield "a folder", lambda: ra.Recipe.load(beside(path))
    for words in (
        *(
            ["lr", path, "--rank", 8],
            ["lr", path, "--rank", 4],
            ["lr", path, "--full"],
            ["show", path],
        ),
        *(
            ["report", path, "-o", path.with_suffix(".html")],
            ["plot", path, "-o", path.with_suffix(".svg")],
        ),
        *(["diff", path, path], ["diff", path, path.with_name("saved.toml")]),
    ):
        yield f"rankaware {words[0]}", lambda words=words: run(words)


def optimizer(kind: object, path: Path, options: dict) -> None:
    opt = ra.RankAwareOptimizer(
        mlp((4, 8), width=64), kind, **{"recipe": path, **options}
    )
    str(opt.report()), ra.integrations.group_rates(opt)
    opt.load_state_dict(opt.state_dict())


def beside(path: Path) -> Path:
    """An adapter's folder with the files of the recipe, as `save_beside` leaves them."""
    folder = path.parent / f"{path.stem} adapter"
    copied(path, folder / "rankaware")
    return folder


def copied(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in path.parent.glob("*.safetensors"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "recipe.toml").write_bytes(path.read_bytes())


def run(words: list) -> None:
    command.main([str(word) for word in words], standalone_mode=False)


def ended(read: Callable[[], object]) -> str:
    try:
        read()
    except (ra.RankAwareError, click.ClickException) as error:
        return str(error)
    return ""


def main(honest: Path, others: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sys.path.insert(0, str(others))  # where `payload` lies
    real, sys.stdout = sys.stdout, sys.stderr  # what the commands print
    for _, read in readers(honest):
        ended(read)
    for path in sorted(others.glob("*.toml")):
        for name, read in readers(path):
            before = set(sys.modules)
            said = ended(read)
            line = {
                "recipe": path.stem,
                "reader": name,
                "said": said,
                "new": sorted(set(sys.modules) - before),
            }
            print(json.dumps(line), file=real, flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
