"""Damaged recipes: bytes and values of the TOML, or bytes, names, shapes and values of the tensors.

In half of the cases of tensors the TOML gets the hash of the damaged ones, so that they are read. In the others it
keeps the hash of the good ones, and no damaged trial may be read.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli
import tomli_w
import torch
from attacks.damage import damaged_bytes, damaged_values, places
from attacks.outcomes import Attack, Outcomes
from safetensors.torch import load, save

import rankaware_optim as ra
from rankaware_optim.reports import diff_recipes, diff_text, write_report

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
RANKS = (1, 4, 64, 4096)
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)
NUMBERS = (0.0, -1.0, math.nan, math.inf, 1e300, 1e-300, 5e-324, -1e24)


def run(seed: int, count: int, folder: Path) -> Outcomes:
    warnings.simplefilter("ignore", ra.RankAwareWarning)
    chance, outcomes = random.Random(seed), Outcomes()
    for number in range(count):
        path, foreign = write(chance.choice(SHIPPED), chance, folder)
        page = number % 8 == 0  # a page takes ten times as long as all else
        outcomes.attempt(
            (seed, number), partial(use, path, page, foreign), ra.RecipeError
        )
    return outcomes


def write(source: Path, chance: random.Random, folder: Path) -> tuple[Path, bool]:
    """Write a damaged copy of a shipped recipe, and say whether its tensors have another hash than the TOML says."""
    path, text = folder / source.name, source.read_bytes()
    document = tomli.loads(text.decode())
    named = document["tensors"]["file"]
    tensors = whole = (source.parent / named).read_bytes()
    for old in folder.iterdir():
        old.unlink()
    where, rehashed = chance.randrange(10), chance.random() < 0.5
    if where < 3:
        text = damaged_bytes(text, chance)
    elif where < 5:
        text = as_toml(damaged_values(document, chance))
    elif where < 6:
        text = as_toml(unprintable(document, chance))
    else:
        tensors = (
            damaged_tensors(tensors, chance)
            if where < 9
            else damaged_bytes(tensors, chance)
        )
    if tensors != whole and rehashed:
        document["tensors"]["sha256"] = hashlib.sha256(tensors).hexdigest()
        text = as_toml(document)
    path.write_bytes(text)
    (folder / named).write_bytes(tensors)
    return path, tensors != whole and not rehashed


def each_number(seed: int, count: int, folder: Path) -> Outcomes:
    """Every tensor of the trials with each impossible number in turn, under a hash that fits."""
    warnings.simplefilter("ignore", ra.RankAwareWarning)
    outcomes, source = Outcomes(), SHIPPED[seed % len(SHIPPED)]
    document = tomli.loads(source.read_text())
    path, beside = folder / source.name, folder / document["tensors"]["file"]
    whole = load((source.parent / beside.name).read_bytes())
    for name, tensor in whole.items():
        for number in NUMBERS if tensor.is_floating_point() else (-1.0, 2.0**62):
            damaged = tensor.clone()
            damaged.view(-1)[0] = torch.tensor(number, dtype=torch.float64).to(
                tensor.dtype
            )
            data = bytes(save({**whole, name: damaged}))
            beside.write_bytes(data)
            document["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
            path.write_bytes(as_toml(document))
            outcomes.attempt(
                (name, number), partial(use, path, False, False), ra.RecipeError
            )
    return outcomes


COVARIANCES: dict[str, list[list[float]]] = {
    "a negative variance": [[-0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.1]],
    "a correlation above 1": [[0.1, 0.2, 0.0], [0.2, 0.1, 0.0], [0.0, 0.0, 0.1]],
    "not symmetric": [[0.1, 0.05, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.1]],
    "too large": [[1e9, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.1]],
    "not a number": [[math.nan, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.1]],
    "two rows": [[0.1, 0.0, 0.0], [0.0, 0.1, 0.0]],
}


def each_covariance(seed: int, count: int, folder: Path) -> Outcomes:
    """Every matrix that is no covariance, in a TOML that stands alone."""
    outcomes, source = Outcomes(), SHIPPED[seed % len(SHIPPED)]
    document, path = tomli.loads(source.read_text()), folder / source.name
    for what, matrix in COVARIANCES.items():
        document["fit"]["covariance"] = matrix
        path.write_bytes(as_toml(document))
        outcomes.attempt(what, partial(must_refuse, path), ra.RecipeError)
    return outcomes


def must_refuse(path: Path) -> None:
    ra.Recipe.load(path)
    raise AssertionError("an impossible covariance was read")


def unprintable(document: Any, chance: random.Random) -> Any:
    """A copy of a document in which every third text has signs that control a terminal."""
    document = copy.deepcopy(document)
    for inner, key in places(document):
        if isinstance(inner[key], str) and chance.random() < 0.3:
            inner[key] += chance.choice(("\x1b[2J", "\x00", "\u202e", "\r", "\x9b31m"))
    return document


def as_toml(document: Any) -> bytes:
    return str(tomli_w.dumps(document)).encode("utf-8", "surrogatepass")


def damaged_tensors(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file with one or two changed tensors."""
    tensors = load(data)
    for _ in range(chance.randint(1, 2)):
        name = chance.choice(sorted(tensors))
        tensor = tensors[name]
        match chance.randrange(6):
            case 0:
                del tensors[name]
            case 1:
                tensors[chance.choice([*tensors, "trial.odd", "fit.other"])] = (
                    tensor.clone()
                )
            case 2:
                tensors[name] = tensor.to(chance.choice(DTYPES))
            case 3:
                shapes = ((-1,), (1, -1), (-1, 1, 1))
                tensors[name] = tensor.reshape(chance.choice(shapes))[
                    : chance.randrange(3)
                ].clone()
            case 4 if tensor.numel() and tensor.is_floating_point():
                number = torch.tensor(chance.choice(NUMBERS), dtype=torch.float64).to(
                    tensor.dtype
                )
                tensor.view(-1)[chance.randrange(tensor.numel())] = number
            case _:
                if tensor.numel():
                    tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice(
                        (0, 1, 2, 100)
                    )
    return bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def use(path: Path, page: bool, foreign: bool) -> None:
    """Use a recipe in every way: load it, read rates, print and compare it, write its page, and save it again.

    foreign: whether its tensors have another hash than the TOML says.
    """
    recipe = ra.Recipe.load(path)
    if foreign and recipe.tensors:
        raise AssertionError("trials of another hash were read")
    are_possible(recipe.tensors)
    rates = []
    for target in [{"rank": rank} for rank in RANKS] + [
        {"method": "full"},
        {"rank": 16, "steps": 1000},
    ]:
        # a recipe of full finetuning has no other rank
        with suppress(ra.RecipeError, ra.InvalidReferenceError):
            rates.append(recipe.at(**target))
    for rate in rates:
        if not (0 < rate.lr < math.inf and 0 <= rate.low <= rate.high):
            raise AssertionError(f"rate {rate!r}")
    shown = str(recipe) + diff_text(diff_recipes(recipe, ra.Recipe.load(SHIPPED[0])))
    if not all(character.isprintable() or character == "\n" for character in shown):
        raise AssertionError(f"unprintable {shown!r}")
    if page:
        write_report(recipe, path.with_suffix(".html"))
    again = ra.Recipe.load(recipe.save(path.parent / "again.toml"))
    if again.tag.partition(" ")[0] != recipe.tag.partition(" ")[0]:
        raise AssertionError("its hash changed when it was saved and loaded again")


