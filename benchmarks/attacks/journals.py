"""Damaged journals and other files, given as storage: each must be refused and left unchanged, or be resumed."""

from __future__ import annotations

import json
import math
import random
import shutil
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attacks.damage import damaged_bytes, damaged_values
from attacks.outcomes import Attack, Outcomes
from attacks.victim import calibration, prepare
from safetensors.torch import save_file

import rankaware_optim as ra


def run(seed: int, count: int, folder: Path) -> Outcomes:
    prepare()
    chance, outcomes = random.Random(seed), Outcomes()
    whole = folder / "whole.journal"
    calibration(whole, pause=0.0)
    for number in range(count):
        path = folder / "study.journal"
        path.write_bytes(damaged_journal(whole.read_bytes(), chance))
        outcomes.attempt(
            (seed, number), lambda path=path: use(path), ra.CalibrationError
        )
    return outcomes


def damaged_journal(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.4:
        return damaged_bytes(data, chance)
    lines = data.splitlines(keepends=True)
    for _ in range(chance.randint(1, 2)):
        i = chance.randrange(len(lines))
        match chance.randrange(4):
            case 0:
                lines.pop(i)
            case 1:
                lines.insert(chance.randrange(len(lines) + 1), lines[i])
            case _:
                lines[i] = (
                    json.dumps(damaged_values(json.loads(lines[i]), chance)).encode()
                    + b"\n"
                )
        lines = lines or [b"\n"]
    return b"".join(lines)


TRIAL_VALUES: dict[str, tuple[Any, ...]] = {
    "rank": (-1, 0, 2**70, "4", 2.5, True),
    "seed": ("0", 0.5, [0]),
    "scaling": (-1.0, 0.0, "1"),
    "own_lr": (-1.0, 0.0, 1e300, "1e-3"),
    "curve": ("loss", 1.0, [[1.0]]),
}


def each_value(seed: int, count: int, folder: Path) -> Outcomes:
    """Every value that a stored trial holds, with each impossible one in turn."""
    prepare()
    outcomes, whole, path = (
        Outcomes(),
        folder / "whole.journal",
        folder / "study.journal",
    )
    calibration(whole, pause=0.0)
    lines = whole.read_bytes().splitlines(keepends=True)
    for name, values in TRIAL_VALUES.items():
        for value in values:
            path.write_bytes(b"".join(with_value(lines, name, value)))
            outcomes.attempt(
                (name, str(value)), partial(must_refuse, path), ra.CalibrationError
            )
    return outcomes


def with_value(lines: list[bytes], name: str, value: Any) -> Iterator[bytes]:
    """Lines of a journal in which the first trial that has this value has another."""
    changed = False
    for line in lines:
        entry = json.loads(line)
        for key in ("user_attr", "user_attrs"):
            if (
                not changed
                and entry["op_code"] in (4, 8)
                and name in (entry.get(key) or {})
            ):
                entry[key][name], changed = value, True
        yield json.dumps(entry).encode() + b"\n"


def must_refuse(path: Path) -> None:
    use(path)
    raise AssertionError("an impossible value was read")


def use(path: Path) -> None:
    """Make the same call again. If it is refused, the file keeps all that it held, except an incomplete last line.

    The file may grow: Optuna appends a line when it opens a study.
    """
    before = path.read_bytes()
    try:
        recipe = calibration(path, pause=0.0)
    except ra.CalibrationError as error:
        after = path.read_bytes()
        if not after.startswith(before[: before.rfind(b"\n") + 1]):
            raise AssertionError(f"refused ({error}), but the file changed") from error
        raise
    if not 0 < recipe.lr < math.inf:
        raise AssertionError(f"rate {recipe.lr}")


# --- files that are not journals ------------------------------------------------------------------------------------


def other_files(folder: Path, chance: random.Random) -> Iterator[Path]:
    """A file of another kind, under a random name."""
    made = folder / f"file-{chance.randrange(10**9)}"
    match chance.randrange(7):
        case 0:
            made.write_bytes(chance.randbytes(chance.randrange(1, 10**6)))
        case 1:
            made.write_bytes(b"x" * chance.randrange(1, 10**6))
        case 2:
            with sqlite3.connect(made) as database:
                database.execute("create table t (a integer)")
        case 3:
            save_file({"a": torch.zeros(chance.randrange(1, 100))}, made)
        case 4:
            shutil.copy(Path(__file__), made)
        case 5:
            made.write_text(json.dumps({"rows": list(range(chance.randrange(1000)))}))
        case _:
            made.write_text("a,b\n" + "1,2\n" * chance.randrange(1000) + "3,")
    yield made


def run_others(seed: int, count: int, folder: Path) -> Outcomes:
    chance, outcomes = random.Random(seed), Outcomes()
    for number in range(count):
        for path in other_files(folder, chance):
            outcomes.attempt(
                (seed, number), lambda path=path: refuse(path), ra.CalibrationError
            )
    return outcomes


def refuse(path: Path) -> Any:
    before = path.read_bytes()
    try:
        calibration(path, pause=0.0)
    finally:
        if path.read_bytes() != before:
            raise AssertionError("a file that is not a journal was changed")
    raise AssertionError("a file that is not a journal was taken for one")


ATTACKS = (
    Attack("damaged journals", 10_000, 250, run),
    Attack("impossible values in journals", 1, 1, each_value),
    Attack("other files as storage", 1000, 500, run_others),
)
