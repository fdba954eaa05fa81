"""WordNet's nouns: glosses and their 26 lexicographer classes, shuffled, always in the same order."""

from __future__ import annotations

from functools import cache

import torch

from ._assets import Asset, debian_files

WORDNET = Asset(
    "debian",
    "wordnet-base=1:3.0-39",
    "f4f96d4d5d19061916c66cbb889a0119e6a46f9655051f5fd42b7317e46ce4db",
)
FIRST = 3  # the number of the first noun file, noun.Tops


@cache
def glosses() -> tuple[tuple[str, str, int], ...]:
    """(word, gloss, class) of every noun, shuffled with a fixed seed."""
    rows = [_row(line) for line in _nouns().splitlines() if not line.startswith("  ")]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return tuple(rows[i] for i in order.tolist())


def _row(line: str) -> tuple[str, str, int]:
    fields, _, gloss = line.partition(" | ")
    _, number, _, _, word, *_ = fields.split()
    return (
        word.replace("_", " "),
        gloss.partition('; "')[0].strip(),
        int(number) - FIRST,
    )


def _nouns() -> str:
    (file,) = debian_files(WORDNET, "/wordnet/data.noun")
    return file.decode()