POSITIVE = ("lr", "own_lr", "rank", "steps", "planned_steps", "planned_batch")
MAY_BE_ZERO = ("rank", "steps", "planned_steps", "planned_batch")
KINDS = dict.fromkeys(("rank", "seed", "steps", "planned_steps"), "iu") | dict.fromkeys(
    ("diverged", "pruned"), "b"
)
KINDS |= dict.fromkeys(("lr", "own_lr", "value", "curve", "planned_batch"), "f")


def are_possible(trials: Mapping[str, Any]) -> None:
    """Check the trials of a recipe by the table in recipes/SCHEMA.md."""
    for name in trials.keys() & {*POSITIVE}:
        values = (
            trials[name][~np.isnan(trials[name])] if name == "own_lr" else trials[name]
        )
        if not bool(
            (
                np.isfinite(values)
                & ((values > 0) | (values == 0) & (name in MAY_BE_ZERO))
            ).all()
        ):
            raise AssertionError(f"trial.{name} has an impossible value")
    wrong = [
        name
        for name in trials.keys() & KINDS.keys()
        if trials[name].dtype.kind not in KINDS[name]
    ]
    wrong += [
        name
        for name in trials.keys() & KINDS.keys()
        if trials[name].ndim != 1 + (name == "curve")
    ]
    if wrong or len({len(values) for values in trials.values()}) > 1:
        raise AssertionError(
            f"trials have other lengths, or another type or shape: {wrong}"
        )


ATTACKS = (
    Attack("damaged recipes", 53_000, 1000, run),
    Attack("impossible numbers in trials", 1, 1, each_number),
    Attack("impossible covariances", 1, 1, each_covariance),
)
