"""Mutants of a room of the package, drawn with a seed: does a test fail?

    tox run -e mutants -- laws                          # 100 of rankaware_optim/laws, by tests/laws
    tox run -e mutants -- fitting --tests tests/sweeps

The tests run on a copy of the package with one mutant until one fails. A survivor, which is printed, is a missing test
or a change that no test can see. mutmut makes the mutants; those of texts are left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click
import libcst as cst
from mutmut.mutation.file_mutation import Mutation, create_mutations
from planted import PACKAGE, is_seen


def mutants_of(path: Path) -> Iterator[tuple[Path, cst.Module, Mutation]]:
    module, mutations, *_ = create_mutations(str(path), path.read_text())
    for each in mutations:
        if not isinstance(each.original_node, cst.BaseString):
            yield path, module, each


def survivor(
    tests: list[str], path: Path, module: cst.Module, change: Mutation
) -> str | None:
    """A mutant on which no test fails, in words; None where one does."""
    text = module.deep_replace(change.original_node, change.mutated_node).code
    file = str(path.relative_to(PACKAGE))
    if is_seen(file, text, tests):
        return None
    before, after = path.read_text().splitlines(), text.splitlines()
    number = next(n for n, line in enumerate(after) if line != before[n])
    return f"{file}:{number + 1}: {before[number]} becomes {after[number]}"


@click.command()
@click.argument("room")
@click.option("--tests", multiple=True, help="Tests to run, tests/ROOM by default.")
@click.option("--count", default=100)
@click.option("--seed", default=39)
def main(room: str, tests: tuple[str, ...], count: int, seed: int) -> None:
    """Print the survivors, and the share of mutants on which a test fails."""
    paths = sorted((PACKAGE / room).rglob("*.py"))
    mutants = [mutant for path in paths for mutant in mutants_of(path)]
    drawn = random.Random(seed).sample(mutants, min(count, len(mutants)))
    judge = partial(survivor, list(tests or [f"tests/{room}"]))
    with ThreadPoolExecutor(2) as pool:
        left = [each for each in pool.map(judge, *zip(*drawn, strict=True)) if each]
    print(*left, f"{len(drawn) - len(left)} of {len(drawn)} killed", sep="\n")


if __name__ == "__main__":
    main()
