"""The package under attack: kills, interrupts, injected errors, and damaged files of every kind that it reads.

    python benchmarks/attacks/attack.py                    # all, about an hour on two cores; resumable
    python benchmarks/attacks/attack.py --only recipes     # attacks whose name contains a word
    python benchmarks/attacks/attack.py --tables           # results/attack.json and .md, from the pieces on file

PostgreSQL is attacked if RANKAWARE_POSTGRESQL holds the URL of a database that may be written to. An attack is run in
pieces. Each piece has its own process, its own seed and a limit on its memory, and is appended to results/attack.jsonl
when it ends, with the commit. Pieces that are on file at this commit are not run again.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
from attacks import (
    adapter_files,
    between_calls,
    bystanders,
    checkpoints,
    interrupts,
    journals,
    kills,
    modules,
    recipes,
    special,
    studies,
    sweeps,
)
from attacks.outcomes import FAILED, HELD, REFUSED, Attack
from recording import RESULTS, commit, machine, record

RESTS_ON = ()  # outcomes: made again at a release
MODULES = (
    between_calls,
    bystanders,
    kills,
    interrupts,
    studies,
    modules,
    special,
    recipes,
    checkpoints,
    sweeps,
    journals,
    adapter_files,
)
ATTACKS: dict[str, Attack] = {
    attack.name: attack for module in MODULES for attack in module.ATTACKS
}
FILE = RESULTS / "attack.jsonl"
FIRST_SEED = 20261200
MEMORY = 8 * 2**30  # bytes that a piece may map
NOTES = (
    "held: it went well, and what the attack's docstring asks for was true. refused: an error of ours, in printable "
    "words, with nothing changed. failed: any other exception, a loss, a tear, a rate that is not finite and positive, "
    "or too long: fifty times what a fixed piece of work takes on the same machine. The slowest in seconds. Newest: "
    "attempts at the commit that is named, that of the attack's last piece. The others are older.",
    "Between calls: a save or a study is run once for every call by which Python changes a file (open, write, fsync, "
    "replace, unlink and others), and ended there, or in the middle of a write. SQLite makes its calls in C. They are "
    "not reached: it is attacked by kills at random moments. So is PostgreSQL.",
    "Which planted bugs this attack sees is in planted.md.",
)


@click.command()
@click.option("--only", default="", help="Run the attacks whose name has this word.")
@click.option("--workers", default=2, show_default=True)
@click.option(
    "--share",
    default=1.0,
    show_default=True,
    help="Share of every attack's pieces to run, at least one.",
)
@click.option("--tables", is_flag=True, help="Write the page from the results on file.")
@click.option(
    "--piece",
    nargs=2,
    type=str,
    hidden=True,
    help="An attack and a seed: run one piece, print JSON.",
)
@click.option("--size", type=int, hidden=True)
def main(
    only: str,
    workers: int,
    share: float,
    tables: bool,
    piece: tuple[str, str] | None,
    size: int,
) -> None:
    """Attack the package, and count the outcomes."""
    if piece:
        print(json.dumps(run_piece(ATTACKS[piece[0]], int(piece[1]), size)))
        return
    if not tables:
        here = commit()
        seen = {key for key, row in on_file().items() if row.get("commit") == here}
        todo = [
            work
            for work in pieces(share)
            if only in work[0].name and (work[0].name, work[1]) not in seen
        ]
        with ThreadPoolExecutor(workers) as pool, FILE.open("a") as file:
            for row in pool.map(lambda work: in_process(*work), todo):
                print(json.dumps(row)[:500], flush=True)
                print(json.dumps(row), file=file, flush=True)
    write_table()


def pieces(share: float) -> list[tuple[Attack, int, int]]:
    """Every piece as (attack, seed, number of attempts)."""
    made = []
    for attack in ATTACKS.values():
        sizes = [
            min(attack.piece, attack.total - done)
            for done in range(0, attack.total, attack.piece)
        ]
        chosen = sizes[: max(1, round(share * len(sizes)))]
        made += [
            (attack, FIRST_SEED + number, size) for number, size in enumerate(chosen)
        ]
    return made


def in_process(attack: Attack, seed: int, size: int) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--piece",
        attack.name,
        str(seed),
        "--size",
        str(size),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    found: dict[str, Any] = {"counts": {FAILED: size}, "slowest": 0.0}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            timeout=attack.patience,
        )
        if done.returncode:
            found["failures"] = [
                f"the process ended with {done.returncode}: {done.stderr[-300:]}"
            ]
        else:
            found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found["failures"] = [f"the process took more than {attack.patience:g} s"]
    return {"attack": attack.name, "seed": seed, "commit": commit(), **found}


def run_piece(attack: Attack, seed: int, size: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # SIGKILL does not lose the page cache, so a file system in memory is as good
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="attack-", dir=memory if memory.is_dir() else None
    ) as folder:
        return attack.run(seed, size, Path(folder)).as_dict()


def on_file() -> dict[tuple[str, int], dict[str, Any]]:
    """The last run of every piece, by attack and seed, the newest at the end."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in FILE.read_text().splitlines() if FILE.exists() else ():
        row = json.loads(line)
        key = (row["attack"], row["seed"])
        found.pop(key, None)
        found[key] = row
    return found


def write_table() -> None:
    rows, failures, done = [], [], on_file()
    for name in ATTACKS:
        mine = [row for (attack, _), row in done.items() if attack == name]
        counts = sum((Counter(row["counts"]) for row in mine), Counter())
        failures += [f"{name}: {words}" for row in mine for words in row["failures"]]
        shown = {outcome: counts[outcome] for outcome in (HELD, REFUSED, FAILED)}
        slowest = max((row["slowest"] for row in mine), default=0.0)
        newest = next((row.get("commit") for row in reversed(mine)), None)
        new = sum(
            sum(row["counts"].values()) for row in mine if row.get("commit") == newest
        )
        at = {"attempts": counts.total(), "newest": new, "at commit": newest}
        rows.append({"attack": name, **at, **shown, "slowest s": slowest})
    notes = [*NOTES, f"Seeds from {FIRST_SEED}, one a piece.", *failures[:40]]
    record("attack", "The package under attack", rows, machine(threads=1), notes)


if __name__ == "__main__":
    main()
