"""Damaged recipes: bytes and values of the TOML, or bytes, names, shapes and values of the tensors, with their hash."""

from __future__ import annotations

import hashlib
import math
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomli
import tomli_w
import torch
from attacks.damage import damaged_bytes, damaged_values
from attacks.outcomes import Attack, Outcomes
from safetensors.torch import load, save

import rankaware_optim as ra
from rankaware_optim.recipe import diff_recipes, diff_text, write_report

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
RANKS = (1, 4, 64, 4096)
DTYPES = (torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
NUMBERS = (0.0, -1.0, math.nan, math.inf, 1e300, 1e-300, 5e-324, -1e24)


def run(seed: int, count: int, folder: Path) -> Outcomes:
    chance, outcomes = random.Random(seed), Outcomes()
    for number in range(count):
        source = chance.choice(SHIPPED)
        path = write(source, chance, folder)
        page = number % 8 == 0  # a page takes ten times as long as all else
        outcomes.attempt((seed, number), lambda path=path, page=page: use(path, page), ra.RecipeError)
    return outcomes


def write(source: Path, chance: random.Random, folder: Path) -> Path:
    """Write a damaged copy of a shipped recipe."""
    path, text = folder / source.name, source.read_bytes()
    named = tomli.loads(text.decode())["tensors"]["file"]
    tensors = (source.parent / named).read_bytes()
    for old in folder.iterdir():
        old.unlink()
    where = chance.randrange(10)
    if where < 3:
        text = damaged_bytes(text, chance)
    elif where < 7:
        text = as_toml(damaged_values(tomli.loads(text.decode()), chance))
    else:
        tensors = damaged_tensors(tensors, chance) if where < 9 else damaged_bytes(tensors, chance)
        document = tomli.loads(text.decode())
        document["tensors"]["sha256"] = hashlib.sha256(tensors).hexdigest()
        text = as_toml(document)
    path.write_bytes(text)
    (folder / named).write_bytes(tensors)
    return path


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
                tensors[chance.choice([*tensors, "trial.odd", "fit.other"])] = tensor.clone()
            case 2:
                tensors[name] = tensor.to(chance.choice(DTYPES))
            case 3:
                shapes = ((-1,), (1, -1), (-1, 1, 1))
                tensors[name] = tensor.reshape(chance.choice(shapes))[: chance.randrange(3)].clone()
            case 4 if tensor.numel() and tensor.is_floating_point():
                number = torch.tensor(chance.choice(NUMBERS), dtype=torch.float64).to(tensor.dtype)
                tensor.view(-1)[chance.randrange(tensor.numel())] = number
            case _:
                if tensor.numel():
                    tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice((0, 1, 2, 100))
    return bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def use(path: Path, page: bool) -> None:
    """Use a recipe in every way: load it, read rates, print and compare it, write its page, and save it again."""
    recipe = ra.Recipe.load(path)
    rates = []
    for target in [{"rank": rank} for rank in RANKS] + [{"method": "full"}, {"rank": 16, "steps": 1000}]:
        with suppress(ra.RecipeError, ra.InvalidReferenceError):  # a recipe of full finetuning has no other rank
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


ATTACKS = (Attack("damaged recipes", 53_000, 1000, run),)
